"""``hsm-token cert``: certificates and requests, signed by the token."""

import time
from pathlib import Path
from typing import Annotated

import typer

from hsm_signer import assembly, files
from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError

BACKDATED = 300  # seconds that notBefore lies in the past: the server's clock may be behind ours
DAYS = 730

app = typer.Typer()
cert = typer.Typer(name="cert", help="Certificates and requests, signed by the token.", no_args_is_help=True)
app.add_typer(cert)

Out = Annotated[Path | None, typer.Option("--out", help="File to write, which must not exist; else stdout.")]
CommonName = Annotated[
    str | None,
    typer.Option(help="CN, if not '<client id> private_key_jwt authentication'.", show_default=False),
]
Subject = Annotated[str | None, typer.Option(help="Whole subject as RFC 4514 text.", show_default=False)]


@cert.command("self-signed")
@options.configured(*options.KEY, "client_id")
def self_signed(
    settings: Settings,
    out: Out = None,
    common_name: CommonName = None,
    subject: Subject = None,
    days: Annotated[int, typer.Option(help="Days of validity.", min=1)] = DAYS,
    store: Annotated[bool, typer.Option("--store", help="Store it on the token beside the key.")] = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Make the certificate that is registered at the authorization server.

    Example: hsm-token cert self-signed --profile das --out es256_cert.pem
    """
    from hsm_signer import x509
    from hsm_signer.ecdsa import pem

    name = _common_name(settings, common_name, subject)
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        settings.require("key")
        signer = token.signer(str(settings.key), thumbprint=settings.key_thumbprint)
        not_before = int(time.time()) - BACKDATED
        der = x509.self_signed(signer, common_name=name, subject=subject, not_before=not_before, days=days)
        if store:
            token.store_certificate(str(settings.key), der)
    write(out, pem("CERTIFICATE", der))


def _common_name(settings: Settings, common_name: str | None, subject: str | None) -> str | None:
    from hsm_signer import x509

    if common_name and subject:
        raise ConfigError("--common-name and --subject exclude each other: the subject holds the CN")
    if common_name or subject:
        return common_name
    settings.require("client_id")
    return x509.default_common_name(str(settings.client_id))


def write(out: Path | None, text: str) -> None:
    """Write public text to a new file, or to stdout."""
    if out is None:
        terminal.result(text.rstrip("\n"))
        return
    try:
        files.create(out, text.encode(), mode=0o644)
    except FileExistsError:
        raise ConfigError(f"{out} exists; nothing is overwritten") from None
    except OSError as failed:
        raise ConfigError(f"cannot write {out}: {failed.strerror}") from None
    terminal.note(f"wrote {out}")
