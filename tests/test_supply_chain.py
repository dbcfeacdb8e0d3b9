"""What is released: built from the checkout alone, the same for everybody, and the very thing that is tested."""

import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import CHECKOUT
from office import Office
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_requirements import CORE, EXTRAS, PROJECT, locked

import hsm_signer

VERSION = hsm_signer.__version__
WHEEL = f"hsm_signer-{VERSION}-py3-none-any.whl"
SDIST = f"hsm_signer-{VERSION}.tar.gz"


def build(checkout: Path, out: Path, **environment: str) -> dict[str, str]:
    """Names and SHA-256 of what ``scripts/build`` says that it built, checked against what is there."""
    no_network = ["unshare", "--map-root-user", "--net"]
    command = [*no_network, "bash", "-c", f"umask {environment.pop('umask')}; exec scripts/build {out}"]
    settings = {"PATH": os.environ["PATH"], "PYTHON": sys.executable} | environment
    done = subprocess.run(command, cwd=checkout, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = {name: digest for digest, name in (line.split() for line in done.stdout.splitlines())}
    assert said == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    return said


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    out = tmp_path_factory.mktemp("dist")
    return out, build(CHECKOUT, out, umask="022")


def test_whoever_builds_the_sdist_again_gets_the_same_sdist_and_wheel(
    built: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    out, first = built
    assert set(first) == {WHEEL, SDIST}
    subprocess.run(["tar", "-xf", out / SDIST, "-C", tmp_path, "--no-same-owner"], check=True)
    elsewhere = tmp_path / SDIST.removesuffix(".tar.gz")
    for path in elsewhere.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path)
    other = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": "1000000000"}
    assert build(elsewhere, tmp_path / "again", umask="077", **other) == first


def test_what_is_tested_is_the_wheel_that_was_built(built: tuple[Path, dict[str, str]]) -> None:
    """Only PYTHONPATH changes that, for people at work; tests/run clears it."""
    tested = Path(hsm_signer.__file__).parent
    started = subprocess.check_output(
        [sys.executable, "-c", "import hsm_signer; print(hsm_signer.__file__)"], text=True
    )
    assert started.strip() == hsm_signer.__file__, "a program that a test starts imports another package"
    if "PYTHONPATH" in os.environ:
        assert tested == CHECKOUT / "hsm_signer"
        return
    origin = json.loads(metadata.distribution("hsm-signer").read_text("direct_url.json") or "")
    assert tested.parent.name == "site-packages"
    assert origin["archive_info"]["hashes"]["sha256"] == built[1][WHEEL]


def test_the_sbom_names_what_an_installation_with_all_extras_consists_of(tmp_path: Path) -> None:
    made = tmp_path / "sbom.json"
    command = [str(CHECKOUT / "scripts/sbom"), str(made)]
    subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, check=True)
    sbom = json.loads(made.read_bytes())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    root = sbom["metadata"]["component"]
    assert (root["name"], root["version"]) == ("hsm-signer", VERSION)
    assert root["licenses"][0]["license"]["id"] == PROJECT["project"]["license"]
    found: dict[str, set[str]] = {}
    for component in sbom["components"]:
        found.setdefault(component["name"], set()).add(component["version"])
        assert component["purl"].startswith(f"pkg:pypi/{component['name']}@")
        assert all(reference["hashes"] for reference in component["externalReferences"])
    assert found == locked("package.txt")
    for line in (*CORE, *(each for extra in EXTRAS.values() for each in extra)):
        assert canonicalize_name(Requirement(line).name) in found


IMPORTS = """
import os, sys
from importlib import import_module
from pkgutil import walk_packages

# urllib3 binds a socket to localhost to see whether there is IPv6; that sends nothing
HARMLESS = ("socket.__new__", "socket.bind")

def guard(event, arguments):
    if event in HARMLESS:
        return
    if event.split(".")[0] in ("socket", "subprocess") or event in ("os.system", "os.posix_spawn", "os.fork"):
        print(event, file=sys.stderr, flush=True)
        os._exit(1)  # an exception might be caught

sys.addaudithook(guard)
package = import_module(sys.argv[1])
for module in walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith(".__main__"):
        import_module(module.name)
        print(module.name)
"""


def imported(package: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": ":".join([*map(str, path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error", "-c", IMPORTS, package]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_importing_everything_asks_no_network_starts_no_program_and_warns_of_nothing() -> None:
    done = imported("hsm_signer")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    home = CHECKOUT / "hsm_signer"
    files = [path.relative_to(home.parent) for path in home.rglob("*.py") if path.name != "__main__.py"]
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert {"hsm_signer", *done.stdout.split()} == modules


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "socket.getaddrinfo"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import warnings; warnings.warn('old', DeprecationWarning)", "DeprecationWarning: old"),
    ],
)
def test_an_import_that_did_one_of_these_would_be_found(line: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "hasty").mkdir()
    (tmp_path / "hasty/__init__.py").touch()
    (tmp_path / "hasty/module.py").write_text(line)
    assert complaint in imported("hasty", tmp_path).stderr


def test_the_commands_of_every_day_warn_of_nothing(tls_office: Office, tmp_path: Path) -> None:
    office = tls_office.copy(tmp_path).configure(
        cache=str(tmp_path / "cache"), state_dir=str(tmp_path / "state"), audit_log="audit.jsonl"
    )
    strict = {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"}
    assertion = ""
    for words, stdin in (
        ("slots", ""),
        ("key list", ""),
        ("key prove", ""),
        ("key export --format jwks", ""),
        ("cert check", ""),
        ("fetch", ""),
        ("fetch --force --format curl", ""),
        ("assertion", ""),
        ("exchange", "assertion"),
        ("doctor --login", ""),
        ("config show", ""),
        ("cache list", ""),
        ("audit head", ""),
        ("audit verify", ""),
    ):
        done = office.run(*words.split(), stdin=assertion if stdin else "", environment=strict)
        assert done.status == 0, f"{words}: {done.stderr}"
        assert "Warning" not in done.stderr, f"{words}: {done.stderr}"
        assertion = done.stdout
