"""The client credentials grant (RFC 6749 §4.4) with a client assertion (RFC 7523 §2.2): ask until a verdict.

What fails while an assertion is around is returned, not raised: a traceback keeps frames, and they hold it.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsm_signer.assertion import ClientAssertion
from hsm_signer.errors import HsmSignerError, OAuthError, TokenResponseError, TransportError
from hsm_signer.jose import Signer, unverified_claims
from hsm_signer.oauth.hints import refusal_hint
from hsm_signer.oauth.response import TokenResponse, parse
from hsm_signer.oauth.retry import retry_after, timestamp, until_verdict
from hsm_signer.oauth.transport import Answer, Transport
from hsm_signer.text import printable
from hsm_signer.url import Url

if TYPE_CHECKING:
    from hsm_signer.audit import AuditLog

_log = logging.getLogger(__name__)

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
        log: AuditLog | None = getattr(signer, "audit", None)

        def attempt(number: int) -> Outcome:
            _log.info("asking %s for an access token, attempt %d", self.endpoint, number)
            if log is None:
                return self._attempt(assertions, deadline, signer)
            with log.errand(self.endpoint.text) as line:
                outcome = self._attempt(assertions, deadline, signer)
                line.update(_answer(outcome))
            return outcome

        outcome: Outcome = until_verdict(attempt, deadline, once=once)
        if isinstance(outcome, TokenResponse):
            until = outcome.expires_at and time.strftime(
                "%Y-%m-%dT%H:%M:%SZ", time.gmtime(outcome.expires_at)
            )
            _log.info("granted: scope %r, until %s", outcome.scope, until or "nobody knows when")
        return outcome

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
            outcome.retry_after = retry_after(answer)
        elif answer and isinstance(outcome, OAuthError) and not isinstance(outcome, TokenResponseError):
            outcome.hint = self._hint(outcome, answer, signer)
        return outcome

    def _form(self, assertion: str) -> dict[str, str]:
        return {
            "grant_type": "client_credentials",
            **({"scope": self.scope} if self.scope else {}),
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": assertion,
        }

    def _hint(self, refusal: OAuthError, answer: Answer, signer: Signer | None) -> str:
        server_now = timestamp(answer.date)
        our_now = time.time() + self.assertion.clock_offset
        thumbprint, kid = self._names(signer)
        return refusal_hint(
            refusal.error,
            description=refusal.description,
            status=refusal.status,
            endpoint=self.endpoint.text,
            assertion=self.assertion,
            scope=self.scope,
            thumbprint=thumbprint,
            kid=kid,
            clock_lead=None if server_now is None else server_now - our_now,
        )

    def _names(self, signer: Signer | None) -> tuple[str | None, str | None]:
        """The key's thumbprint and the ``kid`` that was sent, as far as they can be told now.

        An explanation is worth no signature: where only a challenge would prove the thumbprint, it is named
        without.
        """
        if signer is None:
            return None, None
        try:
            thumbprint = getattr(signer, "verifies_under", None) or signer.kid
            return thumbprint, self.assertion.header(signer).get("kid")
        except HsmSignerError as exc:  # the card was pulled meanwhile: what the server said matters more
            _log.info("the refusal is explained without the key's thumbprint: %s", exc)
            return None, None


def _answer(outcome: Outcome) -> dict[str, object]:
    """What the server answered, for the audit log: accepted, or its error; and by which name it knows that."""
    if isinstance(outcome, TokenResponse):
        claims = unverified_claims(outcome.access_token) or {}
        names = {name: claims.get(name) for name in ("auditTrackingId", "jti")}
        shown = {name: printable(each, 200) for name, each in names.items() if isinstance(each, str)}
        return {"answer": "accepted", "unverified": shown or None}
    status = getattr(outcome, "status", None)
    code = getattr(outcome, "error", None) or (status and str(status))
    return {"answer": code, "error": type(outcome).__name__}
