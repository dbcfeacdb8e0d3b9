"""Locks between processes: the kernel releases them when the holder ends, however it ends.

flock(2) itself where there is one: importing filelock costs as much as half a fetch, and 50 processes that
wait for one access token would pay it 50 times.
"""

import os
from typing import Protocol

from hsm_signer.files import PrivateDirectory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module, or none


class HeldLock(Protocol):
    """A lock of ours."""

    def release(self) -> None:
        """Let the others have it."""


class _Flock:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # also for a child that was forked meanwhile
        os.close(self._descriptor)


def try_lock(directory: PrivateDirectory, name: str) -> HeldLock | None:
    """Take the lock of this name in ``directory``, or ``None`` where somebody else has it.

    Raises ``UnsafeFileError`` and ``OSError`` as :mod:`hsm_signer.files` does.
    """
    if fcntl is None:
        import filelock

        lock = filelock.FileLock(directory.path / name)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            return None
        return lock
    descriptor = directory.open_to_change(name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return _Flock(descriptor)
