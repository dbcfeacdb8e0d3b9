"""Judge what a token endpoint answered (RFC 6749 §5): a pure function of status, media type and body."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hsm_signer.errors import ConfigError, OAuthError, TokenResponseError, TransportError
from hsm_signer.text import printable

MAX_ACCESS_TOKEN = 16 * 1024  # characters
MAX_EXPIRES_IN = 24 * 60 * 60  # seconds; no server is believed beyond that

_B64TOKEN = r"[A-Za-z0-9._~+/-]+=*"  # RFC 6750 §2.1
_SECONDS = r"-?[0-9]{1,20}"
SCOPE = r"(?:[!#-\[\]-~]+(?: [!#-\[\]-~]+)*)?"  # RFC 6749 §3.3, or none


@dataclass(frozen=True)
class TokenResponse:
    """An access token as the authorization server granted it (RFC 6749 §5.1).

    ``raw``: the members of the answer. ``expires_at``: Unix seconds of our clock, at most 24 hours ahead, or
    ``None`` where the server gave none. ``scope``: what was granted, separated by spaces.
    """

    access_token: str = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False, hash=False)
    token_type: str
    expires_at: int | None
    scope: str


def require_scope(scope: str) -> None:
    """Raise :class:`ConfigError` for what is no scope to ask for (RFC 6749 §3.3)."""
    if not re.fullmatch(SCOPE, scope):
        raise ConfigError(f"scope is names with single spaces between them (RFC 6749 §3.3), found {scope!r}")


def parse(
    status: int,
    content_type: str | None,
    body: bytes,
    *,
    asked_scope: str,
    now: int,
    allow_narrower_scope: bool = False,
) -> TokenResponse:
    """Turn an HTTP answer into a token response; ``now`` in Unix seconds.

    Raises :class:`OAuthError` where the server refused (RFC 6749 §5.2), :class:`TokenResponseError` for a
    success without an access token that we accept, and :class:`TransportError` for 429 and 5xx.
    """
    members, fault = json_object(body)
    error, description = _text(members, "error"), _text(members, "error_description")
    if status == 429 or status >= 500:
        said = ": ".join(filter(None, (f"the server answered {status}", error, description)))
        raise TransportError(said)
    if status >= 400 or members.get("error") is not None:
        said = ": ".join(filter(None, (error, description))) or "without an OAuth error in the answer"
        message = f"the authorization server refused with {status}: {said}"
        raise OAuthError(message, error=error, description=description, status=status)
    if status != 200:
        raise TokenResponseError(f"the token endpoint answered {status}, success is 200", status=status)
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        _reject(f"has media type {printable(media_type, 80) or 'none'}, not application/json")
    if fault:
        _reject(fault)
    return TokenResponse(
        access_token=_access_token(members),
        raw=members,
        token_type=_token_type(members),
        expires_at=_expires_at(members, now),
        scope=_scope(members, asked_scope, allow_narrower_scope),
    )


def _reject(fault: str, *, hint: str | None = None) -> NoReturn:
    raise TokenResponseError(f"the answer of the token endpoint {fault}", status=200, hint=hint)


def json_object(body: bytes) -> tuple[dict[str, Any], str | None]:
    """The members of a JSON object and ``None``, or no members and what is wrong.

    A name that stands twice has two meanings for two readers (RFC 8725 §2.4), and is refused.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        return {}, "is no UTF-8"
    except _DuplicateError:
        return {}, "has a member twice, so nobody can tell which one is meant"
    except (ValueError, RecursionError):
        return {}, "is no JSON"
    return (value, None) if isinstance(value, dict) else ({}, "is JSON, but no object")


class _DuplicateError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _DuplicateError
    return members


def _no_constant(_name: str) -> NoReturn:
    raise ValueError  # NaN and Infinity are Python's, not JSON's


def _text(members: Mapping[str, Any], name: str) -> str | None:
    value = members.get(name)
    return printable(value) if isinstance(value, str) and value else None


def _access_token(members: Mapping[str, Any]) -> str:
    value = members.get("access_token")
    if not isinstance(value, str):
        _reject("has no access_token" if value is None else "has an access_token that is no text")
    if len(value) > MAX_ACCESS_TOKEN:
        _reject(f"has an access_token of {len(value)} characters, more than {MAX_ACCESS_TOKEN}")
    if not re.fullmatch(_B64TOKEN, value):
        _reject("has an access_token that cannot be sent as a bearer token (RFC 6750 §2.1)")
    return value


def _token_type(members: Mapping[str, Any]) -> str:
    value = members.get("token_type")
    if not isinstance(value, str) or value.lower() != "bearer":  # RFC 6749 §7.1: whatever the case
        found = repr(printable(value, 80)) if isinstance(value, str) else "none that is text"
        _reject(f"needs token_type Bearer, found {found}")
    return value


def _expires_at(members: Mapping[str, Any], now: int) -> int | None:
    value = members.get("expires_in")
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(_SECONDS, value):  # some servers write it as text
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        _reject("has an expires_in that is no whole number of seconds")
    if value <= 0:
        _reject("has an access_token that has expired already")
    return now + min(value, MAX_EXPIRES_IN)


def _scope(members: Mapping[str, Any], asked: str, allow_narrower: bool) -> str:
    granted = members.get("scope")
    if granted is None:
        return asked  # RFC 6749 §5.1: left out means as asked
    if not isinstance(granted, str) or not re.fullmatch(SCOPE, granted := granted.strip(" ")):
        _reject("has a scope that is no list of scopes in text")
    missing = sorted(set(asked.split()) - set(granted.split()))
    if missing and not allow_narrower:
        _reject(
            f"grants scope {printable(granted, 200)!r} and leaves out {' '.join(missing)!r}",
            hint="ask the operator of the authorization server to grant it to this client, or ask for less",
        )
    return granted
