"""How things are measured: side by side and in turn, A B A B, and quoted as a ratio of medians."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What a process took: seconds on the wall and on the CPU, and its largest memory in MB."""

    seconds: float
    cpu: float
    memory: float


@dataclass(frozen=True)
class Row:
    """A line of the table. ``low`` and ``high``: the quartiles of the rounds, where there are some."""

    what: str
    against: str
    reached: float
    must: float
    aim: float | None = None
    at_least: bool = False
    unit: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def holds(self) -> bool:
        return self.reached >= self.must if self.at_least else self.reached <= self.must


HEAD = ("| what | against | reached | must reach | aim for |", "|---|---|---|---|---|")


def line(row: Row) -> str:
    """A row in Markdown; the quartiles of the rounds stand in parentheses."""
    sign = "≥" if row.at_least else "≤"
    reached = f"{row.reached:.4g}{row.unit}"
    if row.low is not None and row.high is not None:
        reached += f" ({row.low:.3g} to {row.high:.3g})"
    aim = "" if row.aim is None else f"{sign} {row.aim:g}{row.unit}"
    verdict = "" if row.holds else " **missed**"
    return f"| {row.what} | {row.against} | {reached}{verdict} | {sign} {row.must:g}{row.unit} | {aim} |"


def process(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run a process from its start to its end; it must succeed."""
    began = time.perf_counter()
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    took = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"ended with {child.returncode}: {' '.join(command)}")
    return Run(took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def output(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a process prints; it must succeed."""
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def in_turn(rounds: int, **things: Callable[[], T]) -> dict[str, list[T]]:
    """Do each of the things once to warm up, then all of them in turn, ``rounds`` times."""
    for thing in things.values():
        thing()
    results: dict[str, list[T]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, thing in things.items():
            results[name].append(thing())
    return results


def ratio(
    what: str,
    ours: Sequence[float],
    against: str,
    theirs: Sequence[float],
    must: float,
    aim: float,
    **more: bool,
) -> Row:
    """The median of ours over the median of theirs; the quartiles are those of the rounds, taken in pairs."""
    pairs = [one / other for one, other in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    reached = statistics.median(ours) / statistics.median(theirs)
    return Row(what, against, reached, must, aim, low=low, high=high, **more)
