"""``hsm-token rehearse``: a loopback authorization server with WIPO's rules."""

import gc
from pathlib import Path
from typing import Annotated

import typer

from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings

app = typer.Typer()


@app.command()
@options.configured("client_id", "scope")
def rehearse(
    settings: Settings,
    certificate: Annotated[
        Path, typer.Option(help="The certificate to register, in PEM.", show_default=False)
    ],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.", min=0, max=65535)] = 0,
) -> None:
    """Run an authorization server with WIPO's rules, on loopback.

    It prints its token endpoint and runs until Ctrl-C.

    Example: hsm-token rehearse --client-id das-api-auth --certificate es256_cert.pem
    """
    settings.require("client_id")
    with options.needs_extra("rehearsal"):
        from hsm_signer import rehearsal
    gc.enable()  # off since the start, which suits commands that end soon
    rehearsal.serve(
        {str(settings.client_id): certificate},
        scopes=settings.scope.split() if settings.scope else rehearsal.SCOPES,
        port=port,
        on_ready=terminal.result_now,
    )
