"""``hsm-token key``: keys in the token. Private halves are never imported, exported or shown."""

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from hsm_signer import assembly, rollover, validity
from hsm_signer.cli import enrol, options, terminal
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError, KeyExportableError, ProfileNotChangedError
from hsm_signer.hsm.uri import key_uri
from hsm_signer.jose import jwk_set

if TYPE_CHECKING:
    from hsm_signer.hsm.keys import KeyInfo
    from hsm_signer.hsm.token import Token

app = typer.Typer()
key = typer.Typer(name="key", help="Generate, list, prove, export and delete keys.", no_args_is_help=True)
app.add_typer(key)

Label = Annotated[
    str | None, typer.Argument(help="Label of the new key, if not the one of --key.", show_default=False)
]


class PublicFormat(StrEnum):
    pem = "pem"
    jwk = "jwk"
    jwks = "jwks"
    thumbprint = "thumbprint"


@key.command()
@options.configured(*options.KEY)
def generate(
    settings: Settings,
    label: Label = None,
    key_id: Annotated[str | None, typer.Option("--id", help="CKA_ID in hex, if not a random one.")] = None,
    as_json: options.Json = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Generate a P-256 key inside the token; print its thumbprint.

    Example: hsm-token key generate das-2026 --module /usr/lib/softhsm/libsofthsm2.so --token office
    """
    if label is None:
        settings.require("key")
    wanted = key_uri(label or str(settings.key))
    if not wanted.object:
        raise ConfigError("a new key needs a label", hint="name it: hsm-token key generate das-2026")
    identifier = wanted.id if key_id is None else _hex(key_id)
    with (
        assembly.open_token(settings, options.login(retry_pin)) as token,
        terminal.working("generating a key"),
    ):
        token.require_own(wanted)
        made = token.generate_key(wanted.object, id=identifier)
    terminal.json_result(made) if as_json else terminal.result(str(made.thumbprint))


@key.command("list")
@options.configured(*options.TOKEN)
def list_keys(settings: Settings, as_json: options.Json = False, retry_pin: options.RetryPin = False) -> None:
    """List the keys of the token that can sign ES256.

    Example: hsm-token key list --profile das --json
    """
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        keys = token.keys()
    if as_json:
        terminal.json_result(keys)
        return
    terminal.table(("label", "id", "thumbprint", "flags", "certificate"), map(_row, keys))


def _row(info: "KeyInfo") -> tuple[str, ...]:
    return (
        info.label,
        info.id.hex(),
        info.thumbprint or "",
        " ".join(name for name, held in info.flags.items() if held),
        "yes" if info.certificate else "",
    )


@key.command()
@options.configured(*options.KEY)
def prove(settings: Settings, as_json: options.Json = False, retry_pin: options.RetryPin = False) -> None:
    """Try to get the private key out of the token. Every way must fail.

    Example: hsm-token key prove --profile das
    """
    settings.require("key")
    with (
        assembly.open_token(settings, options.login(retry_pin)) as token,
        terminal.working("probing the key"),
    ):
        proof = token.prove(str(settings.key))
    if as_json:
        terminal.json_result(proof.as_dict())
    else:
        rows = [("claimed", name, str(value).lower(), "") for name, value in proof.claimed.items()]
        results = {True: "held", False: "FAILED", None: "not tried"}
        rows += [("probed", each.name, results[each.held], each.answer) for each in proof.probed]
        terminal.table(("", "what", "result", "the module's answer"), rows)
    if not proof.ok:
        raise KeyExportableError(proof.statement)
    terminal.note(proof.statement)


@key.command()
@options.configured(*options.KEY)
def export(
    settings: Settings,
    output: Annotated[
        PublicFormat, typer.Option("--format", help="Form of the public key.")
    ] = PublicFormat.pem,
    retry_pin: options.RetryPin = False,
) -> None:
    """Print the public half of the key. The private half signs a challenge first.

    Example: hsm-token key export --profile das --format jwks
    """
    settings.require("key")
    settings = assembly.looked_at(settings)
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        signer = assembly.signer(token, settings)
        match output:
            case PublicFormat.pem:
                terminal.result(signer.public_key_pem.rstrip("\n"))
            case PublicFormat.jwk:
                terminal.json_result(signer.jwk)
            case PublicFormat.jwks:
                watched = validity.watched(settings, signer, int(time.time()))
                own = (each.certificate.der for each in watched if each.certificate.holds(signer.kid))
                terminal.json_result(jwk_set(signer, next(own, None)))
            case PublicFormat.thumbprint:
                terminal.result(signer.kid)


@key.command()
@options.configured(*options.KEY)
def delete(
    settings: Settings,
    thumbprint: options.Thumbprint = None,
    retry_pin: options.RetryPin = False,
) -> None:
    """Destroy a key, its public half and its certificates. There is no way back.

    A key that a profile of the configuration file pins or names, as its own or as the next, is not deleted.

    Example: hsm-token key delete --key das-2024 --profile das
    """
    settings.require("token", "key")
    name = str(settings.key)
    if thumbprint is None:
        if not terminal.somebody_there():
            raise ConfigError("deleting a key needs its thumbprint", hint="use --thumbprint")
        terminal.note(f"{name} on {settings.token} will be destroyed for ever")
        thumbprint = terminal.ask("type its thumbprint")
    rollover.require_unused(settings.config, thumbprint, name)
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        destroy(settings, token, thumbprint, name)


def destroy(settings: Settings, token: "Token", thumbprint: str, key: str | None = None) -> None:
    """Destroy a key that no profile uses, and tell a person."""
    left: ProfileNotChangedError | None = None
    try:
        rollover.destroy(
            token,
            thumbprint,
            settings.config,
            settings.profile,
            state_directory=assembly.state_directory(settings),
            key=key,
        )
    except ProfileNotChangedError as failed:  # only after the key is gone
        left = failed
    terminal.note(f"destroyed the key {thumbprint}")
    if left:
        enrol.show_lines(left)


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ConfigError(f"--id {text!r} is not hexadecimal") from None
