"""What a caller gets from a module that misbehaves: a verified signature or an error that says why."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import leaks
import pytest
from conftest import SoftToken

from faults import FaultyModule
from faults.behind import ALWAYS, DATA, KEY, Behind, make_keys, verify
from hsm_signer import PIN_PAD
from hsm_signer.errors import (
    HsmSignerError,
    PinLockedError,
    PinRefusedError,
    PinRejectedError,
    SignatureFormatError,
    SignatureInvalidError,
    TokenError,
)


@pytest.fixture(scope="module")
def token(new_token: Callable[[], SoftToken]) -> SoftToken:
    token = new_token()
    make_keys(token)
    return token


@pytest.fixture
def behind(token: SoftToken, faulty: FaultyModule) -> Behind:
    return Behind(token, faulty)


@pytest.mark.parametrize(
    "rule",
    [
        "delay C_Sign 5",
        "signature der",
        "point raw",
        "point bare",
        "only-hashing",
        "cant-lock",
        "only-read-write",
        "max-sessions 1",
        "token-flags CKF_USER_PIN_COUNT_LOW",
    ],
)
def test_it_signs_all_the_same(behind: Behind, rule: str) -> None:
    behind.faulty.set(rule)
    with behind.open() as token:
        signer = token.signer(KEY)
        for _ in range(3):
            verify(signer, signer.sign(DATA))
        for data in (b"", bytes(100_000)):
            verify(signer, signer.sign(data), data)
    assert behind.faulty.sessions() == 0


@pytest.mark.parametrize("how", ["short", "long", "empty"])
def test_a_signature_of_the_wrong_length_never_leaves(behind: Behind, how: str) -> None:
    with behind.open() as token:
        signer = token.signer(KEY)
        behind.faulty.set(f"signature {how}")
        with pytest.raises(SignatureFormatError):
            signer.sign(DATA)
        behind.faulty.set()
        verify(signer, signer.sign(DATA))


def test_a_signature_that_does_not_verify_never_leaves(behind: Behind) -> None:
    with behind.open() as token:
        signer = token.signer(KEY)
        behind.faulty.set("signature wrong")
        with pytest.raises(SignatureInvalidError):
            signer.sign(DATA)
        behind.faulty.set()
        verify(signer, signer.sign(DATA))


def test_without_verification_it_leaves_because_that_was_asked_for(behind: Behind) -> None:
    with behind.open(verify=False) as token:
        signer = token.signer(KEY)
        behind.faulty.set("signature wrong")
        assert len(signer.sign(DATA)) == 64


def test_a_module_that_cannot_lock_is_shared_by_threads_but_not_in_parallel(behind: Behind) -> None:
    behind.faulty.set("cant-lock")
    with behind.open() as token, ThreadPoolExecutor(8) as pool:
        signer = token.signer(KEY)
        for raw in pool.map(signer.sign, [DATA] * 200):
            verify(signer, raw)
    with pytest.raises(HsmSignerError, match="sessions"), behind.open(sessions=2):
        pass


def test_parallel_sessions_overlap_and_one_session_does_not(behind: Behind) -> None:
    for sessions in (1, 4):
        with behind.open(sessions=sessions) as token, ThreadPoolExecutor(4) as pool:
            signer = token.signer(KEY)
            behind.faulty.set("delay C_Sign 20")
            behind.faulty.forget()
            for raw in pool.map(signer.sign, [DATA] * 16):
                verify(signer, raw)
            assert behind.faulty.overlaps("C_Sign") == (sessions > 1)
            behind.faulty.set()


def test_more_sessions_than_the_token_has_are_told_or_done_without(behind: Behind) -> None:
    behind.faulty.set("max-sessions 3", "delay C_Sign 5")
    with behind.open(sessions=8) as token, ThreadPoolExecutor(8) as pool:
        signer = token.signer(KEY)
        for raw in pool.map(signer.sign, [DATA] * 64):
            verify(signer, raw)
    assert behind.faulty.sessions() == 0


def test_a_locked_token_is_not_sent_a_pin(behind: Behind) -> None:
    behind.faulty.set("token-flags CKF_USER_PIN_LOCKED")
    with pytest.raises(PinLockedError), behind.open():
        pass
    assert behind.faulty.calls("C_Login") == 0


def test_the_final_try_is_not_spent_unless_allowed(behind: Behind) -> None:
    behind.faulty.set("token-flags CKF_USER_PIN_FINAL_TRY")
    with pytest.raises(PinRefusedError), behind.open():
        pass
    assert behind.faulty.calls("C_Login") == 0
    with behind.open(allow_final_try=True) as token:
        signer = token.signer(KEY)
        verify(signer, signer.sign(DATA))
    assert behind.faulty.calls("C_Login") == 1


def test_flags_are_read_again_before_each_login(behind: Behind) -> None:
    with behind.open() as token:
        token.signer(KEY)
    behind.faulty.set("token-flags CKF_USER_PIN_LOCKED")
    with pytest.raises(PinLockedError), behind.open():
        pass
    assert behind.faulty.calls("C_Login") == 1


def test_a_rejected_pin_is_sent_once(behind: Behind) -> None:
    wrong = leaks.pin()
    for _ in range(3):
        with pytest.raises((PinRejectedError, PinRefusedError)), behind.open(pin=wrong):
            pass
    assert behind.faulty.calls("C_Login") == 1


def test_the_pin_is_typed_on_the_pad(behind: Behind) -> None:
    behind.faulty.set("pin-pad", f"pin {behind.token.pin}")
    with behind.open(pin=PIN_PAD) as token:
        signer = token.signer(KEY)
        verify(signer, signer.sign(DATA))


def test_a_person_who_gives_up_at_the_pad_is_told_so(behind: Behind) -> None:
    behind.faulty.set("pin-pad")
    with pytest.raises(HsmSignerError, match="CKR_FUNCTION_CANCELED"), behind.open(pin=PIN_PAD):
        pass


def test_a_pad_is_not_waited_for_where_the_token_has_none(behind: Behind) -> None:
    with pytest.raises(HsmSignerError, match="no PIN pad"), behind.open(pin=PIN_PAD):
        pass
    assert behind.faulty.calls("C_Login") == 0


def test_an_always_authenticate_key_gets_its_pin_for_each_signature(behind: Behind) -> None:
    with behind.open() as token:
        signer = token.signer(ALWAYS)
        verify(signer, signer.sign(DATA))  # proves the public half, once, with a signature
        behind.faulty.forget()
        for _ in range(3):
            verify(signer, signer.sign(DATA))
        assert behind.faulty.calls("C_Login") == 3
        other = token.signer(KEY)
        verify(other, other.sign(DATA))


def test_pin_pad_and_always_authenticate_are_refused_without_a_try(behind: Behind) -> None:
    behind.faulty.set("pin-pad", f"pin {behind.token.pin}")
    with behind.open(pin=PIN_PAD) as token:
        with pytest.raises(HsmSignerError, match="CKA_ALWAYS_AUTHENTICATE"):
            token.signer(ALWAYS).sign(DATA)
        signer = token.signer(KEY)
        verify(signer, signer.sign(DATA))
    assert behind.faulty.calls("C_Login") == 1


def test_a_token_that_is_pulled_out_is_named_and_signs_once_it_is_back(behind: Behind) -> None:
    with behind.open() as token:
        signer = token.signer(KEY)
        verify(signer, signer.sign(DATA))
        behind.faulty.set("removed")
        for _ in range(2):
            with pytest.raises(TokenError, match=r"CKR_|is gone"):
                signer.sign(DATA)
        behind.faulty.set()
        verify(signer, signer.sign(DATA))
    assert behind.faulty.sessions() == 0


def test_a_pin_that_the_program_has_needs_no_state_directory(
    behind: Behind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file" / "state"))
    with behind.open() as token:
        signer = token.signer(KEY)
        verify(signer, signer.sign(DATA))
