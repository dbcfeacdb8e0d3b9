"""What a person sees: results on stdout, everything else on stderr; tables and spinners on a terminal only."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from hsm_signer.text import printable

SPINNER_AFTER = 0.5  # seconds
KEPT_WHOLE = 12  # characters of a cell

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


def note(text: str) -> None:
    """Tell a person something on stderr."""
    print(f"hsm-token: {printable(text)}", file=sys.stderr)


def copyable(lines: Iterable[str]) -> None:
    """Show lines of ours on stderr as they are, for a person to copy."""
    print(*lines, sep="\n", file=sys.stderr)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows: a table on a terminal, tab-separated lines without a head in a pipe."""
    clean = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in clean:
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        # a thumbprint cut short is of no use; what is short, such as a date, stays in one piece
        whole = all(len(row[number]) <= KEPT_WHOLE for row in clean)
        drawn.add_column(column.replace(" ", "\n") if whole else column, overflow="fold", no_wrap=whole)
    for row in clean:
        drawn.add_row(*map(Text, row))  # Text, not str: a label must not be read as markup
    Console().print(drawn)


def ask(question: str, default: str | None = None) -> str:
    """Ask a person for one line; the default is taken for an empty answer."""
    shown = f"{printable(question)} [{printable(default)}]: " if default else f"{printable(question)}: "
    while True:
        print(shown, end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if not answer:
            raise KeyboardInterrupt  # Ctrl-D: no more answers will come
        if answer.strip() or default is not None:
            return answer.strip() or str(default)


def choose(question: str, choices: Sequence[str], *, or_other: bool = False) -> str:
    """Let a person pick one by its number, or type something else where that is allowed."""
    for number, choice in enumerate(choices, 1):
        print(f"  {number}  {printable(choice)}", file=sys.stderr)
    while True:
        answer = ask(f"{question}: number" + (" or path" if or_other else ""), "1")
        if answer.isdecimal() and 1 <= int(answer) <= len(choices):
            return choices[int(answer) - 1]
        if or_other and not answer.isdecimal():
            return answer


def ask_secret(question: str) -> str:
    """Ask without echo, on the terminal itself; the question is shown as it is."""
    from getpass import getpass

    return getpass(question, stream=sys.stderr)


def somebody_there() -> bool:
    """Whether a person can be asked."""
    return sys.stdin.isatty()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on a terminal when the block takes longer than half a second."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from threading import Timer

    started: list[object] = []

    def spin() -> None:
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_dumb_terminal:
            return
        status = console.status(printable(what))
        started.append(status)
        status.start()

    timer = Timer(SPINNER_AFTER, spin)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for status in started:
            status.stop()  # type: ignore[attr-defined]  # rich.status.Status, which is loaded by then only
