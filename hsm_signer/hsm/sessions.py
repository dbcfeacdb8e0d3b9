"""Sessions of one opened token, and what happens when they break.

A session that failed in the middle of something is never used again: between ``C_SignInit`` and ``C_Sign`` an
error leaves it in ``CKR_OPERATION_ACTIVE`` for ever on some tokens.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

from pkcs11.exceptions import SessionCount

from hsm_signer.errors import (
    ConfigError,
    HsmSignerError,
    KeyNotFoundError,
    ModuleError,
    PinError,
    TokenError,
    TokenNotFoundError,
)
from hsm_signer.hsm.codes import FOREIGN, code_of, failure
from hsm_signer.hsm.login import Login

if TYPE_CHECKING:
    from hsm_signer.audit import AuditLog

log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

# the token judged what was asked of it; nothing is broken
_OF_THE_REQUEST = frozenset(
    {
        "CKR_ATTRIBUTE_TYPE_INVALID",
        "CKR_ATTRIBUTE_VALUE_INVALID",
        "CKR_DATA_INVALID",
        "CKR_DATA_LEN_RANGE",
        "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_KEY_SIZE_RANGE",
        "CKR_KEY_TYPE_INCONSISTENT",
        "CKR_MECHANISM_INVALID",
        "CKR_MECHANISM_PARAM_INVALID",
        "CKR_SESSION_COUNT",
        "CKR_TEMPLATE_INCOMPLETE",
        "CKR_TEMPLATE_INCONSISTENT",
        "CKR_TOKEN_WRITE_PROTECTED",
    }
)


class _ClosedError(TokenError):
    """The ``with`` block of ``open_token`` is over."""


class Lane:
    """One session, its lock, the handles that were found through it, and the log of what keys are used for."""

    def __init__(self, login: Login, audit: "AuditLog | None") -> None:
        self.login = login
        self.audit = audit
        # a module that was not told of threads gets one call at a time
        self.lock = threading.RLock() if login.module.locked else login.module.lock
        self.handles: dict[object, Any] = {}
        self.closed = False
        self.session: Any = None  # python-pkcs11's
        self.epoch = -1

    def ready(self) -> "Lane":
        """Have a session of the current login; the caller holds the lock."""
        if self.epoch != self.login.epoch:
            if self.closed:
                raise _ClosedError("the token was closed", hint="sign inside the with block of open_token")
            self.drop()
            self.session = self.login.session()
            self.epoch = self.login.epoch
        return self

    def use(self, intent: str, key: str | None, name: str) -> AbstractContextManager[dict[str, object]]:
        """Write a use that is no signature into the log, if there is one; ``key``: its thumbprint."""
        if self.audit is None:
            return nullcontext({})
        return self.audit.use(intent, done="done", serial=self.login.info.serial, key=key, object=name)

    def drop(self) -> None:
        """Close the session and forget what it found; the next :meth:`ready` opens another."""
        session = self.session
        self.forget()
        if session is not None:
            self.login.close(session)

    def discard(self) -> None:
        """:meth:`drop`, for whoever does not hold the lock."""
        with self.lock:
            self.drop()

    def forget(self) -> None:
        """Forget the session without a call: the module has closed it."""
        self.session, self.epoch = None, -1
        self.handles.clear()


class Sessions:
    """``count`` sessions on one token that threads take in turn."""

    def __init__(self, login: Login, count: int, audit: "AuditLog | None") -> None:
        if count < 1:
            raise ConfigError(f"sessions must be 1 or more, found {count}")
        if count > 1 and not login.module.locked:
            raise ConfigError(
                f"sessions={count} needs a module that locks for itself, and {login.module.path} does not",
                hint="sessions=1 works with every module",
            )
        self.login = login
        self.audit = audit
        self._module = login.module
        self._process = os.getpid()
        self._count = count
        self._retiring = threading.Lock()
        self._lanes = [Lane(login, audit) for _ in range(count)]
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in self._lanes:
            self._free.put(lane)
        with self._module.lock:
            login.lanes.extend(self._lanes)

    def run(self, operation: Callable[[Lane, Unpack[Ts]], T], what: str, *args: *Ts) -> T:
        """Do something with a session, and again after each step of recovery while it fails.

        ``operation`` may run up to four times. ``what``: the sentence that says what did not happen then.
        """
        if os.getpid() != self._process:
            self._module.check_process()
        lane, login, recovery = self._free.get(), self.login, None
        try:
            while True:
                try:
                    if recovery is not None:
                        recovery.step()
                    if lane.epoch != login.epoch and login.stale:
                        login.renew(login.epoch)
                    with lane.lock:
                        return operation(lane if lane.epoch == login.epoch else lane.ready(), *args)
                except (TokenError, KeyNotFoundError, *FOREIGN) as exc:
                    if isinstance(exc, SessionCount) and self._retire(lane):
                        lane = self._free.get()
                        continue
                    recovery = recovery or _Recovery(self, lane, what)
                    recovery.judge(exc)
        except HsmSignerError as exc:
            if isinstance(exc, PinError):  # of a login between C_SignInit and C_Sign
                lane.discard()
            raise
        except BaseException:  # Ctrl-C: nobody knows what the session was doing
            lane.discard()
            raise
        finally:
            self._free.put(lane)

    def _retire(self, lane: Lane) -> bool:
        """Do without a session that the token does not give, as long as there is another."""
        with self._retiring:
            if lane.session is not None or self._count == 1:
                return False
            self._count -= 1
        log.warning("the token gives no more sessions: %d are used", self._count)
        return True

    def restart(self, generation: int) -> None:
        """Start the module again, and log in again; what else uses the module does so when it finds out."""
        module = self._module
        if not module.owned:
            raise ModuleError(f"{module.path} was initialised by another part of this process")
        with module.lock, ExitStack() as held:
            if module.generation != generation:
                return  # another thread has done it
            logins = list(module.logins.values())
            for login in logins:
                held.enter_context(login.lock)
            for login in logins:
                for lane in login.lanes:
                    held.enter_context(lane.lock)
            for pause in (0.1, 0.4, None):  # a server that comes back is not there at once
                for login in logins:
                    login.forget_sessions()
                module.reinitialize()
                try:
                    self.login.renew(self.login.epoch)
                except TokenNotFoundError:
                    if pause is None:
                        raise
                    time.sleep(pause)
                else:
                    return

    def close(self) -> None:
        """Close the sessions; a signature under way is waited for."""
        with self._module.lock:
            for lane in self._lanes:
                with lane.lock:
                    lane.closed = True
                    lane.drop()
                self.login.lanes.remove(lane)


class _Recovery:
    """One bounded pass: another session, a new login, the module started again.

    Whether a step helped is for the operation to tell: on a sick token much works, only not a signature.
    """

    def __init__(self, sessions: Sessions, lane: Lane, what: str) -> None:
        login, epoch = sessions.login, sessions.login.epoch
        generation = login.module.generation
        self._lane = lane
        self._what = what
        self._first: Exception | None = None
        self._tried: list[str] = []
        self._steps: list[tuple[str, Callable[[], None]]] = [
            ("another session", lambda: None),
            ("a new login", lambda: login.renew(epoch)),
            ("the module started again", lambda: sessions.restart(generation)),
        ]

    def judge(self, exc: Exception) -> None:
        """Raise what the caller is to see, unless there is another step."""
        if isinstance(exc, _ClosedError):
            raise exc
        if isinstance(exc, KeyNotFoundError):
            # without a login private keys are invisible, and another session does not bring that back
            if self._first is None or len(self._tried) != 1 or not self._steps:
                raise exc
        elif isinstance(exc, HsmSignerError) and not isinstance(exc, TokenError):
            raise exc
        self._lane.discard()
        if self._first is None:
            self._first = exc
            if code_of(exc) in _OF_THE_REQUEST:
                del self._steps[1:]
        if not self._steps:
            if isinstance(self._first, TokenError):
                raise self._first
            raise failure(self._first, f"{self._what} (tried: {', '.join(self._tried)})") from self._first
        log.info("%s: %s", self._what, code_of(exc) or exc)

    def step(self) -> None:
        name, act = self._steps.pop(0)
        self._tried.append(name)
        log.info("trying %s", name)
        act()
