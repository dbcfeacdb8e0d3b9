"""What lies beside a key on the token: its public half and certificates; and its end."""

import hashlib
import logging
from typing import Any

from pkcs11 import _pkcs11
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.util.x509 import decode_x509_certificate

from hsm_signer import ecdsa
from hsm_signer.errors import ConfigError, KeyMismatchError
from hsm_signer.hsm import attributes, keys, public_half
from hsm_signer.hsm.codes import code_of
from hsm_signer.hsm.keys import FoundKey
from hsm_signer.hsm.login import Login
from hsm_signer.hsm.sessions import Lane
from hsm_signer.hsm.uri import Uri, checked_label
from hsm_signer.jose import thumbprint as thumbprint_of

log = logging.getLogger(__name__)


def certificates(lane: Lane, uri: Uri) -> list[bytes]:
    """The certificates, in DER, that hold the key's proved public half."""
    key = keys.find_key(lane.session, uri, lane.login)
    beside = public_half.certificates_beside(key)
    if not beside:
        return []
    point = public_half.require_proof(lane, key)
    return [der for der, its in beside if its == point]


def store_certificate(lane: Lane, uri: Uri, der: bytes, label: str | None, *, replace: bool) -> int:
    """Write one certificate object under the key's CKA_ID (PKCS#11 v3.1 §4.6.3); the number of others.

    With ``replace`` they are destroyed, once the new one is there.
    """
    from hsm_signer import x509

    if x509.read_certificate(der).der != der:
        raise ConfigError("a certificate is stored in DER, but this one is in PEM")
    if label is not None:
        checked_label(label, "certificate")
    with lane.login.writable() as session:
        key = keys.find_key(session, uri, lane.login)
        point = public_half.require_proof(lane, key)
        if public_half.point_of_certificate(der) != point:
            raise KeyMismatchError(f"the certificate does not hold the public half of key {key.name}")
        there = _certificates(key, point)
        if der not in there.values():
            template = decode_x509_certificate(der) | {
                Attribute.TOKEN: True,
                Attribute.LABEL: key.label if label is None else label,
                Attribute.ID: key.id,
            }
            session.create_object(template)
            log.info("certificate of key %s stored", key.name)
        others = [handle for handle, stored in there.items() if stored != der]
        for handle in others if replace else ():
            handle.destroy()
            log.info("another certificate of key %s destroyed", key.name)
    return len(others)


class VerifyingKey(_pkcs11.PublicKey, _pkcs11.VerifyMixin, _pkcs11.Object):  # type: ignore[misc, name-defined]  # python-pkcs11 ships no types
    """A public EC key that verifies whatever its CKA_VERIFY says."""

    key_type = KeyType.EC


def verify(login: Login, key: FoundKey, point: bytes, signature: bytes, data: bytes) -> bool | None:
    """Ask the token whether r‖s is a signature over ``data`` (``C_Verify``); ``None`` if it cannot tell."""
    handle = next(iter(_public_halves(key, point)), None)
    if handle is None:
        return None
    mechanism = Mechanism.ECDSA_SHA256 if login.hashes else Mechanism.ECDSA
    subject = data if login.hashes else hashlib.sha256(data).digest()
    try:
        return bool(VerifyingKey(handle.wrapper).verify(subject, signature, mechanism=mechanism))
    except PKCS11Error as exc:
        log.info("the token does not verify: %s", code_of(exc))
        return None


def delete(lane: Lane, uri: Uri, thumbprint: str | None) -> None:
    """Destroy a private key by handle, and then what is certainly its own."""
    with lane.login.writable() as session:
        key = keys.find_key(session, uri, lane.login)
        point = public_half.point_if_proved(lane, key)
        found = None if point is None else thumbprint_of(ecdsa.jwk_from_point(point))
        if thumbprint is not None and found != thumbprint:
            raise KeyMismatchError(
                f"key {key.name} has the thumbprint {found or '(none proved)'}, not {thumbprint}"
            )
        beside = [] if point is None else _own(key, point)
        with lane.use("key deletion", found, key.name):
            key.handle.destroy()
            log.info("key %s destroyed", key.name)
            for handle in beside:  # before a log that is full can stop it
                try:
                    handle.destroy()
                except PKCS11Error as exc:
                    log.warning("something public of key %s stays on the token: %s", key.name, code_of(exc))


def _own(key: FoundKey, point: bytes) -> list[Any]:
    """Public objects and certificates that hold the point; strangers may have given others the same names."""
    return [*_public_halves(key, point), *_certificates(key, point)]


def _certificates(key: FoundKey, point: bytes) -> dict[Any, bytes]:
    found = attributes.search(key.session, public_half.beside(key, ObjectClass.CERTIFICATE))
    read = {handle: attributes.read(handle, [Attribute.VALUE]).get(Attribute.VALUE) for handle in found}
    return {
        handle: der for handle, der in read.items() if der and public_half.point_of_certificate(der) == point
    }


def _public_halves(key: FoundKey, point: bytes) -> list[Any]:
    template = public_half.beside(key, ObjectClass.PUBLIC_KEY) | {Attribute.KEY_TYPE: KeyType.EC}
    found = attributes.search(key.session, template)
    values = [
        (handle, attributes.read(handle, [Attribute.EC_POINT]).get(Attribute.EC_POINT)) for handle in found
    ]
    return [handle for handle, value in values if value and keys.point_of_attribute(value) == point]
