"""What is kept on disk for a while, one file per identity, and believed only if it is whole and ours.

An identity is a set of settings. A file's name is the hash of the identity, and the identity inside is
compared again. Whatever is wrong becomes a warning, and then there is no record.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsm_signer.errors import ConfigError
from hsm_signer.files import PrivateDirectory, private_directory

TROUBLE = (OSError, ConfigError, ValueError, RecursionError)  # the last two from odd JSON of a server
_MAX_SIZE = 256 * 1024  # bytes
_MAGIC = b"hsm-token cache 1 "  # and the SHA-256 of all that follows this line

_log = logging.getLogger(__name__)
_warned: set[str] = set()


@dataclass(frozen=True)
class Record:
    """``members`` as they were stored, with both clocks of that moment in seconds."""

    identity: Mapping[str, Any]
    stored_at: int
    uptime: int
    lifetime: int
    members: Mapping[str, Any] = field(repr=False)

    def left(self, now: int) -> int:
        """Seconds that it may still be used: by the clock or by the uptime, whichever says less.

        The uptime notices that the clock was set back after the record was stored. After a restart it is
        lower than what was stored, and then says nothing.
        """
        if now < self.stored_at:
            return 0
        return self.lifetime - max(now - self.stored_at, _uptime() - self.uptime)


class RecordFile:
    """The record of one identity. ``identity``: JSON values or paths; ``suffix`` tells the kinds apart."""

    def __init__(self, directory: Path, suffix: str, identity: Mapping[str, object]) -> None:
        self.directory = directory
        text = json.dumps(identity, default=os.fspath, sort_keys=True)
        self._identity = json.loads(text)
        self.stem = hashlib.sha256(text.encode()).hexdigest()
        self._name = self.stem + suffix

    def load(self) -> Record | None:
        """Read it, live or not."""
        try:
            with private_directory(self.directory, create=False) as directory:
                return self.read(directory)
        except FileNotFoundError:
            return None
        except TROUBLE as exc:
            self.warn(exc)
            return None

    def read(self, directory: PrivateDirectory) -> Record:
        """Read it from the opened directory; raises one of :data:`TROUBLE`."""
        record = read(directory, self._name)
        if record.identity != self._identity:
            raise ConfigError(f"{self.directory / self._name} was written for other settings")
        return record

    def store(self, members: Mapping[str, Any], lifetime: int, now: int) -> None:
        """Put a record in the place of the one before, good for ``lifetime`` seconds from ``now`` on."""
        record = {
            "identity": self._identity,
            "stored_at": now,
            "uptime": _uptime(),
            "lifetime": lifetime,
            "members": members,
        }
        try:
            body = json.dumps(record).encode()
            with private_directory(self.directory) as directory:
                try:
                    directory.replace(self._name, _MAGIC + _digest(body) + b"\n" + body)
                except OSError:  # what could not be replaced may be the very one that a server refused
                    directory.remove(self._name)
                    raise
        except TROUBLE as exc:
            self.warn(exc)

    def warn(self, exc: Exception) -> None:
        """Say once what keeps the cache from being used."""
        hint = getattr(exc, "hint", None)
        text = f"the cache is not used: {exc}" + (f" ({hint})" if hint else "")
        if text not in _warned:
            _warned.add(text)
            _log.warning("%s", text)


def read(directory: PrivateDirectory, name: str) -> Record:
    """Read a file of this module; raises one of :data:`TROUBLE`."""
    head, _, body = directory.read_bytes(name, max_size=_MAX_SIZE).partition(b"\n")
    if head != _MAGIC + _digest(body):
        raise ConfigError(f"{directory.path / name} is damaged")
    return Record(**json.loads(body))


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _uptime() -> int:
    if hasattr(time, "CLOCK_BOOTTIME"):  # counts sleep too
        return int(time.clock_gettime(time.CLOCK_BOOTTIME))
    return int(time.monotonic())
