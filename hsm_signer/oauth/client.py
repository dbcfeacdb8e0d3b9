"""TokenClient: an access token from memory, from the cache, or from the authorization server.

Of all threads and, with a cache, of all processes that need the same access token, one asks for it.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from hsm_signer.assertion import ClientAssertion
from hsm_signer.errors import ConfigError, HsmSignerError, TransportError
from hsm_signer.jose import Signer, unverified_claims
from hsm_signer.oauth.cache import UNKNOWN_LIFETIME, TokenCache
from hsm_signer.oauth.grant import Grant, Outcome
from hsm_signer.oauth.response import TokenResponse, require_scope
from hsm_signer.oauth.transport import Transport
from hsm_signer.text import printable
from hsm_signer.url import parse as parse_url

_MAX_DEADLINE = 3600  # seconds

SignerSource = Signer | Callable[[], AbstractContextManager[Signer]] | None


class TokenClient:
    """Fetch access tokens from one authorization server, for one client and one scope.

    ``signer``: a Signer, or a callable that returns a context manager of one and is called only when an
    assertion is needed. ``ca_bundle`` replaces certifi's roots; ``proxy`` is never used for loopback.
    ``timeout``: seconds to connect, and seconds without a byte of an answer. ``deadline``: seconds for all of
    it, waiting and retries included; only the time that the signer takes to open does not count.
    ``attended``: a person may be asked when the signer opens, so it opens with no lock held, and what others
    wait for does not wait for a person.

    Raises :class:`ConfigError` for whatever is wrong, before a signer is opened. Safe from any thread.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        assertion: ClientAssertion,
        signer: SignerSource,
        scope: str,
        cache: TokenCache | None = None,
        ca_bundle: str | os.PathLike[str] | None = None,
        proxy: str | None = None,
        timeout: tuple[float, float] = (5, 15),
        deadline: float = 60,
        allow_narrower_scope: bool = False,
        attended: bool = False,
    ) -> None:
        url = parse_url(endpoint, what="token endpoint")
        require_scope(scope)
        if not 0 < deadline <= _MAX_DEADLINE:
            raise ConfigError(f"deadline is above 0 and at most {_MAX_DEADLINE} seconds, found {deadline!r}")
        self._grant = Grant(Transport(ca_bundle, proxy, timeout), url, assertion, scope, allow_narrower_scope)
        self._signer = signer
        self._cache = cache
        self._attended = attended
        self._deadline = deadline
        self._held: _Held | None = None
        self._turn = (os.getpid(), threading.Lock())  # in a child another one: see _our_turn

    def fetch(self, *, min_validity: int = 60, force: bool = False) -> TokenResponse:
        """Return an access token that lives at least ``min_validity`` seconds, or a fresh one.

        ``force`` asks the server in any case. Raises :class:`OAuthError` when the server refuses,
        :class:`TransportError` when it cannot be reached before the deadline, and what the signer raises.
        """
        if force:
            return self._fetch(min_validity, lambda _: False)
        held = self._held
        if held is not None and held.lives(min_validity):
            return held.response
        return self._fetch(min_validity, lambda _: True)

    def replace(self, refused: str) -> TokenResponse:
        """Return another access token than ``refused``, which an API no longer takes."""
        return self._fetch(0, lambda response: response.access_token != refused)

    def exchange(self, assertion: str) -> TokenResponse:
        """Turn an assertion that was made elsewhere, as by ``hsm-token assertion``, into an access token.

        It is tried again only where nothing of it was sent. Raises :class:`ConfigError` when it has expired
        or its ``aud``, ``iss`` or ``sub`` are not ours, and else as :meth:`fetch`.
        """
        fault = _fault(assertion, self._grant.assertion, time.time())
        if fault:
            outcome: Outcome | ConfigError = ConfigError(f"assertion: {fault}")
        else:
            deadline = time.monotonic() + self._deadline
            self._grant.transport.prepare()
            outcome = self._grant.ask(_again_and_again(assertion), deadline, once=True)
        del assertion  # so that an error does not hold it
        return _unless_error(outcome)

    def _fetch(self, min_validity: int, fits: Callable[[TokenResponse], bool]) -> TokenResponse:
        began = time.monotonic()
        deadline = began + self._deadline
        with self._our_turn(deadline):
            held = self._held
            # What another thread fetched while we waited will do, however short it lives
            if held and held.lives(1 if held.since > began else min_validity) and fits(held.response):
                return held.response
            response, fresh = self._load_or_ask(min_validity, fits, deadline)
            self._held = _Held(response, fresh=fresh)
            return response

    def _load_or_ask(
        self, min_validity: int, fits: Callable[[TokenResponse], bool], deadline: float
    ) -> tuple[TokenResponse, bool]:
        if self._cache is None:
            return self._ask(deadline), True
        found = self._cache.load(int(time.time()), min_validity)
        if found and fits(found):
            return found, False
        began = time.monotonic()
        with self._signer_before_turn() as signer:
            deadline += time.monotonic() - began
            with self._cache.lock(deadline) as theirs:
                found = theirs or self._cache.load(int(time.time()), min_validity)
                if found and fits(found):
                    return found, False
                response = self._ask(deadline, signer)
                self._cache.store(response, int(time.time()))
        return response, True

    def _ask(self, deadline: float, opened: Signer | None = None) -> TokenResponse:
        self._grant.transport.prepare()  # what is wrong there must not cost a PIN
        began = time.monotonic()
        with nullcontext(opened) if opened else self._open_signer() as signer:
            deadline += time.monotonic() - began  # a person may have typed a PIN
            assertions = (self._grant.assertion.issue(signer) for _ in itertools.count())
            outcome = self._grant.ask(assertions, deadline, signer=signer)
        return _unless_error(outcome)

    @contextmanager
    def _signer_before_turn(self) -> Iterator[Signer | None]:
        if not self._attended:
            yield None
            return
        self._grant.transport.prepare()
        with self._open_signer() as signer:
            yield signer

    def _open_signer(self) -> AbstractContextManager[Signer]:
        if self._signer is None:
            raise ConfigError("this client has no signer: it can only exchange assertions made elsewhere")
        return self._signer() if callable(self._signer) else nullcontext(self._signer)

    @contextmanager
    def _our_turn(self, deadline: float) -> Iterator[None]:
        owner, lock = self._turn
        if owner != os.getpid():  # forked while another thread had its turn: it is not here to end it
            lock = threading.Lock()
            self._turn = (os.getpid(), lock)
        if not lock.acquire(timeout=max(0, deadline - time.monotonic())):
            raise TransportError(
                "another thread was asking for this access token until our deadline", sent=False
            )
        try:
            yield
        finally:
            lock.release()


class _Held:
    """An access token in memory, believed by the wall clock and by the one that nobody sets."""

    def __init__(self, response: TokenResponse, *, fresh: bool) -> None:
        self.response = response
        self.since = time.monotonic()
        now = time.time()
        unknown = UNKNOWN_LIFETIME if fresh else 0
        self._until = now + unknown if response.expires_at is None else response.expires_at
        self._until_monotonic = self.since + self._until - now

    def lives(self, seconds: float) -> bool:
        needed = max(1, seconds if self.response.expires_at is not None else 0)
        return time.time() + needed <= self._until and time.monotonic() + needed <= self._until_monotonic


def _again_and_again(assertion: str) -> Iterator[str]:
    while True:
        yield assertion


def _unless_error(outcome: TokenResponse | HsmSignerError) -> TokenResponse:
    if isinstance(outcome, HsmSignerError):
        raise outcome
    return outcome


def _fault(assertion: str, ours: ClientAssertion, now: float) -> str | None:
    """What keeps an assertion that was made elsewhere from being sent, if anything."""
    claims = unverified_claims(assertion) if assertion.count(".") == 2 else None
    if claims is None:
        return "this is no compact JWS with claims in it"
    for name, expected in (("aud", ours.audience), ("iss", ours.client_id), ("sub", ours.client_id)):
        if claims.get(name) != expected:
            found = printable(repr(claims.get(name)), 200)
            return f"it was made with {name} {found}, and {expected!r} is configured here"
    expires = claims.get("exp")
    if isinstance(expires, bool) or not isinstance(expires, int | float) or not abs(expires) < 2**53:
        return "it has no exp"
    over = now + ours.clock_offset - expires
    return None if over < 0 else f"it expired {over:.0f} s ago"
