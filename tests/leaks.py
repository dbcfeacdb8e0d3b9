"""A test fails where a secret is seen in what it, or a process that it started, prints or logs.

Looked for are PINs by their text, and by their shape: whatever begins like a JWS (``{"alg"``, ``{"typ"``,
``{"kid"``, ``{"iss"``, ``{"sub"`` or ``{"aud"`` in base64url: each assertion, each access token that is a JWT, also
cut off; a thumbprint by chance holds ``eyJ`` alone), the signature of an assertion by itself, and the opaque
access tokens of our test servers, which all begin with ``access-token-``. Listened to is what pytest captures,
logs of every level included, each pipe of a process, and each terminal. Where an assertion or an access token is
the result, :data:`MEANT` says so.
"""

import io
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

SHAPES = {
    "a JWS": re.compile(r"eyJ(hbGci|0eXAi|raWQi|pc3Mi|zdWIi|hdWQi)"),
    "a signature": re.compile(r"(?<![\w+/-])[\w-]{86}(?![\w+/=-])"),
    "an access token": re.compile(r"access-token-\w"),
}

# Whose stdout may hold an assertion or an access token: a PIN never, and neither does stderr or a log
MEANT = {
    "it is the result": re.compile(r"(hsm_signer\.cli|hsm-token) .*\b(fetch|assertion|exchange)\b"),
    "the pages show what these commands print": re.compile(r"^timeout 100 script -qec bash "),
    "the demo ends with it": re.compile(r"/softhsm-setup demo"),
}

_pins: set[str] = set()
_heard: dict[tuple[str, object, bool], list[bytes]] = {}


def pin(text: str | None = None) -> str:
    """A PIN that is looked for from now on: this one, or one by chance that is not found by chance."""
    text = text or f"{secrets.randbelow(10**16):016}"
    assert len(text) >= 8, "a shorter text is found in many places"
    _pins.add(text)
    return text


def hear(where: str, source: object, content: bytes, *, meant: bool = False) -> None:
    """Note a piece of what was printed while the test runs; pieces of one source belong together."""
    _heard.setdefault((where, source, meant), []).append(content)


def found() -> Iterator[str]:
    """What was seen, and where, since this was asked last; never the secret itself."""
    heard = dict(_heard)
    _heard.clear()
    for (where, _, meant), pieces in heard.items():
        text = b"".join(pieces).decode("latin-1")
        yield from (f"a PIN in {where}" for each in _pins if each in text)
        if not meant:
            yield from (f"{kind} in {where}" for kind, shape in SHAPES.items() if shape.search(text))


def judged(report: pytest.TestReport) -> pytest.TestReport:
    """The report of a test that is over, with its fixtures: a failure where a secret was shown."""
    for title, text in report.sections:
        hear(title, None, text.encode(errors="replace"))
    if leaks := sorted(set(found())):
        report.outcome = "failed"
        report.longrepr = f"a secret was shown: {'; '.join(leaks)}"
    return report


class _Pipe(io.FileIO):
    """Our end of a pipe from a process."""

    where, meant = "a pipe", False

    def hear(self, content: bytes) -> None:
        hear(self.where, self, content, meant=self.meant)

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.hear(bytes(memoryview(buffer)[: count or 0]))
        return count

    def readall(self) -> bytes:
        content = super().readall()
        self.hear(content)
        return content


_taps: dict[int, _Pipe] = {}
_read, _start = os.read, subprocess.Popen.__init__


def _heard_read(descriptor: int, size: int, /) -> bytes:
    """Hear what ``communicate`` reads of a pipe, and a test of a terminal."""
    content = _read(descriptor, size)
    if tap := _taps.get(descriptor):
        tap.hear(content)
    elif os.isatty(descriptor):
        hear("a terminal", descriptor, content)
    return content


def _heard_start(process: "subprocess.Popen[Any]", args: Any, *more: Any, **options: Any) -> None:
    _start(process, args, *more, **options)
    words = args if isinstance(args, str) else " ".join(map(os.fsdecode, args))
    for name in ("stdout", "stderr"):
        if stream := getattr(process, name):
            setattr(process, name, _tapped(stream, name, words))


def _tapped(stream: Any, name: str, words: str) -> Any:
    """The same stream, heard."""
    pipe = _Pipe(os.dup(stream.fileno()))
    stream.close()
    pipe.meant = name == "stdout" and any(who.search(words) for who in MEANT.values())
    for each in _pins:
        words = words.replace(each, "…")
    for shape in SHAPES.values():
        words = shape.sub("…", words)
    pipe.where = f"{name} of {words[-200:]!r}"
    _taps[pipe.fileno()] = pipe
    if isinstance(stream, io.FileIO):
        return pipe
    buffered = io.BufferedReader(pipe)
    if isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(buffered, encoding=stream.encoding, errors=stream.errors)
    return buffered


os.read = _heard_read
subprocess.Popen.__init__ = _heard_start
