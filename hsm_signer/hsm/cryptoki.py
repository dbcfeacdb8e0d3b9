"""PKCS#11 functions below python-pkcs11: initialisation for threads, lost sessions, signatures, attributes.

python-pkcs11 calls ``C_Initialize(NULL)``, which tells the module that there is one thread, and then runs
every call without the GIL: threads crash it. Here a module is told the truth (``CKF_OS_LOCKING_OK``, PKCS#11
v3.1 §5.4). And it makes three calls for a signature, since it asks for the length first; here there are two.
An attribute costs it two calls, after two others to find out what the object can do; here there is one.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from pkcs11 import _pkcs11
from pkcs11.exceptions import PKCS11Error

from hsm_signer.hsm.codes import code_of, name_of

_OK, _ALREADY_INITIALIZED = 0x0, 0x191
# CKR_ARGUMENTS_BAD, CKR_NEED_TO_CREATE_THREADS, CKR_CANT_LOCK, CKR_FUNCTION_NOT_SUPPORTED
_CANNOT_LOCK = frozenset({0x07, 0x09, 0x0A, 0x54})
_OS_LOCKING_OK = 0x2
# CKR_ATTRIBUTE_SENSITIVE, CKR_ATTRIBUTE_TYPE_INVALID: the other attributes are there all the same (§5.7.5)
_READ = frozenset({_OK, 0x11, 0x12})
_UNAVAILABLE = ctypes.c_ulong(-1).value  # CK_UNAVAILABLE_INFORMATION
_USER_FUNCTIONS = frozenset({1, 3})  # CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS

_INITIALIZE, _FINALIZE, _CLOSE_SESSION, _GET_SESSION_INFO = 0, 1, 13, 15  # places in CK_FUNCTION_LIST
_GET_ATTRIBUTE_VALUE, _SIGN_INIT, _SIGN = 24, 42, 43
_POINTER_CALL = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)
_HANDLE_CALL = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)
_SESSION_INFO_CALL = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p)
_GET_ATTRIBUTE_VALUE_CALL = ctypes.CFUNCTYPE(
    ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong
)
_SIGN_INIT_CALL = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong)
_SIGN_CALL = ctypes.CFUNCTYPE(
    ctypes.c_ulong, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p
)

_ROOM = 144  # bytes; a DER signature of P-521, the longest, has 139
_Signature = ctypes.c_char * _ROOM


class _InitializeArgs(ctypes.Structure):
    """``CK_C_INITIALIZE_ARGS``."""

    _fields_ = (
        ("mutex_functions", ctypes.c_void_p * 4),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    )


class _SessionInfo(ctypes.Structure):
    """``CK_SESSION_INFO``."""

    _fields_ = (
        ("slot", ctypes.c_ulong),
        ("state", ctypes.c_ulong),
        ("flags", ctypes.c_ulong),
        ("device_error", ctypes.c_ulong),
    )


class _Mechanism(ctypes.Structure):
    """``CK_MECHANISM``."""

    if os.name == "nt":
        _pack_ = 1
    _fields_ = (
        ("mechanism", ctypes.c_ulong),
        ("parameter", ctypes.c_void_p),
        ("parameter_length", ctypes.c_ulong),
    )


class _Attribute(ctypes.Structure):
    """``CK_ATTRIBUTE``."""

    if os.name == "nt":
        _pack_ = 1
    _fields_ = (("type", ctypes.c_ulong), ("value", ctypes.c_void_p), ("length", ctypes.c_ulong))


_ECDSA = _Mechanism(0x1041)  # CKM_ECDSA, which has no parameter
_TO_ECDSA = ctypes.c_void_p(ctypes.addressof(_ECDSA))
_DIGEST_LENGTH = ctypes.c_ulong(32)


class _FunctionList(ctypes.Structure):
    """The head of ``CK_FUNCTION_LIST``: a version and pointers in the order of PKCS#11 v3.1 §3.6."""

    if os.name == "nt":
        _pack_ = 1
    _fields_ = (("version", ctypes.c_ubyte * 2), ("functions", ctypes.c_void_p * 44))


class Functions:
    """Those functions of a module that python-pkcs11 does not call as we need them."""

    def __init__(self, functions: _FunctionList) -> None:
        self._list = functions
        self._get_attribute_value = _GET_ATTRIBUTE_VALUE_CALL(functions.functions[_GET_ATTRIBUTE_VALUE])
        self._sign_init = _SIGN_INIT_CALL(functions.functions[_SIGN_INIT])
        self._sign = _SIGN_CALL(functions.functions[_SIGN])

    def initialize(self) -> int:
        arguments = _InitializeArgs(flags=_OS_LOCKING_OK)
        return int(_POINTER_CALL(self._list.functions[_INITIALIZE])(ctypes.addressof(arguments)))

    def finalize(self) -> int:
        return int(_POINTER_CALL(self._list.functions[_FINALIZE])(None))

    def close_session(self, handle: int) -> int:
        return int(_HANDLE_CALL(self._list.functions[_CLOSE_SESSION])(handle))

    def logged_in(self, handle: int) -> bool:
        info = _SessionInfo()
        call = _SESSION_INFO_CALL(self._list.functions[_GET_SESSION_INFO])
        return call(handle, ctypes.addressof(info)) == _OK and info.state in _USER_FUNCTIONS

    def read(self, session: int, number: int, asked: Sequence[int], room: int) -> dict[int, bytes] | None:
        """``C_GetAttributeValue``, once: what the object has of the attributes, each shorter than ``room`` bytes.

        ``None`` where it takes more than that: a value is longer, or the module does not answer by the rules.
        Where another attribute is missing, one that is too long may be left out.
        """
        values = ctypes.create_string_buffer(room * len(asked))
        places = range(ctypes.addressof(values), ctypes.addressof(values) + len(values), room)
        attributes = [_Attribute(each, place, room) for each, place in zip(asked, places, strict=True)]
        template = (_Attribute * len(asked))(*attributes)
        answer = self._get_attribute_value(session, number, template, len(asked))
        there = [(each, at) for at, each in enumerate(template) if each.length != _UNAVAILABLE]
        if answer not in _READ or any(
            each.length >= room for each, _ in there
        ):  # a length left as it was too
            return None
        return {each.type: values.raw[at * room :][: each.length] for each, at in there}

    def ecdsa(self, session: int, key: int) -> "EcdsaKey":
        """A private key, by handles, that signs."""
        return EcdsaKey(self._sign_init, self._sign, session, key)


class EcdsaKey:
    """``C_SignInit`` and ``C_Sign`` with ``CKM_ECDSA`` by one key in one session, for one thread at a time.

    What the calls take is made once: to make it for each costs as much as ctypes itself.
    """

    def __init__(
        self, sign_init: Callable[..., int], sign: Callable[..., int], session: int, key: int
    ) -> None:
        self._sign_init, self._sign = sign_init, sign
        self._session, self._key = ctypes.c_ulong(session), ctypes.c_ulong(key)
        self._signature, self._length = _Signature(), ctypes.c_ulong()
        self._to_signature, self._to_length = (
            ctypes.c_void_p(ctypes.addressof(each)) for each in (self._signature, self._length)
        )

    def sign(self, digest: bytes) -> bytes:
        """What the token answers for a digest of 32 bytes."""
        self._length.value = _ROOM
        _accepted("C_SignInit", self._sign_init(self._session, _TO_ECDSA, self._key))
        answer = self._sign(self._session, digest, _DIGEST_LENGTH, self._to_signature, self._to_length)
        _accepted("C_Sign", answer)
        return self._signature.raw[: self._length.value]


def _accepted(function: str, answer: int) -> None:
    if answer != _OK:
        raise PKCS11Error(f"{function} answered {name_of(answer)} ({answer:#x})")


def _functions(path: str) -> Functions | None:
    found = ctypes.POINTER(_FunctionList)()
    answer = ctypes.CDLL(path).C_GetFunctionList(ctypes.byref(found))
    return Functions(found.contents) if answer == _OK and found else None


class Library(_pkcs11.lib):
    """python-pkcs11's library with our initialisation: its constructor calls :meth:`initialize`.

    ``locked``: the module was told of threads. ``owned``: we initialised it, so we may finalise it.
    """

    def __init__(self, path: str) -> None:
        self.functions = _functions(path)
        self.locked = self.owned = False
        try:
            super().__init__(path)
        except PKCS11Error as exc:
            self.shut()
            if not self.locked or code_of(exc) != "CKR_CRYPTOKI_NOT_INITIALIZED":
                raise
            # p11-kit's client makes another function list for every C_GetFunctionList: what we initialised is
            # not what python-pkcs11 calls, so it has to do it
            self.functions = None
            self.locked = self.owned = False
            super().__init__(path)

    def initialize(self) -> None:
        if self.functions is not None:
            answer = self.functions.initialize()
            if answer == _OK:
                self.locked = self.owned = True
            if answer == _ALREADY_INITIALIZED:
                return
            if answer not in _CANNOT_LOCK:
                _accepted("C_Initialize", answer)
                return
        try:
            super().initialize()
        except PKCS11Error as exc:
            if code_of(exc) != "CKR_CRYPTOKI_ALREADY_INITIALIZED":
                raise
        else:
            self.owned = True

    def shut(self) -> None:
        """Finalise what we initialised, whatever the module says to it.

        python-pkcs11 knows only of what it initialised itself.
        """
        if self.initialized:
            with suppress(PKCS11Error):
                self.finalize()
        elif self.functions is not None and self.owned:
            self.functions.finalize()
