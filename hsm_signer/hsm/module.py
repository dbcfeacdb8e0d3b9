"""PKCS#11 modules: loaded once, initialised for threads, never used across a fork.

Where a module cannot lock for itself (PKCS#11 v3.1 §5.4), all its calls go through one lock of ours.

A module stays loaded and our reference to it is never given back: python-pkcs11 finalises in a destructor,
which in a forked child would end what belongs to the parent.
"""

import atexit
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pkcs11.constants import SlotFlag, TokenFlag
from pkcs11.exceptions import PKCS11Error, TokenNotPresent, TokenNotRecognised

from hsm_signer.errors import ForkedError, ModuleError
from hsm_signer.hsm.codes import FOREIGN, code_of, failure
from hsm_signer.hsm.cryptoki import Functions, Library
from hsm_signer.hsm.uri import Uri

if TYPE_CHECKING:
    from hsm_signer.hsm.login import Login

# A module that answers CKR_CRYPTOKI_ALREADY_INITIALIZED in a forked child shares its state with the parent, and
# with it the connection to the token: tpm2-pkcs11 mixes up the answers and ends with a locked PIN. SoftHSM
# has no connection; modules that start afresh in the child (p11-kit, OpenSC) answer CKR_OK.
_SURVIVE_A_FORK = ("SoftHSM",)
_FORK_PATIENCE = 5.0  # seconds; a call that hangs must not hang the fork

log = logging.getLogger(__name__)


class Module:
    """One loaded module in one process.

    ``lock`` is held around whatever concerns more than one session, but a first login, and, where ``locked`` is
    false, around every call. ``generation`` counts initialisations: sessions of an earlier one are gone.
    """

    def __init__(self, path: str, library: Library, *, locked: bool) -> None:
        self.path = path
        self.library = library
        self.locked = locked
        self.direct = library.functions if library.locked else None  # else they may not be initialised
        self.lock = threading.RLock()
        self._process = os.getpid()
        self.generation = 0
        self.suspect = False  # it failed in a way that a new start may mend
        self.logins: dict[str, Login] = {}

    @property
    def functions(self) -> Functions | None:
        functions: Functions | None = self.library.functions
        return functions

    @property
    def owned(self) -> bool:
        """Whether we initialised it; otherwise another part of this process, or a parent, did."""
        return bool(self.library.owned)

    @property
    def here(self) -> bool:
        """Whether this is the process that loaded the module."""
        return os.getpid() == self._process

    def check_process(self) -> None:
        """Raise :class:`ForkedError` in a forked child; to be called before any lock is taken."""
        if os.getpid() != self._process:
            raise ForkedError(
                "this handle was made before a fork, in another process",
                hint="open the token in the worker: PKCS#11 sessions do not survive a fork",
            )

    def locks(self) -> list["_Lock"]:
        """All that is held around calls, in the order in which to take them."""
        logins = self.logins.values()
        return [
            self.lock,
            *(login.lock for login in logins),
            *(lane.lock for login in logins for lane in login.lanes),
        ]

    def refresh(self) -> bool:
        """Start the module again if nobody uses it; whether that was done."""
        with self.lock:
            if self.logins or not self.owned:
                return False
            self.reinitialize()
            return True

    def reinitialize(self) -> None:
        """Finalise and initialise again; the caller holds every lock. All sessions are gone then."""
        self.generation += 1
        self.suspect = False
        self.library.shut()
        try:
            self.library.initialize()
        except PKCS11Error as exc:
            raise failure(exc, f"the PKCS#11 module {self.path} does not start again") from exc


_modules: dict[str, Module] = {}
_inherited: dict[str, Module] = {}
_loading = threading.Lock()


def load(path: str) -> Module:
    """Load and initialise a module, or return the one that is loaded; one per canonical path.

    Raises :class:`ModuleError`.
    """
    canonical = os.path.realpath(path)
    if canonical in _modules and not _modules[canonical].here:
        _forget_the_parents()  # a fork that Python did not see
    with _loading:
        if canonical not in _modules:
            if not Path(canonical).is_file():
                raise ModuleError(
                    f"no PKCS#11 module at {path}", hint="the setting module is the path of a file"
                )
            _modules[canonical] = _load(canonical)
        return _modules[canonical]


def _load(path: str) -> Module:
    try:
        library = Library(path)
    except FOREIGN as exc:
        _explain(path, exc)
    except (OSError, AttributeError) as exc:
        raise ModuleError(f"{path} is no PKCS#11 module: {exc}") from exc
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(library))
    before = _inherited.get(path)
    if before and not library.owned and library.manufacturer_id not in _SURVIVE_A_FORK:
        raise ForkedError(
            f"the PKCS#11 module {path} was loaded before a fork and does not survive one",
            hint="open the token in the workers only, not in the process that forks them",
        )
    module = Module(
        path, library, locked=library.locked or bool(before and before.locked and not library.owned)
    )
    log.info("module %s loaded (%s)", path, "for threads" if module.locked else "behind one lock")
    return module


def _explain(path: str, exc: BaseException) -> None:
    code = code_of(exc)
    if code is None:
        raise ModuleError(f"{path} is no PKCS#11 module that loads: {exc}") from exc
    raise ModuleError(
        f"the PKCS#11 module {path} does not start: {code}",
        code=code,
        hint="its own configuration (a file, an environment variable, a service) is the usual cause",
    ) from exc


class _Lock(Protocol):
    def acquire(self, *, timeout: float) -> bool: ...
    def release(self) -> None: ...


class _Fork(threading.local):
    """The locks that the thread which forks holds meanwhile."""

    def __init__(self) -> None:
        self.held: list[_Lock] = []


_fork = _Fork()


def _let_calls_end() -> None:
    """Before a fork: a lock that a thread holds inside a module would stay held in the child for ever."""
    deadline = time.monotonic() + _FORK_PATIENCE
    for lock in [_loading, *(lock for module in _modules.values() for lock in module.locks())]:
        if lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            _fork.held.append(lock)


def _go_on() -> None:
    while _fork.held:
        _fork.held.pop().release()


def _forget_the_parents() -> None:
    """In a forked child: let go of the parent's modules without touching them."""
    global _loading  # noqa: PLW0603  # another thread of the parent may hold it
    _loading = threading.Lock()
    _fork.held.clear()
    _inherited.update(_modules)
    _modules.clear()


def _finalize_at_exit() -> None:
    """Finalise what nobody uses any more; a thread still inside a module is left alone."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends us even if the module hangs now
    for module in _modules.values():
        if module.owned and not module.logins and module.here:
            module.library.shut()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_let_calls_end, after_in_parent=_go_on, after_in_child=_forget_the_parents)
atexit.register(_finalize_at_exit)


@dataclass(frozen=True)
class ModuleInfo:
    """``CK_INFO`` of a module, and how it is used."""

    path: str
    manufacturer: str
    description: str
    version: str
    cryptoki_version: str
    threads: bool


@dataclass(frozen=True)
class TokenInfo:
    """``CK_TOKEN_INFO``, and what its slot says of itself. ``flags``: names without CKF_."""

    label: str
    serial: str
    manufacturer: str
    model: str
    hardware_version: str
    firmware_version: str
    flags: frozenset[str]
    slot_id: int
    hardware: bool

    @property
    def initialized(self) -> bool:
        return "TOKEN_INITIALIZED" in self.flags

    @property
    def identity(self) -> str:
        """A URI that names the token whatever module, slot and profile it is reached through."""
        uri = Uri(token=self.label, manufacturer=self.manufacturer, serial=self.serial, model=self.model)
        return str(uri)


@dataclass(frozen=True)
class SlotInfo:
    """A slot and what is in it. ``problem``: why the token cannot be read, a PKCS#11 return value."""

    slot_id: int
    description: str
    manufacturer: str
    hardware: bool
    token: TokenInfo | None
    mechanisms: tuple[str, ...]
    problem: str | None = None


@dataclass(frozen=True)
class FoundToken:
    """A token in its slot, as python-pkcs11 hands it out, and what we read of it."""

    token: Any
    info: TokenInfo
    attributes: Mapping[str, object]


def module_info(path: str) -> ModuleInfo:
    """What a module says of itself (``C_GetInfo``)."""
    module = load(path)
    library = module.library
    return ModuleInfo(
        path=module.path,
        manufacturer=library.manufacturer_id,
        description=library.library_description,
        version=_version(library.library_version),
        cryptoki_version=_version(library.cryptoki_version),
        threads=module.locked,
    )


def slots(path: str) -> list[SlotInfo]:
    """List slots and tokens of a module, without logging in."""
    module = load(path)
    module.check_process()
    with module.lock, _slots_of(module) as found:
        return [_slot_info(slot) for slot in found]


def tokens(module: Module) -> tuple[list[FoundToken], list[str]]:
    """The module's tokens, and the slots that answered with an error, one line each."""
    found: list[FoundToken] = []
    problems: list[str] = []
    with module.lock, _slots_of(module) as slot_list:
        for slot in slot_list:
            try:
                token = slot.get_token()
            except (TokenNotPresent, TokenNotRecognised):
                continue
            except FOREIGN as exc:
                problems.append(f"slot {slot.slot_id} ({slot.slot_description}): {code_of(exc)}")
                continue
            info = token_info(token)
            found.append(FoundToken(token, info, attributes_of(module, token, info)))
    return found, problems


@contextmanager
def _slots_of(module: Module) -> Iterator[list[Any]]:
    try:
        found = module.library.get_slots()
    except FOREIGN as exc:
        raise failure(exc, f"the slots of {module.path} cannot be listed") from exc
    yield found


def token_info(token: Any) -> TokenInfo:  # python-pkcs11's Token
    """Read what python-pkcs11 holds of a token; no call to the module."""
    return TokenInfo(
        label=token.label,
        serial=token.serial.decode("utf-8", "replace").rstrip("\0 "),
        manufacturer=token.manufacturer_id,
        model=token.model,
        hardware_version=_version(token.hardware_version),
        firmware_version=_version(token.firmware_version),
        flags=frozenset(flag.name for flag in TokenFlag if flag & token.flags and flag.name),
        slot_id=token.slot.slot_id,
        hardware=bool(token.slot.flags & SlotFlag.HW_SLOT),
    )


def _version(numbers: tuple[int, int]) -> str:
    """``CK_VERSION`` as vendors print it."""
    return "{}.{}".format(*numbers)


def attributes_of(module: Module, token: Any, info: TokenInfo) -> dict[str, object]:
    """What the path attributes of a PKCS#11 URI are compared with (RFC 7512 §2.3)."""
    slot = token.slot
    return {
        "token": info.label,
        "manufacturer": info.manufacturer,
        "serial": info.serial,
        "model": info.model,
        "library-manufacturer": module.library.manufacturer_id,
        "library-description": module.library.library_description,
        "library-version": module.library.library_version,
        "slot-manufacturer": slot.manufacturer_id,
        "slot-description": slot.slot_description,
        "slot-id": slot.slot_id,
    }


def _slot_info(slot: Any) -> SlotInfo:
    token: TokenInfo | None = None
    mechanisms: tuple[str, ...] = ()
    problem: str | None = None
    try:
        token = token_info(slot.get_token())
        mechanisms = tuple(sorted(_mechanism_name(mechanism) for mechanism in slot.get_mechanisms()))
    except (TokenNotPresent, TokenNotRecognised):
        pass
    except FOREIGN as exc:
        problem = code_of(exc) or type(exc).__name__
    return SlotInfo(
        slot_id=slot.slot_id,
        description=slot.slot_description,
        manufacturer=slot.manufacturer_id,
        hardware=bool(slot.flags & SlotFlag.HW_SLOT),
        token=token,
        mechanisms=mechanisms,
        problem=problem,
    )


def _mechanism_name(mechanism: int) -> str:
    return str(getattr(mechanism, "name", f"{mechanism:#010x}"))
