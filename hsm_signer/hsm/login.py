"""One login per token in a process, shared and counted; its sessions, and how it is brought back.

PKCS#11 logs in the application, not the session (v3.1 §5.6): sessions opened without a PIN share the login,
and closing the one that python-pkcs11 opened with the PIN logs everybody out. So that one is kept to the end.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pkcs11.attributes import AttributeMapper, handle_bool, handle_ulong
from pkcs11.constants import Attribute
from pkcs11.exceptions import (
    ArgumentsBad,
    FunctionFailed,
    FunctionNotSupported,
    FunctionRejected,
    PKCS11Error,
    SessionCount,
    SessionReadOnly,
)
from pkcs11.types import PROTECTED_AUTH

from hsm_signer.errors import (
    PinRefusedError,
    TokenError,
    TokenNotFoundError,
)
from hsm_signer.hsm import pins
from hsm_signer.hsm.codes import FOREIGN, code_of, failure
from hsm_signer.hsm.module import FoundToken, Module, TokenInfo, token_info, tokens
from hsm_signer.hsm.pins import Secret, Source
from hsm_signer.pin import PinPad
from hsm_signer.pin_guard import UNSPENT, Attempt

if TYPE_CHECKING:
    from hsm_signer.hsm.sessions import Lane

log = logging.getLogger(__name__)

_ALREADY = "CKR_USER_ALREADY_LOGGED_IN"


def _attribute_mapper() -> AttributeMapper:
    """Read attributes as they come: labels that are no UTF-8, flags without a value (``None``)."""
    mapper = AttributeMapper()
    for attribute, handler in AttributeMapper().attribute_types.items():
        if handler == handle_bool:
            mapper.register_handler(attribute, handler[0], lambda value: value != b"\0" if value else None)
    mapper.register_handler(Attribute.LABEL, str.encode, lambda value: value.decode("utf-8", "replace"))
    mapper.register_handler(Attribute.KEY_GEN_MECHANISM, *handle_ulong)
    return mapper


MAPPER = _attribute_mapper()


class Login:
    """What all users of one token in this process share: the login and the list of their sessions.

    ``epoch`` counts logins: a session of an earlier epoch is not used any more.
    """

    def __init__(self, module: Module, found: FoundToken) -> None:
        self.module = module
        self.token = found.token
        self.info = found.info
        self.key = f"{found.info.identity} in slot {found.info.slot_id}"
        # held while it logs in, which takes minutes where a person types at a PIN pad; after the module's, never before
        self.lock = threading.RLock() if module.locked else module.lock
        self.users = 0
        self.epoch = 0
        self.hashes = False  # the token signs with CKM_ECDSA_SHA256 only
        self.lanes: list[Lane] = []
        self._source: Source | None = None
        self._pin: Secret | PinPad | None = None  # worked in this process
        # for signatures that carry it, where others had logged in: nothing tells yet whether it is right
        self._adopted: tuple[Source | None, Secret | PinPad | None] = None, None
        self._anchor: Any = None  # the session that python-pkcs11 logs out when it closes it
        self._spare: list[Any] = []
        self._writable = False  # the token has read-write sessions only
        self._foreign = False  # another part of this process logged in, and will log out

    def __repr__(self) -> str:
        return f"Login({self.key!r})"

    @property
    def authenticated(self) -> bool:
        return self._anchor is not None or self._foreign

    @property
    def stale(self) -> bool:
        """Whether a login was lost."""
        return self._source is not None and self._anchor is None and not self._foreign

    def enter(self, pin: Source | None, info: TokenInfo, *, allow_final_try: bool) -> None:
        """Log in unless somebody has; ``info``: the token's flags as just read."""
        if self.authenticated or pin is None or "LOGIN_REQUIRED" not in info.flags:
            return
        with self.module.lock:
            self._foreign = self._logged_in_by_others()
        if self._foreign:
            log.info("token %s: logged in by another part of this process", info.label)
            return
        pins.judge_flags(info, allow_final_try=allow_final_try)
        text = pins.fetch(pin, info)  # no lock is held while a person is asked
        with self.lock:  # and not the module's while one types at a PIN pad: others use their tokens
            if not self.authenticated:
                self._log_in(pin, text, allow_final_try=allow_final_try)

    def leave(self) -> None:
        """Count one user less; the last one logs out."""
        with self.module.lock:
            self.users -= 1
            if self.users == 0:
                self._log_out()
                self._source = self._pin = None
                self._adopted = None, None
                self.module.logins.pop(self.key, None)

    def adopt(self, pin: Source) -> None:
        """Fetch the PIN where somebody else had logged in, and a key wants it for each signature."""
        if self._pin is None and self._adopted[1] is None:
            text = pins.fetch(pin, self.info)  # no lock is held while a person is asked
            with self.module.lock:
                self._adopted = pin, text

    @contextmanager
    def context_login(self) -> Iterator[Secret]:
        """Guard one signature that carries the PIN (``CKU_CONTEXT_SPECIFIC``)."""
        source, pin = self._adopted if self._pin is None else (self._source, self._pin)
        if not isinstance(pin, Secret):
            raise PinRefusedError("the key wants its PIN for each signature, and no PIN is known")
        with self._guarded(source, pin, allow_final_try=False) as (_, attempt):
            attempt.begin()
            try:
                yield pin
            except PKCS11Error as exc:
                attempt.failed(code_of(exc))  # C_SignInit comes before the login
                if code_of(exc) in pins.OF_THE_PIN:
                    raise self._refused(exc, pin) from exc
                if code_of(exc) not in UNSPENT:  # no step of recovery sends it again
                    raise PinRefusedError(
                        f"a signature that carries the PIN ended with {code_of(exc)}: a try may be spent",
                        hint="see whether the token takes its PIN, at a prompt, and open it again",
                    ) from exc
                raise
            attempt.succeeded()

    def session(self) -> Any:  # python-pkcs11's Session
        """A session for signing; the caller closes it with :meth:`close`."""
        try:
            return self._spare.pop()
        except IndexError:
            return self._open(self.token)

    @contextmanager
    def writable(self) -> Iterator[Any]:
        """A read-write session beside the others, closed without logging out."""
        session = self.token.open(rw=True, attribute_mapper=MAPPER)
        try:
            yield session
        finally:
            self.close(session)

    def close(self, session: Any) -> None:
        """Close a session and leave the login alone; errors are of no use to anybody."""
        if session is self._anchor:
            return
        self._really_close(session)

    def renew(self, seen: int) -> None:
        """Find the token again and log in again with the PIN that worked; its sessions are closed before.

        ``seen``: the epoch of whoever found it broken; if that is over, somebody has done it already.
        """
        with self.module.lock, self.lock, ExitStack() as held:
            if self.epoch != seen:
                return
            if self.stale and self._pin is None:
                raise PinRefusedError(
                    f"the login to token {self.info.label!r} was lost, and it rejected the PIN that worked before",
                    hint="open the token again, with its PIN of today",
                )
            for lane in self.lanes:
                held.enter_context(lane.lock)
            for lane in self.lanes:
                lane.drop()
            foreign = self._foreign
            self._log_out()
            self.epoch += 1
            found = self._find_again()
            self.token, self.info = found.token, found.info
            if self._source is not None and self._pin is not None:
                self._log_in(self._source, self._pin, allow_final_try=False)
            elif foreign:
                self._foreign = self._logged_in_by_others()

    def forget_sessions(self) -> None:
        """After the module was finalised: its sessions are gone, their handles may be given out again."""
        self._anchor = None
        self._foreign = False
        self._spare.clear()
        self.epoch += 1
        for lane in self.lanes:
            lane.forget()

    def _log_in(self, pin: Source, text: Secret | PinPad, *, allow_final_try: bool) -> None:
        try:
            with self._guarded(pin, text, allow_final_try=allow_final_try) as (token, attempt):
                # proves that sessions can be opened, before a failure would count as a wrong PIN
                self._spare.append(self._first_session(token))
                attempt.begin()
                self._anchor = self._open_with_pin(token, text)
                attempt.succeeded()
        except TokenError as exc:
            if exc.code != _ALREADY:
                self._close_spares()
                raise
            self._foreign = True  # and whether the PIN is right, nobody knows
            return
        except BaseException:
            self._close_spares()
            raise
        self._source, self._pin = pin, text
        log.info("token %s: logged in", self.info.label)

    @contextmanager
    def _guarded(
        self, pin: Source | None, text: Secret | PinPad, *, allow_final_try: bool
    ) -> Iterator[tuple[Any, Attempt]]:
        """What must hold around every PIN that goes to the token."""
        with pins.attempt(pin, self.info) as attempt:
            pins.judge_text(text, self.info)
            try:
                token = self.token.slot.get_token()
            except FOREIGN as exc:
                raise failure(exc, f"token {self.info.label!r} does not answer") from exc
            info = token_info(token)
            if info.identity != self.info.identity:
                raise TokenNotFoundError(
                    f"slot {info.slot_id} holds another token now", candidates=[info.identity]
                )
            pins.judge_flags(info, allow_final_try=allow_final_try)
            if "USER_PIN_COUNT_LOW" in info.flags:
                log.warning("token %r: a wrong PIN was tried since the last login", info.label)
            yield token, attempt

    def _open(self, token: Any) -> Any:
        try:
            return token.open(rw=self._writable, attribute_mapper=MAPPER)
        except (ArgumentsBad, FunctionFailed, FunctionNotSupported, FunctionRejected, SessionReadOnly):
            # some modules have read-write sessions only
            session = token.open(rw=True, attribute_mapper=MAPPER)
            self._writable = True
            return session

    def _first_session(self, token: Any) -> Any:
        try:
            return self._open(token)
        except FOREIGN as exc:
            raise failure(exc, f"no session on token {self.info.label!r}") from exc

    def _open_with_pin(self, token: Any, text: Secret | PinPad) -> Any:
        try:
            try:
                return self._open_logged_in(token, text)
            except SessionCount:  # of C_OpenSession: no PIN was sent, and what gave one session is shared
                self._close_spares()
                session = self._open_logged_in(token, text)
                self._spare.append(session)
                return session
        except FOREIGN as exc:
            raise self._refused(exc, text) from exc

    def _open_logged_in(self, token: Any, text: Secret | PinPad) -> Any:
        return token.open(
            rw=self._writable,
            user_pin=text.text if isinstance(text, Secret) else PROTECTED_AUTH,
            attribute_mapper=MAPPER,
        )

    def _refused(self, exc: BaseException, text: Secret | PinPad) -> Exception:
        if code_of(exc) in pins.OF_THE_PIN:
            self._pin, self._adopted = None, (None, None)
            with suppress(*FOREIGN):  # for its flags; what counts is the answer
                return pins.refusal(exc, text, token_info(self.token.slot.get_token()))
        return pins.refusal(exc, text, self.info)

    def _logged_in_by_others(self) -> bool:
        """Whether a part of this process that is not ours, or a parent before a fork, has logged in."""
        functions = self.module.functions
        if self.module.owned or functions is None:
            return False
        session = self._first_session(self.token)
        try:
            return functions.logged_in(session.handle)
        finally:
            self.close(session)

    def _find_again(self) -> FoundToken:
        found, problems = tokens(self.module)
        same = [one for one in found if one.info.identity == self.info.identity]
        if len(same) > 1:
            same = [one for one in same if one.info.slot_id == self.info.slot_id] or same
        if len(same) != 1:
            raise TokenNotFoundError(
                f"token {self.info.label!r} is gone: {len(same)} tokens with its label and serial are there",
                candidates=problems,
            )
        return same[0]

    def _log_out(self) -> None:
        self._close_spares()
        anchor, self._anchor, self._foreign = self._anchor, None, False
        if anchor is not None:
            self._really_close(anchor)
            log.info("token %s: logged out", self.info.label)

    def _close_spares(self) -> None:
        while self._spare:
            self.close(self._spare.pop())

    def _really_close(self, session: Any) -> None:
        for _ in range(2):  # a failed C_Logout keeps python-pkcs11 from closing the session
            try:
                session.close()
            except PKCS11Error as exc:
                log.debug("closing a session: %s", code_of(exc))
            else:
                return
        if self.module.functions is not None:
            self.module.functions.close_session(session.handle)
