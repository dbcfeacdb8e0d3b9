"""The lock files say what ``pyproject.toml`` asks for, by hash and without naming where it comes from."""

import json
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
CORE = PROJECT["project"]["dependencies"]
BUILD = [*PROJECT["build-system"]["requires"], *GROUPS["build"]]
ALL_EXTRAS = [line for extra in EXTRAS.values() for line in extra]
ASKED = {
    "package.txt": [*CORE, *ALL_EXTRAS],
    "demo.txt": [*CORE, *BUILD, *EXTRAS["rehearsal"]],
    "tests.txt": [*CORE, *BUILD, *ALL_EXTRAS, *GROUPS["tests"], *GROUPS["release"]],
    "fuzz.txt": [*CORE, *GROUPS["fuzz"]],
    "mutation.txt": [*CORE, *ALL_EXTRAS, *GROUPS["tests"], *GROUPS["mutation"]],
    "node.txt": GROUPS["node"],
    "lock.txt": GROUPS["lock"],
}


def locked(name: str) -> dict[str, set[str]]:
    """Versions of each distribution; more than one where Python versions differ."""
    text = (CHECKOUT / "requirements" / name).read_text()
    versions: dict[str, set[str]] = {}
    for distribution, version in re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE):
        versions.setdefault(distribution, set()).add(version)
    return versions


def test_each_direct_dependency_has_a_range_and_a_reason() -> None:
    """A reason stands behind the requirement, on its line."""
    text = (CHECKOUT / "pyproject.toml").read_text()
    for line in {*CORE, *BUILD, *ALL_EXTRAS, *(line for group in GROUPS.values() for line in group)}:
        assert Requirement(line).specifier, line
        written = re.findall(rf'^ *"{re.escape(line)}",(.*)$', text, re.MULTILINE)
        assert all(re.match(r" +# \w", rest) for rest in written), line
        assert written or line in PROJECT["build-system"]["requires"], f"{line} is not on a line of its own"


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


@pytest.mark.parametrize("name", ["package.txt", "demo.txt"])
def test_what_is_tested_is_what_is_installed(name: str) -> None:
    tests = locked("tests.txt")
    assert all(versions == tests[name] for name, versions in locked(name).items())


@pytest.mark.parametrize("name", ["fuzz.txt", "mutation.txt"])
def test_tools_bring_packages_of_their_own_but_no_other_versions(name: str) -> None:
    tests, tool = locked("tests.txt"), locked(name)
    assert tests.keys() & tool.keys()
    assert all(tool[shared] == tests[shared] for shared in tests.keys() & tool.keys())


def test_npm_installs_by_hash_too_and_runs_no_script_of_a_package() -> None:
    packages = json.loads((CHECKOUT / "tests/interop/package-lock.json").read_text())["packages"]
    installed = {name: package for name, package in packages.items() if name}
    assert installed
    assert [
        name for name, package in installed.items() if not package["integrity"].startswith("sha512-")
    ] == []
    lines = (CHECKOUT / "tests/run").read_text().splitlines()
    assert [" ci --ignore-scripts " in line for line in lines if "npm env" in line] == [True]


def test_the_scripts_install_from_packages_by_hash_only() -> None:
    lines = (CHECKOUT / "scripts/install.sh").read_text().splitlines()
    installing = [line.strip() for line in lines if re.search(r"\bpip .* install ", line)]
    wheel = [line for line in installing if line.endswith(".cache/dist/*.whl")]
    assert len(wheel) == 1
    assert "--no-index" in wheel[0]
    assert all("--require-hashes --only-binary :all: -r" in line for line in installing if line not in wheel)
    assert len(installing) == 3
