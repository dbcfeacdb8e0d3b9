"""Sessions of one opened token, and what happens when they break.

A session that failed in the middle of something is never used again: between ``C_SignInit`` and ``C_Sign`` an
error leaves it in ``CKR_OPERATION_ACTIVE`` for ever on some tokens.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any, TypeVar

from pkcs11.exceptions import PKCS11Error

from hsm_signer.errors import ConfigError, HsmSignerError, KeyNotFoundError, ModuleError, TokenError
from hsm_signer.hsm.codes import FOREIGN, code_of, failure
from hsm_signer.hsm.login import Login

log = logging.getLogger(__name__)

T = TypeVar("T")


class _ClosedError(TokenError):
    """The ``with`` block of ``open_token`` is over."""


class Lane:
    """One session, its lock, and the handles that were found through it."""

    def __init__(self, login: Login) -> None:
        self.login = login
        # a module that was not told of threads gets one call at a time
        self.lock = threading.RLock() if login.module.locked else login.module.lock
        self.handles: dict[object, Any] = {}
        self.closed = False
        self._session: Any = None
        self._epoch = -1

    @property
    def session(self) -> Any:  # noqa: ANN401  # python-pkcs11's Session
        return self._session

    def ready(self) -> "Lane":
        """Have a session of the current login; the caller holds the lock."""
        if self._session is None or self._epoch != self.login.epoch:
            if self.closed:
                raise _ClosedError("the token was closed", hint="sign inside the with block of open_token")
            self.drop()
            self._session = self.login.session()
            self._epoch = self.login.epoch
        return self

    def drop(self) -> None:
        """Close the session and forget what it found; the next :meth:`ready` opens another."""
        session = self._session
        self.forget()
        if session is not None:
            self.login.close(session)

    def forget(self) -> None:
        """Forget the session without a call: the module has closed it."""
        self._session = None
        self.handles.clear()


class Sessions:
    """``count`` sessions on one token that threads take in turn."""

    def __init__(self, login: Login, count: int) -> None:
        if count < 1:
            raise ConfigError(f"sessions must be 1 or more, found {count}")
        if count > 1 and not login.module.locked:
            raise ConfigError(
                f"sessions={count} needs a module that locks for itself, and {login.module.path} does not",
                hint="sessions=1 works with every module",
            )
        self.login = login
        self._module = login.module
        self._lanes = [Lane(login) for _ in range(count)]
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in self._lanes:
            self._free.put(lane)
        with self._module.lock:
            login.lanes.extend(self._lanes)

    def run(self, operation: Callable[[Lane], T], what: str) -> T:
        """Do something with a session, and again after each step of recovery while it fails.

        ``operation`` may run up to four times. ``what`` could not be done, for the message.
        """
        self._module.check_process()
        lane = self._free.get()
        try:
            epoch = self.login.epoch
            try:
                return self._attempt(lane, operation)
            except _ClosedError:
                raise
            except (TokenError, *FOREIGN) as exc:
                if isinstance(exc, HsmSignerError) and not isinstance(exc, TokenError):
                    raise
                first = exc
            return self._recover(lane, operation, epoch, first, what)
        except HsmSignerError:
            raise
        except BaseException:  # Ctrl-C: nobody knows what the session was doing
            self._spoil(lane)
            raise
        finally:
            self._free.put(lane)

    def run_once(self, operation: Callable[[Lane], T], what: str) -> T:
        """Do something that must not happen twice."""
        self._module.check_process()
        lane = self._free.get()
        try:
            return self._attempt(lane, operation)
        except HsmSignerError:
            raise
        except FOREIGN as exc:
            self._spoil(lane)
            raise failure(exc, what) from exc
        except BaseException:
            self._spoil(lane)
            raise
        finally:
            self._free.put(lane)

    def _attempt(self, lane: Lane, operation: Callable[[Lane], T]) -> T:
        if self.login.stale:
            self.login.renew(self.login.epoch)
        with lane.lock:
            return operation(lane.ready())

    def close(self) -> None:
        """Close the sessions; a signature under way is waited for."""
        with self._module.lock:
            for lane in self._lanes:
                with lane.lock:
                    lane.closed = True
                    lane.drop()
                self.login.lanes.remove(lane)

    def _recover(
        self, lane: Lane, operation: Callable[[Lane], T], epoch: int, first: Exception, what: str
    ) -> T:
        """One bounded pass: another session, the token found again, the module started again."""
        generation = self._module.generation
        steps: tuple[tuple[str, Callable[[], None]], ...] = (
            ("another session", lambda: self._spoil(lane)),
            ("a new login", lambda: self.login.renew(epoch)),
            ("the module started again", lambda: self._restart(generation)),
        )
        for name, step in steps:
            log.info("%s: %s; trying %s", what, code_of(first) or first, name)
            try:
                step()
                return self._attempt(lane, operation)
            except _ClosedError:
                raise
            except KeyNotFoundError:
                # without a login private keys are invisible, and another session does not bring that back
                if step is not steps[0][1]:
                    raise
            except (TokenError, *FOREIGN) as exc:
                if isinstance(exc, HsmSignerError) and not isinstance(exc, TokenError):
                    raise
                log.debug("%s did not help: %s", name, code_of(exc) or exc)
            self._spoil(lane)
        if isinstance(first, TokenError):
            raise first
        raise failure(
            first, f"{what}, nor with another session, a new login or the module started again"
        ) from first

    def _spoil(self, lane: Lane) -> None:
        with lane.lock:
            lane.drop()

    def _restart(self, generation: int) -> None:
        module = self._module
        if not module.owned:
            raise ModuleError(f"{module.path} was initialised by another part of this process")
        with module.lock, ExitStack() as held:
            if module.generation != generation:
                return  # another thread has done it
            logins = list(module.logins.values())
            for login in logins:
                for lane in login.lanes:
                    held.enter_context(lane.lock)
            for login in logins:
                login.forget_sessions()
            try:
                module.reinitialize()
            except PKCS11Error as exc:
                raise failure(exc, f"{module.path} does not start again") from exc
            self.login.renew(self.login.epoch)
