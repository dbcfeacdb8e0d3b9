"""``hsm-token enroll``: a key, its proof and its certificate, in a folder that is ready to send."""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsm_signer import assembly, profile_file, rollover, validity
from hsm_signer.cli import options, terminal
from hsm_signer.cli.cert import CommonName, Days, Subject, common_name_of, store_certificate
from hsm_signer.cli.config import ask_module, ask_token
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError, HsmSignerError, ProfileNotChangedError
from hsm_signer.hsm.uri import key_uri, token_uri

if TYPE_CHECKING:
    from hsm_signer.enrolment import Enrolment
    from hsm_signer.hsm.token import Token

_log = logging.getLogger(__name__)

app = typer.Typer()

_ENROLLED = {"key-thumbprint", "certificate"}  # one of these in a profile is of an enrolment before

Folder = Annotated[
    Path | None, typer.Option("--out", help="Folder to write; files in it are new.", show_default=False)
]
Store = Annotated[bool, typer.Option("--store", help="Store the certificate on the token too.")]


@app.command()
@options.configured(*options.KEY, "client_id")
def enroll(
    settings: Settings,
    out: Folder = None,
    common_name: CommonName = None,
    subject: Subject = None,
    days: Days = validity.DAYS,
    store: Store = False,
    may_replace: Annotated[
        bool, typer.Option("--replace", help="Replace what the profile has of an enrolment before.")
    ] = False,
    as_json: options.Json = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Make or take a key, and write the folder to register it. The key is proved first.

    On a terminal it asks for what is missing. It prints the path of the one file to send. A profile that is
    enrolled already is changed only with --replace, or after a yes on a terminal.

    Example: hsm-token enroll --profile das --key das-2026 --out das-2026
    """
    settings, folder = _complete(settings, out)
    before = _as_written(settings)
    _agree(settings, before, folder, may_replace=may_replace)
    name = common_name_of(settings, common_name, subject)
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        made = make(settings, token, folder, common_name=name, subject=subject, days=days, store=store)
        serial = token.info.serial
    _into_profile(settings, before, made, folder, serial)
    _warn_of_the_one_before(settings, before)
    report(made, folder, as_json=as_json)


def make(
    settings: Settings,
    token: "Token",
    folder: Path,
    *,
    common_name: str | None,
    subject: str | None,
    days: int,
    store: bool,
    in_use: str | None = None,
) -> "Enrolment":
    """Make sure of the key, which is not the one ``in_use``, enrol it and write the folder."""
    from hsm_signer import enrolment

    key, pinned = str(settings.key), settings.key_thumbprint
    enrolment.check_free(folder)
    with terminal.working("generating and proving the key"):
        generated = enrolment.ensure_key(token, key, thumbprint=pinned)
        made = enrolment.enrol(
            token,
            key,
            client_id=str(settings.client_id),
            common_name=common_name,
            subject=subject,
            days=days,
            now=int(time.time()),
            thumbprint=pinned,
        )
    if made.certificate.thumbprint == in_use:
        raise ConfigError(f"{key} is the key in use", hint="give the next key another label")
    if store:
        store_certificate(token, key, made.certificate.der)
    enrolment.write(made, folder)
    label = made.proof.key.label
    if generated:
        terminal.note(f"key {label} generated")
        return made
    terminal.note(
        f"key {label} was there, and is taken: this is another certificate than any made of it before,"
    )
    terminal.note("with a fingerprint of its own, and the one that is registered is the one that counts")
    if settings.config is not None:
        rollover.warn_of_sharing(settings.config, settings.profile, made.certificate.thumbprint)
    return made


def report(made: "Enrolment", folder: Path, *, as_json: bool) -> None:
    """Tell a person what to do with the folder; the result is the file to send, or the receipt."""
    from hsm_signer import enrolment

    terminal.note(made.proof.statement)
    terminal.note(f"wrote {folder}: {', '.join(enrolment.FILES)}")
    terminal.note(
        f"send {enrolment.CERTIFICATE} to the operator of the server (WIPO DAS: to WIPO), and nothing else"
    )
    terminal.note(f"SHA-256 of the certificate: {enrolment.in_groups(made.certificate.fingerprint)}")
    terminal.note(f"SHA-256 of the public key:  {enrolment.in_groups(made.key_fingerprint)}")
    if as_json:
        terminal.json_result(made.receipt())
    else:
        terminal.result(str(folder / enrolment.CERTIFICATE))


def relative_to_config(settings: Settings, path: Path) -> str:
    """A path as the configuration file should name it."""
    absolute = path.absolute()
    home = settings.config.parent if settings.config else None
    return os.path.relpath(absolute, home) if home and absolute.is_relative_to(home) else str(absolute)


def _as_written(settings: Settings) -> dict[str, object]:
    """The profile as its file has it, without options and presets."""
    if settings.config is None or settings.profile is None:
        return {}
    return profile_file.profiles(settings.config).get(settings.profile, {})


def _agree(settings: Settings, before: Mapping[str, object], folder: Path, *, may_replace: bool) -> None:
    """Have somebody say so before what an enrolment wrote is replaced: the server may know no other key."""
    from hsm_signer import enrolment

    if not before.keys() & _ENROLLED:
        return
    planned = {
        "token": str(settings.token),
        "key": str(settings.key),
        "certificate": relative_to_config(settings, folder / enrolment.CERTIFICATE),
    }
    replaced = {name: text for name, text in planned.items() if not _may_stay(name, before.get(name), text)}
    if not replaced:
        return
    terminal.note(f"profile {settings.profile} is enrolled already; in the place of what it has comes:")
    _show_changes(before, replaced)
    if may_replace or (terminal.somebody_there() and terminal.ask("replace it? yes or no", "no") == "yes"):
        return
    raise ConfigError(
        f"profile {settings.profile} is enrolled already, and is not changed",
        hint="another key: hsm-token rollover prepare; another certificate of the same key: --replace",
    )


def _may_stay(name: str, old: object, new: str) -> bool:
    """Whether a setting is not there yet, or the two of it do not contradict each other."""
    if not isinstance(old, str) or old == new:
        return True
    if name == "certificate":
        return False
    read = token_uri if name == "token" else key_uri
    pairs = zip(astuple(read(old)), astuple(read(new)), strict=True)
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _show_changes(before: Mapping[str, object], changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        old = before.get(name)
        if value != old:
            terminal.note(f"  {name} = {value}, " + ("new" if old is None else f"was {old}"))


def _into_profile(
    settings: Settings, before: Mapping[str, object], made: "Enrolment", folder: Path, serial: str
) -> None:
    from hsm_signer import enrolment

    token = token_uri(str(settings.token))
    if serial.strip("0 "):
        token = replace(token, serial=serial)
    changes: dict[str, str | None] = {
        "token": str(token),
        "key": made.proof.key.uri,
        "key-thumbprint": made.certificate.thumbprint,
        "certificate": relative_to_config(settings, folder / enrolment.CERTIFICATE),
    }
    if settings.config is None or settings.profile is None:
        show_lines(profile_file.not_changed("there is no profile", settings.profile or "NAME", changes))
        return
    try:
        with profile_file.exclusive(assembly.state_directory(settings)):
            if _as_written(settings) != before:
                raise profile_file.not_changed("the profile was changed meanwhile", settings.profile, changes)
            profile_file.change(settings.config, settings.profile, changes)
    except ProfileNotChangedError as failed:
        show_lines(failed)
    else:
        terminal.note(f"profile {settings.profile} in {settings.config} now pins the key:")
        _show_changes(before, changes)


def _warn_of_the_one_before(settings: Settings, before: Mapping[str, object]) -> None:
    """Say that the server still has another certificate than the one that is watched from now on."""
    if not before.keys() & _ENROLLED:
        return
    verdict = ""
    if settings.certificate is not None:
        with suppress(HsmSignerError):  # a file that is gone or broken has no date
            old = validity.Watched(settings.certificate, validity.read_file(Path(settings.certificate)))
            verdict = f": {old.verdict(int(time.time()))}"
    _log.warning(
        "cert check watches the new certificate, and until that is registered the server has the one before%s",
        verdict,
    )


def show_lines(failed: ProfileNotChangedError) -> None:
    """Hand a person the lines that we cannot write."""
    terminal.note(f"{failed}; change these lines of the profile yourself:")
    terminal.copyable(failed.lines)


def _complete(settings: Settings, out: Path | None) -> tuple[Settings, Path]:
    """Ask for what is missing, where there is somebody to ask."""
    if terminal.somebody_there():
        module = settings.module or ask_module()
        settings = replace(
            settings,
            module=module,
            token=settings.token or ask_token(module),
            key=settings.key or terminal.ask("label of the key, there or to be made", "das-key"),
            client_id=settings.client_id or terminal.ask("client id"),
        )
        out = out or Path(terminal.ask("folder to write", str(settings.client_id)))
    settings.require("module", "token", "key", "client_id")
    if out is None:
        raise ConfigError("no folder given", hint="use --out")
    return settings, out
