"""From settings to parts: the token, its signer, the assertion and the client that a profile describes.

What a cached access token does not need is imported inside the functions: most runs find one.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hsm_signer import paths
from hsm_signer.config import Settings, default_pin_source, prepared_module, proxy_for, variable
from hsm_signer.errors import ConfigError, KeyMismatchError
from hsm_signer.oauth.cache import TokenCache

if TYPE_CHECKING:
    from hsm_signer.assertion import ClientAssertion
    from hsm_signer.audit import AuditLog
    from hsm_signer.hsm.signer import HsmSigner
    from hsm_signer.hsm.token import Token
    from hsm_signer.oauth.client import TokenClient
    from hsm_signer.oauth.metadata import ServerMetadata
    from hsm_signer.oauth.transport import Transport
    from hsm_signer.pin import PinPad, PinSource


_log = logging.getLogger(__name__)


class Login(NamedTuple):
    """How a run comes by a PIN: who can be asked, and whether a standing PIN marker is passed over once."""

    prompt: Callable[[str], str] | None = None
    retry: bool = False


def pin_source(settings: Settings, login: Login) -> "PinSource | PinPad":
    """The source of the PIN: the one that is set, else ``HSM_TOKEN_PIN``, else a person."""
    from hsm_signer import pin
    from hsm_signer.pin_guard import process_began

    text = settings.pin_source or default_pin_source()
    if text == "prompt" and login.prompt is None:
        given = "the PIN is to be asked for" if settings.pin_source else "no PIN source given"
        raise ConfigError(
            f"{given}, and no terminal to ask at",
            hint=f"use --pin-source, {variable('pin_source')}, or pin-source in a profile",
        )
    pin.make_undumpable()
    ask = login.prompt and partial(_ask_for, login.prompt, str(settings.token))
    retry = login.retry and process_began()
    return pin.from_source(text, prompt=ask, state_directory=state_directory(settings), retry=retry)


def _ask_for(prompt: Callable[[str], str], token: str, question: str) -> str:
    return prompt(f"{token}: {question}")


@contextmanager
def open_token(settings: Settings, login: Login) -> "Iterator[Token]":
    """The configured token, logged in."""
    settings.require("token")
    judge_uris(settings)
    source = pin_source(settings, login)
    module = prepared_module(settings)
    from hsm_signer.hsm.token import open_token

    with open_token(
        str(settings.token),
        module=module,
        pin=source,
        sessions=settings.sessions,
        verify=settings.verify,
        audit=audit_log(settings),
    ) as token:
        yield token


def another_key(settings: Settings) -> bool:
    """Whether option or variable names another key than the profile, to which pin and certificate belong."""
    from hsm_signer.hsm.uri import key_uri

    named, own = settings.key, settings.profile_key
    return named is not None and own is not None and key_uri(named) != key_uri(own)


def looked_at(settings: Settings) -> Settings:
    """The settings to look at a key with that the command line names: the pin of another key does not hold.

    Only for commands that show or check. What signs for others, or makes what is registered, keeps to the
    pin, and so does a key that a variable names: it may come from elsewhere than the person.
    """
    if settings.origin("key") != "option" or not another_key(settings):
        return settings
    _log.warning("%s is not the key of profile %s: its pin is not compared", settings.key, settings.profile)
    return replace(settings, key_thumbprint=None, certificate=None, next_certificate=None)


def signer(token: "Token", settings: Settings) -> "HsmSigner":
    """A signer on the configured key of an open token, which must be the pinned one."""
    try:
        return token.signer(str(settings.key), thumbprint=settings.key_thumbprint)
    except KeyMismatchError as mismatch:
        if another_key(settings):
            mismatch.hint = (
                f"profile {settings.profile} pins the key {settings.profile_key}: give another key a profile of"
                " its own; with --key only key export, key prove and cert check look at one"
            )
        raise


@contextmanager
def open_signer(settings: Settings, login: Login) -> "Iterator[HsmSigner]":
    """A signer on the configured key, which must be the pinned one."""
    from hsm_signer import validity

    settings.require("key")
    with open_token(settings, login) as token:
        found = signer(token, settings)
        validity.warn(settings, found)
        yield found


def audit_log(settings: Settings) -> "AuditLog | None":
    """The log of what the keys are used for, where the settings name one."""
    if settings.audit_log is None:
        return None
    from hsm_signer.audit import AuditLog

    return AuditLog(settings.audit_log, syslog=settings.audit_syslog)


def client_assertion(settings: Settings, endpoint: str) -> "ClientAssertion":
    """The assertion of the configured client for a token endpoint."""
    from hsm_signer.assertion import ClientAssertion

    settings.require("client_id")
    return ClientAssertion(
        str(settings.client_id),
        settings.audience_for(endpoint),
        lifetime=settings.lifetime,
        claims=settings.claims,  # type: ignore[arg-type]  # config.py takes no other text
        typ=settings.typ,
        kid=settings.kid,
        clock_offset=settings.clock_offset,
    )


def judge(settings: Settings, *, signs: bool = True) -> None:
    """Raise :class:`ConfigError` for settings that cannot work, before a token is opened or a server asked."""
    from hsm_signer.oauth.response import require_scope

    if settings.issuer is None:
        settings.require("token_endpoint")
    client_assertion(settings, str(settings.token_endpoint or settings.issuer))
    require_scope(settings.scope or "")
    if signs:
        settings.require("module", "token", "key")
        judge_uris(settings)


def judge_uris(settings: Settings) -> None:
    """Raise :class:`ConfigError` for a token or key that no URI or label can mean."""
    from hsm_signer.hsm.uri import key_uri, token_uri

    token_uri(str(settings.token))
    if settings.key is not None:
        key_uri(settings.key)


def token_client(settings: Settings, login: Login | None, *, cached: bool = True) -> "TokenClient":
    """The client of the configured service; no token is opened before an assertion is needed.

    Without ``login`` there is no signer either: for assertions that were made elsewhere.
    """
    from hsm_signer.oauth.client import TokenClient

    judge(settings, signs=login is not None)
    endpoint = token_endpoint(settings, cached=cached)
    return TokenClient(
        endpoint,
        assertion=client_assertion(settings, endpoint),
        signer=None if login is None else lambda: open_signer(settings, login),
        scope=settings.scope or "",
        cache=access_token_cache(settings, endpoint) if cached else None,
        ca_bundle=settings.ca_bundle,
        proxy=proxy_for(settings, endpoint),
        timeout=settings.timeout,
        deadline=settings.deadline,
        allow_narrower_scope=settings.allow_narrower_scope,
        attended=(settings.pin_source or default_pin_source()) in ("prompt", "pinpad"),
    )


def token_endpoint(settings: Settings, *, cached: bool = True) -> str:
    """The configured token endpoint, else the one that the pinned issuer publishes (RFC 8414)."""
    if settings.token_endpoint:
        return settings.token_endpoint
    if not settings.issuer:
        settings.require("token_endpoint")
    return server_metadata(settings, cached=cached).token_endpoint


def server_metadata(settings: Settings, *, cached: bool = True) -> "ServerMetadata":
    """What the pinned issuer publishes, from the cache or the server."""
    from hsm_signer.oauth.metadata import MetadataCache, discover

    settings.require("issuer")
    issuer = str(settings.issuer)
    identity = {
        "issuer": issuer,
        "ca_bundle": settings.ca_bundle,
        "proxy": _digest(proxy_for(settings, issuer)),
    }
    return discover(
        issuer,
        transport(settings, issuer),
        deadline=time.monotonic() + settings.deadline,
        cache=MetadataCache(cache_directory(settings), identity) if cached else None,
    )


def transport(settings: Settings, url: str) -> "Transport":
    """What carries requests to the server of a URL."""
    from hsm_signer.oauth.transport import Transport

    return Transport(settings.ca_bundle, proxy_for(settings, url), settings.timeout)


def access_token_cache(settings: Settings, endpoint: str) -> TokenCache:
    """The cache of access tokens, keyed by all that an answer depends on: who asks whom for what, by which key."""
    names = (
        "issuer",
        "client_id",
        "scope",
        "allow_narrower_scope",
        "claims",
        "module",
        "token",
        "key",
        "key_thumbprint",
        "ca_bundle",
    )
    identity = {name: getattr(settings, name) for name in names}
    identity |= {
        "endpoint": endpoint,
        "audience": settings.audience_for(endpoint),
        "proxy": _digest(settings.proxy),
    }
    return TokenCache(cache_directory(settings), identity)


def _digest(proxy: str | None) -> str | None:
    """What tells proxies apart in a file that need not hold their passwords."""
    return hashlib.sha256(proxy.encode(errors="surrogatepass")).hexdigest() if proxy else None


def cache_directory(settings: Settings) -> Path:
    """Where access tokens are cached."""
    return Path(settings.cache) if settings.cache else paths.cache_directory()


def state_directory(settings: Settings) -> Path:
    """Where PIN markers are kept."""
    return Path(settings.state_dir) if settings.state_dir else paths.state_directory()
