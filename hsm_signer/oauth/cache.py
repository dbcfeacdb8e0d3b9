"""Access tokens on disk, and one fetch among many processes.

Whatever is wrong with the cache becomes a warning and a fetch without it, never a wrong access token.

A hit loads nothing but the standard library. On a miss one process fetches under a lock; the others look now
and then whether its access token has come: more seldom as time goes by, for there may be many of them.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hsm_signer.errors import TransportError
from hsm_signer.files import PrivateDirectory, private_directory
from hsm_signer.locks import HeldLock, try_lock
from hsm_signer.oauth.records import TROUBLE, Record, RecordFile, read
from hsm_signer.oauth.response import TokenResponse

MAX_LIFETIME = 86_400  # seconds that an access token is kept, whatever the server says
UNKNOWN_LIFETIME = 60  # seconds, where the server gave none
_FIRST_POLL, _LONGEST_POLL = 0.02, 0.1  # seconds
_SUFFIX = ".token"
_FIELDS = ("access_token", "raw", "token_type", "expires_at", "scope")
_SHOWN = ("endpoint", "client_id", "scope")
_OURS = r"\.?[0-9a-f]{64}\.(token|metadata)(\.[0-9a-f]+)?"  # also what a killed writer left

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
        self._file = RecordFile(directory, _SUFFIX, identity)

    def load(self, now: int, min_validity: int) -> TokenResponse | None:
        """Look for an access token that lives ``min_validity`` seconds longer than ``now`` (Unix seconds).

        One whose lifetime the server did not tell is good for the minute that it is kept.
        """
        record = self._file.load()
        found = _judged(record, now, min_validity)
        if found and record:
            _log.info("an access token is kept in %s, for %d s more", self._file.directory, record.left(now))
        return found

    def store(self, response: TokenResponse, now: int) -> None:
        """Keep an access token that came at ``now`` (Unix seconds), in the place of the one before."""
        lifetime = UNKNOWN_LIFETIME if response.expires_at is None else response.expires_at - now
        members = {name: getattr(response, name) for name in _FIELDS}
        self._file.store(members, min(lifetime, MAX_LIFETIME), now)

    def awaited(self, deadline: float) -> TokenResponse | None:
        """The access token that another process is fetching; ``None``, at once, where none does.

        ``None`` also where the other one got none. ``deadline`` and errors as for :meth:`lock`.
        """
        with self.lock(deadline) as theirs:
            return theirs

    @contextmanager
    def lock(self, deadline: float) -> Iterator[TokenResponse | None]:
        """Wait for our turn to fetch, at most until ``deadline`` (of ``time.monotonic``).

        Gives ``None`` when it is our turn: look at the cache once more, then fetch and store. Gives the
        access token that another process stored while we waited, however short it lives. Where the cache is
        unusable it is our turn at once. Raises :class:`TransportError` at the deadline.
        """
        held = theirs = None
        try:
            with private_directory(self._file.directory) as directory:
                held, theirs = self._wait(directory, deadline)
        except TROUBLE as exc:
            self._file.warn(exc)
        try:
            yield theirs
        finally:
            if held:
                held.release()

    def _wait(
        self, directory: PrivateDirectory, deadline: float
    ) -> tuple[HeldLock | None, TokenResponse | None]:
        before = self._glance(directory)
        pause = _FIRST_POLL
        while True:
            held = try_lock(directory, f"{self._file.stem}.lock")
            record = self._glance(directory)
            theirs = _judged(record, int(time.time()), 0) if record != before else None
            if held or theirs:
                return held, theirs
            if time.monotonic() >= deadline:
                raise TransportError(
                    "another process was fetching this access token all the time that we had",
                    hint="try again; if it stays so, look for an hsm-token that hangs",
                )
            if pause == _FIRST_POLL:
                _log.info("another process is fetching this access token: waiting for it")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL)

    def _glance(self, directory: PrivateDirectory) -> Record | None:
        """What is there, if anything that we can use: :meth:`load` has warned of the rest."""
        with suppress(*TROUBLE):
            return self._file.read(directory)
        return None


def entries(directory: Path) -> list[CacheEntry]:
    """List the access tokens that are kept and live, without showing them.

    Raises ``UnsafeFileError`` for a directory that is not ours alone.
    """
    found = []
    now = int(time.time())
    with suppress(FileNotFoundError), private_directory(directory, create=False) as opened:
        for name in opened.names():
            if not name.endswith(_SUFFIX):
                continue
            try:
                record = read(opened, name)
            except TROUBLE as exc:
                _log.warning("skipped: %s", exc)
                continue
            if (left := record.left(now)) > 0:
                shown = {key: str(record.identity.get(key) or "") for key in _SHOWN}
                found.append(CacheEntry(**shown, expires_at=now + left))
    return found


def clear(directory: Path) -> int:
    """Remove what the cache keeps, and nothing else; the number of access tokens that went.

    The empty lock files stay: a lock on a removed file locks out nobody, and a fetch may be under way.
    Raises ``UnsafeFileError`` for a directory that is not ours alone.
    """
    gone = 0
    with suppress(FileNotFoundError), private_directory(directory, create=False) as opened:
        for name in opened.names():
            if re.fullmatch(_OURS, name):
                opened.remove(name)
                gone += name.endswith(_SUFFIX)
    return gone


def _judged(record: Record | None, now: int, min_validity: int) -> TokenResponse | None:
    if record is None:
        return None
    needed = max(1, 0 if record.members["expires_at"] is None else min_validity)
    if record.left(now) < needed:
        return None
    return TokenResponse(**record.members)
