"""``hsm-token cert`` as a process: requests for a CA, its answer, and certificates that end."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import office as offices
import pytest
from conftest import SoftToken
from cryptography import x509
from office import CLIENT_ID, Office

from hsm_signer.rehearsal import RehearsalServer


@pytest.fixture(scope="module")
def token(new_token: Callable[..., SoftToken]) -> SoftToken:
    made = new_token()
    for label in ("mine", "other"):
        made.pkcs11_tool("--keypairgen", "--key-type", "EC:prime256v1", "--label", label, "--usage-sign")
    return made


@pytest.fixture
def office(tmp_path: Path, token: SoftToken) -> Office:
    return offices.found(tmp_path, token, key="mine")


def openssl(*arguments: str | Path) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA of the office, made by OpenSSL."""
    home = tmp_path_factory.mktemp("ca")
    subject = ("-subj", "/CN=Office CA", "-days", "9", "-noenc")
    openssl(
        "req", "-x509", "-newkey", "rsa:2048", *subject, "-keyout", home / "ca.key", "-out", home / "ca.crt"
    )
    return home


def issued(authority: Path, request: Path, out: Path) -> None:
    ca = ("-CA", authority / "ca.crt", "-CAkey", authority / "ca.key", "-days", "9")
    openssl("x509", "-req", "-in", request, *ca, "-copy_extensions", "copy", "-out", out)


def test_a_ca_signs_our_request_and_its_chain_is_imported(office: Office, authority: Path) -> None:
    request, returned = office.home / "das.csr", office.home / "das.crt"
    done = office.run("cert", "request", "--subject", "CN=das-2026,O=Office,C=CH", "--out", str(request))
    assert (done.status, done.stdout) == (0, "")
    assert "verify OK" in openssl("req", "-in", request, "-verify", "-noout")
    issued(authority, request, returned)
    chain = office.home / "chain.pem"
    chain.write_bytes((authority / "ca.crt").read_bytes() + returned.read_bytes())
    done = office.run("cert", "import", str(chain))
    assert (done.status, done.stdout) == (0, "")
    assert "CN=das-2026,O=Office,C=CH, issued by CN=Office CA" in done.stderr
    stored = office.token.pkcs11_tool("--list-objects", "--type", "cert", login=False)
    assert stored.count("Certificate Object") == 1
    (listed,) = [key for key in office.run("key", "list", "--json").json if key["label"] == "mine"]
    certificate = x509.load_der_x509_certificate(bytes.fromhex(listed["certificate"]))
    assert certificate == x509.load_pem_x509_certificate(returned.read_bytes())
    jwks = office.run("key", "export", "--format", "jwks").json
    assert len(jwks["keys"][0]["x5c"]) == 1


def test_a_request_has_the_name_that_wipo_knows_by_default(office: Office) -> None:
    pem = office.run("cert", "request").stdout
    request = x509.load_pem_x509_csr(pem.encode())
    assert request.subject.rfc4514_string() == f"CN={CLIENT_ID} private_key_jwt authentication"


def test_a_certificate_of_another_key_is_not_imported(office: Office, authority: Path) -> None:
    request, returned = office.home / "other.csr", office.home / "other.crt"
    assert office.run("cert", "request", "--key", "other", "--out", str(request)).status == 0
    issued(authority, request, returned)
    done = office.run("cert", "import", str(returned))
    assert (done.status, done.stdout) == (5, "")
    assert "0 of 1 certificates" in done.stderr


@pytest.mark.parametrize(
    "content", ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_not_imported_and_no_token_is_opened(office: Office, content: str) -> None:
    file = office.home / "odd.crt"
    file.write_text(content)
    (office.home / "pin").unlink()
    done = office.run("cert", "import", str(file))
    assert (done.status, done.stdout) == (2, "")
    assert "odd.crt" in done.stderr


@pytest.fixture(scope="module")
def certificates(token: SoftToken, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Certificates of the key ``mine`` by their days of validity."""
    home = tmp_path_factory.mktemp("certificates")
    office = offices.found(home, token, key="mine")
    made = {days: home / f"{days}.pem" for days in (1, 30, 90)}
    for days, file in made.items():
        assert office.run("cert", "self-signed", "--days", str(days), "--out", str(file)).status == 0
    return made


def test_check_tells_monitoring_what_ends_soon_and_needs_no_pin_for_files(
    office: Office, certificates: dict[int, Path]
) -> None:
    (office.home / "pin").unlink()
    office.configure(certificate=str(certificates[90]), next_certificate=str(certificates[30]))
    fine = office.run("cert", "check", "--within", "20d", "--json")
    soon = office.run("cert", "check", "--within", "60d")
    assert (fine.status, fine.stderr) == (0, "")
    assert [row["days_left"] for row in fine.json] == [89, 29]
    assert soon.status == 8
    assert f"error: the certificate {certificates[30]} ends on" in soon.stderr
    assert str(certificates[90]) not in soon.stderr
    assert len(soon.stdout.splitlines()) == 2


def test_check_looks_60_days_ahead_and_at_the_files_that_it_is_given(
    office: Office, certificates: dict[int, Path]
) -> None:
    assert office.run("cert", "check", str(certificates[90])).status == 0
    assert office.run("cert", "check", str(certificates[90]), str(certificates[30])).status == 8


def test_check_without_a_certificate_or_with_a_damaged_one_is_no_all_clear(office: Office) -> None:
    office.configure(key="other")
    assert office.run("cert", "check").status == 2
    (office.home / "odd.pem").write_text("odd")
    office.configure(certificate="odd.pem")
    assert office.run("cert", "check").status == 2
    assert office.run("cert", "check", "--within", "soon").status == 2


def test_check_reads_the_token_where_the_profile_names_no_file(
    office: Office, certificates: dict[int, Path]
) -> None:
    made = office.run("key", "generate", "on-token")
    assert made.status == 0
    office.configure(key="on-token")
    assert office.run("cert", "self-signed", "--days", "30", "--store").status == 0
    done = office.run("cert", "check", "--json")
    assert done.status == 8
    assert [(row["certificate"], row["days_left"]) for row in done.json] == [("of on-token on the token", 29)]
    fetch = office.run("assertion", "--token-endpoint", "http://127.0.0.1:9/token")
    assert fetch.status == 0
    assert "warning: the certificate of on-token on the token ends on" in fetch.stderr


@pytest.mark.parametrize(("days", "warned"), [(1, True), (30, True), (90, False)])
def test_fetch_warns_from_60_days_ahead_and_prints_its_token(
    office: Office, certificates: dict[int, Path], days: int, warned: bool
) -> None:
    with RehearsalServer({CLIENT_ID: certificates[90]}) as server:
        office.configure(certificate=str(certificates[days]), token_endpoint=server.token_endpoint)
        done = office.run("fetch")
    assert done.status == 0
    assert done.stdout.count(".") == 2
    assert (f"warning: the certificate {certificates[days]} ends on" in done.stderr) is warned
    assert bool(done.stderr) is warned


def test_a_certificate_file_that_is_gone_costs_a_warning_and_no_token(
    office: Office, certificates: dict[int, Path]
) -> None:
    with RehearsalServer({CLIENT_ID: certificates[90]}) as server:
        office.configure(certificate="gone.pem", token_endpoint=server.token_endpoint)
        done = office.run("fetch", "--format", "json")
    assert done.status == 0
    assert "access_token" in json.loads(done.stdout)
    assert "warning: certificates are not watched" in done.stderr


@pytest.mark.parametrize("command", ["cert self-signed --store", "cert request"])
def test_an_output_file_that_exists_is_told_before_the_token_is_opened(office: Office, command: str) -> None:
    (office.home / "pin").unlink()
    out = office.home / "there"
    out.write_text("kept")
    done = office.run(*command.split(), "--out", str(out))
    assert (done.status, out.read_text()) == (2, "kept")
    assert "nothing is overwritten" in done.lines[0]


def test_doctor_refuses_a_bundle_that_exists_before_it_looks(office: Office) -> None:
    out = office.home / "there"
    out.write_text("kept")
    done = office.run("doctor", "--offline", "--bundle", str(out))
    assert (done.status, done.stdout, out.read_text()) == (2, "", "kept")


def test_another_key_than_the_pinned_one_is_looked_at_and_signs_nothing(office: Office) -> None:
    def thumbprint(*options: str, **environment: str) -> str:
        done = office.run("key", "export", "--format", "thumbprint", *options, environment=environment)
        assert done.status == 0, done.stderr
        return done.stdout.strip()

    mine = thumbprint()
    assert office.run("cert", "self-signed", "--out", str(office.home / "mine.pem")).status == 0
    assert office.run("cert", "self-signed", "--key", "other", "--store").status == 0
    office.configure(key_thumbprint=mine, certificate="mine.pem", token_endpoint="http://127.0.0.1:1/token")
    other = thumbprint("--key", "other")
    assert other != mine == thumbprint("--key", "pkcs11:object=mine")

    looked = office.run("cert", "check", "--key", "other")
    assert looked.status == 0
    assert looked.lines == ["warning: other is not the key of profile office: its pin is not compared"]
    assert looked.stdout.startswith("of other on the token")
    assert office.run("key", "prove", "--key", "other").status == 0

    named = {"HSM_TOKEN_KEY": "other"}
    for command, environment in (
        (("key", "export"), named),  # not by the person who types
        (("assertion", "--key", "other"), {}),
        (("fetch", "--no-cache", "--key", "other"), {}),
        (("cert", "self-signed", "--key", "other"), {}),
        (("cert", "request", "--key", "other"), {}),
    ):
        done = office.run(*command, environment=environment)
        assert (done.status, done.stdout) == (5, ""), command
        assert done.lines[-2].startswith("error: key pkcs11:object=other is not the pinned"), done.stderr
        assert done.lines[-1].startswith("hint: profile office pins the key mine: "), done.stderr
