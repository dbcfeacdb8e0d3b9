"""What must hold before a PIN goes to a token, and what its answer means."""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from hsm_signer.errors import ConfigError, PinError, PinLockedError, PinRefusedError, PinRejectedError
from hsm_signer.hsm.codes import code_of, failure
from hsm_signer.hsm.module import TokenInfo
from hsm_signer.pin import PIN_PAD, PinPad, PinSource
from hsm_signer.pin_guard import Attempt, in_turn

Pin = str | Callable[[], str] | PinSource | PinPad


@dataclass(frozen=True)
class Secret:
    """A PIN that no traceback with local variables shows: frames hold this, and the text only passes by."""

    text: str = field(repr=False)

    @property
    def is_utf8(self) -> bool:
        try:
            self.text.encode()
        except UnicodeEncodeError:  # it carries the PIN, so it ends here
            return False
        return True


Source = Secret | Callable[[], str] | PinSource | PinPad

_REJECTED = frozenset({"CKR_PIN_INCORRECT", "CKR_PIN_INVALID", "CKR_PIN_LEN_RANGE"})
_CANCELLED = frozenset({"CKR_CANCEL", "CKR_FUNCTION_CANCELED", "CKR_FUNCTION_REJECTED"})
OF_THE_PIN = _REJECTED | {"CKR_PIN_LOCKED"}

_HASH_KEY = secrets.token_bytes(32)
_rejected: set[bytes] = set()  # keyed hashes of PINs that a token rejected in this process


def sealed(pin: Pin | None) -> Source | None:
    """What to pass on of a ``pin`` argument."""
    return pin if pin is None or isinstance(pin, PinPad) or callable(pin) else Secret(pin)


def fetch(pin: Source, info: TokenInfo) -> Secret | PinPad:
    """Get the PIN from where it comes from; call with no lock held, a person may be asked."""
    if isinstance(pin, PinPad):
        if "PROTECTED_AUTHENTICATION_PATH" not in info.flags:
            raise PinRefusedError(
                f"token {info.label!r} has no PIN pad",
                hint="it does not set CKF_PROTECTED_AUTHENTICATION_PATH: choose another pin-source",
            )
        return PIN_PAD
    if isinstance(pin, PinSource):
        pin.check(info.identity)
    secret = pin if isinstance(pin, Secret) else Secret(pin())
    if not isinstance(secret.text, str):
        raise ConfigError(f"a PIN is text, but its source gave {type(secret.text).__name__}")
    if not secret.text:
        raise PinRefusedError("the PIN is empty; some tokens count that as a wrong one")
    if not secret.is_utf8:
        raise PinRefusedError("the PIN cannot be written in UTF-8, so it is none (PKCS#11 v3.1 §5.6.8)")
    return secret


def attempt(pin: Source | None, info: TokenInfo) -> AbstractContextManager[Attempt]:
    """The guard of one login, by where its PIN comes from."""
    if isinstance(pin, PinSource):
        return pin.attempt(info.identity)
    return nullcontext(Attempt(None, source=None)) if isinstance(pin, PinPad) else in_turn(info.identity)


def judge_flags(info: TokenInfo, *, allow_final_try: bool) -> None:
    """Raise where the token says that no try, or only the last one, is left."""
    judge_lock(info)
    if "USER_PIN_FINAL_TRY" in info.flags and not allow_final_try:
        raise PinRefusedError(
            f"token {info.label!r} allows one last try (CKF_USER_PIN_FINAL_TRY), which is not spent",
            hint="log in once with the right PIN and the token's own tool, or allow the final try",
        )


def judge_lock(info: TokenInfo) -> None:
    """Raise where the token says that the PIN is locked."""
    if "USER_PIN_LOCKED" in info.flags:
        raise _locked(info, "CKF_USER_PIN_LOCKED")


def judge_text(text: Secret | PinPad, info: TokenInfo) -> None:
    """Raise where the token rejected this PIN before, in this process; call it in the turn of the login."""
    if isinstance(text, Secret) and _hash(text, info) in _rejected:
        raise PinRefusedError(
            f"token {info.label!r} rejected this PIN before; it is not sent a second time",
            hint="a wrong PIN that is repeated locks the token",
        )


def refusal(exc: BaseException, text: Secret | PinPad, info: TokenInfo) -> Exception:
    """What a login that failed means; ``info``: of the token after it."""
    code, label = code_of(exc), repr(info.label)
    if code in _REJECTED:
        if isinstance(text, Secret):
            _rejected.add(_hash(text, info))
        return PinRejectedError(f"token {label} rejected the PIN: {code}", code=code, hint=_tries_left(info))
    if code == "CKR_PIN_LOCKED":
        return _locked(info, code)
    if code in ("CKR_PIN_EXPIRED", "CKR_USER_PIN_NOT_INITIALIZED"):
        return PinError(f"token {label} has no PIN that it accepts: {code}", code=code)
    if code in _CANCELLED:
        return PinError(f"the login to token {label} was cancelled: {code}", code=code)
    return failure(exc, f"login to token {label} failed")


def _tries_left(info: TokenInfo) -> str:
    """What the flags say after a wrong PIN; not every token says it."""
    if "USER_PIN_LOCKED" in info.flags:
        return "the token says that the PIN is locked now"
    if "USER_PIN_FINAL_TRY" in info.flags:
        return "the token says that the next wrong PIN locks it"
    return "tokens lock after a few wrong PINs: be sure of it before the next try"


def _locked(info: TokenInfo, code: str) -> PinLockedError:
    return PinLockedError(
        f"the user PIN of token {info.label!r} is locked: {code}",
        code=code,
        hint="whoever holds the security officer's PIN or the PUK can unlock it",
    )


def _hash(pin: Secret, info: TokenInfo) -> bytes:
    return hmac.digest(_HASH_KEY, f"{info.identity}\0{pin.text}".encode(), hashlib.sha256)
