"""Figures in the documents are those of the run whose results are kept."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.parametrize("place", ["README.md", "benchmarks/README.md"])
def test_the_figures_that_a_page_quotes_are_those_of_the_results(place: str) -> None:
    program = "import quote, pathlib, sys; page = pathlib.Path(sys.argv[1]); "
    program += "sys.exit(quote.quoted(page) != page.read_text() and 'other figures')"
    command = [sys.executable, "-c", program, str(CHECKOUT / place)]
    environment = {"PYTHONPATH": str(CHECKOUT / "benchmarks")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| what | against | reached |" in (CHECKOUT / place).read_text()
