"""An assertion that cannot be recorded goes nowhere."""

import pytest
from canary import assert_no_trace
from software_signer import SoftwareSigner

from hsm_signer.recorded_assertion import RecordedAssertion


class Keeps(SoftwareSigner):
    """Remembers what it signed."""

    def sign(self, data: bytes) -> bytes:
        self.last = data.decode()
        return super().sign(data)


def test_an_assertion_that_cannot_be_recorded_is_in_no_frame_of_the_error() -> None:
    def fail(_signer: object, _jti: str | None) -> None:
        raise OSError("the disk is full")

    signer = Keeps()
    with pytest.raises(OSError, match="full") as caught:
        RecordedAssertion("client", "https://as.example/token", record=fail).issue(signer)
    assert_no_trace(caught.value, [signer.last])
