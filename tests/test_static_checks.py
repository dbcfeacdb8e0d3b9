"""An exception from the static checks says why, wherever it stands."""

import re
from pathlib import Path

import pytest
from conftest import CHECKOUT

EXCEPTION = re.compile(
    r"# ?(noqa|type: ?ignore|mypy:|ruff:|fmt:|pragma: no|nosec|pyright:|shellcheck disable)"
)
WITH_REASON = re.compile(
    r"# (noqa: [A-Z]+[0-9]+(, [A-Z]+[0-9]+)*|type: ignore\[[a-z, -]+\]|pragma: no \w+|fmt: skip)  # \S"
)
PLACES = ("hsm_signer", "tests", "scripts", "benchmarks", "fuzz", "softhsm-setup")
OTHERS = {"node_modules", "build", "__pycache__", Path(__file__).name}
FILES = [
    path.relative_to(CHECKOUT)
    for place in PLACES
    for path in sorted([CHECKOUT / place, *(CHECKOUT / place).rglob("*")])
    if path.is_file() and path.suffix in ("", ".py", ".sh") and not OTHERS & {*path.parts}
]


def without_reason(text: str) -> list[str]:
    return [line for line in text.splitlines() if EXCEPTION.search(line) and not WITH_REASON.search(line)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_exception_in_the_code_has_its_reason(path: Path) -> None:
    assert without_reason((CHECKOUT / path).read_text(encoding="utf-8")) == []


def test_each_rule_that_is_off_has_its_reason() -> None:
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    rules = text.split("[tool.ruff.lint]")[1].split("[tool.mypy]")[0]
    off = [
        line for line in rules.splitlines() if re.search(r'"[A-Z]+[0-9]*"', line) and "select =" not in line
    ]
    off += [line for line in text.splitlines() if line.startswith("ignore_")]
    assert len(off) > 10
    assert [line for line in off if not re.search(r"  +# \S", line)] == []


@pytest.mark.parametrize(
    "line",
    [
        "except Exception:  # noqa",
        "except Exception:  # noqa: BLE001",
        "except Exception:  # noqa  # whatever it is",
        "fcntl = None  # type: ignore[assignment]",
        "fcntl = None  # type: ignore  # a module, or none",
        "# ruff: noqa: S101",
    ],
)
def test_an_exception_without_a_rule_or_without_a_reason_would_be_found(line: str) -> None:
    assert without_reason(f"import os\n{line}\n") == [line]
