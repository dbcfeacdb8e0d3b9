"""No cron job can lock a token: one try, and after a failure none until a person has looked.

Every login with a PIN that no person types runs under one lock per token, shared by all commands and
profiles of a user. Right before ``C_Login`` a marker goes to the disk; only a success takes it away. So a
wrong PIN, a crash and a kill in the middle of a login all leave it, and whoever finds it does not try.

    with source.attempt(identity) as attempt:   # may refuse; takes the lock
        ...                                     # re-read the token's flags; a refusal here leaves no marker
        attempt.begin()                         # the marker is on the disk
        ...                                     # C_Login, once
        attempt.succeeded()                     # the marker is gone
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from hsm_signer import files, paths
from hsm_signer.errors import PinRefusedError, UnsafeFileError
from hsm_signer.locks import try_lock

log = logging.getLogger(__name__)

UNATTENDED_WAIT = 60.0  # seconds for the lock: a login on a slow HSM takes some, and others are before us
CHECK_WAIT = 2.0  # seconds to see whether a marker is of a login under way
_LONGEST_START = 60.0  # seconds from the start of a process to its login
PROMPT_WAIT = 5.0  # a person waits for less: the login goes on, the marker stays

# What C_Login answers when it has compared no PIN, by the wording of PKCS#11 v3.1 §5.1 and §5.6.8: the call
# did not reach the token, or somebody is logged in, or there is no PIN to compare with. After everything else
# (CKR_DEVICE_ERROR, CKR_DEVICE_REMOVED, CKR_GENERAL_ERROR, …) a try may be spent, and the marker stays;
# CKR_PIN_LOCKED and CKR_PIN_LEN_RANGE say that the next try would not be better.
UNSPENT = frozenset(
    {
        "CKR_ARGUMENTS_BAD",
        "CKR_CRYPTOKI_NOT_INITIALIZED",
        "CKR_FUNCTION_NOT_SUPPORTED",
        "CKR_OPERATION_NOT_INITIALIZED",
        "CKR_SESSION_HANDLE_INVALID",
        "CKR_SLOT_ID_INVALID",
        "CKR_TOKEN_NOT_PRESENT",
        "CKR_USER_ALREADY_LOGGED_IN",
        "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
        "CKR_USER_PIN_NOT_INITIALIZED",
        "CKR_USER_TOO_MANY_TYPES",
        "CKR_USER_TYPE_INVALID",
        # never from C_Login, but from C_OpenSession before it, or from C_SignInit before a context login
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_KEY_HANDLE_INVALID",
        "CKR_KEY_SIZE_RANGE",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_MECHANISM_INVALID",
        "CKR_MECHANISM_PARAM_INVALID",
        "CKR_OPERATION_ACTIVE",
        "CKR_SESSION_COUNT",
        "CKR_USER_NOT_LOGGED_IN",
    }
)


class Attempt:
    """One ``C_Login``: :meth:`begin` right before it, :meth:`succeeded` right after."""

    def __init__(self, marker: "_Marker | None", *, source: str | None) -> None:
        self._marker = marker
        self._source = source  # None: a person typed the PIN, and no marker is written
        self._stood = marker is not None and marker.read() is not None
        self._begun = False

    def begin(self) -> None:
        """Write the marker and sync it; :class:`PinRefusedError` where that fails, and then no login."""
        if self._begun:
            raise RuntimeError("an attempt is one login")
        if self._marker is not None and self._source is not None:
            try:
                self._marker.write(self._source)
            except (OSError, UnsafeFileError) as exc:
                raise _no_state(self._marker.directory.path, exc) from exc
        self._begun = True

    def succeeded(self) -> None:
        """Take the marker away: the token accepted this PIN."""
        if self._begun:
            self._remove()

    def failed(self, code: str | None) -> None:
        """Take away what :meth:`begin` wrote if the token compared no PIN; an older marker stays.

        ``code``: the PKCS#11 return value. An exception that leaves the block tells it by its ``code``.
        """
        if self._begun and not self._stood and code in UNSPENT:
            self._remove()

    def _remove(self) -> None:
        if self._marker is None:
            return
        try:
            self._marker.remove()
        except OSError as exc:
            log.warning(
                "the marker of a login cannot be removed from %s (%s): it stops the next unattended login",
                self._marker.directory.path,
                exc.strerror,
            )


class LoginGuard:
    """The markers and locks of one PIN source.

    ``source``: its kind, for the marker's text. ``retry``: as for :func:`hsm_signer.pin.from_source`.
    """

    def __init__(
        self, source: str, *, unattended: bool, state_directory: Path | None, retry: bool | float
    ) -> None:
        self._source = source
        self._unattended = unattended
        self._state_directory = state_directory
        self._retry = bool(retry)
        self._began = time.time() if retry is True else float(retry)
        self._checked: set[str] = set()

    def check(self, token_identity: str) -> None:
        """Refuse where the marker of an ended login stands, before a PIN is fetched for nothing."""
        if not self._unattended:
            return
        name = _name(token_identity)
        path = self._path()
        try:
            with ExitStack() as held:
                directory = held.enter_context(files.guarded_directory(path, create=False))
                marker = _Marker(directory, name)
                # With the lock it is of no login under way; for one that is, attempt() waits.
                if marker.read() is not None and _lock(held, directory, name, CHECK_WAIT):
                    self._refuse_if_standing(marker)
        except FileNotFoundError:
            pass
        except (OSError, UnsafeFileError) as exc:
            raise _no_state(path, exc) from exc
        self._checked.add(name)

    @contextmanager
    def attempt(self, token_identity: str) -> Iterator[Attempt]:
        """Guard one login; see the module's text."""
        name = _name(token_identity)
        if name not in self._checked:
            self.check(token_identity)
        with ExitStack() as held:
            enter = self._enter_unattended if self._unattended else self._enter_at_prompt
            attempt = enter(held, name)
            try:
                yield attempt
            except BaseException as exc:
                attempt.failed(getattr(exc, "code", None))
                raise

    def _enter_unattended(self, held: ExitStack, name: str) -> Attempt:
        path = self._path()
        try:
            directory = held.enter_context(files.guarded_directory(path))
            alone = _lock(held, directory, name, UNATTENDED_WAIT)
        except (OSError, UnsafeFileError) as exc:
            raise _no_state(path, exc) from exc
        if not alone:
            raise PinRefusedError(
                f"another login to this token has not ended within {UNATTENDED_WAIT:.0f} seconds",
                hint="see which hsm-token process hangs, and whether the token answers: hsm-token doctor",
            )
        marker = _Marker(directory, name)
        self._refuse_if_standing(marker)
        return Attempt(marker, source=self._source)

    def _enter_at_prompt(self, held: ExitStack, name: str) -> Attempt:
        """A person logs in with or without a state directory; a marker goes if the login works."""
        path = self._path()
        try:
            directory = held.enter_context(files.guarded_directory(path, create=False))
            marker = _Marker(directory, name)
            if marker.read() is None:
                return Attempt(None, source=None)
            if _lock(held, directory, name, PROMPT_WAIT):
                return Attempt(marker, source=None)
            log.warning("an unattended login to this token is under way: its marker stays")
        except FileNotFoundError:
            pass
        except (OSError, UnsafeFileError) as exc:
            log.warning("%s; a marker that stands there stays", exc)
        return Attempt(None, source=None)

    def _path(self) -> Path:
        return paths.state_directory() if self._state_directory is None else self._state_directory

    def _refuse_if_standing(self, marker: "_Marker") -> None:
        """``retry`` forgives a marker from before the run began, not one that another retry has left since.

        So of many processes that retry at once only one logs in.
        """
        standing = marker.read()
        if standing is None:
            return
        left_since = self._began <= _written(standing) <= time.time() + 1  # or the clock was set back
        if self._retry and not left_since:
            return
        raise PinRefusedError(
            f"{_describe(standing)} did not succeed; another try could lock the token, so none is made",
            hint="check the PIN, then log in at a prompt (--pin-source prompt) or run once with --retry-pin",
        )


@contextmanager
def in_turn(token_identity: str) -> Iterator[Attempt]:
    """Let a login with a PIN that the program has wait for others, and leave no marker.

    Some tokens fail where processes log in at the same time (SoftHSM2: ``CKR_GENERAL_ERROR``, or
    ``CKR_USER_PIN_NOT_INITIALIZED``), as the workers of a server do. Without a state directory, or where the
    logins before it do not end, it goes on all the same.
    """
    with ExitStack() as held:
        with suppress(OSError, UnsafeFileError):
            directory = held.enter_context(files.guarded_directory(paths.state_directory()))
            _lock(held, directory, _name(token_identity), UNATTENDED_WAIT)
        yield Attempt(None, source=None)


class _Marker:
    """The note of a login under way, or of one that did not succeed. Nothing in it comes from a PIN."""

    def __init__(self, directory: files.PrivateDirectory, name: str) -> None:
        self.directory = directory
        self.name = name
        self._file = f"{name}.marker"

    def read(self) -> bytes | None:
        """What it says; ``None`` where none stands. One that is empty or unreadable stands, too."""
        if not self.directory.exists(self._file):
            return None
        try:
            return self.directory.read_bytes(self._file, max_size=4096)
        except FileNotFoundError:
            return None
        except (OSError, UnsafeFileError):
            return b""

    def write(self, source: str) -> None:
        note = {"time": datetime.now(UTC).isoformat(), "source": source, "process": os.getpid()}
        content = json.dumps(note).encode()
        if self.directory.exists(self._file):
            self.directory.replace(self._file, content)
        else:
            self.directory.create(self._file, content)

    def remove(self) -> None:
        self.directory.remove(self._file)


def _lock(held: ExitStack, directory: files.PrivateDirectory, name: str, wait: float) -> bool:
    """Hold the token's lock as long as ``held``; ``False`` where somebody else held it all the while."""
    deadline, waiting = time.monotonic() + wait, False
    while (lock := try_lock(directory, f"{name}.lock")) is None:
        if not waiting:
            log.info("waiting for another login to this token")
            waiting = True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    held.callback(lock.release)
    return True


def _name(token_identity: str) -> str:
    return f"login-{hashlib.sha256(token_identity.encode()).hexdigest()[:32]}"


def process_began() -> float:
    """When this process was started, in Unix seconds: of many that start at once, before any of them logs in.

    Where the kernel does not tell, or something else than the last minute, it is a minute before now.
    """
    now = time.time()
    with suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        if 0 <= age < _LONGEST_START:
            return now - age
    return now - _LONGEST_START


def _written(marker: bytes) -> float:
    """When, in Unix seconds; one that does not tell was written long ago."""
    try:
        return datetime.fromisoformat(json.loads(marker)["time"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return 0.0


def _describe(marker: bytes) -> str:
    try:
        note = json.loads(marker)
        return f"an unattended login at {note['time']} (PIN from {note['source']}, process {note['process']})"
    except (ValueError, KeyError, TypeError):
        return "an earlier unattended login"


def _no_state(path: Path, exc: Exception) -> PinRefusedError:
    return PinRefusedError(
        f"no unattended login without a state directory of ours that we can write: {path}: {exc}",
        hint="name a directory of ours in the profile (state-dir), or log in at a prompt",
    )
