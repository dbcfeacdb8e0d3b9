"""``hsm-token assertion`` and ``exchange``: the two halves of ``fetch`` for an HSM host that has no way out."""

import typer

from hsm_signer import assembly
from hsm_signer.cli import options, terminal
from hsm_signer.cli.fetch import Format, OutputFormat, show
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError

MAX_ASSERTION = 16 * 1024  # bytes

app = typer.Typer()


@app.command()
@options.configured(*options.KEY, *options.ASSERTION)
def assertion(settings: Settings, retry_pin: options.RetryPin = False) -> None:
    """Print a client assertion, signed now. It is as good as a password until it expires.

    Example: hsm-token assertion --profile das --lifetime 300 | ssh gateway hsm-token exchange --profile das
    """
    settings.require("token_endpoint")
    claims = assembly.client_assertion(settings, str(settings.token_endpoint))
    with assembly.open_signer(settings, options.login(retry_pin)) as signer, terminal.working("signing"):
        signed = claims.issue(signer)
    terminal.result(signed)


@app.command()
@options.configured(*options.OAUTH)
def exchange(settings: Settings, output: OutputFormat = Format.token) -> None:
    """Turn a client assertion from stdin into an access token. No HSM is needed.

    Example: hsm-token exchange --profile das < assertion.txt
    """
    client = assembly.token_client(settings, None, cached=False)
    text = terminal.read_stdin("a client assertion", MAX_ASSERTION).decode(errors="replace").strip()
    if not text or len(text) > MAX_ASSERTION:
        raise ConfigError(
            "stdin holds no client assertion", hint="pipe the output of hsm-token assertion into it"
        )
    with terminal.working("asking the authorization server"):
        response = client.exchange(text)
    show(response, output)
