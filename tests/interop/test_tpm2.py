"""A TPM 2.0, emulated by swtpm, through tpm2-pkcs11."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import leaks
import pytest
from conftest import SoftToken
from faults.behind import DATA, KEY, verify

from hsm_signer import open_token
from hsm_signer.errors import PinRejectedError, TokenError
from interop.waiting import wait_until

MODULE = next(Path("/usr/lib").glob("*/pkcs11/libtpm2_pkcs11.so"), None)


FORKS = """
import os, sys
from hsm_signer import open_token
from hsm_signer.errors import ForkedError

def opened():
    return open_token("tpm", module=os.environ["MODULE"], pin=os.environ["PIN"])

with opened() as token:
    signer = token.signer("das-2026")
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                opened().__enter__()
            except ForkedError:
                sys.exit(7)
            sys.exit(0)
        signer.sign(b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        signer.sign(b"x")
"""


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
    """A chip and the resource manager before it, which keeps programs from filling the chip's few places."""

    def __init__(self, directory: Path) -> None:
        self._state = directory / "state"
        self._state.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = free_ports()
        bus = directory / "bus"
        self.address = f"unix:path={bus}"
        command = ["dbus-daemon", "--session", "--nofork", "--nosyslog", f"--address={self.address}"]
        self._bus = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(bus.exists)

    def start(self) -> None:
        address = "type=tcp,bindaddr=127.0.0.1,port="
        chip = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self._state}", "--flags", "startup-clear"]
        chip += ["--server", f"{address}{self._port}", "--ctrl", f"{address}{self._port + 1}"]
        self._processes.append(subprocess.Popen(chip))
        wait_until(self._answers)
        manager = ["tpm2-abrmd", "--session", "--allow-root", "--flush-all"]
        manager += [f"--tcti=swtpm:host=127.0.0.1,port={self._port}"]
        self._processes.append(subprocess.Popen(manager, env=os.environ | self.environment))
        wait_until(self._has_name)

    @property
    def environment(self) -> dict[str, str]:
        return {"DBUS_SESSION_BUS_ADDRESS": self.address}

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port + 1)) == 0

    def _has_name(self) -> bool:
        ask = ["dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.DBus", "/"]
        ask += ["org.freedesktop.DBus.NameHasOwner", "string:com.intel.tss2.Tabrmd"]
        environment = os.environ | self.environment
        return "true" in subprocess.run(ask, env=environment, capture_output=True, text=True).stdout

    def kill(self) -> None:
        while self._processes:
            process = self._processes.pop()
            process.kill()
            process.wait()

    def close(self) -> None:
        self.kill()
        self._bus.kill()
        self._bus.wait()


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tpm]:
    directory = tmp_path_factory.mktemp("tpm")
    tpm = Tpm(directory)
    tpm.start()
    (directory / "store").mkdir()
    settings = {
        "TPM2_PKCS11_STORE": str(directory / "store"),
        "TPM2_PKCS11_TCTI": "tabrmd:bus_type=session",
        "TPM2_PKCS11_LOG_LEVEL": "0",
        "TSS2_LOG": "all+NONE",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | tpm.environment).items():
            patch.setenv(name, value)
        yield tpm
    tpm.close()


@pytest.fixture(scope="module")
def token(tpm: Tpm) -> SoftToken:
    assert MODULE, "tpm2-pkcs11 is not installed: tests/run installs it"
    token = SoftToken(str(MODULE), os.devnull, "tpm", leaks.pin(), leaks.pin())
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


def test_a_key_is_generated_proved_and_signs(token: SoftToken) -> None:
    with open_token(token.uri, module=token.module, pin=token.pin) as opened:
        made = opened.generate_key("made-here")
        signer = opened.signer("made-here", thumbprint=made.thumbprint)
        for _ in range(3):
            verify(signer, signer.sign(DATA))
        assert opened.prove("made-here").ok


def test_a_wrong_pin_is_sent_once(token: SoftToken) -> None:
    with pytest.raises(PinRejectedError), open_token(token.uri, module=token.module, pin=leaks.pin()):
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


def test_a_forked_child_is_refused_before_it_disturbs_the_parent(token: SoftToken) -> None:
    """The module would share its connection to the chip: answers get mixed up, and the PIN ends up locked."""
    environment = os.environ | {"MODULE": token.module, "PIN": token.pin}
    # Python 3.12 and later warn of a fork beside threads, and the module has some
    program = [sys.executable, "-W", "ignore", "-c", FORKS]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
