"""The audit log: what a private key is about to be used for, and how that ended, in lines bound by their hashes.

A use has two lines. The *intent* is on the disk before the token is asked; a log that cannot be written stops
it. The *outcome* names its intent by ``of``. Each line has its number and the SHA-256 of the line before::

    {"number":1,"previous":"000…","time":"…","intent":"assertion","serial":"61c5…","jti":"…",…}
    {"number":2,"previous":"5f2c…","time":"…","of":1,"outcome":"signed","key":"0LVn…",…}

What a signature is for is read from the bytes that get signed, so nobody can call it something else. Anybody can
plant a public half, so ``key`` names one in the intent only where a challenge has proved it, else in the outcome,
once the signature has verified under it. No line
holds a PIN, a signature, an assertion or an access token. Whoever can write the file can write another
history; what they cannot do is keep the head that was noted elsewhere: see :meth:`AuditLog.verify`.
"""

import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hsm_signer import files
from hsm_signer.errors import AuditLogError, ConfigError, UnsafeFileError
from hsm_signer.jose import unverified_claims
from hsm_signer.locks import try_lock

START = "0" * 64  # what the first line names as the hash of the line before
LOCK_WAIT = 30.0  # seconds; a line takes a few milliseconds, and many may wait on a slow disk
_SYSLOG_WAIT = 1.0  # seconds
_AUTHPRIV_INFO = 10 * 8 + 6  # RFC 5424 §6.2.1
_TAIL = 64 * 1024  # bytes that surely hold the last line
_MAX_VALUE = 1000  # characters
_DONE = {  # what becomes of a use whose outcome cannot be written
    "key deletion": "the key is deleted all the same",
    "key generation": "the key that was made does not stay on the token",
}

# By how the bytes begin: what we sign names itself, DER its structure and version (RFC 5280 §4.1, RFC 2986 §4.1)
_SEQUENCE = rb"(?s)\x30(?:[\0-\x7f]|\x81.|\x82..)"
_PURPOSES = (
    ("challenge", re.compile(rb"hsm-signer: challenge\0")),
    ("test signature", re.compile(rb"hsm-signer: test signature\0")),
    ("certificate", re.compile(_SEQUENCE + rb"\xa0\x03\x02\x01\x02")),
    ("certificate request", re.compile(_SEQUENCE + rb"\x02\x01\x00")),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """Where a log stands: the number of its last line, and the SHA-256 of that line in hex."""

    count: int
    hash: str

    def __str__(self) -> str:
        return f"{self.count}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> "Head":
        """Read ``COUNT:HEAD``; :class:`ConfigError` for anything else."""
        found = re.fullmatch(r"([0-9]{1,18}):([0-9a-fA-F]{64})", text.strip())
        if found is None:
            raise ConfigError(f"a head is COUNT:HEAD, as hsm-token audit head prints it, found {text!r}")
        return cls(int(found[1]), found[2].lower())


@dataclass(frozen=True)
class Verdict:
    """What a walk along the chain found.

    ``unanchored``: no head was given to compare with, or that of an empty log. ``torn``: how many times there
    is what is no whole line, as crashes leave it. ``open``: intents without an outcome, of a process that ended
    in between or is not done yet. Neither is a finding.
    """

    head: Head
    findings: tuple[str, ...]
    unanchored: bool
    torn: int
    open: tuple[int, ...]


class AuditLog:
    """The log in one file, shared by all processes that name it; hand it to :func:`hsm_signer.open_token`.

    The file gets mode 0600 and lies in a directory of ours that nobody else can write; links are not followed.
    ``syslog``: the socket of a syslog daemon that gets each head, a copy that whoever writes the file cannot
    take back. ``clock``: Unix seconds. Safe from any thread, and after a fork.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        syslog: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = Path(path).absolute()
        self._lock = self.path.with_name(f"{self.path.name}.lock")
        self._syslog = syslog
        self._clock = clock

    def __repr__(self) -> str:
        return f"AuditLog({str(self.path)!r})"

    def check(self) -> None:
        """Raise :class:`AuditLogError` for a log that cannot be written, before a PIN is spent for nothing."""
        try:
            with self._locked() as (_, descriptor):
                _last(descriptor)
        except (OSError, UnsafeFileError) as exc:
            raise self._unwritable(exc) from None

    def look(self) -> Head | None:
        """:meth:`check` as far as a look tells, which makes nothing and takes no lock.

        The head, unverified; ``None`` where the first use makes the log.
        """
        place = next(each for each in self.path.parents if os.path.lexists(each))
        try:
            if place != self.path.parent:
                _require_writable(files.guarded(place))
                return None
            with files.guarded_directory(place, create=False) as directory:
                for path in (self.path, self._lock):
                    if directory.exists(path.name):
                        files.open_regular(path).close()
                        _require_writable(path)
                    else:
                        _require_writable(place)
                return self.head() if directory.exists(self.path.name) else None
        except (OSError, UnsafeFileError) as exc:
            raise self._unwritable(exc) from None

    @contextmanager
    def use(self, intent: str, *, done: str, **facts: str | None) -> Iterator[dict[str, object]]:
        """Write the intent, and after the block the outcome: ``done``, or ``failed`` with the error's class.

        It is ``unknown`` where Ctrl-C or an exit interrupted the block: the token may have done it. The block
        may put more into the outcome. Raises :class:`AuditLogError`, before the block too.
        """
        with self._outcome(intent) as outcome:
            outcome |= {"of": self._append({"intent": intent, **facts}), "outcome": "failed"}
            yield outcome
            outcome["outcome"] = done

    @contextmanager
    def signing(self, data: bytes, **facts: str | None) -> Iterator[dict[str, object]]:
        """:meth:`use` for a signature over ``data``; an :meth:`errand` around it writes the outcome of an assertion."""
        described = _described(data) | facts
        endpoint, answer = _ERRAND.get() if described["intent"] == "assertion" else (None, None)
        with self._outcome(str(described["intent"])) as outcome:
            outcome |= {"of": self._append(described | {"endpoint": endpoint}), "outcome": "failed"}
            yield outcome
            outcome["outcome"] = "signed"
            if answer is not None:
                answer |= outcome
                outcome.clear()

    @contextmanager
    def errand(self, endpoint: str) -> Iterator[dict[str, object]]:
        """Write the outcome of the assertion that the block signs for this endpoint, with the answer put into it.

        It goes past ``Signer.sign(bytes)``, which knows of no servers.
        """
        with self._outcome("assertion") as outcome:
            before = _ERRAND.set((endpoint, outcome))
            try:
                yield outcome
            finally:
                _ERRAND.reset(before)

    @contextmanager
    def _outcome(self, intent: str) -> Iterator[dict[str, object]]:
        """Write what is in it after the block, if an intent is; what went wrong in the block matters more."""
        outcome: dict[str, object] = {}
        try:
            yield outcome
        except BaseException as exc:
            if outcome.get("outcome") == "failed" and not isinstance(exc, Exception):
                outcome["outcome"] = "unknown"
            code = getattr(exc, "code", None)
            told = {"error": type(exc).__name__, "code": code if isinstance(code, str) else None}
            if "of" in outcome:
                try:
                    self._append(outcome | told, intent)
                except AuditLogError as also:
                    log.warning("%s", also)
            raise
        if "of" in outcome:
            self._append(outcome, intent)

    def head(self) -> Head:
        """The head as the last whole line has it, unverified; raises ``OSError`` and :class:`ConfigError`."""
        with files.open_regular(self.path) as file:
            return _last(file.fileno())[0]

    def verify(self, expect: Head | None = None) -> Verdict:
        """Walk along the chain. ``expect``: a head noted earlier, which the line of that number must have.

        Changed, missing, inserted and reordered lines show in the line after them. A last line that
        was changed, lines cut off at the end, and a history that was written anew show by ``expect`` alone.
        Raises ``OSError`` and :class:`ConfigError` where the file cannot be read.
        """
        findings: list[str] = []
        head, torn, pending, scraps = Head(0, START), 0, set[int](), list[bytes]()
        anchored = expect in (None, head)
        with files.open_regular(self.path) as file:
            at, is_open = 0, False
            for at, read in enumerate(_lines(file), 1):
                line, is_open = read.removesuffix(b"\n"), not read.endswith(b"\n")
                record = _record(line)
                if record is None:
                    scraps.append(line)
                    continue
                if record.get("torn") != (_hash(*scraps) if scraps else None):
                    findings.append(f"line {at} does not tell of the same torn line before it as the file")
                if (record["number"], record["previous"]) != (head.count + 1, head.hash):
                    findings.append(f"lines before line {at} were changed, removed, inserted or moved")
                head, torn, scraps = Head(record["number"], _hash(line)), torn + bool(scraps), []
                anchored = anchored or head == expect
                if "intent" in record:
                    pending.add(head.count)
                elif type(begun := record.get("of")) is int and begun in pending:
                    pending.remove(begun)
                else:
                    findings.append(f"line {at} is the outcome of nothing that was begun")
        foreign = _foreign(scraps[:-1] if is_open else scraps, head)
        findings += [f"line {at - len(scraps) + index} is none of ours" for index in foreign]
        if not anchored:
            findings.append(f"no line is {expect}: lines were cut off, or this is another history")
        torn += len(scraps) > len(foreign)
        return Verdict(head, tuple(findings), expect in (None, Head(0, START)), torn, tuple(sorted(pending)))

    @contextmanager
    def _locked(self) -> Iterator[tuple[files.PrivateDirectory, int]]:
        with files.guarded_directory(self.path.parent) as directory:
            deadline = time.monotonic() + LOCK_WAIT
            while (lock := try_lock(directory, self._lock.name)) is None:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"another process has held its lock for {LOCK_WAIT:.0f} seconds")
                time.sleep(0.005)
            try:
                descriptor = directory.open_to_change(self.path.name, append=True)
                try:
                    yield directory, descriptor
                finally:
                    os.close(descriptor)
            finally:
                lock.release()

    def _append(self, facts: dict[str, Any], done: str | None = None) -> int:
        """Add a line and sync it; its number. ``done``: the use that the line is the outcome of."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))
        cut = {name: each[:_MAX_VALUE] if isinstance(each, str) else each for name, each in facts.items()}
        record = {"time": when} | {name: each for name, each in cut.items() if each is not None}
        try:
            with self._locked() as (directory, descriptor):
                head = self._write(directory, descriptor, record)
        except (OSError, UnsafeFileError) as exc:
            raise self._unwritable(exc, done) from None
        if self._syslog is not None:
            self._send(self._syslog, head)
        return head.count

    def _write(self, directory: files.PrivateDirectory, descriptor: int, record: dict[str, Any]) -> Head:
        last, scraps, is_open = _last(descriptor)
        links: dict[str, object] = {"number": last.count + 1, "previous": last.hash}
        if scraps:
            links["torn"] = _hash(*scraps)
        line = json.dumps(links | record, separators=(",", ":")).encode()
        written = b"\n" * is_open + line + b"\n"
        if os.write(descriptor, written) < len(written):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        if last.count == 0:
            directory.sync()
        return Head(last.count + 1, _hash(line))

    def _send(self, address: str, head: Head) -> None:
        """Hand a head to syslog. The file is the log: that a copy is lost is a warning, and the next tells more."""
        import socket

        text = f"<{_AUTHPRIV_INFO}>hsm-token[{os.getpid()}]: audit log {self.path}: {head}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
                syslog.settimeout(_SYSLOG_WAIT)
                syslog.sendto(text.encode(errors="backslashreplace"), address)
        except OSError as exc:
            log.warning("the head of the audit log did not reach syslog at %s: %s", address, exc)

    def _unwritable(self, exc: OSError | UnsafeFileError, done: str | None = None) -> AuditLogError:
        why = str(exc.strerror or exc) if isinstance(exc, OSError) else str(exc)
        hint = exc.hint if isinstance(exc, UnsafeFileError) else None
        if done is not None:
            return AuditLogError(
                f"the audit log {self.path} has the intent, and the outcome cannot be written: {why}",
                done=done,
                hint=_DONE.get(done, "the key was used, and nothing of it is handed out"),
            )
        return AuditLogError(
            f"the key is not used, since the audit log {self.path} cannot be written: {why}",
            hint=hint or "mend that, or name another file by audit-log",
        )


# the endpoint that an assertion is signed for, and the outcome that the answer goes into
_ERRAND: ContextVar[tuple[str | None, dict[str, object] | None]] = ContextVar("errand", default=(None, None))


def _described(data: bytes) -> dict[str, str | None]:
    """What it is that gets signed, as far as the bytes show it."""
    digest = hashlib.sha256(data).hexdigest()
    claims = unverified_claims(data.decode("ascii", "replace"))
    if claims is None:
        return {
            "intent": next((name for name, start in _PURPOSES if start.match(data)), "other"),
            "sha256": digest,
        }
    shown = {name: value for name in ("iss", "aud", "jti") if isinstance(value := claims.get(name), str)}
    intent = "assertion" if {"iss", "aud"} <= shown.keys() else "JWS"
    return {"intent": intent, **shown, "sha256": None if "jti" in shown else digest}


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that the file has by now; what another process is adding would be read in pieces."""
    left = os.fstat(file.fileno()).st_size
    while line := file.readline(left):
        left -= len(line)
        yield line


def _last(descriptor: int) -> tuple[Head, list[bytes], bool]:
    """The last whole line, what a crash left after it, and whether that lacks its newline."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, max(0, size - _TAIL), os.SEEK_SET)
    tail = os.read(descriptor, _TAIL)
    lines = tail.removesuffix(b"\n").split(b"\n") if tail else []
    at = next((index for index in reversed(range(len(lines))) if _record(lines[index])), -1)
    record = _record(lines[at]) if lines else None
    first = b'{"number":1,'
    if record is None and (size > _TAIL or tail[: len(first)] != first[:size]):
        raise UnsafeFileError("it does not end as a log of ours does", hint="name a file for it alone")
    last = Head(record["number"], _hash(lines[at])) if record else Head(0, START)
    return last, lines[at + 1 :], bool(tail) and not tail.endswith(b"\n")


def _foreign(scraps: list[bytes], head: Head) -> list[int]:
    """Which lines after the last whole one, from 1, no crash can have left, which leaves the beginning of the next."""
    start = f'{{"number":{head.count + 1},"previous":"{head.hash}",'.encode()
    return [
        index
        for index, scrap in enumerate(scraps, 1)
        if not scrap or not start.startswith(scrap[: len(start)])
    ]


def _require_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _hash(*lines: bytes) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_ours = (
        isinstance(record, dict)
        and type(record.get("number")) is int
        and isinstance(record.get("previous"), str)
    )
    return record if is_ours else None
