"""Access tokens on disk, and one fetch among many processes.

One file per identity, that is per set of settings that decide which access token comes back. Its name is the
hash of the identity, and the identity inside is compared again. Whatever is wrong with the cache becomes a
warning and a fetch without it, never a wrong token.

A hit loads nothing but the standard library. On a miss one process fetches under a lock; the others look
every 20 ms whether its access token has come.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsm_signer.errors import ConfigError, TransportError
from hsm_signer.files import PrivateDirectory, private_directory
from hsm_signer.locks import HeldLock, try_lock
from hsm_signer.oauth.response import TokenResponse

MAX_LIFETIME = 86_400  # seconds that an access token is kept, whatever the server says
UNKNOWN_LIFETIME = 60  # seconds, where the server gave none
_MAX_SIZE = 256 * 1024  # bytes of an entry
_POLL = 0.02  # seconds
_MAGIC = b"hsm-token cache 1 "  # and the SHA-256 of all that follows this line
_TROUBLE = (OSError, ConfigError, ValueError, RecursionError)  # the last two from odd JSON of a server
_FIELDS = ("access_token", "raw", "token_type", "expires_at", "scope")
_SHOWN = ("endpoint", "client_id", "scope")
_OURS = re.compile(r"\.?[0-9a-f]{64}\.(token|metadata|lock)(\.[0-9a-f]+)?")  # also what a killed writer left

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheEntry:
    """What may be shown of a kept access token; ``expires_at`` (Unix seconds) is when we drop it."""

    endpoint: str
    client_id: str
    scope: str
    expires_at: int


class TokenCache:
    """The kept access token of one identity.

    ``identity``: everything that the access token depends on, as JSON values or paths; ``endpoint``,
    ``client_id`` and ``scope`` of it are what :func:`entries` shows.
    """

    def __init__(self, directory: Path, identity: Mapping[str, object]) -> None:
        self._directory = directory
        text = json.dumps(identity, default=os.fspath, sort_keys=True)
        self._identity = json.loads(text)
        name = hashlib.sha256(text.encode()).hexdigest()
        self._entry, self._lock = f"{name}.token", f"{name}.lock"
        self._warned: set[str] = set()

    def load(self, now: int, min_validity: int) -> TokenResponse | None:
        """Look for an access token that lives ``min_validity`` seconds longer than ``now`` (Unix seconds).

        One whose lifetime the server did not tell is good for the minute that it is kept.
        """
        try:
            with private_directory(self._directory, create=False) as directory:
                return _judged(self._record(directory), now, min_validity)
        except FileNotFoundError:
            return None
        except _TROUBLE as exc:
            self._warn(exc)
            return None

    def store(self, response: TokenResponse, now: int) -> None:
        """Keep an access token that came at ``now`` (Unix seconds), in the place of the one before."""
        lifetime = UNKNOWN_LIFETIME if response.expires_at is None else response.expires_at - now
        record = {
            "identity": self._identity,
            "stored_at": now,
            "uptime": _uptime(),
            "lifetime": min(lifetime, MAX_LIFETIME),
            **{name: getattr(response, name) for name in _FIELDS},
            "raw": dict(response.raw),
        }
        try:
            with private_directory(self._directory) as directory:
                try:
                    directory.replace(self._entry, _sealed(record))
                except BaseException:  # what could not be replaced may be the very one that a server refused
                    directory.remove(self._entry)
                    raise
        except _TROUBLE as exc:
            self._warn(exc)

    @contextmanager
    def lock(self, deadline: float) -> Iterator[TokenResponse | None]:
        """Wait for our turn to fetch, at most until ``deadline`` (of ``time.monotonic``).

        Gives ``None`` when it is our turn: look at the cache once more, then fetch and store. Gives the
        access token that another process stored while we waited, however short it lives. Where the cache is
        unusable it is our turn at once. Raises :class:`TransportError` at the deadline.
        """
        held = theirs = None
        try:
            with private_directory(self._directory) as directory:
                held, theirs = self._wait(directory, deadline)
        except _TROUBLE as exc:
            self._warn(exc)
        try:
            yield theirs
        finally:
            if held:
                held.release()

    def _wait(
        self, directory: PrivateDirectory, deadline: float
    ) -> tuple[HeldLock | None, TokenResponse | None]:
        before = self._glance(directory)
        waiting = False
        while True:
            held = try_lock(directory, self._lock)
            record = self._glance(directory)
            theirs = _judged(record, int(time.time()), 0) if record != before else None
            if held or theirs:
                return held, theirs
            if time.monotonic() >= deadline:
                raise TransportError(
                    "another process was fetching this access token all the time that we had",
                    hint="try again; if it stays so, look for an hsm-token that hangs",
                )
            if not waiting:
                _log.info("another process is fetching this access token: waiting for it")
                waiting = True
            time.sleep(_POLL)

    def _glance(self, directory: PrivateDirectory) -> dict[str, Any]:
        """What is there, if anything that we can use: load() has warned of the rest."""
        with suppress(*_TROUBLE):
            return self._record(directory)
        return {}

    def _record(self, directory: PrivateDirectory) -> dict[str, Any]:
        record = _read(directory, self._entry)
        if record["identity"] != self._identity:
            raise ConfigError(f"{self._directory / self._entry} was written for other settings")
        return record

    def _warn(self, exc: Exception) -> None:
        hint = getattr(exc, "hint", None)
        text = f"the cache is not used: {exc}" + (f" ({hint})" if hint else "")
        if text not in self._warned:
            self._warned.add(text)
            _log.warning("%s", text)


def entries(directory: Path) -> list[CacheEntry]:
    """List the access tokens that are kept and live, without showing them.

    Raises ``UnsafeFileError`` for a directory that is not ours alone.
    """
    found = []
    now = int(time.time())
    with suppress(FileNotFoundError), private_directory(directory, create=False) as opened:
        for name in opened.names():
            if not name.endswith(".token"):
                continue
            try:
                record = _read(opened, name)
            except _TROUBLE as exc:
                _log.warning("skipped: %s", exc)
                continue
            if (left := _left(record, now)) > 0:
                shown = {key: str(record["identity"].get(key) or "") for key in _SHOWN}
                found.append(CacheEntry(**shown, expires_at=now + left))
    return found


def clear(directory: Path) -> int:
    """Remove what the cache keeps, and nothing else; the number of access tokens that went.

    Raises ``UnsafeFileError`` for a directory that is not ours alone.
    """
    gone = 0
    with suppress(FileNotFoundError), private_directory(directory, create=False) as opened:
        for name in opened.names():
            if _OURS.fullmatch(name):
                opened.remove(name)
                gone += name.endswith(".token")
    return gone


def _sealed(record: Mapping[str, object]) -> bytes:
    body = json.dumps(record).encode()
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _read(directory: PrivateDirectory, name: str) -> dict[str, Any]:
    head, _, body = directory.read_bytes(name, max_size=_MAX_SIZE).partition(b"\n")
    if head != _MAGIC + hashlib.sha256(body).hexdigest().encode():
        raise ConfigError(f"{directory.path / name} is damaged")
    record: dict[str, Any] = json.loads(body)
    return record


def _judged(record: dict[str, Any], now: int, min_validity: int) -> TokenResponse | None:
    if not record:
        return None
    needed = max(1, 0 if record["expires_at"] is None else min_validity)
    if _left(record, now) < needed:
        return None
    return TokenResponse(**{name: record[name] for name in _FIELDS})


def _left(record: dict[str, Any], now: int) -> int:
    """Seconds that an access token may still be used: by the clock or by the uptime, whichever says less.

    The uptime notices that the clock was set back after the access token was stored. After a restart it is
    lower than what was stored, and then says nothing.
    """
    if now < record["stored_at"]:
        return 0
    age = max(now - record["stored_at"], _uptime() - record["uptime"])
    return int(record["lifetime"]) - int(age)


def _uptime() -> int:
    if hasattr(time, "CLOCK_BOOTTIME"):  # counts sleep too
        return int(time.clock_gettime(time.CLOCK_BOOTTIME))
    return int(time.monotonic())
