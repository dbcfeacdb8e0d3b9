"""What the keys were used for: an append-only log, each line bound to the one before by its SHA-256.

Whoever can write the file can write another history; what they cannot do is keep the hash of the last line.
So note it elsewhere now and then (``hsm-token audit head``) and hand it to :meth:`AuditLog.verify`. No line
holds a PIN, a signature, an assertion or an access token: there is no parameter to pass one in.
"""

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from hsm_signer import files
from hsm_signer.errors import UnsafeFileError
from hsm_signer.locks import try_lock

NAME = "audit.jsonl"
START = "0" * 64  # what the first line names as the hash of the line before
LOCK_WAIT = 5.0  # seconds; a line takes a few milliseconds
_TAIL = 64 * 1024  # bytes that surely hold the last line
_MAX_VALUE = 1000  # characters

Event = Literal[
    "key generated", "key deleted", "certificate made", "certificate request made", "assertion signed"
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """Where the log stands: how many events it holds, and the SHA-256 of the last line in hex."""

    count: int
    hash: str


@dataclass(frozen=True)
class Verdict:
    """What a walk along the chain found. ``torn``: how often a crash cut a line, and the next one says so."""

    head: Head
    findings: tuple[str, ...]
    torn: int


class AuditLog:
    """The log in a directory of ours, shared by all processes of a user. ``clock``: Unix seconds."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = directory / NAME
        self._clock = clock

    def append(
        self,
        event: Event,
        *,
        serial: str | None = None,
        label: str | None = None,
        thumbprint: str | None = None,
        client_id: str | None = None,
        aud: str | None = None,
        jti: str | None = None,
    ) -> None:
        """Add a line and sync it. A log that cannot be written is a warning: the work goes on.

        ``serial`` and ``label`` are the token's, ``thumbprint`` is the key's (RFC 7638).
        """
        when = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        told = {
            "serial": serial,
            "label": label,
            "key": thumbprint,
            "client_id": client_id,
            "aud": aud,
            "jti": jti,
        }
        record = {"time": when, "event": event} | {
            name: each[:_MAX_VALUE] for name, each in told.items() if each
        }
        try:
            with self._locked() as descriptor:
                self._write(descriptor, record)
        except (OSError, UnsafeFileError) as exc:
            log.warning("%r is not in the audit log %s: %s", event, self.path, exc)

    def head(self) -> Head:
        """Count the events and hash the last line; raises ``OSError`` or :class:`UnsafeFileError`."""
        return self.verify().head

    def verify(self, head: str | None = None) -> Verdict:
        """Walk along the chain. ``head``: a hash noted earlier, which must be on it.

        Changed, inserted and removed lines show in the line after them. Lines cut off at the end, and a
        history that was written anew, show by ``head`` alone. Raises ``OSError`` or :class:`UnsafeFileError`.
        """
        findings: list[str] = []
        count, torn, last, scraps = 0, 0, START, list[bytes]()
        seen = head in (None, START)
        for number, line in enumerate(self._lines(), 1):
            record = _record(line)
            if record is None:
                scraps.append(line)
                continue
            if record.get("torn") != (_hash(*scraps) if scraps else None):
                findings.append(f"line {number} does not tell of the same torn line before it as the file")
            if record["previous"] != last:
                findings.append(f"lines before line {number} were changed, removed or inserted")
            count, torn, last, scraps = count + 1, torn + bool(scraps), _hash(line), []
            seen = seen or last == head
        if scraps:
            findings.append("the last line is incomplete: torn by a crash, or cut")
        if not seen:
            findings.append(f"{head} is not on the chain: lines were cut off, or this is another history")
        return Verdict(Head(count, last), tuple(findings), torn)

    def _lines(self) -> Iterator[bytes]:
        try:
            with files.open_regular(self.path) as file:
                yield from (line.removesuffix(b"\n") for line in file)
        except FileNotFoundError:
            return

    @contextmanager
    def _locked(self) -> Iterator[int]:
        with files.private_directory(self.path.parent, forbidden=files.UNTOUCHED) as directory:
            deadline = time.monotonic() + LOCK_WAIT
            while (lock := try_lock(directory, "audit.lock")) is None:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"another process has held its lock for {LOCK_WAIT:.0f} seconds")
                time.sleep(0.005)
            try:
                descriptor = directory.open_to_change(NAME)
                try:
                    yield descriptor
                finally:
                    os.close(descriptor)
            finally:
                lock.release()

    def _write(self, descriptor: int, record: dict[str, str]) -> None:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        os.lseek(descriptor, max(0, size - _TAIL), os.SEEK_SET)
        tail = os.read(descriptor, _TAIL)
        lines = tail.removesuffix(b"\n").split(b"\n") if tail else []
        at = next((index for index in reversed(range(len(lines))) if _record(lines[index])), -1)
        links = {"previous": _hash(lines[at]) if at >= 0 else START}
        if lines[at + 1 :]:
            links["torn"] = _hash(*lines[at + 1 :])
        line = json.dumps(links | record, separators=(",", ":")).encode() + b"\n"
        if tail and not tail.endswith(b"\n"):
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        if not size:
            files.sync_directory(self.path.parent)


def _hash(*lines: bytes) -> str:
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _record(line: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("previous"), str) else None
