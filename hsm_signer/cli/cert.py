"""``hsm-token cert``: certificates and requests, signed by the token."""

import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsm_signer import assembly, files, validity
from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError, KeyMismatchError, VerificationError

if TYPE_CHECKING:
    from hsm_signer.hsm.token import Token

_log = logging.getLogger(__name__)

app = typer.Typer()
cert = typer.Typer(name="cert", help="Certificates and requests, signed by the token.", no_args_is_help=True)
app.add_typer(cert)

Out = Annotated[Path | None, typer.Option("--out", help="File to write, which must not exist; else stdout.")]
CommonName = Annotated[
    str | None,
    typer.Option(help="CN, if not '<client id> private_key_jwt authentication'.", show_default=False),
]
Subject = Annotated[str | None, typer.Option(help="Whole subject as RFC 4514 text.", show_default=False)]
Days = Annotated[int, typer.Option(help="Days of validity.", min=1)]


@cert.command("self-signed")
@options.configured(*options.KEY, "client_id")
def self_signed(
    settings: Settings,
    out: Out = None,
    common_name: CommonName = None,
    subject: Subject = None,
    days: Days = validity.DAYS,
    store: Annotated[bool, typer.Option("--store", help="Store it on the token beside the key.")] = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Make the certificate that the server registers.

    Example: hsm-token cert self-signed --profile das --out es256_cert.pem
    """
    from hsm_signer import x509
    from hsm_signer.ecdsa import pem

    settings.require("key")
    name = common_name_of(settings, common_name, subject)
    require_free(out)
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        signer = assembly.signer(token, settings)
        not_before = int(time.time()) - validity.BACKDATED
        der = x509.self_signed(signer, common_name=name, subject=subject, not_before=not_before, days=days)
        if store:
            store_certificate(token, str(settings.key), der)
    write(out, pem("CERTIFICATE", der))


@cert.command()
@options.configured(*options.KEY, "client_id")
def request(
    settings: Settings,
    out: Out = None,
    common_name: CommonName = None,
    subject: Subject = None,
    retry_pin: options.RetryPin = False,
) -> None:
    """Make a certificate request (PKCS#10) for a CA of your own.

    Example: hsm-token cert request --profile das --subject "CN=das-2026,O=Office,C=CH" --out das.csr
    """
    from hsm_signer import x509
    from hsm_signer.ecdsa import pem

    name = common_name_of(settings, common_name, subject)
    require_free(out)
    with assembly.open_signer(settings, options.login(retry_pin)) as signer:
        der = x509.request(signer, common_name=name, subject=subject)
    write(out, pem("CERTIFICATE REQUEST", der))


@cert.command("import")
@options.configured(*options.KEY)
def import_(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help="What the CA returned, PEM or DER; a chain is searched.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove other certificates of this key from the token.")
    ] = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Store a certificate on the token, under its key.

    With --replace the others of the key go, also where this one is there already: those that have ended, when
    the server knows the new one.

    Example: hsm-token cert import das-2026.crt --profile das
    """
    settings.require("key")
    found = validity.read_chain(file)
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        thumbprint = assembly.signer(token, settings).kid
        own = [certificate for certificate in found if certificate.holds(thumbprint)]
        if len(own) != 1:
            raise KeyMismatchError(
                f"{len(own)} of {len(found)} certificates in {file} hold the key {settings.key} ({thumbprint})",
                hint="hsm-token cert request makes the request for this key",
            )
        store_certificate(token, str(settings.key), own[0].der, replace=replace)
    terminal.note(f"stored the certificate of {own[0].subject}, issued by {own[0].issuer}")
    if settings.certificate:
        terminal.note(f"the profile's certificate is {settings.certificate}: name the new file there")


@cert.command()
@options.configured(*options.KEY)
def check(
    settings: Settings,
    certificates: Annotated[
        list[Path] | None, typer.Argument(help="Files to check, if not those of the profile.")
    ] = None,
    within: Annotated[str, typer.Option(help="Days ahead, as in 60d.")] = f"{validity.WARN_DAYS}d",
    as_json: options.Json = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Exit with status 8 if a certificate ends soon. For monitoring.

    Looked at are the files given, else those that the profile names, else the certificates of the key on the
    token; only for the last a PIN is needed. One on the token that has ended does not matter, and is warned of,
    where another of the key is valid.

    Example: hsm-token cert check --profile das --within 60d
    """
    days, now = _days(within), int(time.time())
    watched = [validity.Watched(str(file), validity.read_file(file)) for file in certificates or []]
    if not watched:
        settings = assembly.looked_at(settings)
        watched = validity.in_files(settings)
    if not watched:
        settings.require("key")
        with assembly.open_token(settings, options.login(retry_pin)) as token:
            signer = assembly.signer(token, settings)
            watched = validity.on_token(signer, str(settings.key), now)
    if not watched:
        raise ConfigError(
            "no certificate to check",
            hint="name its file, or certificate in the profile, or store it on the token",
        )
    rows = [
        {
            "certificate": each.where,
            "subject": each.certificate.subject,
            "not_after": f"{each.certificate.not_after:%Y-%m-%dT%H:%M:%SZ}",
            "days_left": each.days_left(now),
        }
        for each in watched
    ]
    if as_json:
        terminal.json_result(rows)
    else:
        terminal.table(tuple(rows[0]), [tuple(map(str, row.values())) for row in rows])
    for each in watched:
        if each.replaced:
            _log.warning("%s; hsm-token cert import --replace removes it from the token", each.verdict(now))
    ending = validity.ending(watched, now, days)
    if ending:
        raise VerificationError(
            "; ".join(each.verdict(now) for each in ending),
            hint="hsm-token rollover prepare makes the next key",
        )


def store_certificate(token: "Token", key: str, der: bytes, *, replace: bool = False) -> None:
    """Store a certificate of the key on the token, and say what becomes of the others."""
    others = token.store_certificate(key, der, replace=replace)
    if others and replace:
        terminal.note(f"other certificates of {key} removed from the token: {others}")
    elif others:
        terminal.note(
            f"other certificates of {key} on the token: {others}; when the server knows the new one, "
            "hsm-token cert import --replace removes them"
        )


def _days(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,5})d?", text)
    if not found:
        raise ConfigError(f"--within is a number of days, as in 60d, found {text!r}")
    return int(found[1])


def common_name_of(settings: Settings, common_name: str | None, subject: str | None) -> str | None:
    """The CN to use where no whole subject is given; judged before a token is opened."""
    from hsm_signer import distinguished_name, x509

    if common_name and subject:
        raise ConfigError("--common-name and --subject exclude each other: the subject holds the CN")
    if subject:
        distinguished_name.parse(subject)
        return None
    if not common_name:
        settings.require("client_id")
        common_name = x509.default_common_name(str(settings.client_id))
    return distinguished_name.checked("CN", common_name)


def require_free(out: Path | None) -> None:
    """Raise :class:`ConfigError` where :func:`write` would, before anything is done that it could not undo."""
    if out is not None and os.path.lexists(out):
        raise ConfigError(f"{out} exists; nothing is overwritten")


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
