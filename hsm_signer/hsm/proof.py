"""Can this key leave its token? What the attributes claim, and what trying shows; never more than that."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism

from hsm_signer.hsm import attributes, keys, public_half
from hsm_signer.hsm.codes import code_of
from hsm_signer.hsm.keys import FoundKey, KeyInfo
from hsm_signer.hsm.module import TokenInfo
from hsm_signer.hsm.sessions import Lane

_Outcome = tuple[bool | None, str]  # of a try: whether the key held, None where it was not tried; the answer

NOT_AN_ATTESTATION = "as reported by the module, not an attestation"

CLAIMS = {  # what the attributes of a key that cannot leave its token say
    "sensitive": True,
    "extractable": False,
    "always_sensitive": True,
    "never_extractable": True,
}
_WEAKENING = {"sensitive": False, "extractable": True}
_WRAPPINGS = (  # mechanism and parameter; an initialisation vector of zeros does for what must fail
    (Mechanism.AES_KEY_WRAP, None),
    (Mechanism.AES_KEY_WRAP_PAD, None),
    (Mechanism.AES_CBC_PAD, bytes(16)),
)
# the token or the session broke: that shows nothing about the key
_TROUBLE = frozenset(
    {
        "CKR_CRYPTOKI_NOT_INITIALIZED",
        "CKR_DEVICE_ERROR",
        "CKR_DEVICE_MEMORY",
        "CKR_DEVICE_REMOVED",
        "CKR_HOST_MEMORY",
        "CKR_OBJECT_HANDLE_INVALID",
        "CKR_OPERATION_ACTIVE",
        "CKR_SESSION_CLOSED",
        "CKR_SESSION_HANDLE_INVALID",
        "CKR_TOKEN_NOT_PRESENT",
        "CKR_USER_NOT_LOGGED_IN",
    }
)


@dataclass(frozen=True)
class Probe:
    """One try to get at the private key. ``answer``: what the module said.

    ``held``: it came to nothing; ``None`` where the try could not be made, which shows nothing.
    """

    name: str
    held: bool | None
    answer: str


@dataclass(frozen=True)
class Proof:
    """What is known about whether a key can leave its token: what the module *claims*, and what was *probed*.

    ``key.thumbprint`` was proved by a fresh challenge. ``hardware``: the slot calls itself a hardware slot.
    """

    key: KeyInfo
    token: TokenInfo
    probed: tuple[Probe, ...]

    @property
    def claimed(self) -> dict[str, bool]:
        """The key's attributes as the module reports them; what it does not report is left out."""
        return self.key.flags

    @property
    def claims_hold(self) -> bool:
        """``local`` is reported, not required: NSS says that keys it generated were not generated in it."""
        return all(self.claimed.get(name) is value for name, value in CLAIMS.items())

    @property
    def probes_hold(self) -> bool:
        """No try that was made got at the key."""
        return not any(probe.held is False for probe in self.probed)

    @property
    def hardware(self) -> bool:
        return self.token.hardware

    @property
    def ok(self) -> bool:
        """The claims are those of a key that stays, and every try that was made to get at it failed."""
        return self.claims_hold and self.probes_hold

    @property
    def statement(self) -> str:
        """One sentence for a person."""
        found = "cannot leave its token" if self.ok else "can leave its token"
        kind = "a hardware slot" if self.hardware else "no hardware: the slot is one of software"
        return f"The key {found} ({NOT_AN_ATTESTATION}; {kind})."

    def as_dict(self) -> dict[str, object]:
        """For JSON: strings, booleans, lists and dictionaries."""
        return {
            "ok": self.ok,
            "statement": self.statement,
            "hardware": self.hardware,
            "key": {
                "label": self.key.label,
                "id": self.key.id.hex(),
                "curve": self.key.curve,
                "thumbprint": self.key.thumbprint,
            },
            "token": {
                "label": self.token.label,
                "serial": self.token.serial,
                "manufacturer": self.token.manufacturer,
                "model": self.token.model,
                "hardware_version": self.token.hardware_version,
                "firmware_version": self.token.firmware_version,
            },
            "claimed": {"holds": self.claims_hold, "attributes": dict(self.claimed)},
            "probed": {
                "holds": self.probes_hold,
                "tries": [
                    {"try": probe.name, "held": probe.held, "answer": probe.answer} for probe in self.probed
                ],
            },
        }


def prove(lane: Lane, key: FoundKey, generated_now: set[bytes]) -> Proof:
    """Prove whose public half it is, then try to get the private one out.

    Attributes are tried to be changed only if the key was generated in this run: whoever is stopped in between
    would leave a weaker key behind. Whatever does come out is dropped unseen.
    """
    info = key.info(public_half.require_proof(lane, key))
    with lane.use("proof", info.thumbprint, key.name):
        probes = [
            Probe("read CKA_VALUE", *_read_value(key)),
            *(Probe(name, *outcome) for name, outcome in _wrappings(key)),
            *(Probe(name, *outcome) for name, outcome in _copies(key)),
        ]
        if key.id in generated_now:
            probes += [Probe(name, *outcome) for name, outcome in _weakenings_where_writable(lane, key)]
    return Proof(info, lane.login.info, tuple(probes))


def _weakenings_where_writable(lane: Lane, key: FoundKey) -> list[tuple[str, _Outcome]]:
    """:func:`weakenings` in a read-write session: that a session is read-only shows nothing about the key."""
    with ExitStack() as held:
        try:
            session = held.enter_context(lane.login.writable())
        except PKCS11Error as exc:
            if code_of(exc) in _TROUBLE:
                raise
            answer = f"not tried: no read-write session: {code_of(exc) or exc}"
            return [(_weakening(name, value=value), (None, answer)) for name, value in _WEAKENING.items()]
        return list(weakenings(keys.find_key(session, key.uri, lane.login)))


def weakenings(key: FoundKey) -> Iterator[tuple[str, _Outcome]]:
    """Change what must not change, look whether the key comes out then, and change it back.

    Some modules let it change because it means nothing to them: tpm2-pkcs11 keeps attributes in a database,
    and the key stays in the chip whatever they say. Only ever for a key that was generated just now.
    """
    for name, value in _WEAKENING.items():
        yield _weakening(name, value=value), _weakened(key, keys.FLAGS[name], value=value)


def _weakening(name: str, *, value: bool) -> str:
    return f"set CKA_{name.upper()} to {value}"


def _weakened(key: FoundKey, attribute: Attribute, *, value: bool) -> _Outcome:
    held, answer = _tried(partial(_changed, key, attribute, value=value))
    if held:
        return True, answer
    tries = [_read_value(key), *(outcome for _, outcome in _wrappings(key))]
    if not _changed(key, attribute, value=not value):
        return False, "it changed, and does not change back"
    if not any(held is False for held, _ in tries):
        return True, "it changed, but the key did not come out, and it changed back"
    return False, "it changed, and the key came out"


def _changed(key: FoundKey, attribute: Attribute, *, value: bool) -> bool:
    key.handle[attribute] = value
    return attributes.read(key.handle, [attribute]).get(attribute) is value


def _tried(attempt: Callable[[], object]) -> _Outcome:
    """Whether the key held, and the answer; what comes out is dropped unseen."""
    try:
        came_out = attempt()
    except PKCS11Error as exc:
        if code_of(exc) in _TROUBLE:
            raise
        return True, code_of(exc) or str(exc)
    return (False, "succeeded") if came_out else (True, "nothing came out")


def _read_value(key: FoundKey) -> _Outcome:
    return _tried(lambda: key.handle[Attribute.VALUE])


def _wrappings(key: FoundKey) -> Iterator[tuple[str, _Outcome]]:
    """Wrap the key with an AES key of this session (``C_WrapKey``)."""
    try:
        with _wrapping_key(key.session) as wrapping_key:
            for mechanism, parameter in _WRAPPINGS:
                wrap = partial(
                    wrapping_key.wrap_key, key.handle, mechanism=mechanism, mechanism_param=parameter
                )
                yield f"wrap with CKM_{mechanism.name}", _tried(wrap)
    except _NoWrappingKeyError as exc:
        yield "wrap with an AES key", (None, f"not tried: no key to wrap with: {exc}")


class _NoWrappingKeyError(Exception):
    """The token makes no AES key that wraps."""


@contextmanager
def _wrapping_key(session: Any) -> Iterator[Any]:
    template = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.TOKEN: False}
    try:
        found = session.generate_key(
            KeyType.AES, 256, store=False, capabilities=MechanismFlag.WRAP, template=template
        )
    except PKCS11Error as exc:
        if code_of(exc) in _TROUBLE:
            raise
        raise _NoWrappingKeyError(code_of(exc) or str(exc)) from exc
    try:
        yield found
    finally:
        with suppress(PKCS11Error):
            found.destroy()


def _copies(key: FoundKey) -> Iterator[tuple[str, _Outcome]]:
    """Copy the key into this session with weaker attributes (``C_CopyObject``)."""
    for name, value in _WEAKENING.items():
        attempt = partial(_copied, key, name, value=value)
        yield f"copy with CKA_{name.upper()} {value}", _tried(attempt)


def _copied(key: FoundKey, name: str, *, value: bool) -> bool:
    attribute = keys.FLAGS[name]
    copy = key.handle.copy({Attribute.TOKEN: False, attribute: value})
    try:
        return attributes.read(copy, [attribute]).get(attribute) is not (not value)
    finally:
        copy.destroy()
