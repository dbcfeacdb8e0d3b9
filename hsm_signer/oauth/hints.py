"""What the person at the keyboard can look at when the authorization server refuses.

Servers say little: oidc-provider has one text for every reason, WIPO's family may answer 403 and nothing. So
the likely causes come in order, a line each with our own value beside it, and never with an assertion.
"""

import re
from collections.abc import Iterator

from hsm_signer.assertion import MAX_CLOCK_OFFSET, ClientAssertion

_NOT_THERE = (404, 405)  # an authorization server has other words for what it refuses
_SAID = {  # words of servers that tell what they mind: that cause comes first
    "key": r"signature|certificate|\bjwks?\b",
    "kid": r"\bkid\b",
    "aud": r"\baud(ience)?\b",
    "clock": r"\b(exp|iat|nbf|expired|expiration)\b",
    "client": r"client (does not|is not|was not|not found)|unknown client|client_?id",
    "scope": r"\bscope",
}
_NOTABLE = 10  # seconds between two clocks that some servers mind


def refusal_hint(
    error: str | None,
    *,
    description: str | None,
    status: int | None,
    endpoint: str,
    assertion: ClientAssertion,
    scope: str,
    thumbprint: str | None = None,
    kid: str | None = None,
    clock_lead: float | None = None,
) -> str:
    """Name the likely causes of an OAuth error in lines, the likeliest first, and what is none of them last.

    ``thumbprint``: of the key that signed; ``kid``: as sent in the header. ``clock_lead``: seconds by which
    the server's clock is ahead of the one that we stamp with, where it told.
    """
    client = f"client id {assertion.client_id!r}"
    asked = f"scope {scope!r}" if scope else "no scope"
    ruled_out = []
    match error:
        case "invalid_scope":
            causes = [f"{asked} was asked for: is it spelt as registered, and may {client} have it?"]
        case "unauthorized_client":
            causes = [f"may {client} use the grant client_credentials?"]
        case "unsupported_grant_type":
            causes = [f"does {endpoint} offer the grant client_credentials? Is it the token endpoint?"]
        case _:
            known = dict(_credentials(assertion, thumbprint, kid))
            if clock_lead is not None and abs(clock_lead) <= _NOTABLE:
                ruled_out = [f"ruled out: the clock, {abs(clock_lead):.0f} s apart from the server's"]
            else:
                known["clock"] = _clock(assertion, clock_lead)
            known |= {"client": f"{client}: is it spelt as registered?", "scope": f"{asked} was asked for"}
            likely = {name for name in known if re.search(_SAID[name], description or "", re.IGNORECASE)}
            if clock_lead is not None and abs(clock_lead) > assertion.lifetime:
                likely.add("clock")
            causes = [known[name] for name in sorted(known, key=lambda name: name not in likely)]
    if status in _NOT_THERE:
        causes.insert(
            0,
            f"{endpoint} is not the token endpoint: the doctor's check 'discovery' has the right one, if issuer is set",
        )
    numbered = [f"{number}. {cause}" for number, cause in enumerate(causes, 1)]
    return "\n".join([*(numbered if len(causes) > 1 else causes), *ruled_out])


def _credentials(
    assertion: ClientAssertion, thumbprint: str | None, kid: str | None
) -> Iterator[tuple[str, str]]:
    key = f" of the key with thumbprint {thumbprint}" if thumbprint else ""
    yield "key", f"the certificate{key} is not registered for this client, or another one took its place"
    if kid is not None:
        yield "kid", f"the server does not know kid {kid!r}"
    expected = f"another aud than {assertion.audience!r}"
    yield "aud", f"the server expects {expected}, which must be the same to the letter"


def _clock(assertion: ClientAssertion, lead: float | None) -> str:
    if lead is None:
        return f"the clocks differ by more than the {assertion.lifetime} s that the assertion lives"
    wanted = assertion.clock_offset + round(lead)
    remedy = (
        f"set clock-offset = {wanted}, or the clock" if abs(wanted) <= MAX_CLOCK_OFFSET else "set the clock"
    )
    side = "behind" if lead > 0 else "ahead of"
    lives = f"an assertion lives {assertion.lifetime} s"
    return f"our clock is {abs(lead):.0f} s {side} the server's, and {lives}: {remedy}"
