"""Ctrl-C that works while a PKCS#11 module hangs.

Python runs its handler between two byte codes, so a blocking C call holds Ctrl-C up for as long as it lasts.
Python's own C handler, however, writes the number of each signal into the wake-up descriptor at once: a thread
that reads it gives Python a moment to end in its own way and then ends the process.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 0.3  # seconds for KeyboardInterrupt to restore the terminal and remove temporary files


@contextmanager
def interruptible(status: int) -> Iterator[None]:
    """End the process with ``status`` soon after SIGINT, whatever the main thread is doing."""
    readable, writable = os.pipe()
    if hasattr(os, "set_blocking"):  # missing on Windows before Python 3.12, where nobody asks for it
        os.set_blocking(writable, False)
    before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(readable, status, ended), name="interrupt", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writable)


def _watch(readable: int, status: int, ended: threading.Event) -> None:
    while received := os.read(readable, 1):
        if received[0] == signal.SIGINT and not ended.wait(GRACE):
            os._exit(status)
