"""What must hold whatever the bytes: one target for each reader of what others wrote.

A target takes bytes and fails by an exception: an error that its reader does not document, or an assertion. Its
seeds are made here, so that no corpus has to be kept. Nothing in here needs a fuzzer: ``tests/test_fuzz.py``
gives each target its own seeds.
"""

import json
import re
import tempfile
import tomllib
import warnings
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from cryptography import x509 as reference
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from hsm_signer import config, ecdsa, profile_file, toml, x509
from hsm_signer.errors import (
    ConfigError,
    HsmSignerError,
    KeyMismatchError,
    OAuthError,
    SignatureFormatError,
    TransportError,
)
from hsm_signer.hsm import uri as pkcs11_uri
from hsm_signer.oauth import response as token_response


def said(error: HsmSignerError) -> str:
    """All that a person could read of an error."""
    return f"{error} {error.hint} {error.args}"


# DER signatures: the first byte chooses the curve

ORDERS = {
    32: 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    48: 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
    66: int("01" + "ff" * 32 + "fa51868783bf2f966b7fcc0148f709a5d03bb5c9b8899c47aebb6fb71e91386409", 16),
}


def der(data: bytes) -> None:
    """A DER signature is taken exactly where cryptography reads one with 0 < r, s < n, and gives the same."""
    size, signature = sorted(ORDERS)[data[0] % 3 if data else 0], data[1:]
    try:
        raw = ecdsa.raw_from_der(signature, size)
    except SignatureFormatError:
        raw = None
    assert raw == _read_by_cryptography(signature, size)
    try:
        from_device = ecdsa.raw_from_device(signature)
    except SignatureFormatError:
        return
    if len(signature) == 64:
        assert from_device == signature
    assert ecdsa.raw_from_der(ecdsa.der_from_raw(from_device)) == from_device
    if raw is not None and size == 32 and len(signature) != 64:
        assert from_device == raw
        assert ecdsa.der_from_raw(raw) == signature


def _read_by_cryptography(signature: bytes, size: int) -> bytes | None:
    try:
        r, s = decode_dss_signature(signature)
    except ValueError:
        return None
    order = ORDERS[size]
    return r.to_bytes(size) + s.to_bytes(size) if 0 < r < order and 0 < s < order else None


def der_seeds() -> Iterator[bytes]:
    for curve, order in enumerate(ORDERS.values()):
        for r in (0, 1, 0x7F, 0x80, order // 3, order - 1, order):
            yield bytes([curve]) + encode_dss_signature(r, order // 5)
            yield bytes([curve]) + encode_dss_signature(order // 7, r)
    yield b"\0" + (ORDERS[32] // 3).to_bytes(32) * 2


# PKCS#11 URIs


def uri(data: bytes) -> None:
    """Anything but a URI or a label is a ConfigError that quotes no PIN; what is read is read again the same."""
    text = data.decode(errors="surrogateescape")  # as an argument of the command line comes
    for read in (pkcs11_uri.parse, pkcs11_uri.token_uri, pkcs11_uri.key_uri):
        try:
            found = read(text)
        except ConfigError as refused:
            for pin in re.findall(r"pin-value=([0-9]{6,})", text):
                assert text.count(pin) > 1 or pin not in said(refused)
            continue
        assert pkcs11_uri.parse(str(found)) == found
        assert found.token_attributes().keys().isdisjoint({"object", "type", "id"})
        if not text.lower().startswith("pkcs11:"):
            assert text in (found.token, found.object)


def uri_seeds() -> Iterable[bytes]:
    return (
        b"das-2026",
        b"pkcs11:",
        b"pkcs11:token=office;object=das%202026;type=private;id=%01%ff",
        b"PKCS11:manufacturer=a;serial=1;model=b;slot-id=18446744073709551615;library-version=2.40",
        b"pkcs11:library-manufacturer=a;library-description=b;slot-manufacturer=c;slot-description=d%C3%BC",
        b"pkcs11:token=a?module-path=/usr/lib/x.so&pin-value=19283746",
        b"pkcs11:token=a?pin-source=file:/etc/pin&module-name=x",
        b"pkcs11:token=a;pin-value=19283746",
        b"pkcs11:token=a;pin-value=19283746#",
        b"pkcs11:token=a;type=privatepin-value=19283746",
        b"pkcs11:type=cert;token=%zz",
    )


# Answers of a token endpoint: three bytes choose status, media type and what was asked for; the rest is the body

NOW = 1_795_507_000
STATUSES = (200, 400, 401, 429, 500, 503, 201, 302, 204, 100, 599)
MEDIA_TYPES = (
    "application/json",
    "application/json;charset=UTF-8",
    "text/html",
    None,
    "\u202eapplication/json",
)
ASKED = ("", "a", "a b", "das-api/das-access")
ACCESS_TOKEN = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJjYW5hcnkifQ.c2lnbmF0dXJlLW9mLXRoZS1jYW5hcnk"
COMPACT_JWS = re.compile(r"(?a)ey[\w-]{10,}\.[\w-]{10,}\.[\w-]{20,}")


def response(data: bytes) -> None:
    """A token is the one that the server granted; all else is one of two errors, printable and without a JWS."""
    choice, body = data[:3].ljust(3, b"\0"), data[3:]
    status = STATUSES[choice[0] % len(STATUSES)]
    media_type = MEDIA_TYPES[choice[1] % len(MEDIA_TYPES)]
    asked, narrower = ASKED[choice[2] % len(ASKED)], choice[2] >= 0x80
    try:
        granted = token_response.parse(
            status, media_type, body, asked_scope=asked, now=NOW, allow_narrower_scope=narrower
        )
    except HsmSignerError as refused:
        assert type(refused).__name__ in ("OAuthError", "TokenResponseError", "TransportError")
        assert isinstance(refused, OAuthError | TransportError)
        assert str(refused).isprintable()
        assert refused.hint is None or refused.hint.isprintable()
        assert refused.__context__ is None
        assert len(str(refused)) < 1200
        assert not COMPACT_JWS.search(said(refused))
        return
    members = json.loads(body)
    assert (status, (media_type or "").partition(";")[0]) == (200, "application/json")
    assert granted.raw == members
    assert granted.access_token == members["access_token"]
    assert re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", granted.access_token)  # RFC 6750 §2.1
    assert members["token_type"].lower() == granted.token_type.lower() == "bearer"
    assert members.get("error") is None
    assert granted.expires_at is None or NOW < granted.expires_at <= NOW + 86_400
    assert narrower or set(asked.split()) <= set(granted.scope.split())
    shown = f"{granted!r} {granted}"
    assert not COMPACT_JWS.search(shown.replace(granted.scope, ""))


def response_seeds() -> Iterator[bytes]:
    grant = {"access_token": ACCESS_TOKEN, "token_type": "Bearer", "expires_in": 3599, "scope": "a b"}
    refusal = {"error": "invalid_client", "error_description": f"no: {ACCESS_TOKEN} \x1b[31m [bold]\u202e"}
    bodies = [json.dumps(grant | changes) for changes in ({}, {"expires_in": "5"}, {"expires_in": 5.0})]
    bodies += [json.dumps(grant | {name: None}) for name in grant]
    bodies += [
        json.dumps(refusal),
        json.dumps(grant | refusal),
        "[]",
        '{"a":1,"a":2}',
        '{"a":NaN}',
        "[" * 3000,
    ]
    for body in bodies:
        yield b"\0\0\0" + body.encode()
    for status in range(len(STATUSES)):
        yield bytes([status, 0, 2]) + json.dumps(refusal).encode()
    for n in range(len(MEDIA_TYPES)):
        yield bytes([0, n, 0x82]) + json.dumps(grant | {"scope": "a"}).encode()


# The configuration file


def configuration(data: bytes) -> None:
    """A file is read or is a ConfigError that quotes no PIN; what is read, and what is changed in it, holds."""
    path = _scratch() / "config.toml"
    path.write_bytes(data)
    for profile in (None, *list(_profiles(data))[:3]):
        try:
            found = config.load({"config": str(path), "profile": profile}, environ={})
        except ConfigError as refused:
            for pin in re.findall(rb'pin = "([0-9]{6,})"', data):
                assert data.count(pin) > 1 or pin.decode() not in said(refused)
            continue
        given = {name: getattr(found, name) for name in found.origins if found.origin(name) == "profile"}
        again = _scratch() / "again.toml"
        again.write_text("[profiles.again]\n" + "".join(_lines(given)))
        same = config.load({"config": str(again)}, environ={})
        assert {name: getattr(same, name) for name in given} == given
    for profile in list(_profiles(data))[:3]:
        _changed(data.decode(), profile, {"key": "das-2028", "next-key": None, "certificate": 'a"b\\c'})


def _changed(text: str, profile: str, changes: dict[str, str | None]) -> None:
    try:
        after = profile_file.changed(text, profile, changes)
    except ConfigError:
        return
    settings = tomllib.loads(after)["profiles"][profile]
    assert {name: settings.get(name) for name in changes} == changes
    assert len(set(after.splitlines()) - set(text.splitlines())) <= len(changes)  # every other line stays
    assert profile_file.changed(after, profile, changes) == after


def _profiles(data: bytes) -> dict[str, object]:
    try:
        profiles = tomllib.loads(data.decode()).get("profiles", {})
    except (ValueError, RecursionError):
        return {}
    return profiles if isinstance(profiles, dict) else {}


def _lines(settings: dict[str, object]) -> Iterator[str]:
    for name, value in settings.items():
        yield f"{name.replace('_', '-')} = {_written(value)}\n"


def _written(value: object) -> str:
    if isinstance(value, str):
        return toml.text(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml.key(name)} = {_written(each)}" for name, each in value.items()) + "}"
    return json.dumps(value)


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # removed at the end, with the last reference to it


def _scratch() -> Path:
    return Path(_directory().name)


def configuration_seeds() -> Iterator[bytes]:
    values = ('"a"', '""', "1", "-1", "1.5", "true", "[1, 2]", "[]", '{a = "b"}', "2026-11-24", '"a\\u0000"')
    values += (
        '"https://example.com/token"',
        '"command:bin/pin x"',
        '"file:pin"',
        '"wipo-das"',
        '"oidc"',
        '"/a"',
    )
    for name in config.SETTINGS:
        for value in values:
            yield f"[profiles.das]\n{name.replace('_', '-')} = {value}\n".encode()
    whole = """\
# our office
[profiles.das]   # production
preset         = "wipo-das"
module         = "/usr/lib/softhsm/libsofthsm2.so"
token          = "pkcs11:token=office"
key            = "das-2026"      # until 2028
key-thumbprint = 'old'
client-id      = "das-api-auth"
pin-source     = "systemd:hsm-pin"

[profiles.das.module-env]
SOFTHSM2_CONF = "/etc/softhsm2.conf"

[profiles.default]
timeout = [5, 15.0]
"""
    yield from (whole.encode(), whole.replace("\n", "\r\n").encode())
    yield from (
        b"",
        b"profiles = 1",
        b"[profiles]\ndas = 1",
        b"pin = 1",
        b"\xff",
        b"[profiles]\ndas.key = 'a'",
    )
    yield b'[profiles.das]\npin = "19283746"\n'
    yield b'[profiles.das]\nkey = """\n[profiles.das]\nkey = "b"\n"""\n'
    yield b"[profiles.das]\nkey = " + b"[" * 2000 + b"]" * 2000


# Certificates


def certificate(data: bytes) -> None:
    """Certificates are read or are a ConfigError; where cryptography reads one too, both read the same."""
    try:
        found = x509.read_certificates(data)
    except ConfigError:
        return
    assert found
    for each in found:
        assert x509.read_certificate(each.pem.encode()) == each
        assert f"{each.subject} {each.issuer}".isprintable()
        assert re.fullmatch("[0-9a-f]{64}", each.fingerprint)
        assert isinstance(each.days_left(NOW), int)
        try:
            jwk = each.jwk
        except KeyMismatchError:
            jwk = None
        assert jwk is None or each.holds(each.thumbprint)
        _as_cryptography_reads(each, jwk)


def _as_cryptography_reads(ours: x509.Certificate, jwk: dict[str, str] | None) -> None:
    with warnings.catch_warnings(action="ignore"):  # of serial numbers that are not positive
        try:
            theirs = reference.load_der_x509_certificate(ours.der)
            times = theirs.not_valid_before_utc, theirs.not_valid_after_utc
            key = theirs.public_key()
        except Exception:  # noqa: BLE001  # whatever it does not read: it is stricter, we check no signature
            return
    assert ours.serial_number == theirs.serial_number
    assert (ours.not_before, ours.not_after) == times
    is_p256 = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    if jwk is not None:
        assert is_p256
        x, y = (int.from_bytes(urlsafe_b64decode(jwk[name] + "=")) for name in ("x", "y"))
        assert key.public_numbers() == ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1())


def certificate_seeds() -> Iterator[bytes]:
    name_types = (NameOID.COMMON_NAME, NameOID.DOMAIN_COMPONENT, NameOID.USER_ID, NameOID.EMAIL_ADDRESS)
    names = [
        reference.Name([reference.NameAttribute(NameOID.COMMON_NAME, "das-api-auth, # +é")]),
        reference.Name([reference.NameAttribute(kind, "a") for kind in name_types]),
        reference.Name([reference.NameAttribute(NameOID.COUNTRY_NAME, "CH")]),
        reference.Name([]),
    ]
    p256 = ec.derive_private_key(5, ec.SECP256R1())
    p384 = ec.derive_private_key(5, ec.SECP384R1())
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for key in (p256, p384, rsa_key):
        for name in names if key is p256 else names[:1]:
            builder = reference.CertificateBuilder(name, name, key.public_key(), 5)
            builder = builder.not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
            builder = builder.not_valid_after(datetime(2026 + 4 * len(name.rdns) * 8, 1, 2, tzinfo=UTC))
            builder = builder.add_extension(
                reference.BasicConstraints(ca=False, path_length=None), critical=True
            )
            made = builder.sign(key, SHA256())
            yield made.public_bytes(Encoding.DER)
            pem = made.public_bytes(Encoding.PEM)
            yield pem
            yield b"Subject: CN=a\r\n" + pem.replace(b"\n", b"\r\n") + b"text\n" + pem
    yield from (b"", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", b"\x30\x82\xff\xff")


@dataclass(frozen=True)
class Target:
    """``check`` must not raise, whatever the bytes."""

    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


TARGETS = {
    "der": Target(der, der_seeds),
    "uri": Target(uri, uri_seeds),
    "response": Target(response, response_seeds),
    "configuration": Target(configuration, configuration_seeds),
    "certificate": Target(certificate, certificate_seeds),
}
