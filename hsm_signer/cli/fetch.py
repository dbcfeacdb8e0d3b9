"""``hsm-token fetch``: an access token."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from hsm_signer import assembly
from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings
from hsm_signer.errors import OAuthError

if TYPE_CHECKING:
    from hsm_signer.oauth.response import TokenResponse

_LEAST_DEADLINE = 0.1  # seconds, where waiting for another process took the rest

app = typer.Typer()
_log = logging.getLogger(__name__)


class Format(StrEnum):
    token = "token"  # noqa: S105  # the name of a format
    json = "json"
    header = "header"
    env = "env"
    curl = "curl"


OutputFormat = Annotated[
    Format,
    typer.Option(
        "--format",
        help="token; json with expires_at; header: an HTTP header; env: an export for sh; curl: for curl -K -.",
    ),
]


@app.command()
@options.configured(*options.KEY, *options.OAUTH)
def fetch(
    settings: Settings,
    output: OutputFormat = Format.token,
    min_validity: Annotated[
        int, typer.Option(help="Seconds that the token must still be valid.", min=0)
    ] = 60,
    force: Annotated[bool, typer.Option("--force", help="Ask the server even if a token is cached.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor write the cache.")] = False,
    or_next: Annotated[
        bool, typer.Option("--or-next", help="If the server refuses the key, try the next one, once.")
    ] = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Print an access token, from the cache or from the server.

    A new one is bought with an assertion that the key signs now.

    Example: hsm-token fetch --profile das --format curl | curl -K - https://das.example/
    """

    def ask(settings: Settings) -> "TokenResponse":
        client = assembly.token_client(settings, options.login(retry_pin), cached=not no_cache)
        try:
            return client.fetch(min_validity=min_validity, force=force)
        except OAuthError as refused:
            from hsm_signer import rollover

            rollover.name_the_next(settings, refused)
            raise

    if settings.token_endpoint is None:
        assembly.judge(settings)  # before a server is asked where the endpoint is
    with terminal.working("asking the authorization server"):
        keys = [settings]
        if or_next and settings.next_key:
            from hsm_signer import rollover

            keys.append(rollover.following(settings))
        response, deadline = None, settings.deadline
        if not (force or no_cache):
            response, deadline = _kept(keys, min_validity)
        if response is None:
            asks = [partial(ask, replace(each, deadline=deadline)) for each in keys]
            response = rollover.fetch_or_next(*asks) if len(asks) > 1 else asks[0]()
            _tell_of_a_short_life(response, min_validity)
    show(response, output)


def _tell_of_a_short_life(response: "TokenResponse", wanted: int) -> None:
    """A wish for more than the server gives makes each fetch ask it, which nobody would notice."""
    lives = None if response.expires_at is None else response.expires_at - int(time.time())
    if lives is not None and lives < wanted:
        _log.warning(
            "the access token lives %d s, fewer than the %d of --min-validity: each fetch asks the server",
            lives,
            wanted,
        )


def _kept(keys: Sequence[Settings], min_validity: int) -> "tuple[TokenResponse | None, float]":
    """What is cached of one of the keys, or what another process fetches now; and the seconds that are left.

    So most runs need no client, nor do many that come at once, and after a cut-over there is no refusal.
    Settings are judged where there is nothing: what is kept came by the very same ones.
    """
    caches = [assembly.access_token_cache(each, assembly.token_endpoint(each)) for each in keys]
    for cache in caches:
        if found := cache.load(int(time.time()), min_validity):
            return found, 0
    deadline = time.monotonic() + keys[0].deadline
    return caches[0].awaited(deadline), max(deadline - time.monotonic(), _LEAST_DEADLINE)


def show(response: "TokenResponse", output: Format) -> None:
    """Write an access token in one of the formats."""
    token = response.access_token
    match output:
        case Format.token:
            terminal.result(token)
        case Format.header:
            terminal.result(f"Authorization: Bearer {token}")
        case Format.env:
            import shlex

            terminal.result(f"export ACCESS_TOKEN={shlex.quote(token)}")
        case Format.curl:
            terminal.result(f'header = "Authorization: Bearer {token}"')
        case Format.json:
            terminal.json_result(
                {
                    "access_token": token,
                    "token_type": response.token_type,
                    "expires_at": response.expires_at,
                    "scope": response.scope,
                }
            )
