"""ECDSA signatures and points of P-256: DER, r‖s, SEC 1, SPKI, JWK.

A signature has exactly one encoding in each form (X.690 §10 and §11 for DER); every other input is refused.
RFC 3279 §2.2.3 (``Ecdsa-Sig-Value``), RFC 7518 §3.4 (r‖s), SEC 1 §2.3 (points), RFC 5480 (SPKI).
"""

from base64 import b64encode, urlsafe_b64decode
from collections.abc import Mapping
from functools import cache
from textwrap import wrap
from typing import Any

from hsm_signer.errors import KeyMismatchError, SignatureFormatError
from hsm_signer.jose import b64url

SIZE = 32  # bytes of a coordinate of P-256, and of r and s
_ORDERS = {  # of the base points of P-256, P-384 and P-521, by size in bytes: FIPS 186-4 D.1.2
    32: 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    48: 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
    66: 0x01FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFA51868783BF2F966B7FCC0148F709A5D03BB5C9B8899C47AEBB6FB71E91386409,  # noqa: E501  # a number stays in one piece
}  # fmt: skip  # a number a line
_ZERO, _ORDER = bytes(SIZE), _ORDERS[SIZE].to_bytes(SIZE)
# SEQUENCE of AlgorithmIdentifier (id-ecPublicKey, secp256r1) and the head of the BIT STRING
_SPKI_PREFIX = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")


@cache
def _ecdsa_sig_value() -> Any:  # noqa: ANN401  # asn1crypto has no types
    """The ASN.1 type (RFC 3279 §2.2.3); most tokens answer r‖s, and then asn1crypto is not loaded for it."""
    from asn1crypto import core

    class EcdsaSigValue(core.Sequence):  # type: ignore[misc]  # asn1crypto ships no types
        _fields = [("r", core.Integer), ("s", core.Integer)]  # noqa: RUF012  # completed in place

    return EcdsaSigValue


def raw_from_der(der: bytes, size: int = SIZE) -> bytes:
    """Turn a DER ``Ecdsa-Sig-Value`` into r‖s of ``2 * size`` bytes; 32 is P-256, 48 P-384, 66 P-521.

    Raises :class:`SignatureFormatError` unless ``der`` is the one encoding of r and s with 0 < r, s < n.
    """
    if type(der) is not bytes:
        raise SignatureFormatError(f"a DER signature is bytes, found {type(der).__name__}")
    if type(size) is not int or size not in _ORDERS:
        raise SignatureFormatError(f"an integer of the signature has 32, 48 or 66 bytes, found {size!r}")
    if len(der) > 2 * size + 9:  # 9: all tags, lengths and signs, for P-521
        raise SignatureFormatError(f"{len(der)} bytes are no DER ECDSA signature of {size}-byte integers")
    try:
        value = _ecdsa_sig_value().load(der, strict=True)
        r, s = value["r"].native, value["s"].native
    except (ValueError, TypeError, KeyError, IndexError):
        raise SignatureFormatError(f"{len(der)} bytes that are no DER ECDSA signature") from None
    raw = _raw(r, s, size)
    if _der(r, s) != der:  # asn1crypto reads BER, with lengths and paddings that DER forbids
        raise SignatureFormatError("an ECDSA signature in BER that is not DER")
    return raw


def der_from_raw(raw: bytes) -> bytes:
    """Turn r‖s of P-256, 64 bytes, into the DER ``Ecdsa-Sig-Value``.

    Raises :class:`SignatureFormatError` for another length and unless 0 < r, s < n.
    """
    return _der(*integers_from_raw(raw))


def integers_from_raw(raw: bytes) -> tuple[int, int]:
    """r and s of P-256 from r‖s, 64 bytes (RFC 7518 §3.4); refuses what :func:`der_from_raw` refuses."""
    if type(raw) is not bytes or len(raw) != 2 * SIZE:
        found = f"{len(raw)} bytes" if type(raw) is bytes else type(raw).__name__
        raise SignatureFormatError(f"a raw ES256 signature has {2 * SIZE} bytes, found {found}")
    r, s = int.from_bytes(raw[:SIZE]), int.from_bytes(raw[SIZE:])
    if not (0 < r < _ORDERS[SIZE] and 0 < s < _ORDERS[SIZE]):
        raise SignatureFormatError("r or s of the ECDSA signature is outside 1…n−1")
    return r, s


def raw_from_device(answer: bytes) -> bytes:
    """Bring what a token answers to ``CKM_ECDSA``, r‖s or DER, to r‖s of 64 bytes.

    PKCS#11 §6.3.1 says r‖s; modules that answer DER exist. 64 bytes are r‖s: a DER signature that short
    needs some 48 zero bits in r and s, and would then fail the verification that follows.
    """
    if len(answer) == 2 * SIZE:
        if not (_ZERO < answer[:SIZE] < _ORDER and _ZERO < answer[SIZE:] < _ORDER):
            raise SignatureFormatError("r or s of the ECDSA signature is outside 1…n−1")
        return answer
    return raw_from_der(answer)


def _raw(r: int, s: int, size: int) -> bytes:
    order = _ORDERS[size]
    if not (0 < r < order and 0 < s < order):
        raise SignatureFormatError("r or s of the ECDSA signature is outside 1…n−1")
    return r.to_bytes(size) + s.to_bytes(size)


def _der(r: int, s: int) -> bytes:
    der: bytes = _ecdsa_sig_value()({"r": r, "s": s}).dump()
    return der


def point_from_ec_point(value: bytes) -> bytes:
    """Bring a ``CKA_EC_POINT`` of P-256 to the uncompressed point, 65 bytes (SEC 1 §2.3.3).

    PKCS#11 wants the point inside a DER OCTET STRING (67 bytes); raw points (65) and bare X‖Y (64) exist.
    That it lies on the curve is for the verification to find out.
    """
    match len(value), value[:3]:
        case 67, b"\x04\x41\x04":
            return value[2:]
        case 65, start if start[0] == 0x04:
            return value
        case 64, _:
            return b"\x04" + value
    raise KeyMismatchError(f"CKA_EC_POINT of {len(value)} bytes is no uncompressed point of P-256")


def spki_from_point(point: bytes) -> bytes:
    """SubjectPublicKeyInfo in DER, 91 bytes, of an uncompressed point of 65 bytes (RFC 5480 §2)."""
    return _SPKI_PREFIX + point


def pem(label: str, der: bytes) -> str:
    """Textual encoding, lines of 64 characters (RFC 7468 §2)."""
    lines = wrap(b64encode(der).decode("ascii"), 64)
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])


def jwk_from_point(point: bytes) -> dict[str, str]:
    """JWK of an uncompressed point of 65 bytes (RFC 7518 §6.2.1)."""
    return {"kty": "EC", "crv": "P-256", "x": b64url(point[1:33]), "y": b64url(point[33:])}


def point_from_jwk(jwk: Mapping[str, str]) -> bytes:
    """Uncompressed point, 65 bytes, of a JWK that :func:`jwk_from_point` made."""
    return b"\x04" + b"".join(urlsafe_b64decode(jwk[name] + "=") for name in ("x", "y"))
