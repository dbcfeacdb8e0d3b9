"""Certificates and requests, read by OpenSSL, cryptography and pkilint."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509 as reference
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from software_signer import SoftwareSigner

from hsm_signer import ecdsa, x509
from hsm_signer.errors import ConfigError, KeyMismatchError, SignatureInvalidError

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
NAME = "das-api-auth private_key_jwt authentication"


SIGNER = SoftwareSigner()


def self_signed(**changes: object) -> bytes:
    arguments: dict[str, object] = {"common_name": NAME, "not_before": NOW, "days": 730} | changes
    return x509.self_signed(SIGNER, **arguments)


def openssl(*arguments: str, der: bytes) -> str:
    done = subprocess.run(["openssl", *arguments], input=der, capture_output=True, check=True)
    return (done.stdout + done.stderr).decode(errors="replace")


def test_cryptography_reads_the_certificate_of_the_contract() -> None:
    certificate = reference.load_der_x509_certificate(self_signed())
    certificate.verify_directly_issued_by(certificate)
    assert certificate.version is reference.Version.v3
    assert certificate.public_key() == SIGNER.key.public_key()
    assert certificate.subject == certificate.issuer
    assert [a.value for a in certificate.subject] == [NAME]
    assert certificate.not_valid_before_utc == NOW
    assert certificate.not_valid_after_utc == NOW + timedelta(days=730)
    assert isinstance(certificate.signature_hash_algorithm, SHA256)


def test_its_extensions_say_end_entity_that_signs_and_name_the_key() -> None:
    extensions = reference.load_der_x509_certificate(self_signed()).extensions
    constraints = extensions.get_extension_for_class(reference.BasicConstraints)
    usage = extensions.get_extension_for_class(reference.KeyUsage)
    subject_key = extensions.get_extension_for_class(reference.SubjectKeyIdentifier)
    authority_key = extensions.get_extension_for_class(reference.AuthorityKeyIdentifier)
    assert (constraints.critical, constraints.value.ca) == (True, False)
    assert usage.critical
    assert usage.value == reference.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    assert not subject_key.critical
    assert not authority_key.critical
    assert subject_key.value.digest == authority_key.value.key_identifier
    assert len(extensions) == 4


def test_serial_numbers_are_positive_have_20_bytes_and_differ() -> None:
    serials = {reference.load_der_x509_certificate(self_signed()).serial_number for _ in range(8)}
    assert len(serials) == 8
    assert all(1 << 152 <= serial < 1 << 159 for serial in serials)


@pytest.mark.parametrize(
    ("not_before", "kinds"),
    [
        (datetime(2047, 12, 31, 23, 59, 59, tzinfo=UTC), (0x17, 0x17)),
        (datetime(2048, 1, 2, tzinfo=UTC), (0x17, 0x18)),
        (datetime(2049, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), (0x17, 0x18)),
        (datetime(2050, 1, 1, tzinfo=UTC), (0x18, 0x18)),
        (datetime(2050, 1, 1, 1, tzinfo=UTC).astimezone(), (0x18, 0x18)),
        (datetime(1999, 12, 31, tzinfo=UTC), (0x17, 0x17)),
        (int(NOW.timestamp()), (0x17, 0x17)),
    ],
)
def test_times_are_utctime_up_to_2049_and_generalizedtime_from_2050(
    not_before: datetime | int, kinds: tuple[int, int]
) -> None:
    der = self_signed(not_before=not_before)
    start = not_before if isinstance(not_before, datetime) else datetime.fromtimestamp(not_before, UTC)
    start = start.replace(microsecond=0)
    certificate = reference.load_der_x509_certificate(der)
    assert certificate.not_valid_before_utc == start
    assert certificate.not_valid_after_utc == start + timedelta(days=730)
    read = x509.read_certificate(der)
    assert (read.not_before, read.not_after) == (start, start + timedelta(days=730))
    lines = openssl("asn1parse", "-inform", "DER", der=der).splitlines()
    found = [line for line in lines if "TIME" in line]
    assert [0x17 if "UTCTIME" in line else 0x18 for line in found] == list(kinds)


@pytest.mark.parametrize(
    "changes",
    [
        {"days": 0},
        {"days": -1},
        {"days": 3_000_000},
        {"days": 10**12},
        {"not_before": datetime(2026, 1, 1)},
        {"not_before": datetime(1949, 12, 31, tzinfo=UTC)},
        {"not_before": 10**18},
        {"common_name": ""},
        {"common_name": "a" * 65},
        {"common_name": "a\nb"},
        {"common_name": None},
        {"subject": "CN=a"},
    ],
)
def test_what_a_certificate_cannot_hold_is_a_configuration_error(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        self_signed(**changes)


def test_a_subject_is_encoded_in_the_order_and_types_of_the_standards() -> None:
    der = self_signed(common_name=None, subject="CN=das\\, 2026,OU=Patents+UID=ü,O=Office,DC=example,C=CH")
    subject = reference.load_der_x509_certificate(der).subject
    assert [[a.oid for a in rdn] for rdn in subject.rdns] == [
        [NameOID.COUNTRY_NAME],
        [NameOID.DOMAIN_COMPONENT],
        [NameOID.ORGANIZATION_NAME],
        [NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.USER_ID],
        [NameOID.COMMON_NAME],
    ]
    assert subject.rfc4514_string() == "CN=das\\, 2026,OU=Patents+UID=ü,O=Office,DC=example,C=CH"
    assert x509.read_certificate(der).subject == subject.rfc4514_string()
    lines = openssl("x509", "-inform", "DER", "-noout", "-subject", "-nameopt", "show_type", der=der)
    assert "C=PRINTABLESTRING:CH, DC=IA5STRING:example, O=UTF8STRING:Office" in lines


def test_openssl_verifies_the_certificate_strictly(tmp_path: Path) -> None:
    file = tmp_path / "es256_cert.pem"
    file.write_text(ecdsa.pem("CERTIFICATE", self_signed()))
    strict = ["verify", "-x509_strict", "-check_ss_sig", "-attime", str(int(NOW.timestamp()) + 60)]
    assert "OK" in openssl(*strict, "-CAfile", str(file), str(file), der=b"")
    assert "Version: 3" in openssl("x509", "-noout", "-text", der=file.read_bytes())


@pytest.mark.parametrize(
    "not_before", [NOW, datetime(2048, 6, 1, tzinfo=UTC), datetime(2055, 1, 1, tzinfo=UTC)]
)
def test_pkilint_has_nothing_to_say(not_before: datetime, tmp_path: Path) -> None:
    file = tmp_path / "certificate.der"
    file.write_bytes(self_signed(common_name=None, subject="CN=das,O=Office,C=CH", not_before=not_before))
    command = [
        sys.executable,
        "-m",
        "pkilint.bin.lint_pkix_cert",
        "lint",
        "-s",
        "NOTICE",
        "-f",
        "JSON",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(done.stdout)["results"] == [], done.stdout
    assert done.returncode == 0


def test_a_request_is_verified_by_openssl_and_asks_for_the_extensions() -> None:
    der = x509.request(SIGNER, common_name=NAME)
    assert "self-signature verify OK" in openssl("req", "-inform", "DER", "-verify", "-noout", der=der)
    found = reference.load_der_x509_csr(der)
    assert found.is_signature_valid
    assert found.public_key() == SIGNER.key.public_key()
    assert [a.value for a in found.subject] == [NAME]
    assert [e.oid for e in found.extensions] == [
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    ]
    assert x509.request(SIGNER, subject=f"CN={NAME}")


def test_nothing_is_made_that_does_not_verify_under_its_own_key() -> None:
    liar = SoftwareSigner()
    liar.jwk = SIGNER.jwk
    with pytest.raises(SignatureInvalidError):
        x509.self_signed(liar, common_name=NAME, not_before=NOW, days=1)
    with pytest.raises(SignatureInvalidError):
        x509.request(liar, common_name=NAME)


def certificate_of(key: ec.EllipticCurvePrivateKey) -> reference.Certificate:
    name = reference.Name([reference.NameAttribute(NameOID.COMMON_NAME, "office")])
    builder = reference.CertificateBuilder(name, name, key.public_key(), 7, NOW, NOW + timedelta(days=61))
    return builder.sign(key, SHA256())


def test_a_certificate_of_somebody_else_is_read_in_pem_and_der() -> None:
    theirs = certificate_of(SIGNER.key)
    pem = theirs.public_bytes(Encoding.PEM)
    for data in (pem, theirs.public_bytes(Encoding.DER), b"Bag Attributes\n" + pem.replace(b"\n", b"\r\n")):
        read = x509.read_certificate(data)
        assert read.thumbprint == SIGNER.kid
        assert read.holds(SIGNER.kid)
        assert read.jwk == SIGNER.jwk
        assert (read.subject, read.issuer, read.serial_number) == ("CN=office", "CN=office", 7)
        assert read.fingerprint == theirs.fingerprint(SHA256()).hex()
        assert read.pem.encode() == pem


def test_days_left_are_whole_days_and_negative_afterwards() -> None:
    read = x509.read_certificate(certificate_of(SIGNER.key).public_bytes(Encoding.DER))
    end = int((NOW + timedelta(days=61)).timestamp())
    assert [read.days_left(end - offset) for offset in (61 * 86400, 86400, 86399, 0, -1)] == [61, 1, 0, 0, -1]


def test_a_certificate_with_another_kind_of_key_is_read_but_holds_no_key_of_ours() -> None:
    other = certificate_of(ec.generate_private_key(ec.SECP384R1()))
    read = x509.read_certificate(other.public_bytes(Encoding.DER))
    assert not read.holds(SIGNER.kid)
    with pytest.raises(KeyMismatchError, match="CN=office"):
        _ = read.thumbprint


def test_a_chain_is_several_certificates() -> None:
    pem = certificate_of(SIGNER.key).public_bytes(Encoding.PEM)
    assert [read.thumbprint for read in x509.read_certificates(pem + b"and\n" + pem)] == [SIGNER.kid] * 2
    with pytest.raises(ConfigError, match="found 2"):
        x509.read_certificate(pem + pem)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\x30\x00",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n",
        ecdsa.pem("CERTIFICATE REQUEST", x509.request(SIGNER, common_name=NAME)).encode(),
        x509.request(SIGNER, common_name=NAME),
        self_signed() + b"\x00",
        self_signed()[:-1],
        self_signed() + b"\x00" * x509.MAX_BYTES,
        self_signed(not_before=datetime(2050, 1, 1, tzinfo=UTC)).replace(b"20500101", b"00000101"),
    ],
)
def test_what_is_no_certificate_is_a_configuration_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        x509.read_certificate(data)


DER = self_signed(common_name=None, subject="CN=das,DC=example,C=CH")


@given(st.integers(0, len(DER) - 1), st.integers(1, 255), st.binary(max_size=3))
def test_a_damaged_certificate_is_read_or_refused_and_nothing_else(at: int, flip: int, extra: bytes) -> None:
    damaged = DER[:at] + bytes([DER[at] ^ flip]) + extra + DER[at + 1 :]
    try:
        read = x509.read_certificates(damaged)[0]
        read.holds(SIGNER.kid)
    except ConfigError:
        return
    assert read.subject.isprintable()
