"""``hsm-token cache``: the access tokens on disk."""

import time

import typer

from hsm_signer import assembly
from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings

app = typer.Typer()
cache = typer.Typer(name="cache", help="Cached access tokens.", no_args_is_help=True)
app.add_typer(cache)


@cache.command("list")
@options.configured()
def list_entries(settings: Settings, as_json: options.Json = False) -> None:
    """List what is cached, without the tokens.

    Example: hsm-token cache list
    """
    from hsm_signer.oauth.cache import entries

    found = entries(assembly.cache_directory(settings))
    if as_json:
        terminal.json_result(found)
        return
    now = time.time()
    rows = ((each.endpoint, each.client_id, each.scope, f"{each.expires_at - now:.0f} s") for each in found)
    terminal.table(("endpoint", "client id", "scope", "valid for"), rows)


@cache.command()
@options.configured()
def clear(settings: Settings) -> None:
    """Remove all cached access tokens.

    Example: hsm-token cache clear
    """
    from hsm_signer.oauth.cache import clear

    count = clear(assembly.cache_directory(settings))
    terminal.note(f"cached access tokens removed: {count}")
