"""Try again what may do better in a moment, until there is a verdict or no time left."""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from hsm_signer.errors import TransportError
from hsm_signer.oauth.transport import Answer

MAX_ATTEMPTS = 6
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8  # seconds

_log = logging.getLogger(__name__)
_Verdict = TypeVar("_Verdict")


def until_verdict(
    attempt: Callable[[int], _Verdict | TransportError], deadline: float, *, once: bool = False
) -> _Verdict | TransportError:
    """Call ``attempt`` with 1, 2, … until it returns a verdict, or no time is left before ``deadline``.

    Trouble that is ``transient`` (lost connections, 429, 5xx) is no verdict; it is returned with what was
    tried, not raised. ``deadline``: of ``time.monotonic``. With ``once`` it is not tried again after a part
    of a request may have been sent.
    """
    began = time.monotonic()
    attempts: list[tuple[float, str]] = []  # seconds since the beginning, and what was wrong
    while True:
        outcome = attempt(len(attempts) + 1)
        if not isinstance(outcome, TransportError):
            return outcome
        attempts.append((time.monotonic() - began, str(outcome)))
        pause = _pause(outcome, len(attempts))
        hopeless = not outcome.transient or (once and outcome.sent) or len(attempts) == MAX_ATTEMPTS
        if hopeless or time.monotonic() + pause >= deadline:
            return _in_the_end(outcome, attempts)
        _log.info("%s; again in %.1f s", outcome, pause)
        time.sleep(pause)


def _in_the_end(trouble: TransportError, attempts: list[tuple[float, str]]) -> TransportError:
    if len(attempts) > 1:
        causes = dict.fromkeys(cause for _, cause in attempts)  # each once, mostly there is but one
        took = f"tried {len(attempts)} times in {attempts[-1][0]:.0f} s"
        trouble.args = (f"{took}: {'; '.join(causes)}",)
    trouble.attempts = tuple(f"after {seconds:.1f} s: {cause}" for seconds, cause in attempts)
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


def retry_after(answer: Answer) -> float | None:
    """Seconds that a server asks to wait (RFC 9110 §10.2.3); nonsense is ``None``."""
    if re.fullmatch(r"[0-9]{1,9}", answer.retry_after or ""):
        return float(answer.retry_after or 0)
    until = timestamp(answer.retry_after)
    return None if until is None else max(0.0, until - time.time())


def timestamp(date: str | None) -> float | None:
    """Unix seconds of an HTTP-date (RFC 9110 §5.6.7), or ``None``."""
    from datetime import UTC
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(date or "").replace(tzinfo=UTC).timestamp()  # HTTP knows GMT only
    except (ValueError, OverflowError):
        return None
