"""``hsm-token verify``: an access token checked against its issuer's keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hsm_signer import assembly
from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError

TIMES = ("exp", "iat", "nbf", "auth_time")  # NumericDate (RFC 7519 §4.1, OpenID Connect Core §2)

app = typer.Typer()


@app.command()
@options.configured("issuer", "ca_bundle", "proxy")
def verify(
    settings: Settings,
    audience: Annotated[
        str, typer.Option(help="Whom the access token must be meant for.", show_default=False)
    ],
    file: Annotated[
        Path | None, typer.Argument(help="File with the access token; - or none: stdin.", show_default=False)
    ] = None,
    jwks: Annotated[
        str | None,
        typer.Option(help="URL or file of the issuer's keys, if not found by --issuer.", show_default=False),
    ] = None,
    scope: Annotated[str, typer.Option(help="Scopes that must be granted.", show_default=False)] = "",
    leeway: Annotated[int, typer.Option(help="Seconds that the clocks may differ.", min=0, max=60)] = 0,
    as_json: options.Json = False,
) -> None:
    """Check an access token, and print its claims. Exit 8: refused.

    Checked are signature, issuer, audience, times and scopes.

    Example: hsm-token verify --profile das --audience das-api-auth access_token.txt
    """
    settings.require("issuer")
    with options.needs_extra("verify"):
        from hsm_signer.verify import AccessTokenVerifier
    verifier = AccessTokenVerifier(
        _keys(settings, jwks), issuer=str(settings.issuer), audience=audience, scope=scope, leeway=leeway
    )
    access_token = _read(file)
    with terminal.working("fetching the issuer's keys"):
        verified = verifier.verify(access_token)
    if as_json:
        terminal.json_result(dict(verified.claims))
    else:
        terminal.table(
            ("claim", "value"),
            [(name, _told(name, value)) for name, value in verified.claims.items()],
        )


def _told(name: str, value: object) -> str:
    if name in TIMES and isinstance(value, int | float):
        return terminal.moment(value)
    return value if isinstance(value, str) else json.dumps(value)


def _keys(settings: Settings, jwks: str | None) -> Callable[[], object]:
    from hsm_signer.verify import issuer_keys, jwks_file, jwks_url

    if jwks and "://" not in jwks:
        return jwks_file(Path(jwks))
    where = jwks or str(settings.issuer)
    transport = assembly.transport(settings, where)
    if jwks:
        return jwks_url(where, transport)
    return issuer_keys(where, transport, allowed=[*filter(None, [settings.token_endpoint])])


def _read(file: Path | None) -> bytes:
    from hsm_signer.verify import MAX_SIZE

    if str(file) == "-":
        file = None
    try:
        if file is None:
            return terminal.read_stdin("an access token", MAX_SIZE + 1).strip()
        with file.open("rb") as opened:
            return opened.read(MAX_SIZE + 2).strip()
    except OSError as unreadable:
        raise ConfigError(f"cannot read {file or 'stdin'}: {unreadable.strerror}") from None
