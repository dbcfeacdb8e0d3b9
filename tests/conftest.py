"""Real parts for the tests: a SoftHSM2 of their own, never the machine's."""

import os
import re
import secrets
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import leaks
import office as offices
import pytest
import trustme
from endpoint import Endpoint, Reply
from faults import FaultyModule, compile_module
from hypothesis import HealthCheck, settings

import hsm_signer

# Two cores that other tests share say nothing about the time that one example takes
settings.register_profile("suite", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
)


CHECKOUT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Test no installed package that is another than the checkout's."""
    tested = Path(hsm_signer.__file__).parent
    if _contents(tested) != _contents(CHECKOUT / "hsm_signer"):
        hint = f"run tests/run, which installs it, or set PYTHONPATH={CHECKOUT}"
        pytest.exit(f"{tested} is not what is in the checkout: {hint}", returncode=4)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Save what ``tests/run --coverage`` measured: nobody waits for the processes of xdist to end by themselves."""
    if "coverage" in sys.modules and (measuring := sys.modules["coverage"].Coverage.current()):
        measuring.save()


def _contents(package: Path) -> dict[Path, bytes]:
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(package): path.read_bytes() for path in files}


@dataclass(frozen=True)
class SoftToken:
    """A SoftHSM2 token made for a test."""

    module: str
    conf: str
    label: str
    pin: str = field(repr=False)
    so_pin: str = field(repr=False)

    @property
    def uri(self) -> str:
        return f"pkcs11:token={self.label}"

    def pkcs11_tool(self, *arguments: str, login: bool = True) -> str:
        """Run OpenSC's ``pkcs11-tool`` on this token, as a stranger to our code."""
        command = ["pkcs11-tool", "--module", self.module, "--token-label", self.label]
        command += ["--login", "--pin", "env:TEST_PIN"] if login else []
        environment = os.environ | {"TEST_PIN": self.pin, "SOFTHSM2_CONF": self.conf}
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home for what a test forgets to put elsewhere: nobody's own state or cache is read or written.

    It is the working directory, too, since Python imports from there what ``-c`` and ``-m`` name: programs that
    tests start get the package that the tests got.
    """
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.chdir(home)
        for name in [name for name in os.environ if name.startswith(("XDG_", "HSM_TOKEN_"))]:
            patch.delenv(name)
        yield home


@pytest.fixture(scope="session")
def softhsm_module() -> str:
    found = next((path for path in MODULES if Path(path).exists()), None)
    assert found, "SoftHSM2 is not installed: tests/run installs it"
    return found


@pytest.fixture(scope="session")
def softhsm_conf() -> Iterator[str]:
    """Path of a configuration with a token directory of this run; SoftHSM reads it once a process."""
    home = Path(tempfile.mkdtemp(prefix="softhsm-"))
    (home / "tokens").mkdir()
    conf = home / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {home}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    before = os.environ.get("SOFTHSM2_CONF")
    os.environ["SOFTHSM2_CONF"] = str(conf)
    yield str(conf)
    os.environ.pop("SOFTHSM2_CONF") if before is None else os.environ.update(SOFTHSM2_CONF=before)
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def new_token(softhsm_module: str, softhsm_conf: str) -> Callable[..., SoftToken]:
    """Make a token: ``new_token()`` or ``new_token("label")``."""

    def make(label: str | None = None) -> SoftToken:
        label = label or f"token-{secrets.token_hex(4)}"
        token = SoftToken(softhsm_module, softhsm_conf, label, leaks.pin(), leaks.pin())
        environment = os.environ | {"TEST_PIN": token.pin, "TEST_SO_PIN": token.so_pin}
        tool = ["pkcs11-tool", "--module", softhsm_module, "--so-pin", "env:TEST_SO_PIN"]
        listing = subprocess.check_output(["softhsm2-util", "--show-slots"], env=environment, text=True)
        slot = re.findall(r"^Slot (\d+)", listing, re.MULTILINE)[-1]  # the uninitialised one comes last
        for step in (
            ["--slot", slot, "--init-token", "--label", label],
            ["--token-label", label, "--login", "--login-type", "so", "--init-pin", "--pin", "env:TEST_PIN"],
        ):
            done = subprocess.run([*tool, *step], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return token

    return make


@pytest.fixture(scope="session")
def soft_token(new_token: Callable[..., SoftToken]) -> SoftToken:
    """One token that the tests of a run share; make another where a test changes more than its own keys."""
    return new_token()


@pytest.fixture(scope="session")
def faulty_shared_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_module(tmp_path_factory.mktemp("faulty"))


@pytest.fixture
def faulty(
    faulty_shared_object: Path, softhsm_module: str, tmp_path_factory: pytest.TempPathFactory
) -> FaultyModule:
    """A module that counts calls and fails as told, in front of the tokens of :func:`new_token`."""
    return FaultyModule(faulty_shared_object, Path(softhsm_module), tmp_path_factory.mktemp("faulty"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    report = _fail_skips((yield))
    return leaks.judged(report) if call.when == "teardown" else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    return _fail_skips((yield))


def _fail_skips(report):
    """In CI a skip is a failure: what is not run there is not run anywhere."""
    if os.environ.get("CI") and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI forbids: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    """Who signs the certificates of the loopback servers."""
    return trustme.CA()


@pytest.fixture(scope="session")
def ca_bundle(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture(scope="session")
def server_tls(ca: trustme.CA) -> ssl.SSLContext:
    """For servers on localhost that :func:`ca_bundle` vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(scope="session")
def tls_files(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("tls")
    certificate = ca.issue_cert("localhost", "127.0.0.1")
    chain, key = directory / "chain.pem", directory / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    return chain, key


@pytest.fixture
def endpoint(ca: trustme.CA) -> Iterator[Endpoint]:
    """A token endpoint that grants, unless ``answer`` is set to something else."""
    with Endpoint(ca, Reply()) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def office(
    new_token: Callable[..., SoftToken], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[offices.Office]:
    """An office whose key is registered at a rehearsal server that is up; leave it as you found it."""
    from hsm_signer.rehearsal import RehearsalServer

    home = tmp_path_factory.mktemp("office")
    certificate = home / "es256_cert.pem"
    new = offices.found(home, new_token())
    for command in (("key", "generate"), ("cert", "self-signed", "--out", str(certificate))):
        done = new.run(*command)
        assert done.status == 0, done.stderr
    with RehearsalServer({offices.CLIENT_ID: certificate}) as server:
        yield offices.found(
            home, new.token, token_endpoint=server.token_endpoint, certificate="es256_cert.pem"
        )


@pytest.fixture(scope="session")
def tls_office(
    new_token: Callable[..., SoftToken],
    tls_files: tuple[Path, Path],
    ca_bundle: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[offices.Office]:
    """As :func:`office`, with TLS, an issuer and a pinned key."""
    from hsm_signer.rehearsal import RehearsalServer

    home = tmp_path_factory.mktemp("office")
    certificate = home / "es256_cert.pem"
    new = offices.found(home, new_token())
    generated = new.run("key", "generate")
    assert generated.status == 0, generated.stderr
    assert new.run("cert", "self-signed", "--out", str(certificate)).status == 0
    with RehearsalServer({offices.CLIENT_ID: certificate}, tls=tls_files) as server:
        yield offices.found(
            home,
            new.token,
            token_endpoint=server.token_endpoint,
            issuer=server.issuer,
            ca_bundle=ca_bundle,
            certificate="es256_cert.pem",
            key_thumbprint=generated.stdout.strip(),
            timeout=5,
            deadline=10,
        )
