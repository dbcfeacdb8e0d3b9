"""What README and SECURITY promise is shown by a test that exists and runs: SECURITY.md names it, or docs/claims.md."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from conftest import CHECKOUT
from office import Office

from hsm_signer.cli import program

PROMISE = re.compile(r"\b(never|always|only|nobody|every|cannot leave|no option)\b", re.IGNORECASE)
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")
PAGES = {name: (CHECKOUT / name).read_text(encoding="utf-8") for name in ("README.md", "SECURITY.md")}
CLAIMS = (CHECKOUT / "docs/claims.md").read_text(encoding="utf-8")
SHOWN = sorted({named for text in (PAGES["SECURITY.md"], CLAIMS) for named in NAMED.findall(text)})


def statements(text: str) -> Iterator[str]:
    """Cells of tables that name no test, and sentences of everything else but code."""
    for line in re.sub(r"^```.*?^```$|^    .*?$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
        if not line.startswith("|"):
            yield from re.split(r"(?<=[.!?])\s+", re.sub(r"^([-*#>]+|\d+\.) ", "", line.strip()))
        elif not NAMED.search(line):
            yield from line.strip("| ").split(" | ")


def promises(text: str) -> list[str]:
    return [each for each in statements(text) if PROMISE.search(each)]


@pytest.mark.parametrize("page", PAGES)
def test_each_promise_stands_in_the_table_of_claims(page: str) -> None:
    claimed = [row.split(" | ")[0].strip("| ") for row in CLAIMS.splitlines() if NAMED.search(row)]
    assert promises(PAGES[page])
    assert [each for each in promises(PAGES[page]) if each not in claimed] == []


def test_each_claim_is_still_made() -> None:
    made = "\n".join(PAGES.values())
    claimed = [row.split(" | ")[0].strip("| ") for row in CLAIMS.splitlines() if NAMED.search(row)]
    assert [each for each in claimed if each not in made] == []


def test_each_row_about_an_attacker_names_code_and_a_test() -> None:
    threats = PAGES["SECURITY.md"].split("### Another user on the host")[1].split("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| .*", threats, re.MULTILINE)]
    rows = [row for row in rows if row[0] != "holds"]
    assert len(rows) > 40
    for _, code, shown in rows:
        assert re.sub(NAMED, "", shown).strip(", ") == ""
        for path in re.findall(r"`([^`]+)`", code):
            assert (CHECKOUT / "hsm_signer" / path).is_file(), path


def test_each_test_that_is_named_is_collected_and_cannot_be_skipped(tmp_path: Path) -> None:
    """In CI a skip is a failure; here a test that could be skipped shows nothing at all."""
    files = sorted({file for file, _ in SHOWN})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider"]
    with (tmp_path / "list").open("w+") as listed:  # no pipe: made up tokens are among the names of cases
        done = subprocess.run([*command, *files], cwd=CHECKOUT / "tests", stdout=listed)
        listed.seek(0)
        collected = set(re.findall(r"^tests/([\w/]+\.py)::(test_\w+)", listed.read(), re.MULTILINE))
    assert done.returncode == 0
    assert [named for named in SHOWN if named not in collected] == []
    for file in files:
        source = (CHECKOUT / "tests" / file).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and (file, node.name) in SHOWN:
                written = "\n".join([ast.unparse(node), *map(ast.unparse, node.decorator_list)])
                assert not re.search(r"\b(skip|skipif|importorskip|xfail)\b", written), f"{file}::{node.name}"


@pytest.mark.parametrize(
    "text", ["It never fails.", "- **Here.** Some say so. Always.", "| a | for you only |"]
)
def test_a_new_promise_would_be_found(text: str) -> None:
    assert len(promises(text)) == 1
    assert promises(f"```\n{text}\n```\n    {text}\n") == []


# ---- promises that no other file has tests for ----


def options(group: typer.core.TyperGroup) -> Iterator[str]:
    for command in group.commands.values():
        if isinstance(command, typer.core.TyperGroup):
            yield from options(command)
        else:
            yield from (name for parameter in command.params for name in parameter.opts)


def test_no_option_takes_a_pin() -> None:
    names = set(options(typer.main.get_group(program.application())))
    assert "--module" in names
    assert {name for name in names if "pin" in name.split("-")} == {"--pin-source", "--retry-pin"}
    assert not names & {"--password", "--secret", "--so-pin", "-p"}


def test_a_command_is_undumpable_before_it_reads_a_pin(office: Office) -> None:
    """Whether it is: prctl(2), asked where the PIN is read."""
    program = """
import ctypes, sys
from hsm_signer import pin
from hsm_signer.cli import main

get_dumpable, read = 3, pin.from_source

def asked(text, **more):
    print("dumpable:", ctypes.CDLL(None).prctl(get_dumpable, 0, 0, 0, 0), file=sys.stderr)
    return read(text, **more)

pin.from_source = asked
sys.argv[1:] = ["key", "list"]
main()
"""
    command = [sys.executable, "-c", program]
    environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dumpable: 0" in done.stderr
