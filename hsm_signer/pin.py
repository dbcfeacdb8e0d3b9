"""Where a PIN comes from. There is no option that takes a PIN: other users read command lines.

    pin = from_source("systemd:hsm-pin")
    with open_token("pkcs11:token=office", module=MODULE, pin=pin) as token: ...

A source that cannot be asked (no such file, variable, credential, command or keyring entry) is a
:class:`ConfigError`. One that was asked and gave nothing to send (a command that fails, a keyring that does
not answer, a file that others could read or write, bytes that can be no PIN) is a :class:`PinRefusedError`.
"""

import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final

from hsm_signer import files
from hsm_signer.errors import ConfigError, PinRefusedError, UnsafeFileError
from hsm_signer.pin_guard import Attempt, LoginGuard

log = logging.getLogger(__name__)

PIN_VARIABLE = "HSM_TOKEN_PIN"
MAX_SIZE = 4096  # bytes
COMMAND_SECONDS = 60.0  # a password manager may ask a person to touch something

KINDS = "prompt, env:NAME, file:PATH, command:…, systemd:NAME, keyring:SERVICE/USER, pinpad"


class PinPad(Enum):
    """The type of :data:`PIN_PAD`."""

    PIN_PAD = "pinpad"

    def __repr__(self) -> str:
        return self.name


PIN_PAD: Final = PinPad.PIN_PAD
"""The PIN is typed on the token's own pad (``CKF_PROTECTED_AUTHENTICATION_PATH``); we never see it."""


class PinSource:
    """A callable that fetches the PIN, and the guard of the logins that are made with it.

    ``name`` is for messages; ``unattended``: no person types the PIN, so :meth:`attempt` guards the login.
    """

    def __init__(self, name: str, read: "_Read", guard: LoginGuard, *, unattended: bool) -> None:
        self.name = name
        self.unattended = unattended
        self._read = read
        self._guard = guard

    def __repr__(self) -> str:
        return f"PinSource({self.name!r})"

    def __call__(self) -> str:
        """Fetch the PIN. Call it with no lock held: it may ask a person, or run a command."""
        log.info("PIN from %s", self.name)
        return _checked(self._read(), self.name)

    def check(self, token_identity: str) -> None:
        """Refuse where the marker of an unsuccessful login stands, before the PIN is fetched for nothing."""
        self._guard.check(token_identity)

    def attempt(self, token_identity: str) -> AbstractContextManager[Attempt]:
        """Guard one login: :mod:`hsm_signer.pin_guard`.

        ``token_identity`` names the token whatever module, slot and profile it is reached through.
        """
        return self._guard.attempt(token_identity)


_Read = Callable[[], str | bytes]


def from_source(
    text: str,
    *,
    prompt: Callable[[str], str] | None = None,
    state_directory: Path | None = None,
    retry: bool | float = False,
) -> PinSource | PinPad:
    """Make a source of ``prompt``, ``env:NAME``, ``file:PATH``, ``command:…``, ``systemd:NAME``,
    ``keyring:SERVICE/USER`` or ``pinpad``; nothing is read yet.

    ``prompt`` asks a person; it gets the text to show. ``state_directory``: of the markers, by default the
    user's. ``retry``: a marker that stands does not stop this source, and a success takes it away; a
    number: only one from before that time, in Unix seconds.
    """
    if text == "pinpad":
        return PIN_PAD
    kind, _, argument = text.partition(":")
    unattended = kind != "prompt"
    name, read = _reader(kind, argument, prompt)
    guard = LoginGuard(kind, unattended=unattended, state_directory=state_directory, retry=retry)
    return PinSource(name, read, guard, unattended=unattended)


def _reader(kind: str, argument: str, prompt: Callable[[str], str] | None) -> tuple[str, _Read]:
    """Name a source for messages, and what fetches its PIN. Wrong text is never shown: it may be a PIN."""
    if kind == "prompt" and not argument:
        if prompt is None:
            raise ConfigError(
                "the PIN is to be asked for, but there is nobody to ask", hint=f"pin-source: {KINDS}"
            )
        return "prompt", partial(prompt, "PIN: ")
    if kind == "command" and argument:
        words = _words(argument)
        return f"command:{Path(words[0]).name}", partial(_from_command, words)
    readers: dict[str, Callable[[str], str | bytes]]
    readers = {"env": _from_variable, "file": _from_file, "systemd": _from_systemd, "keyring": _from_keyring}
    if kind not in readers or not argument:
        raise ConfigError("the PIN source is none of those known", hint=f"pin-source: {KINDS}")
    return f"{kind}:{argument}", partial(readers[kind], argument)


def _checked(content: str | bytes, name: str) -> str:
    """Drop one trailing newline and refuse what can be no PIN: sent, it would cost a try.

    Who holds the PIN lets go of it before an error is raised: tracebacks may show what the frames hold.
    """
    try:
        pin = content.decode() if isinstance(content, bytes) else content.encode().decode()
    except UnicodeError:
        pin = None
    del content
    if pin is None:  # raised out here, because the exception above carries the PIN
        raise PinRefusedError(f"what {name} gives is not UTF-8 text, so it is no PIN")
    pin = pin.removesuffix("\n").removesuffix("\r")
    if not pin:
        raise PinRefusedError(f"{name} gives an empty PIN; some tokens count that as a wrong one")
    if pin.startswith("\ufeff") or any(ord(character) < 0x20 or character == "\x7f" for character in pin):
        del pin
        raise PinRefusedError(
            f"what {name} gives has control characters or several lines, so it is no PIN",
            hint="the PIN alone is wanted, with at most one newline after it, and no byte order mark",
        )
    return pin


# PINs that were removed from the environment, for the next reader in this process
_taken: dict[str, str] = {}


def _from_variable(name: str) -> str:
    if name in os.environ:
        _taken[name] = os.environ.pop(name)
    if name not in _taken:
        raise ConfigError(f"the environment variable {name}, which should hold the PIN, is not set")
    return _taken[name]


def _from_file(path: str) -> bytes:
    # Of our own file nobody else needs anything. A file of root's may be readable by its group: that is how
    # root hands it to a service (mode 0640), and how an ACL shows in the mode (systemd's credentials).
    try:
        return files.read_bytes(Path(path), max_size=MAX_SIZE, forbidden_to_root=0o037)
    except UnsafeFileError as exc:
        hint = exc.hint or "what a platform mounts as a link can be read by command:cat PATH"
        raise PinRefusedError(f"PIN file refused: {exc}", hint=hint) from exc
    except OSError as exc:
        raise ConfigError(
            f"PIN file {path} cannot be read: {exc.strerror}",
            hint="it holds the PIN alone and has mode 0600; pin-source names another file, or another source",
        ) from exc


def _from_systemd(name: str) -> bytes:
    directory = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not Path(directory).is_absolute():
        raise ConfigError(
            f"systemd gave us no credentials (CREDENTIALS_DIRECTORY is not set), and so no {name}",
            hint=f"LoadCredentialEncrypted={name} in the service's unit; by hand, use another PIN source",
        )
    if Path(name).name != name or name in (".", ".."):
        raise ConfigError("the name of a systemd credential has no path in it")
    return _from_file(str(Path(directory, name)))


def _from_keyring(argument: str) -> str:
    service, slash, user = argument.rpartition("/")
    if not (service and slash and user):
        raise ConfigError("a keyring entry is named keyring:SERVICE/USER")
    try:
        import keyring
    except ImportError:
        raise ConfigError(
            "the package keyring is not installed", hint="pip install hsm-signer[keyring]"
        ) from None
    trouble = None
    try:
        pin = keyring.get_password(service, user)
    except keyring.errors.KeyringError as exc:
        trouble = type(exc).__name__
    if trouble:  # raised out here: a foreign exception can carry anything
        raise PinRefusedError(f"the keyring does not answer: {trouble}")
    if pin is None:
        raise ConfigError(f"the keyring has no password of {user} for {service}")
    return str(pin)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise ConfigError(f"the PIN command cannot be split into words: {exc}") from None
    if not words:
        raise ConfigError("the PIN command is empty")
    return words


def _from_command(words: list[str]) -> bytes:
    """Run a command without a shell; its stdout is the PIN, its stderr is ours: it tells why it failed."""
    name = Path(words[0]).name
    reader, writer = os.pipe()
    environment = {key: value for key, value in os.environ.items() if key != PIN_VARIABLE}
    try:
        process = subprocess.Popen(  # noqa: S603  # the user's own command, and no shell
            words, stdin=subprocess.DEVNULL, stdout=writer, env=environment
        )
    except OSError as exc:
        os.close(reader)
        raise ConfigError(f"the PIN command {name} cannot be started: {exc.strerror}") from None
    finally:
        os.close(writer)
    output, status = _collect(process, reader)
    size = len(output)
    if size <= MAX_SIZE and status == 0:
        return output
    del output
    if size > MAX_SIZE:
        raise PinRefusedError(f"the PIN command {name} prints more than {MAX_SIZE} bytes")
    if status is None:
        raise PinRefusedError(f"the PIN command {name} has not ended within {COMMAND_SECONDS:.0f} seconds")
    how = f"with status {status}" if status > 0 else f"by signal {-status}"
    raise PinRefusedError(f"the PIN command {name} ended {how}")


def _collect(process: subprocess.Popen[bytes], reader: int) -> tuple[bytes, int | None]:
    """Read a little more than a PIN can be; ``None`` is the status of a command that had to be killed.

    A thread reads, because a process that the command left behind can hold the pipe open for ever.
    """
    output = bytearray()

    def drain() -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while len(output) <= MAX_SIZE and (piece := pipe.read(MAX_SIZE)):
                output.extend(piece)

    deadline = time.monotonic() + COMMAND_SECONDS
    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    status = None
    try:
        thread.join(COMMAND_SECONDS)
        if not thread.is_alive() and len(output) <= MAX_SIZE:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return bytes(output), status


def make_undumpable() -> None:
    """Keep a PIN out of core dumps, debuggers and ``/proc/PID/environ`` (prctl(2)); Linux only."""
    if sys.platform != "linux":
        return
    import ctypes
    import resource

    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
