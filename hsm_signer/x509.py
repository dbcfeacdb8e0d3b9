"""X.509 certificates and PKCS#10 requests over any :class:`~hsm_signer.jose.Signer`; certificates read.

RFC 5280 (profile), RFC 2986 (request), RFC 5480 and RFC 5758 (ECDSA with SHA-256), RFC 7468 (PEM).
"""

import hashlib
import re
import secrets
from base64 import b64decode
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property

from asn1crypto import algos, core, csr, keys, x509

from hsm_signer import distinguished_name, ecdsa
from hsm_signer.errors import ConfigError, KeyMismatchError
from hsm_signer.jose import Signer, thumbprint

MAX_BYTES = 1 << 16
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----\r?\n([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----\s")
_ASN1_ERRORS = (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError, RecursionError)
_NAME_TYPES = {
    "CN": "common_name",
    "L": "locality_name",
    "ST": "state_or_province_name",
    "O": "organization_name",
    "OU": "organizational_unit_name",
    "C": "country_name",
    "STREET": "street_address",
    "DC": "domain_component",
    "UID": "user_id",
}
_SHORT = {name: short for short, name in _NAME_TYPES.items()}


def default_common_name(client: str) -> str:
    """CN by which WIPO knows the certificate of a client."""
    return f"{client} private_key_jwt authentication"


def self_signed(
    signer: Signer,
    *,
    common_name: str | None = None,
    subject: str | None = None,
    not_before: datetime | int,
    days: int,
) -> bytes:
    """Make a self-signed end-entity certificate (RFC 5280 §4.1), in DER.

    Either ``common_name`` or ``subject``, a whole name as RFC 4514 text. ``not_before``: an aware time or
    Unix seconds. The serial number has 20 bytes, 158 bits of them random.

    Raises :class:`ConfigError` for a name or time that a certificate cannot hold, and
    :class:`SignatureInvalidError` if the signature does not verify under the key.
    """
    start, end = _validity(not_before, days)
    name = _name(common_name, subject)
    spki = _public_key(signer)
    identifier = _key_identifier(spki)
    body = x509.TbsCertificate(
        {
            "version": "v3",
            "serial_number": 1 << 158 | secrets.randbits(158),
            "signature": _ecdsa_with_sha256(),
            "issuer": name,
            "validity": {"not_before": _time(start), "not_after": _time(end)},
            "subject": name,
            "subject_public_key_info": spki,
            "extensions": [
                *_key_extensions(identifier),
                _extension(
                    "authority_key_identifier", x509.AuthorityKeyIdentifier({"key_identifier": identifier})
                ),
            ],
        }
    )
    return _signed(body, spki, signer)


def request(signer: Signer, *, common_name: str | None = None, subject: str | None = None) -> bytes:
    """Make a certificate request (PKCS#10, RFC 2986 §4) that asks for our extensions, in DER."""
    spki = _public_key(signer)
    extensions = csr.CRIAttribute(
        {"type": "extension_request", "values": [_key_extensions(_key_identifier(spki))]}
    )
    body = csr.CertificationRequestInfo(
        {
            "version": "v1",
            "subject": _name(common_name, subject),
            "subject_pk_info": spki,
            "attributes": [extensions],
        }
    )
    return _signed(body, spki, signer)


class _Signed(core.Sequence):  # type: ignore[misc]  # asn1crypto ships no types
    """Certificate and CertificationRequest have one shape (RFC 5280 §4.1, RFC 2986 §4.2)."""

    _fields = [  # noqa: RUF012  # asn1crypto completes it in place
        ("body", core.Any),
        ("signature_algorithm", algos.SignedDigestAlgorithm),
        ("signature", core.OctetBitString),
    ]


def _signed(body: core.Asn1Value, spki: keys.PublicKeyInfo, signer: Signer) -> bytes:
    """Sign; what does not verify under the key that it certifies leaves nobody."""
    from hsm_signer.verification import PublicKey

    signature = signer.sign(body.dump())
    PublicKey(spki["public_key"].native).verify(signature, body.dump())
    value = _Signed(
        {
            "body": body,
            "signature_algorithm": _ecdsa_with_sha256(),
            "signature": ecdsa.der_from_raw(signature),
        }
    )
    der: bytes = value.dump()
    return der


def _ecdsa_with_sha256() -> algos.SignedDigestAlgorithm:
    return algos.SignedDigestAlgorithm({"algorithm": "sha256_ecdsa"})  # no parameters: RFC 5758 §3.2


def _public_key(signer: Signer) -> keys.PublicKeyInfo:
    return keys.PublicKeyInfo.load(ecdsa.spki_from_point(ecdsa.point_from_jwk(signer.jwk)), strict=True)


def _key_identifier(spki: keys.PublicKeyInfo) -> bytes:
    # RFC 7093 §2 method 1: the leftmost 160 bits of SHA-256, so that no SHA-1 is needed
    point: bytes = spki["public_key"].native
    return hashlib.sha256(point).digest()[:20]


def _key_extensions(identifier: bytes) -> list[x509.Extension]:
    return [
        _extension("basic_constraints", x509.BasicConstraints({"ca": False}), critical=True),
        _extension("key_usage", x509.KeyUsage({"digital_signature"}), critical=True),
        _extension("key_identifier", core.OctetString(identifier)),
    ]


def _extension(name: str, value: core.Asn1Value, *, critical: bool = False) -> x509.Extension:
    return x509.Extension(
        {"extn_id": name, "critical": critical, "extn_value": core.ParsableOctetString(value.dump())}
    )


def _name(common_name: str | None, subject: str | None) -> x509.Name:
    if (common_name is None) == (subject is None):
        raise ConfigError("a certificate is for a common name or for a subject: give one of the two")
    if subject is not None:
        names = distinguished_name.parse(subject)
    else:
        names = [[("CN", distinguished_name.checked("CN", common_name or ""))]]
    # RFC 4514 §2.1: text starts with the last element of the sequence
    sequence = [[_attribute(kind, value) for kind, value in name] for name in reversed(names)]
    return x509.Name(name="", value=x509.RDNSequence(sequence))


def _attribute(kind: str, value: str) -> x509.NameTypeAndValue:
    if kind == "DC":
        return x509.NameTypeAndValue({"type": _NAME_TYPES[kind], "value": x509.DNSName(value)})
    string = core.PrintableString(value) if kind == "C" else core.UTF8String(value)
    choice = "printable_string" if kind == "C" else "utf8_string"
    directory_string = x509.DirectoryString(name=choice, value=string)
    return x509.NameTypeAndValue({"type": _NAME_TYPES[kind], "value": directory_string})


def _validity(not_before: datetime | int, days: int) -> tuple[datetime, datetime]:
    if days < 1:
        raise ConfigError(f"a certificate is valid for at least 1 day, found {days}")
    try:
        start = datetime.fromtimestamp(not_before, UTC) if isinstance(not_before, int) else not_before
        if start.tzinfo is None:
            raise ConfigError("not_before needs a time zone")
        start = start.astimezone(UTC).replace(microsecond=0)
        end = start + timedelta(days=days)
    except (OverflowError, OSError, ValueError):
        raise ConfigError(f"a certificate cannot say {days} days from {not_before}") from None
    if start.year < 1950:
        raise ConfigError(f"a certificate cannot start in {start.year}")
    return start, end


def _time(moment: datetime) -> x509.Time:
    if moment.year < 2050:  # RFC 5280 §4.1.2.5
        return x509.Time(name="utc_time", value=core.UTCTime(moment))
    return x509.Time(name="general_time", value=core.GeneralizedTime(moment))


@dataclass(frozen=True)
class Certificate:
    """A certificate as read; its signature is not checked. ``subject`` and ``issuer`` are RFC 4514 text."""

    der: bytes = field(repr=False)
    subject: str
    issuer: str
    serial_number: int
    not_before: datetime
    not_after: datetime
    spki: bytes = field(repr=False)

    @cached_property
    def jwk(self) -> dict[str, str]:
        """The public key; :class:`KeyMismatchError` if it is not one of P-256."""
        point = self.spki[-65:]
        if self.spki != ecdsa.spki_from_point(point) or point[:1] != b"\x04":
            raise KeyMismatchError(f"the certificate of {self.subject} holds no P-256 key")
        return ecdsa.jwk_from_point(point)

    @property
    def thumbprint(self) -> str:
        """RFC 7638 thumbprint of the public key; :class:`KeyMismatchError` if it is not one of P-256."""
        return thumbprint(self.jwk)

    @property
    def pem(self) -> str:
        """Textual encoding (RFC 7468 §5)."""
        return ecdsa.pem("CERTIFICATE", self.der)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the DER, 64 hexadecimal digits, as ``openssl x509 -fingerprint -sha256`` has it."""
        return hashlib.sha256(self.der).hexdigest()

    def holds(self, thumbprint: str) -> bool:
        """Does it certify the key of this thumbprint?"""
        try:
            return self.thumbprint == thumbprint
        except KeyMismatchError:
            return False

    def days_left(self, now: int) -> int:
        """Whole days until it ends, rounded down; negative when it has ended. ``now`` in Unix seconds."""
        return int((self.not_after.timestamp() - now) // 86400)


def read_certificate(data: bytes) -> Certificate:
    """Read the one certificate in DER or PEM; :class:`ConfigError` otherwise. At most 64 KiB."""
    found = read_certificates(data)
    if len(found) != 1:
        raise ConfigError(f"one certificate expected, found {len(found)}")
    return found[0]


def read_certificates(data: bytes) -> list[Certificate]:
    """Read one certificate in DER, or all in PEM with whatever text is around them (RFC 7468 §2)."""
    if len(data) > MAX_BYTES:
        raise ConfigError(f"a certificate of {len(data)} bytes; at most {MAX_BYTES} are read")
    if data[:1] == b"\x30" and data[1:2] >= b"\x80":  # a long length; text may start with "0" too
        return [_read(data)]
    blocks = _CERTIFICATE.findall(data + b"\n")
    if not blocks:
        raise ConfigError(f"no certificate in {len(data)} bytes, neither in PEM nor in DER")
    return [_read(_unarmoured(block)) for block in blocks]


def _unarmoured(block: bytes) -> bytes:
    try:
        return b64decode(b"".join(block.split()), validate=True)
    except ValueError:
        raise ConfigError("the Base64 of the certificate is damaged") from None


def _read(der: bytes) -> Certificate:
    try:
        body = x509.Certificate.load(der, strict=True)["tbs_certificate"]
        validity = body["validity"]
        return Certificate(
            der=der,
            subject=_text(body["subject"].chosen),
            issuer=_text(body["issuer"].chosen),
            serial_number=body["serial_number"].native,
            not_before=_moment(validity["not_before"].native),
            not_after=_moment(validity["not_after"].native),
            spki=body["subject_public_key_info"].dump(),
        )
    except _ASN1_ERRORS:
        raise ConfigError(f"{len(der)} bytes that are no X.509 certificate") from None


def _moment(value: object) -> datetime:
    if not isinstance(value, datetime):  # asn1crypto has a class of its own for the year 0
        raise TypeError
    return value.astimezone(UTC)


def _text(sequence: Iterable[Iterable[x509.NameTypeAndValue]]) -> str:
    names = [[_pair(attribute) for attribute in name] for name in sequence]
    return ",".join("+".join(name) for name in reversed(names))


def _pair(attribute: x509.NameTypeAndValue) -> str:
    short = _SHORT.get(attribute["type"].native)
    if short is None:
        return f"{attribute['type'].dotted}=#{attribute['value'].dump().hex()}"
    return distinguished_name.text([[(short, attribute["value"].native)]])
