"""A TPM 2.0, emulated by swtpm, through tpm2-pkcs11."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SoftToken
from faults.test_misbehaviour import DATA, KEY, verify

from hsm_signer import open_token
from hsm_signer.errors import PinRejectedError, TokenError
from interop.waiting import wait_until

MODULE = next(Path("/usr/lib").glob("*/pkcs11/libtpm2_pkcs11.so"), None)


def free_ports() -> int:
    """The first of two free ports in a row: swtpm's, and that of its control channel."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Tpm:
    def __init__(self, directory: Path) -> None:
        self._state = directory / "state"
        self._state.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_ports()

    def start(self) -> None:
        address = "type=tcp,bindaddr=127.0.0.1,port="
        command = [
            "swtpm",
            "socket",
            "--tpm2",
            "--tpmstate",
            f"dir={self._state}",
            "--flags",
            "startup-clear",
        ]
        command += ["--server", f"{address}{self.port},disconnect", "--ctrl", f"{address}{self.port + 1}"]
        self._process = subprocess.Popen(command)
        wait_until(self._answers)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port + 1)) == 0

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tpm]:
    directory = tmp_path_factory.mktemp("tpm")
    tpm = Tpm(directory)
    tpm.start()
    (directory / "store").mkdir()
    settings = {
        "TPM2_PKCS11_STORE": str(directory / "store"),
        "TPM2_PKCS11_TCTI": f"swtpm:host=127.0.0.1,port={tpm.port}",
        "TPM2_PKCS11_LOG_LEVEL": "0",
        "TSS2_LOG": "all+NONE",
    }
    os.environ.update(settings)
    yield tpm
    tpm.kill()
    for name in settings:
        del os.environ[name]


@pytest.fixture(scope="module")
def token(tpm: Tpm) -> SoftToken:
    assert MODULE, "tpm2-pkcs11 is not installed: tests/run installs it"
    token = SoftToken(str(MODULE), os.devnull, "tpm", "123456", "1234567890")
    tool = ["pkcs11-tool", "--module", token.module, "--so-pin", "env:SO_PIN"]
    environment = os.environ | {"PIN": token.pin, "SO_PIN": token.so_pin}
    login = ["--token-label", token.label, "--login", "--pin", "env:PIN"]
    for step in (
        ["--slot-index", "0", "--init-token", "--label", token.label],
        [*login, "--login-type", "so", "--init-pin"],
        [*login, "--keypairgen", "--key-type", "EC:prime256v1", "--label", KEY, "--id", "01"],
    ):
        done = subprocess.run([*tool, *step], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return token


def test_a_key_signs(token: SoftToken) -> None:
    with open_token(token.uri, module=token.module, pin=token.pin) as opened:
        signer = opened.signer(KEY)
        for _ in range(3):
            verify(signer, signer.sign(DATA))
        assert opened.prove(KEY).ok


def test_a_wrong_pin_is_sent_once(token: SoftToken) -> None:
    with pytest.raises(PinRejectedError), open_token(token.uri, module=token.module, pin="654321"):
        pass


def test_a_tpm_that_goes_is_named_and_signs_once_it_is_back(token: SoftToken, tpm: Tpm) -> None:
    with open_token(token.uri, module=token.module, pin=token.pin) as opened:
        signer = opened.signer(KEY)
        verify(signer, signer.sign(DATA))
        tpm.kill()
        with pytest.raises(TokenError, match="CKR_"):
            signer.sign(DATA)
        tpm.start()
        verify(signer, signer.sign(DATA))
