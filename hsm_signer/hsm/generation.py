"""Keys made in the token, with the strictest attributes that it takes (PKCS#11 v3.1 §4.9, §6.3.5)."""

import logging
import secrets
from typing import Any

from pkcs11.constants import DEFAULT, Attribute, MechanismFlag, ObjectClass
from pkcs11.exceptions import (
    ArgumentsBad,
    AttributeReadOnly,
    AttributeTypeInvalid,
    AttributeValueInvalid,
    FunctionFailed,
    GeneralError,
    MechanismInvalid,
    TemplateIncomplete,
    TemplateInconsistent,
)
from pkcs11.mechanisms import KeyType

from hsm_signer.errors import (
    ConfigError,
    KeyAmbiguousError,
    KeyExportableError,
)
from hsm_signer.hsm import attributes, keys, proof, public_half
from hsm_signer.hsm.codes import FOREIGN, code_of, failure
from hsm_signer.hsm.keys import FoundKey, KeyInfo
from hsm_signer.hsm.login import Login
from hsm_signer.hsm.sessions import Lane
from hsm_signer.hsm.uri import Uri, checked_label

log = logging.getLogger(__name__)

_Template = dict[Attribute, object]

_PRIVATE: _Template = {
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
    Attribute.DERIVE: False,
}
_FOR_SIGNING_ONLY: _Template = {Attribute.DECRYPT: False, Attribute.UNWRAP: False}
_LEFT_OUT: _Template = {Attribute.DECRYPT: DEFAULT, Attribute.UNWRAP: DEFAULT}
_PUBLIC: _Template = {Attribute.VERIFY: True, Attribute.ENCRYPT: False, Attribute.WRAP: False}
_PUBLIC_LEFT_OUT: _Template = {Attribute.VERIFY: True, Attribute.ENCRYPT: DEFAULT, Attribute.WRAP: DEFAULT}
_HIDDEN: _Template = {Attribute.PRIVATE: True}  # the public half, from those who have no PIN
_NOT_COPYABLE: _Template = {Attribute.COPYABLE: False}
# NSS takes no CKA_COPYABLE; a TPM takes no attribute of another use, not even as false; some have no private
# public keys; the last leaves CKA_DERIVE to the token
LADDER: tuple[tuple[_Template, _Template], ...] = (
    (_PUBLIC | _HIDDEN, _PRIVATE | _FOR_SIGNING_ONLY | _NOT_COPYABLE),
    (_PUBLIC | _HIDDEN, _PRIVATE | _FOR_SIGNING_ONLY),
    (_PUBLIC, _PRIVATE | _FOR_SIGNING_ONLY),
    (_PUBLIC_LEFT_OUT | _HIDDEN, _PRIVATE | _LEFT_OUT),
    (_PUBLIC_LEFT_OUT, _PRIVATE | _LEFT_OUT),
    (_PUBLIC_LEFT_OUT, _PRIVATE | _LEFT_OUT | {Attribute.DERIVE: DEFAULT}),
)
_TEMPLATE_REFUSED = (
    ArgumentsBad,
    AttributeReadOnly,
    AttributeTypeInvalid,
    AttributeValueInvalid,
    FunctionFailed,
    GeneralError,
    TemplateIncomplete,
    TemplateInconsistent,
)


def generate(lane: Lane, label: str, key_id: bytes | None) -> KeyInfo:
    """Generate, read back, try out; what fails the policy is destroyed."""
    checked_label(label, "key")
    if key_id is not None and not (isinstance(key_id, bytes) and key_id):
        raise ConfigError("the CKA_ID of a key is bytes, at least one")
    chosen = secrets.token_bytes(16) if key_id is None else key_id
    login, uri, made = lane.login, Uri(object=label, id=chosen), list[Any]()
    with login.writable() as session:
        _require_free(session, Uri(object=label), login)
        _require_free(session, Uri(id=chosen), login)
        try:
            with lane.use("key generation", None, str(uri)) as outcome:
                made += _generate_pair(session, label, chosen)
                key = keys.find_key(session, uri, login)
                _judge(key)
                info = key.info(public_half.require_proof(lane, key))
                _require_free(session, Uri(object=label), login, but=1)  # another process may be as fast
                outcome["key"] = info.thumbprint
        except BaseException:  # Ctrl-C as well, and a log that was full: what is not handed out does not stay
            _destroy(login, uri, None if key_id is None else made)
            raise
    log.info("key %s generated", key.name)
    return info


def _require_free(session: Any, uri: Uri, login: Login, *, but: int = 0) -> None:
    if len(keys.find_keys(session, uri, login)) > but:
        raise KeyAmbiguousError(
            f"a private key {uri} is on the token already", hint="choose another label; keys are chosen by it"
        )


def _generate_pair(session: Any, label: str, key_id: bytes) -> Any:
    """Take the first rung that the token takes; the handles of both halves."""
    parameters = session.create_domain_parameters(KeyType.EC, {Attribute.EC_PARAMS: keys.P256}, local=True)
    pair: Any = ()
    for number, (public, private) in enumerate(LADDER, 1):
        try:
            pair = parameters.generate_keypair(
                id=key_id,
                label=label,
                store=True,
                capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
                public_template=public,
                private_template=private,
            )
        except MechanismInvalid as exc:
            raise failure(exc, "the token generates no EC keys (CKM_EC_KEY_PAIR_GEN)") from exc
        except _TEMPLATE_REFUSED as exc:
            log.info("key templates, rung %d of %d: %s", number, len(LADDER), code_of(exc))
            if number == len(LADDER):
                raise
        else:
            break
    return pair


def _judge(key: FoundKey) -> None:
    """What was read back must say that the key stays, and changing that must not get the key out."""
    flags = key.flags
    kept = flags.get("always_sensitive") is not False and flags.get("never_extractable") is not False
    if key.info(None).exportable or not kept:
        raise KeyExportableError(
            f"the token made key {key.name} such that it can leave it; the key was destroyed",
            hint="the token's policy or configuration decides that",
        )
    for name, (held, answer) in proof.weakenings(key):
        if held is False:
            raise KeyExportableError(f"{name} of key {key.name}: {answer}; the key was destroyed")


def _destroy(login: Login, uri: Uri, made: list[Any] | None) -> None:
    """Destroy what was made, by its handles: another process may be making a key of the same label and CKA_ID.

    ``None``: by its names, in a fresh session; a random CKA_ID is nobody else's, and the answer with the
    handles may have been lost.
    """
    template: dict[Attribute, object] = {Attribute.LABEL: uri.object, Attribute.ID: uri.id}
    try:
        with login.writable() as session:
            if made is None:
                classes = (ObjectClass.PUBLIC_KEY, ObjectClass.PRIVATE_KEY)
                found = [attributes.search(session, template | {Attribute.CLASS: each}) for each in classes]
                made = [handle for handles in found for handle in handles]
            for handle in reversed(made):  # the private half first
                handle.destroy()
    except FOREIGN as exc:
        log.warning("a key that failed, %s, may be left on the token (%s): delete it", uri, code_of(exc))
