"""Put the table of ``results.json`` where it is quoted, between two marks: here and in the project's README."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from measure import HEAD, Row, line

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PLACES = (HERE / "README.md", HERE.parent / "README.md")
MARKED = re.compile(r"(?<=<!-- benchmarks/run writes this -->\n).*?(?=<!-- to here -->)", re.DOTALL)


def quoted(place: Path) -> str:
    """The text of a page with the figures of the results; the project's README leaves out what was aimed for."""
    results = json.loads(RESULTS.read_text())
    rows = [Row(**row) for row in results["rows"]]
    lines = [*HEAD, *map(line, rows)]
    if place.parent != HERE:
        lines = ["|".join(each.split("|")[:4]) + "|" for each in lines]
    table = "\n".join([*_machine(results["machine"]), "", *lines])
    return MARKED.sub(lambda _: f"\n{table}\n\n", place.read_text())


def _machine(machine: dict[str, object]) -> Iterator[str]:
    libraries = machine["libraries"]
    assert isinstance(libraries, dict)
    versions = ", ".join(f"{name} {version}" for name, version in libraries.items())
    yield (
        f"Measured on {machine['date']} on {machine['cores']} cores of an {machine['cpu']}, {machine['kernel']}, "
        f"Python {machine['python']}, SoftHSM2 {machine['softhsm']}, {machine['openssl']}, {versions}; "
        f"the load average was {machine['load_before']:.2f} at the start."
    )


def main() -> None:
    for place in PLACES:
        place.write_text(quoted(place))


if __name__ == "__main__":
    sys.exit(main())
