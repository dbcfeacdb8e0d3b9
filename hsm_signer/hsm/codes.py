"""What a module answered, by the names of PKCS#11 (v3.1 §5.1); the door for foreign exceptions.

python-pkcs11 raises :class:`PKCS11Error` for every return value, often without a text, and what Python
raises by itself when a module's answer makes no sense: a length of 2^63, an attribute cut short.
"""

import re
import struct

from pkcs11.exceptions import PKCS11Error

from hsm_signer.errors import TokenError

FOREIGN = (PKCS11Error, struct.error, ValueError, IndexError, KeyError, MemoryError, OverflowError)

_SPELLINGS = {
    "AnotherUserAlreadyLoggedIn": "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
    "FunctionCancelled": "CKR_FUNCTION_CANCELED",
    "TokenNotRecognised": "CKR_TOKEN_NOT_RECOGNIZED",
}
_NAMES = {  # what python-pkcs11 does not map, and what the functions answer that we call ourselves
    0x01: "CKR_CANCEL",
    0x02: "CKR_HOST_MEMORY",
    0x05: "CKR_GENERAL_ERROR",
    0x06: "CKR_FUNCTION_FAILED",
    0x07: "CKR_ARGUMENTS_BAD",
    0x09: "CKR_NEED_TO_CREATE_THREADS",
    0x0A: "CKR_CANT_LOCK",
    0x1B: "CKR_ACTION_PROHIBITED",
    0x20: "CKR_DATA_INVALID",
    0x21: "CKR_DATA_LEN_RANGE",
    0x30: "CKR_DEVICE_ERROR",
    0x31: "CKR_DEVICE_MEMORY",
    0x32: "CKR_DEVICE_REMOVED",
    0x50: "CKR_FUNCTION_CANCELED",
    0x54: "CKR_FUNCTION_NOT_SUPPORTED",
    0x60: "CKR_KEY_HANDLE_INVALID",
    0x62: "CKR_KEY_SIZE_RANGE",
    0x63: "CKR_KEY_TYPE_INCONSISTENT",
    0x65: "CKR_KEY_CHANGED",
    0x68: "CKR_KEY_FUNCTION_NOT_PERMITTED",
    0x70: "CKR_MECHANISM_INVALID",
    0x71: "CKR_MECHANISM_PARAM_INVALID",
    0x82: "CKR_OBJECT_HANDLE_INVALID",
    0x90: "CKR_OPERATION_ACTIVE",
    0x91: "CKR_OPERATION_NOT_INITIALIZED",
    0xA3: "CKR_PIN_EXPIRED",
    0xB0: "CKR_SESSION_CLOSED",
    0xB3: "CKR_SESSION_HANDLE_INVALID",
    0xE0: "CKR_TOKEN_NOT_PRESENT",
    0xE1: "CKR_TOKEN_NOT_RECOGNIZED",
    0x101: "CKR_USER_NOT_LOGGED_IN",
    0x140: "CKR_CURVE_NOT_SUPPORTED",
    0x150: "CKR_BUFFER_TOO_SMALL",
    0x160: "CKR_SAVED_STATE_INVALID",
    0x170: "CKR_INFORMATION_SENSITIVE",
    0x180: "CKR_STATE_UNSAVEABLE",
    0x190: "CKR_CRYPTOKI_NOT_INITIALIZED",
    0x191: "CKR_CRYPTOKI_ALREADY_INITIALIZED",
    0x1A0: "CKR_MUTEX_BAD",
    0x1A1: "CKR_MUTEX_NOT_LOCKED",
    0x1B0: "CKR_NEW_PIN_MODE",
    0x1B1: "CKR_NEXT_OTP",
    0x1B6: "CKR_FIPS_SELF_TEST_FAILED",
    0x1B7: "CKR_LIBRARY_LOAD_FAILED",
    0x200: "CKR_FUNCTION_REJECTED",
    0x201: "CKR_TOKEN_RESOURCE_EXCEEDED",
    0x202: "CKR_OPERATION_CANCEL_FAILED",
}
_SENTENCES = {  # texts of bare PKCS11Errors
    "not initialized": "CKR_CRYPTOKI_NOT_INITIALIZED",
    "already initialized": "CKR_CRYPTOKI_ALREADY_INITIALIZED",
    "Buffer was too small": "CKR_BUFFER_TOO_SMALL",
    "Parallel not supported": "CKR_SESSION_PARALLEL_NOT_SUPPORTED",
    "User type invalid": "CKR_USER_TYPE_INVALID",
}


def name_of(rv: int) -> str:
    """Name of a return value that a module gave to us directly."""
    return _NAMES.get(rv, f"CKR_{rv:#010x}")


def code_of(exc: BaseException) -> str | None:
    """``CKR_…`` of what python-pkcs11 or we raised; ``None`` if no PKCS#11 function said it."""
    if isinstance(exc, TokenError):
        return exc.code
    if not isinstance(exc, PKCS11Error):
        return None
    if type(exc) is not PKCS11Error:
        name = type(exc).__name__
        return _SPELLINGS.get(name) or "CKR" + re.sub(r"[A-Z]+(?![a-z])|[A-Z]", r"_\g<0>", name).upper()
    text = str(exc)
    if unmapped := re.search(r"0x[0-9a-fA-F]+", text):
        return name_of(int(unmapped[0], 16))
    return next((code for sentence, code in _SENTENCES.items() if sentence in text), None)


def failure(exc: BaseException, what: str, *, hint: str | None = None) -> TokenError:
    """Say what could not be done, and what the module answered."""
    code = code_of(exc)
    answered = code or f"an answer that makes no sense ({type(exc).__name__})"
    if code is None and isinstance(exc, PKCS11Error):
        answered = str(exc) or type(exc).__name__
    return TokenError(f"{what}: {answered}", code=code, hint=hint)
