"""``hsm-token fetch``: an access token."""

import shlex
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from hsm_signer import assembly
from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings

if TYPE_CHECKING:
    from hsm_signer.oauth.response import TokenResponse

app = typer.Typer()


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
    retry_pin: options.RetryPin = False,
) -> None:
    """Print an access token: the cached one, or one for an assertion that the key signs now.

    Example: hsm-token fetch --profile das --format curl | curl -K - https://das.example/
    """
    client = assembly.token_client(settings, options.login(retry_pin), cached=not no_cache)
    with terminal.working("asking the authorization server"):
        response = client.fetch(min_validity=min_validity, force=force)
    show(response, output)


def show(response: "TokenResponse", output: Format) -> None:
    """Write an access token in one of the formats."""
    token = response.access_token
    match output:
        case Format.token:
            terminal.result(token)
        case Format.header:
            terminal.result(f"Authorization: Bearer {token}")
        case Format.env:
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
