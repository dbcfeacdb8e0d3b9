"""What a person sees: results on stdout, everything else on stderr; tables and spinners on a terminal only."""

import dataclasses
import itertools
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hsm_signer.text import shown

if TYPE_CHECKING:
    from rich.table import Table

SPINNER_AFTER = 0.5  # seconds
GAP = 3  # blanks between the columns of a table
MAX_OVERFLOW = 3  # columns of a table whose lines may be longer than the terminal is wide
SPINNER_PERIOD = 0.1

quiet = False  # set once by --quiet


def result(text: str) -> None:
    """Write the one result of the command."""
    print(text)


def result_now(text: str) -> None:
    """Write a result line that somebody waits for while we go on."""
    print(text, flush=True)


def json_result(value: object) -> None:
    """Write the result as JSON, in ASCII: values of ours as objects, bytes in hex."""
    print(json.dumps(value, indent=2, default=_jsonable))


def _jsonable(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def tell(text: str) -> None:
    """Write lines on stderr as they are."""
    with _spinner.aside():
        print(text, file=sys.stderr)


def note(text: str) -> None:
    """Tell a person something on stderr."""
    tell(f"hsm-token: {shown(text)}")


def remark(text: str) -> None:
    """Tell a person what is good to know and asks for nothing, unless ``--quiet``."""
    if not quiet:
        note(text)


def copyable(lines: Iterable[str]) -> None:
    """Show lines of ours on stderr as they are, for a person to copy."""
    tell("\n".join(lines))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows: a table on a terminal, tab-separated lines without a head in a pipe."""
    clean = [[shown(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in clean:
            print("\t".join(row))
        return
    if not clean:
        note("there is nothing to list")
        return
    from rich.console import Console

    console = Console()
    gaps = GAP * (len(columns) - 1)
    widths = _widths(columns, clean, console.width - gaps)
    if sum(widths) + gaps <= console.width or len(columns) <= MAX_OVERFLOW:
        console.width = max(console.width, sum(widths) + gaps)
        console.print(_drawn(columns, clean, widths))
        return
    name_width = max(map(len, columns))
    for row in clean:  # a record a block: nothing that a person copies is broken in two
        for column, cell in zip(columns, row, strict=True):
            print(f"{column:<{name_width + GAP}}{cell}".rstrip())
        print()


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of the columns: what is too much is taken from the widest, but no word is ever cut."""
    cells = [[column, *(row[number] for row in rows)] for number, column in enumerate(columns)]
    widths = [max(map(len, column), default=0) for column in cells]
    least = [max((len(word) for cell in column for word in cell.split()), default=0) for column in cells]
    while sum(widths) > room:
        slack = [width - word for width, word in zip(widths, least, strict=True)]
        if not any(slack):
            break
        widest = max((width, number) for number, width in enumerate(widths) if slack[number])[1]
        widths[widest] -= 1
    return widths


def _drawn(columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column, width in zip(columns, widths, strict=True):
        drawn.add_column(column, width=width, overflow="fold")  # wide characters: nothing is cut
    for row in rows:
        drawn.add_row(*map(Text, row))  # Text, not str: a label must not be read as markup
    return drawn


def moment(seconds: float) -> str:
    """A moment as a person reads it, in UTC (ISO 8601)."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (ValueError, OverflowError, OSError):  # a year that no calendar has
        return str(seconds)


def ask(question: str, default: str | None = None) -> str:
    """Ask a person for one line; the default is taken for an empty answer."""
    line = f"{shown(question)} [{shown(default)}]: " if default else f"{shown(question)}: "
    while True:
        print(line, end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if not answer:
            raise KeyboardInterrupt  # Ctrl-D: no more answers will come
        if answer.strip() or default is not None:
            return answer.strip() or str(default)


def choose(
    question: str, choices: Sequence[str], *, labels: Sequence[str] = (), or_other: bool = False
) -> str:
    """Let a person pick one by its number, by its label where only one has it, or type something else.

    ``labels``: of the choices, in their order; ``or_other``: something else is allowed, a path.
    """
    for number, choice in enumerate(choices, 1):
        print(f"  {number}  {shown(choice)}", file=sys.stderr)
    while True:
        also = " or path" if or_other else " or label" if labels else ""
        answer = ask(f"{question}: number{also}", "1")
        if answer.isdecimal() and 1 <= int(answer) <= len(choices):
            return choices[int(answer) - 1]
        if labels.count(answer) == 1:
            return choices[labels.index(answer)]
        if or_other and not answer.isdecimal():
            return answer
        note(f"{answer!r} is none of the numbers 1 to {len(choices)}")


def ask_secret(question: str) -> str:
    """Ask without echo, on the terminal itself; the question is shown as it is."""
    from getpass import getpass

    with _spinner.aside():
        return getpass(question, stream=sys.stderr)


def somebody_there() -> bool:
    """Whether a person can be asked."""
    return sys.stdin.isatty()


def read_stdin(what: str, limit: int) -> bytes:
    """Read what is piped into us, a byte more than ``limit`` at most; a person who has to type it is told."""
    if somebody_there():
        note(f"reading {what} from the terminal; end with Ctrl-D")
    return sys.stdin.buffer.read(limit + 1)


class _Spinner:
    """One line on stderr that others put aside while they write there, or ask."""

    def __init__(self) -> None:
        self.what = ""
        self._lock = threading.RLock()
        self._drawn = ""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the line off the screen, and draw none during the block."""
        with self._lock:
            self._write("")
            yield

    def turn(self, ended: threading.Event) -> None:
        """Draw until the end, from half a second on."""
        if ended.wait(SPINNER_AFTER):
            return
        for sign in itertools.cycle("|/-\\"):
            with self._lock:
                if not ended.is_set():
                    width = shutil.get_terminal_size().columns - 1  # a line that wraps is not taken off whole
                    self._write(f"{sign} {self.what}"[:width])
            if ended.wait(SPINNER_PERIOD):
                return

    def _write(self, line: str) -> None:
        if line or self._drawn:  # blanks, not an escape sequence: every terminal knows them
            print(f"\r{' ' * len(self._drawn)}\r{line}", end="", file=sys.stderr, flush=True)
        self._drawn = line


_spinner = _Spinner()


class _Progress(logging.Handler):
    """What the spinner says meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        _spinner.what = shown(record.getMessage())


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on a terminal when the block takes longer than half a second.

    It says what is being done, and why that is being done again.
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    ended, retries, progress = threading.Event(), logging.getLogger("hsm_signer.oauth.retry"), _Progress()
    _spinner.what = what
    retries.addHandler(progress)
    retries.setLevel(logging.INFO)
    threading.Thread(target=_spinner.turn, args=(ended,), name="spinner", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        retries.removeHandler(progress)
        with _spinner.aside():
            pass
