"""Assertions that are told of when they are signed: the audit log wants a line for each."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from hsm_signer.assertion import ClientAssertion
from hsm_signer.jose import Signer


@dataclass(frozen=True)
class RecordedAssertion(ClientAssertion):
    """Calls ``record`` with the signer and the ``jti`` (``None`` without one) before anybody gets it."""

    record: Callable[[Signer, str | None], None] = field(kw_only=True, repr=False, compare=False)

    def issue(self, signer: Signer, *, now: int | None = None, jti: str | None = None) -> str:
        """As in the base class."""
        jti = secrets.token_urlsafe(16) if jti is None else jti
        assertion = super().issue(signer, now=now, jti=jti)
        try:
            self.record(signer, jti if self.claims == "oidc" else None)
        except BaseException:
            del assertion  # the traceback keeps this frame
            raise
        return assertion
