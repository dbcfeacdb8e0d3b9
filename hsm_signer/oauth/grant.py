"""The client credentials grant (RFC 6749 §4.4) with a client assertion (RFC 7523 §2.2): ask until a verdict.

What fails while an assertion is around is returned, not raised: a traceback keeps frames, and they hold it.
"""

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hsm_signer.assertion import ClientAssertion
from hsm_signer.errors import OAuthError, TokenResponseError, TransportError
from hsm_signer.jose import Signer
from hsm_signer.oauth.hints import refusal_hint
from hsm_signer.oauth.response import TokenResponse, parse
from hsm_signer.oauth.transport import Answer, Transport
from hsm_signer.url import Url

_log = logging.getLogger(__name__)

MAX_ATTEMPTS = 6
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8  # seconds

Outcome = TokenResponse | OAuthError | TransportError


@dataclass(frozen=True)
class Grant:
    """What is asked, and of whom."""

    transport: Transport
    endpoint: Url
    assertion: ClientAssertion
    scope: str
    allow_narrower_scope: bool

    def ask(
        self, assertions: Iterator[str], deadline: float, *, signer: Signer | None = None, once: bool = False
    ) -> Outcome:
        """Ask until there is a verdict, or no time left before ``deadline`` (of ``time.monotonic``).

        Each attempt takes the next of ``assertions``; ``signer``, which makes them, is named in hints. With
        ``once`` it is not tried again after a part of a request may have been sent.
        """
        began = time.monotonic()
        attempts: list[str] = []
        while True:
            _log.info("asking %s for an access token, attempt %d", self.endpoint, len(attempts) + 1)
            outcome = self._attempt(assertions, deadline, signer)
            if not isinstance(outcome, TransportError):
                return outcome
            attempts.append(f"after {time.monotonic() - began:.1f} s: {outcome}")
            pause = _pause(outcome, len(attempts))
            hopeless = not outcome.transient or (once and outcome.sent) or len(attempts) == MAX_ATTEMPTS
            if hopeless or time.monotonic() + pause >= deadline:
                return _in_the_end(outcome, attempts)
            _log.info("%s; again in %.1f s", outcome, pause)
            time.sleep(pause)

    def _attempt(self, assertions: Iterator[str], deadline: float, signer: Signer | None) -> Outcome:
        now = int(time.time())
        answer = None
        try:
            answer = self.transport.request(
                "POST", self.endpoint, form=self._form(next(assertions)), deadline=deadline
            )
            return parse(
                answer.status,
                answer.content_type,
                answer.body,
                asked_scope=self.scope,
                now=now,
                allow_narrower_scope=self.allow_narrower_scope,
            )
        except (OAuthError, TransportError) as error:
            outcome = error.with_traceback(None)
        if isinstance(outcome, TransportError) and answer:
            outcome.retry_after = _retry_after(answer)
        elif answer and not isinstance(outcome, TokenResponseError):
            outcome.hint = self._hint(outcome, answer, signer)
        return outcome

    def _form(self, assertion: str) -> dict[str, str]:
        return {
            "grant_type": "client_credentials",
            **({"scope": self.scope} if self.scope else {}),
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": assertion,
        }

    def _hint(self, refusal: OAuthError | TransportError, answer: Answer, signer: Signer | None) -> str:
        server_now = _timestamp(answer.date)
        our_now = time.time() + self.assertion.clock_offset
        return refusal_hint(
            getattr(refusal, "error", None),
            assertion=self.assertion,
            scope=self.scope,
            thumbprint=signer.kid if signer else None,
            kid=self.assertion.header(signer).get("kid") if signer else None,
            clock_lead=None if server_now is None else server_now - our_now,
        )


def _in_the_end(trouble: TransportError, attempts: list[str]) -> TransportError:
    if len(attempts) > 1:
        trouble.args = (f"{trouble}; the last of {len(attempts)} attempts",)
    trouble.attempts = tuple(attempts)
    if trouble.retry_after is not None:
        trouble.hint = f"the server asks to be left alone for {trouble.retry_after:.0f} s"
    return trouble


def _pause(trouble: TransportError, attempts: int) -> float:
    """Seconds before the next attempt: as the server says, else doubled each time, half of it by chance."""
    import random

    if trouble.retry_after is not None:
        return trouble.retry_after
    longest = min(_FIRST_PAUSE * 2 ** (attempts - 1), _LONGEST_PAUSE)
    return random.uniform(longest / 2, longest)  # noqa: S311  # spreads load, guards nothing


def _retry_after(answer: Answer) -> float | None:
    """Seconds that a server asks to wait (RFC 9110 §10.2.3); nonsense is ``None``."""
    if re.fullmatch(r"[0-9]{1,9}", answer.retry_after or ""):
        return float(answer.retry_after or 0)
    until = _timestamp(answer.retry_after)
    return None if until is None else max(0.0, until - time.time())


def _timestamp(date: str | None) -> float | None:
    """Unix seconds of an HTTP-date (RFC 9110 §5.6.7), or ``None``."""
    from datetime import UTC
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(date or "").replace(tzinfo=UTC).timestamp()  # HTTP knows GMT only
    except (ValueError, OverflowError):
        return None
