"""Which public half is really a private key's: what lies beside it, and the challenge that tells.

Anybody without a PIN can plant public keys and certificates with our label and CKA_ID, and destroy the
genuine ones. So a public half counts only after a fresh random challenge, signed by the private key, verified
under it.
"""

import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType

from hsm_signer import ecdsa
from hsm_signer.errors import (
    ConfigError,
    HsmSignerError,
    KeyMismatchError,
    KeyNotFoundError,
    PinRefusedError,
    SignatureError,
    SigningKeyError,
)
from hsm_signer.hsm import attributes, keys
from hsm_signer.hsm.codes import code_of
from hsm_signer.hsm.keys import FoundKey, KeyInfo
from hsm_signer.hsm.sessions import Lane
from hsm_signer.jose import thumbprint

_CHALLENGE_PREFIX = b"hsm-signer: challenge\0"  # by which the audit log knows it
_NOT_FOR_SIGNING = frozenset(
    {
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_KEY_SIZE_RANGE",
        "CKR_MECHANISM_INVALID",
    }
)


def public_points(key: FoundKey) -> list[bytes]:
    """What may be the key's public half: its own attribute, else public objects, else certificates.

    Whoever has no PIN can have written all but the first.
    """
    if key.point is not None:
        return [key.point]
    template = beside(key, ObjectClass.PUBLIC_KEY) | {Attribute.KEY_TYPE: KeyType.EC}
    found = attributes.values(key.session, template, Attribute.EC_POINT, key.direct)
    points = [point for value in found if (point := keys.point_of_attribute(value))]
    if not points:
        points = [point for _, point in certificates_beside(key) if point]
    return list(dict.fromkeys(points))


def certificates_beside(key: FoundKey) -> list[tuple[bytes, bytes | None]]:
    """DER and point of the certificates with the key's CKA_ID, what ends last first; no point if not of P-256."""
    found = attributes.values(key.session, beside(key, ObjectClass.CERTIFICATE), Attribute.VALUE, key.direct)
    return sorted(((der, point_of_certificate(der)) for der in found), key=_end, reverse=True)


def _end(certificate: tuple[bytes, bytes | None]) -> float:
    from hsm_signer import x509

    der, point = certificate
    return 0.0 if point is None else x509.read_certificate(der).not_after.timestamp()


def point_of_certificate(der: bytes) -> bytes | None:
    """Uncompressed point, 65 bytes, of a certificate's P-256 key; ``None`` for other keys and nonsense."""
    from hsm_signer import x509

    try:
        return ecdsa.point_from_jwk(x509.read_certificate(der).jwk)
    except (ConfigError, KeyMismatchError):
        return None


def beside(key: FoundKey, object_class: ObjectClass) -> dict[Attribute, object]:
    name = {Attribute.ID: key.id} if key.id else {Attribute.LABEL: key.label}
    return {Attribute.CLASS: object_class, **name}


def proved_point(lane: Lane, key: FoundKey, points: Iterable[bytes]) -> bytes | None:
    """The point under which a fresh random challenge, signed by the private key, verifies."""
    from hsm_signer.verification import PublicKey

    candidates = list(points)
    if not candidates:
        return None
    challenge = _CHALLENGE_PREFIX + secrets.token_bytes(32)
    try:
        with _audited(lane, key, challenge) as outcome:
            signature = ecdsa.raw_from_device(keys.sign_es256(lane.login, key, challenge))
            for point in candidates:
                try:
                    PublicKey(point).verify(signature, challenge)
                except (SignatureError, KeyMismatchError):
                    continue
                outcome["key"] = thumbprint(ecdsa.jwk_from_point(point))
                return point
    except SignatureError:
        pass
    return None


def _audited(lane: Lane, key: FoundKey, challenge: bytes) -> AbstractContextManager[dict[str, object]]:
    if lane.audit is None:
        return nullcontext({})
    return lane.audit.signing(challenge, serial=lane.login.info.serial, object=key.name)


def point_if_proved(lane: Lane, key: FoundKey) -> bytes | None:
    """The key's public half, proved; ``None`` also if the key, or we without its PIN, cannot sign."""
    try:
        return proved_point(lane, key, public_points(key))
    except PinRefusedError:
        return None
    except PKCS11Error as exc:
        if code_of(exc) in _NOT_FOR_SIGNING:
            return None
        raise


def require_proof(lane: Lane, key: FoundKey) -> bytes:
    """The key's public half, proved; :class:`KeyMismatchError` if what lies beside it is not its own."""
    require_p256(key)
    points = public_points(key)
    point = proved_point(lane, key, points)
    if point is None:
        raise not_its_own(key, len(points))
    return point


def require_p256(key: FoundKey) -> None:
    if key.curve not in ("P-256", "unknown"):
        raise SigningKeyError(f"key {key.name} is on {key.curve}; ES256 needs P-256 (RFC 7518 §3.4)")


def not_its_own(key: FoundKey, count: int) -> HsmSignerError:
    if count == 0:
        return KeyNotFoundError(
            f"no public key and no certificate of P-256 lies beside private key {key.name}",
            hint="the public half was deleted, or is on the token under another CKA_ID",
        )
    return KeyMismatchError(
        f"what lies beside private key {key.name} is not its public half: {count} tried, and what the key "
        "signs verifies under none",
        hint="anybody without a PIN can put public objects on a token; delete the wrong ones",
    )


def described(lane: Lane, key: FoundKey) -> KeyInfo:
    """A key for a list: what cannot be proved is left out, not an error."""
    if key.curve not in ("P-256", "unknown") or key.flags.get("sign") is False:
        return key.info(None)
    certificates = certificates_beside(key)
    point = point_if_proved(lane, key)
    own = (der for der, its in certificates if its == point and point is not None)
    return key.info(point, next(own, None))
