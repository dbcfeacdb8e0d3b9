"""Enrolment: from a SoftHSM2 token to a folder that strangers can check."""

import hashlib
import json
import resource
import stat
import subprocess
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SoftToken
from cryptography import x509 as reference
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from joserfc.jwk import ECKey, KeySet
from stranger import plant

from hsm_signer import enrolment, open_token
from hsm_signer.enrolment import Enrolment, check_free, enrol, ensure_key, in_groups, write
from hsm_signer.errors import ConfigError, KeyExportableError, KeyMismatchError, KeyNotFoundError
from hsm_signer.hsm.token import Token

NOW = 1_795_000_000
CLIENT = "das-api-auth"


@pytest.fixture
def token(soft_token: SoftToken) -> Iterator[Token]:
    with open_token(soft_token.uri, module=soft_token.module, pin=soft_token.pin) as opened:
        yield opened


@pytest.fixture(scope="module")
def enrolled(soft_token: SoftToken) -> Enrolment:
    with open_token(soft_token.uri, module=soft_token.module, pin=soft_token.pin) as opened:
        opened.generate_key("enrolled")
        return enrol(opened, "enrolled", client_id=CLIENT, common_name="das", days=730, now=NOW)


@pytest.fixture
def folder(enrolled: Enrolment, tmp_path: Path) -> Path:
    write(enrolled, tmp_path / "das-2026")
    return tmp_path / "das-2026"


def thumbprints(token: Token, label: str) -> list[str | None]:
    infos = token.keys()
    return [info.thumbprint for info in infos if info.label == label]


def openssl(*arguments: str) -> str:
    return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout


def test_the_folder_holds_the_five_files_and_nothing_else(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {
        "es256_cert.pem",
        "es256_public.pem",
        "jwks.json",
        "receipt.json",
        "README.txt",
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_certificate_public_key_and_jwks_are_one_key(folder: Path) -> None:
    certificate = reference.load_pem_x509_certificate((folder / "es256_cert.pem").read_bytes())
    certificate.verify_directly_issued_by(certificate)
    public = load_pem_public_key((folder / "es256_public.pem").read_bytes())
    assert certificate.public_key() == public
    jwks = json.loads((folder / "jwks.json").read_text())
    (key,) = KeySet.import_key_set(jwks).keys
    assert isinstance(key, ECKey)
    assert key.as_pem(private=False) == (folder / "es256_public.pem").read_bytes()
    (member,) = jwks["keys"]
    assert member["kid"] == key.thumbprint()
    assert (member["use"], member["alg"]) == ("sig", "ES256")


def test_x5c_and_x5t_are_the_certificate(folder: Path) -> None:
    (member,) = json.loads((folder / "jwks.json").read_text())["keys"]
    (x5c,) = member["x5c"]
    pem = "".join((folder / "es256_cert.pem").read_text().splitlines()[1:-1])
    assert x5c == pem
    digest = openssl("x509", "-in", str(folder / "es256_cert.pem"), "-noout", "-fingerprint", "-sha256")
    expected = bytes.fromhex(digest.strip().partition("=")[2].replace(":", ""))
    assert member["x5t#S256"] == urlsafe_b64encode(expected).rstrip(b"=").decode()


def test_the_receipt_has_the_fingerprints_that_openssl_finds(folder: Path) -> None:
    receipt = json.loads((folder / "receipt.json").read_text())
    printed = openssl("x509", "-in", str(folder / "es256_cert.pem"), "-noout", "-fingerprint", "-sha256")
    fingerprint = printed.strip().partition("=")[2].replace(":", "")
    assert receipt["certificate"]["sha256"] == fingerprint.lower()
    assert receipt["certificate"]["sha256_in_groups"].split() == [
        fingerprint[at : at + 4] for at in range(0, 64, 4)
    ]
    public = subprocess.check_output(
        ["openssl", "pkey", "-pubin", "-in", str(folder / "es256_public.pem"), "-outform", "DER"]
    )
    assert receipt["public_key"]["sha256"] == hashlib.sha256(public).hexdigest()


def test_the_receipt_tells_who_what_when_and_where(
    folder: Path, soft_token: SoftToken, enrolled: Enrolment
) -> None:
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["client_id"] == CLIENT
    assert receipt["send"] == "es256_cert.pem"
    assert receipt["made_at"] == "2026-11-18T11:06:40Z"
    assert receipt["certificate"]["not_before"] == "2026-11-18T11:01:40Z"
    assert receipt["certificate"]["not_after"] == "2028-11-17T11:01:40Z"
    assert receipt["public_key"]["thumbprint"] == enrolled.certificate.thumbprint
    assert receipt["proof"]["token"]["label"] == soft_token.label
    assert receipt["proof"]["token"]["serial"] == enrolled.proof.token.serial
    assert receipt["proof"]["ok"] is True
    assert set(receipt["versions"]) >= {"hsm-signer", "python-pkcs11"}


def test_receipt_and_readme_say_that_softhsm_is_no_hardware_and_a_proof_no_attestation(folder: Path) -> None:
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["proof"]["hardware"] is False
    readme = " ".join((folder / "README.txt").read_text().split())
    for text in (receipt["proof"]["statement"], readme):
        assert "as reported by the module, not an attestation" in text
        assert "no hardware" in text


def test_the_readme_says_which_file_to_send_and_has_the_fingerprints(folder: Path) -> None:
    readme = (folder / "README.txt").read_text()
    receipt = json.loads((folder / "receipt.json").read_text())
    assert "Send es256_cert.pem" in readme
    assert "no other file has to be" in readme
    for name in ("certificate", "public_key"):
        assert all(group in readme for group in receipt[name]["sha256_in_groups"].split())
    assert receipt["public_key"]["thumbprint"] in readme
    assert "{" not in readme


def test_nothing_is_overwritten_whatever_has_the_name(enrolled: Enrolment, tmp_path: Path) -> None:
    for number, name in enumerate(enrolment.FILES):
        directory = tmp_path / str(number)
        directory.mkdir(mode=0o700)
        (directory / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=name):
            check_free(directory)
        with pytest.raises(ConfigError, match=name):
            write(enrolled, directory)
        assert [file.name for file in directory.iterdir()] == [name]
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_a_link_or_open_to_others_is_refused(enrolled: Enrolment, tmp_path: Path) -> None:
    real, link, shared = tmp_path / "real", tmp_path / "link", tmp_path / "shared"
    real.mkdir(mode=0o700)
    link.symlink_to(real)
    shared.mkdir()
    shared.chmod(0o777)
    for directory in (link, shared):
        with pytest.raises(ConfigError):
            check_free(directory)
        with pytest.raises(ConfigError):
            write(enrolled, directory)
    assert not list(real.iterdir())
    assert not list(shared.iterdir())


def test_other_files_in_the_folder_stay_and_a_missing_folder_is_free(
    enrolled: Enrolment, tmp_path: Path
) -> None:
    check_free(tmp_path / "not" / "there")
    (tmp_path / "notes.txt").write_text("mine")
    write(enrolled, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_where_one_file_cannot_be_written_none_stays(enrolled: Enrolment, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # enough for the certificate, not for the receipt
    try:
        with pytest.raises(ConfigError, match="too large"):
            write(enrolled, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out").iterdir()) == []
    write(enrolled, tmp_path / "out")


def test_a_key_is_generated_once_and_then_taken(token: Token) -> None:
    assert ensure_key(token, "once", thumbprint=None)
    first = thumbprints(token, "once")
    assert not ensure_key(token, "once", thumbprint=first[0])
    assert not ensure_key(token, "pkcs11:object=once", thumbprint=None)
    assert thumbprints(token, "once") == first


def test_a_key_that_is_pinned_is_never_made_anew(token: Token) -> None:
    with pytest.raises(KeyNotFoundError):
        ensure_key(token, "lost", thumbprint="A" * 43)
    assert not thumbprints(token, "lost")


def test_a_uri_without_a_label_cannot_be_made(token: Token) -> None:
    with pytest.raises(KeyNotFoundError):
        ensure_key(token, "pkcs11:id=%07%08", thumbprint=None)


def test_another_key_than_the_pinned_one_is_not_enrolled(token: Token) -> None:
    token.generate_key("other")
    with pytest.raises(KeyMismatchError):
        enrol(token, "other", client_id=CLIENT, common_name="das", days=730, now=NOW, thumbprint="A" * 43)


def test_a_key_that_can_leave_the_token_is_not_enrolled(token: Token, soft_token: SoftToken) -> None:
    soft_token.pkcs11_tool(
        *("--keypairgen", "--key-type", "EC:prime256v1", "--label", "leaky", "--usage-sign", "--extractable")
    )
    with pytest.raises(KeyExportableError):
        ensure_key(token, "leaky", thumbprint=None)
    with pytest.raises(KeyExportableError):
        enrol(token, "leaky", client_id=CLIENT, common_name="das", days=730, now=NOW)


def test_a_planted_public_key_is_not_enrolled(token: Token, soft_token: SoftToken, tmp_path: Path) -> None:
    """Anybody can plant a public key without a PIN; it must not get into a folder."""
    info = token.generate_key("planted")
    plant(soft_token, "planted", info.id, tmp_path)
    made = enrol(token, "planted", client_id=CLIENT, common_name="das", days=730, now=NOW)
    assert made.certificate.thumbprint == info.thumbprint


def test_groups_of_four_are_read_out() -> None:
    assert in_groups("0123456789abcdef") == "0123 4567 89AB CDEF"
