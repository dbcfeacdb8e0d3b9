"""Keys on a token: found, described, and matched with the public half that is really theirs.

Anybody without a PIN can plant public keys and certificates with our label and CKA_ID, and destroy the
genuine ones. So a public half counts only after a fresh random challenge, signed by the private key, verified
under it.
"""

import hashlib
import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pkcs11 import _pkcs11
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import (
    AttributeSensitive,
    AttributeTypeInvalid,
    FunctionFailed,
    GeneralError,
    PKCS11Error,
)
from pkcs11.mechanisms import KeyType, Mechanism

from hsm_signer import ecdsa
from hsm_signer.errors import (
    ConfigError,
    HsmSignerError,
    KeyAmbiguousError,
    KeyMismatchError,
    KeyNotFoundError,
    PinRefusedError,
    SignatureError,
    SigningKeyError,
)
from hsm_signer.hsm.codes import code_of
from hsm_signer.hsm.cryptoki import Functions
from hsm_signer.hsm.login import MAPPER, Login
from hsm_signer.hsm.sessions import Lane
from hsm_signer.hsm.uri import Uri
from hsm_signer.jose import thumbprint

FLAGS = {
    "sensitive": Attribute.SENSITIVE,
    "extractable": Attribute.EXTRACTABLE,
    "always_sensitive": Attribute.ALWAYS_SENSITIVE,
    "never_extractable": Attribute.NEVER_EXTRACTABLE,
    "local": Attribute.LOCAL,
    "private": Attribute.PRIVATE,
    "modifiable": Attribute.MODIFIABLE,
    "copyable": Attribute.COPYABLE,
    "always_authenticate": Attribute.ALWAYS_AUTHENTICATE,
    "sign": Attribute.SIGN,
    "decrypt": Attribute.DECRYPT,
    "unwrap": Attribute.UNWRAP,
    "derive": Attribute.DERIVE,
}
_ASKED = (Attribute.LABEL, Attribute.ID, Attribute.EC_PARAMS, Attribute.EC_POINT, *FLAGS.values())
_OF_ANY_LENGTH = {Attribute.LABEL, Attribute.ID, Attribute.EC_PARAMS}
_ROOM = 256  # bytes for each of these in one call; what is longer takes more calls
_LONG_ROOM = 8192  # for a certificate
_NOT_THERE = (AttributeTypeInvalid, AttributeSensitive, FunctionFailed, GeneralError)
P256 = bytes.fromhex("06082a8648ce3d030107")  # secp256r1, RFC 5480 §2.1.1.1
_CURVES = {
    P256: "P-256",
    b"\x13\x09secp256r1": "P-256",  # PKCS#11 allows the name as PrintableString
    b"\x13\x0aprime256v1": "P-256",
    bytes.fromhex("06052b81040022"): "P-384",
    bytes.fromhex("06052b81040023"): "P-521",
    bytes.fromhex("06052b8104000a"): "secp256k1",
}
_NOT_FOR_SIGNING = frozenset(
    {
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_KEY_SIZE_RANGE",
        "CKR_MECHANISM_INVALID",
    }
)
_CHALLENGE_PREFIX = b"hsm-signer: challenge\0"  # by which the audit log knows it


@dataclass(frozen=True)
class KeyInfo:
    """A private EC key on a token, as the module describes it.

    ``flags``: attributes that the module knows, by their names in PKCS#11 in lower case without ``CKA_``.
    ``thumbprint`` (RFC 7638): of the public half under which a challenge verified, ``None`` if there is none.
    ``certificate``: in DER, with the key's CKA_ID and this public half; of several the one that ends last.
    """

    label: str
    id: bytes
    curve: str
    thumbprint: str | None
    flags: dict[str, bool]
    certificate: bytes | None = field(default=None, repr=False)

    @property
    def exportable(self) -> bool:
        """Whether the module does not rule out that the private key leaves the token."""
        return self.flags.get("extractable") is not False or self.flags.get("sensitive") is not True

    @property
    def uri(self) -> str:
        """RFC 7512 URI of the key, without its token."""
        return str(Uri(object=self.label, id=self.id or None))


class SigningKey(_pkcs11.PrivateKey, _pkcs11.SignMixin, _pkcs11.Object):  # type: ignore[misc, name-defined]  # python-pkcs11 ships no types
    """A private EC key that is not asked for its type, nor its caller for the type of the data: bytes."""

    key_type = KeyType.EC
    sign = _pkcs11.SignMixin._sign  # type: ignore[attr-defined]  # not in its stubs
    __repr__ = object.__repr__  # the library's asks the token


@dataclass(frozen=True)
class FoundKey:
    """A private key in one session, its attributes read once; the numbers are the module's own handles."""

    handle: Any
    number: int
    session_number: int
    direct: Functions | None
    label: str
    id: bytes
    curve: str
    point: bytes | None
    always_authenticate: bool
    flags: dict[str, bool]

    @property
    def uri(self) -> Uri:
        return Uri(object=self.label, id=self.id or None)

    @property
    def name(self) -> str:
        return str(self.uri)

    def info(self, point: bytes | None, certificate: bytes | None = None) -> KeyInfo:
        proved = None if point is None else thumbprint(ecdsa.jwk_from_point(point))
        return KeyInfo(self.label, self.id, self.curve, proved, self.flags, certificate)


def search(
    session: Any,
    template: dict[Attribute, object],
    how: Any = _pkcs11.SearchIter,  # type: ignore[attr-defined]  # python-pkcs11 ships no types
) -> list[Any]:
    """All objects that match, in one search that is always finished (``C_FindObjects``)."""
    operation = how(session, template, 16)
    try:
        operation.__enter__()
        return [found for batch in operation for found in batch]
    finally:
        with suppress(PKCS11Error):  # left to its destructor, it would be printed
            operation._finalize()


class _Numbers(_pkcs11.SearchIter):  # type: ignore[misc, name-defined]  # python-pkcs11 ships no types
    """A search that asks nothing about what it finds."""

    def _batch_iter(self, results: Any, count: int) -> list[int]:
        return list(results[:count])


def values(key: FoundKey, template: dict[Attribute, object], attribute: Attribute) -> list[bytes]:
    """The attribute of each object that matches and has it: public keys and certificates, which are many."""
    session = key.handle.session
    if key.direct is not None:
        numbers = search(session, template, _Numbers)
        read_once = [key.direct.read(session.handle, each, [attribute], _LONG_ROOM) for each in numbers]
        if None not in read_once:
            return [value for found in read_once if found and (value := found.get(attribute))]
    handles = search(session, template)
    return [value for handle in handles if (value := read(handle, [attribute]).get(attribute))]


def find_keys(session: Any, uri: Uri, login: Login) -> list[FoundKey]:
    """The private EC keys that match a URI's key attributes."""
    template: dict[Attribute, object] = {
        Attribute.CLASS: ObjectClass.PRIVATE_KEY,
        Attribute.KEY_TYPE: KeyType.EC,
    }
    if uri.object is not None:
        template[Attribute.LABEL] = uri.object
    if uri.id is not None:
        template[Attribute.ID] = uri.id
    return [_described(handle, login.module.direct) for handle in search(session, template)]


def find_key(session: Any, uri: Uri, login: Login) -> FoundKey:
    """The one private EC key that matches, or an error that lists the candidates."""
    found = find_keys(session, uri, login)
    if len(found) == 1:
        return found[0]
    where = f"on token {login.info.label!r}"
    if found:
        raise KeyAmbiguousError(
            f"{len(found)} private EC keys match {uri} {where}",
            candidates=[key.name for key in found],
            hint="add id= to the key's URI",
        )
    others = [key.name for key in find_keys(session, Uri(), login)]
    hint = "hsm-token key list shows what is there" if login.authenticated else None
    if not login.authenticated and "LOGIN_REQUIRED" in login.info.flags:
        hint = "private keys are invisible before login, and no PIN was given"
    raise KeyNotFoundError(f"no private EC key matches {uri} {where}", candidates=others, hint=hint)


def find_in(lane: Lane, uri: Uri) -> FoundKey:
    """:func:`find_key`, kept for the next signature through the same session."""
    found = find_key(lane.session, uri, lane.login)
    lane.handles[found.name] = found
    return found


def _described(handle: Any, direct: Functions | None) -> FoundKey:
    found = _read_at_once(handle, direct) or read(handle, _ASKED)
    curve = _curve(found.get(Attribute.EC_PARAMS))
    point = found.get(Attribute.EC_POINT)
    return FoundKey(
        handle=SigningKey(handle.wrapper),
        number=handle.handle,
        session_number=handle.session.handle,
        direct=direct,
        label=found.get(Attribute.LABEL, ""),
        id=found.get(Attribute.ID, b""),
        curve=curve,
        point=point_of_attribute(point) if point and curve in ("P-256", "unknown") else None,
        always_authenticate=bool(found.get(Attribute.ALWAYS_AUTHENTICATE)),
        flags={name: found[one] for name, one in FLAGS.items() if found.get(one) is not None},
    )


def _read_at_once(handle: Any, direct: Functions | None) -> dict[Attribute, Any] | None:
    found = direct and direct.read(handle.session.handle, handle.handle, _ASKED, _ROOM)
    if not found or not found.keys() >= _OF_ANY_LENGTH:  # of several errors a module names one
        return None
    return {each: MAPPER.unpack_attributes(each, found[each]) for each in _ASKED if each in found}


def read(handle: Any, attributes: Iterable[Attribute]) -> dict[Attribute, Any]:
    """Those of the attributes that the object has; one by one where the token cannot do it in one go."""
    failed: PKCS11Error | None = None
    try:
        return dict(handle.get_attributes(list(attributes)))
    except _NOT_THERE:
        found = {}
        for attribute in attributes:
            try:
                found[attribute] = handle[attribute]
            except (AttributeTypeInvalid, AttributeSensitive):
                continue
            except _NOT_THERE as exc:
                failed = exc
        if failed and not found:
            raise failed from None
        return found


def _curve(parameters: bytes | None) -> str:
    if not parameters:
        return "unknown"
    return _CURVES.get(parameters, parameters.hex())


def point_of_attribute(value: bytes) -> bytes | None:
    try:
        return ecdsa.point_from_ec_point(value)
    except KeyMismatchError:
        return None


def public_points(key: FoundKey) -> list[bytes]:
    """What may be the key's public half: its own attribute, else public objects, else certificates.

    Whoever has no PIN can have written all but the first.
    """
    if key.point is not None:
        return [key.point]
    template = beside(key, ObjectClass.PUBLIC_KEY) | {Attribute.KEY_TYPE: KeyType.EC}
    found = values(key, template, Attribute.EC_POINT)
    points = [point for value in found if (point := point_of_attribute(value))]
    if not points:
        points = [point for _, point in certificates_beside(key) if point]
    return list(dict.fromkeys(points))


def certificates_beside(key: FoundKey) -> list[tuple[bytes, bytes | None]]:
    """DER and point of the certificates with the key's CKA_ID, what ends last first; no point if not of P-256."""
    found = values(key, beside(key, ObjectClass.CERTIFICATE), Attribute.VALUE)
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


def sign_es256(login: Login, key: FoundKey, data: bytes) -> bytes:
    """ECDSA with SHA-256 as the token answers it; a token without CKM_ECDSA hashes by itself."""
    if login.hashes:
        return _sign(login, key, Mechanism.ECDSA_SHA256, data)
    digest, direct = hashlib.sha256(data).digest(), login.module.direct
    try:
        if direct is None or key.always_authenticate:
            return _sign(login, key, Mechanism.ECDSA, digest)
        return direct.sign_ecdsa(key.session_number, key.number, digest)
    except PKCS11Error as exc:
        if code_of(exc) != "CKR_MECHANISM_INVALID":
            raise
        offered = login.token.slot.get_mechanisms()
        if Mechanism.ECDSA in offered or Mechanism.ECDSA_SHA256 not in offered:
            raise
        login.hashes = True
        return _sign(login, key, Mechanism.ECDSA_SHA256, data)


def _sign(login: Login, key: FoundKey, mechanism: Mechanism, data: bytes) -> bytes:
    sign = partial(key.handle.sign, data, mechanism=mechanism)
    if not key.always_authenticate:
        return bytes(sign())
    with login.context_login() as pin:
        return bytes(sign(pin=pin.text))


def proved_point(lane: Lane, key: FoundKey, points: Iterable[bytes]) -> bytes | None:
    """The point under which a fresh random challenge, signed by the private key, verifies."""
    from hsm_signer.verification import PublicKey

    candidates = list(points)
    if not candidates:
        return None
    challenge = _CHALLENGE_PREFIX + secrets.token_bytes(32)
    try:
        with _audited(lane, key, candidates, challenge):
            signature = ecdsa.raw_from_device(sign_es256(lane.login, key, challenge))
    except SignatureError:
        return None
    for point in candidates:
        try:
            PublicKey(point).verify(signature, challenge)
        except (SignatureError, KeyMismatchError):
            continue
        return point
    return None


def _audited(
    lane: Lane, key: FoundKey, candidates: list[bytes], challenge: bytes
) -> AbstractContextManager[None]:
    if lane.audit is None:
        return nullcontext()
    own = thumbprint(ecdsa.jwk_from_point(candidates[0])) if len(candidates) == 1 else None
    return lane.audit.signing(challenge, serial=lane.login.info.serial, key=own, object=key.name)


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
