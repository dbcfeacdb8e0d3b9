"""p11-kit remoting: a token on another machine, its module here a client of a socket."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SoftToken
from faults.behind import DATA, KEY, make_keys, verify

from hsm_signer import open_token
from hsm_signer.errors import ConfigError, TokenError
from interop.waiting import wait_until

CLIENT = next(Path("/usr/lib").glob("*/pkcs11/p11-kit-client.so"), None)


class Remote:
    """A token behind ``p11-kit server``, and a copy of the client that finds it."""

    def __init__(self, token: SoftToken, directory: Path) -> None:
        self.token = token
        assert CLIENT, "p11-kit-modules is not installed: tests/run installs it"
        self.module = str(shutil.copy(CLIENT, directory))
        self._socket = directory / "socket"
        os.environ["P11_KIT_SERVER_ADDRESS"] = f"unix:path={self._socket}"
        self._server: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        command = ["p11-kit", "server", "--foreground", "--name", str(self._socket)]
        command += ["--provider", self.token.module, self.token.uri]
        self._server = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        wait_until(self._listens)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._socket)) == 0

    def kill(self) -> None:
        """End the server and the child that it forked for each client."""
        if self._server:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None

    def close(self) -> None:
        self.kill()
        os.environ.pop("P11_KIT_SERVER_ADDRESS")


@pytest.fixture
def remote(new_token: Callable[..., SoftToken], tmp_path: Path) -> Iterator[Remote]:
    token = new_token()
    make_keys(token)
    remote = Remote(token, tmp_path)
    yield remote
    remote.close()


def test_it_signs_through_the_socket(remote: Remote) -> None:
    with open_token(remote.token.uri, module=remote.module, pin=remote.token.pin) as token:
        signer = token.signer(KEY)
        for _ in range(20):
            verify(signer, signer.sign(DATA))


def test_parallel_sessions_are_refused_since_the_client_is_not_told_of_threads(remote: Remote) -> None:
    with (
        pytest.raises(ConfigError, match="sessions=2"),
        open_token(remote.token.uri, module=remote.module, pin=remote.token.pin, sessions=2),
    ):
        pass


def test_it_generates_and_proves_a_key_through_the_socket(remote: Remote) -> None:
    with open_token(remote.token.uri, module=remote.module, pin=remote.token.pin) as token:
        token.generate_key("made-here")
        signer = token.signer("made-here")
        verify(signer, signer.sign(DATA))


def test_a_server_that_dies_is_named_and_one_that_comes_back_signs(remote: Remote) -> None:
    with open_token(remote.token.uri, module=remote.module, pin=remote.token.pin) as token:
        signer = token.signer(KEY)
        verify(signer, signer.sign(DATA))
        remote.kill()
        with pytest.raises(TokenError, match="CKR_"):
            signer.sign(DATA)
        remote.start()
        verify(signer, signer.sign(DATA))
        remote.kill()
        remote.start()
        verify(signer, signer.sign(DATA))
