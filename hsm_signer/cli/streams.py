"""The standard streams, made such that each failure of one has one meaning.

A result that cannot be written is an error that ends the run, wherever it was printed; what cannot be told to a
person on stderr changes nothing. Descriptors that were closed before we started are no longer free: the next
file would get their number, and what is printed would go into it.
"""

import io
import os
import sys
from typing import Any, cast

from hsm_signer.errors import ConfigError


class StdoutError(ConfigError):
    """The result could not be written. ``closed_pipe``: nobody reads on, which needs no words."""

    def __init__(self, failed: OSError) -> None:
        super().__init__(f"cannot write to stdout: {failed.strerror}")
        self.closed_pipe = isinstance(failed, BrokenPipeError)


class _Stdout(io.FileIO):
    failed = False

    def write(self, data: Any, /) -> int:  # noqa: ANN401  # whatever has bytes, as for FileIO
        if self.failed:
            return memoryview(data).nbytes  # the flush at exit must not fail again
        try:
            return super().write(data)
        except OSError as failed:
            self.failed = True
            raise StdoutError(failed) from None


class _Stderr(io.FileIO):
    def write(self, data: Any, /) -> int:  # noqa: ANN401  # whatever has bytes, as for FileIO
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def prepare() -> None:
    """Give the process its three streams, whatever it was started with."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # a write to a closed stdout must fail: there it is opened for reading
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # ours until the end
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="backslashreplace")
    sys.stdout = _text(_Stdout(1, "wb", closefd=False), sys.stdout)
    sys.stderr = _text(_Stderr(2, "wb", closefd=False), sys.stderr, line_buffering=True)


def _text(raw: io.FileIO, before: Any, *, line_buffering: bool = False) -> io.TextIOWrapper:  # noqa: ANN401  # TextIO or None
    """A stream like the one ``before``, ``None`` where its descriptor was closed.

    What the locale has no character for becomes an escape: a label or a path must not end the run.
    """
    return io.TextIOWrapper(
        cast("io.BufferedWriter", io.BufferedWriter(raw)),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=line_buffering or raw.isatty(),
    )
