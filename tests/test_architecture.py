"""The walls of the house (docs/design.md), read off the imports."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hsm_signer"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# Who may import which distribution; a folder ends in a slash.
DOORS = {
    "pkcs11": {"hsm/"},
    "requests": {"oauth/auth.py"},
    "urllib3": {"oauth/connections.py"},
    "certifi": {"oauth/"},
    "httpx": {"oauth/"},
    "asn1crypto": {"ecdsa.py", "x509.py"},
    "cryptography": {"verification.py"},
    "typer": {"cli/"},
    "rich": {"cli/"},
    "filelock": {"locks.py"},
    "platformdirs": {"paths.py"},
    "keyring": {"pin.py"},
    "joserfc": {"verify.py", "rehearsal.py"},
    "authlib": {"rehearsal.py"},
    "flask": {"rehearsal.py"},
    "werkzeug": {"rehearsal.py"},
}
# From the ground up. A part imports what stands before it; what is not named here stands under the roof.
FLOORS = [
    {"errors", "text"},
    {"url", "jose", "files", "distinguished_name", "toml"},
    {"ecdsa", "locks"},
    {"verification", "assertion", "paths", "profile_file"},
    {"x509", "pin_guard", "audit"},
    {"pin"},
    {"hsm", "oauth"},
    {"config"},
    {"validity"},
    {"assembly"},
]
ROOF = {"cli"}
PURE = {"errors.py", "text.py", "url.py", "jose.py", "assertion.py", "hsm/uri.py", "oauth/response.py"}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def for_types(name: str) -> set[ast.AST]:
    """What stands below ``if TYPE_CHECKING``, which no interpreter runs."""
    blocks = [node for node in ast.walk(tree(name)) if isinstance(node, ast.If)]
    blocks = [node for node in blocks if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"]
    return {node for block in blocks for statement in block.body for node in ast.walk(statement)}


def imports(name: str, *, types: bool = True) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    found = set()
    for node in set(ast.walk(tree(name))) - (set() if types else for_types(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def parts(name: str, *, types: bool = True) -> set[str]:
    """Files of ours that a file imports."""
    found = set()
    for dotted in imports(name, types=types):
        if dotted.startswith("hsm_signer."):
            path = dotted.removeprefix("hsm_signer.").replace(".", "/")
            found |= {file for file in (f"{path}.py", f"{path}/__init__.py") if file in FILES}
    return found - {name}


def inside(name: str, places: set[str]) -> bool:
    return any(name.startswith(place) if place.endswith("/") else name == place for place in places)


def part(name: str) -> str:
    return name.split("/", maxsplit=1)[0].removesuffix(".py")


def floor(name: str) -> int:
    if part(name) in ROOF:
        return len(FLOORS) + 1
    return next((level for level, names in enumerate(FLOORS) if part(name) in names), len(FLOORS))


def attributes(name: str) -> Iterator[str]:
    """``module.name`` wherever a file reads one."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def calls(name: str) -> Iterator[str]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


@pytest.mark.parametrize("name", FILES)
def test_each_dependency_comes_in_by_its_own_door(name: str) -> None:
    for distribution in {dotted.split(".")[0] for dotted in imports(name)} - sys.stdlib_module_names:
        if distribution != "hsm_signer":
            assert distribution in DOORS, f"{distribution} has no door"
            assert inside(name, DOORS[distribution]), f"{distribution} does not come in here"


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__.py"])
def test_imports_run_downwards_only(name: str) -> None:
    for other in parts(name):
        below = floor(other) < floor(name)
        beside = floor(other) == floor(name) and (part(other) == part(name) or floor(name) != HSM_AND_OAUTH)
        assert below or beside, f"{other} stands above"


HSM_AND_OAUTH = next(level for level, names in enumerate(FLOORS) if "hsm" in names)


def test_no_import_leads_back_to_where_it_started() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name not in done:
            for other in parts(name, types=False):
                visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        if name != "__init__.py":
            visit(name, ())


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_files_know_neither_strangers_nor_clock_nor_chance_nor_environment(name: str) -> None:
    tops = {dotted.split(".")[0] for dotted in imports(name)}
    assert tops <= sys.stdlib_module_names | {"hsm_signer"}
    assert all(other in PURE for other in parts(name))
    forbidden = {"os", "time", "datetime", "random", "secrets", "socket", "logging", "pathlib"}
    issue = {"time", "secrets"} if name == "assertion.py" else set()  # the defaults of issue()
    assert not tops & (forbidden - issue)


@pytest.mark.parametrize("package", ["hsm", "oauth"])
def test_hsm_and_oauth_import_nothing_by_themselves(package: str) -> None:
    [docstring] = tree(f"{package}/__init__.py").body
    assert isinstance(docstring, ast.Expr)


ENVIRONMENT = {"config.py", "paths.py", "pin.py"}


@pytest.mark.parametrize("name", [name for name in FILES if not inside(name, ENVIRONMENT)])
def test_only_configuration_paths_and_pin_read_the_environment(name: str) -> None:
    assert not {"os.environ", "os.getenv", "os.environb"} & set(attributes(name))
    assert not {"os.environ", "os.getenv", "os.environb"} & imports(name)


@pytest.mark.parametrize("name", [n for n in FILES if not inside(n, {"cli/"})])
def test_only_the_command_line_prints_prompts_and_exits(name: str) -> None:
    assert not {"print", "input", "getpass", "exit", "quit", "SystemExit"} & set(calls(name))
    assert not {"sys.stdin", "sys.stdout", "sys.stderr", "sys.exit", "os._exit"} & set(attributes(name))
    assert "getpass" not in imports(name)


@pytest.mark.parametrize("name", [name for name in FILES if not inside(name, {"hsm/"})])
def test_no_private_key_is_handled_outside_the_token(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    for word in ("PrivateKey", "private_key(", "load_pem_private", "load_der_private", "derive_private"):
        assert word not in text


def test_private_keys_sign_in_two_places_that_write_the_audit_log() -> None:
    """Whoever signs in a third one has to write its lines too (tests/test_audit.py counts them)."""
    assert {name for name in FILES if "keys.sign_es256" in attributes(name)} == {
        "hsm/signer.py",
        "hsm/public_half.py",
    }
    assert [name for name in FILES if "sign_es256" in calls(name)] == []


def modules_after(program: str) -> set[str]:
    program += "\nimport sys; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    return set(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_the_package_loads_no_other_library() -> None:
    loaded = modules_after("import hsm_signer") - modules_after("")
    assert {name.split(".")[0] for name in loaded} <= sys.stdlib_module_names | {"hsm_signer"}


def test_every_public_name_is_there() -> None:
    loaded = modules_after("import hsm_signer\nfor name in hsm_signer.__all__: getattr(hsm_signer, name)")
    assert "hsm_signer.hsm.token" in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("typer", "filelock", "platformdirs")}


def test_the_design_has_every_part_on_its_floor_and_names_every_file() -> None:
    page = (PACKAGE.parent / "docs/design.md").read_text(encoding="utf-8").split("## The walls")[0]
    rows = [set(re.findall(r"`([\w/]+?)/?`", row)) for row in re.findall(r"^\| `.*$", page, re.MULTILINE)]
    for floor, row in zip(FLOORS, rows, strict=False):
        assert row & set().union(*FLOORS) == floor
    inside = ("cli/", "doctor/")  # one file per group of commands, and per group of checks
    files = {Path(name).stem for name in FILES if not name.startswith(inside)} - {"__init__"}
    assert files | {"hsm", "oauth", "cli", "doctor"} <= set(re.findall(r"`([\w/]+?)/?`", page))
