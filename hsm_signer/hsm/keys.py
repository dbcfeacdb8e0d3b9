"""Keys on a token: found, described, and asked to sign."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pkcs11 import _pkcs11
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism

from hsm_signer import ecdsa
from hsm_signer.errors import KeyAmbiguousError, KeyMismatchError, KeyNotFoundError
from hsm_signer.hsm import attributes
from hsm_signer.hsm.codes import code_of
from hsm_signer.hsm.cryptoki import EcdsaKey, Functions
from hsm_signer.hsm.login import Login
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
P256 = bytes.fromhex("06082a8648ce3d030107")  # secp256r1, RFC 5480 §2.1.1.1
_CURVES = {
    P256: "P-256",
    b"\x13\x09secp256r1": "P-256",  # PKCS#11 allows the name as PrintableString
    b"\x13\x0aprime256v1": "P-256",
    bytes.fromhex("06052b81040022"): "P-384",
    bytes.fromhex("06052b81040023"): "P-521",
    bytes.fromhex("06052b8104000a"): "secp256k1",
}


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
    """A private key in one session, its attributes read once.

    ``ecdsa`` signs by ``CKM_ECDSA``, for one thread at a time; ``None`` where python-pkcs11 has to.
    """

    handle: Any
    direct: Functions | None
    ecdsa: EcdsaKey | None
    label: str
    id: bytes
    curve: str
    point: bytes | None
    always_authenticate: bool
    flags: dict[str, bool]

    @property
    def session(self) -> Any:
        return self.handle.session

    @property
    def uri(self) -> Uri:
        return Uri(object=self.label, id=self.id or None)

    @property
    def name(self) -> str:
        return str(self.uri)

    def info(self, point: bytes | None, certificate: bytes | None = None) -> KeyInfo:
        proved = None if point is None else thumbprint(ecdsa.jwk_from_point(point))
        return KeyInfo(self.label, self.id, self.curve, proved, self.flags, certificate)


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
    return [_described(handle, login.module.direct) for handle in attributes.search(session, template)]


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
    hint = None
    if login.authenticated:
        hint = "hsm-token key list shows what is there" if others else "hsm-token enroll generates a key"
    if not login.authenticated and "LOGIN_REQUIRED" in login.info.flags:
        hint = "private keys are invisible before login, and no PIN was given"
    raise KeyNotFoundError(f"no private EC key matches {uri} {where}", candidates=others, hint=hint)


def find_in(lane: Lane, uri: Uri) -> FoundKey:
    """:func:`find_key`, kept for the next signature through the same session."""
    found = find_key(lane.session, uri, lane.login)
    lane.handles[found.name] = found
    return found


def _described(handle: Any, direct: Functions | None) -> FoundKey:
    found = attributes.read(handle, _ASKED, direct)
    curve = _curve(found.get(Attribute.EC_PARAMS))
    point = found.get(Attribute.EC_POINT)
    by_context = bool(found.get(Attribute.ALWAYS_AUTHENTICATE))
    return FoundKey(
        handle=SigningKey(handle.wrapper),
        direct=direct,
        ecdsa=None if direct is None or by_context else direct.ecdsa(handle.session.handle, handle.handle),
        label=found.get(Attribute.LABEL, ""),
        id=found.get(Attribute.ID, b""),
        curve=curve,
        point=point_of_attribute(point) if point and curve in ("P-256", "unknown") else None,
        always_authenticate=by_context,
        flags={name: found[one] for name, one in FLAGS.items() if found.get(one) is not None},
    )


def _curve(parameters: bytes | None) -> str:
    if not parameters:
        return "unknown"
    return _CURVES.get(parameters, parameters.hex())


def point_of_attribute(value: bytes) -> bytes | None:
    try:
        return ecdsa.point_from_ec_point(value)
    except KeyMismatchError:
        return None


def sign_es256(login: Login, key: FoundKey, data: bytes) -> bytes:
    """ECDSA with SHA-256 as the token answers it; a token without CKM_ECDSA hashes by itself."""
    if login.hashes:
        return _sign(login, key, Mechanism.ECDSA_SHA256, data)
    digest = hashlib.sha256(data).digest()
    try:
        return key.ecdsa.sign(digest) if key.ecdsa else _sign(login, key, Mechanism.ECDSA, digest)
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
