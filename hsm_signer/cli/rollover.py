"""``hsm-token rollover``: from one key to the next, at a server that knows one at a time."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsm_signer import assembly, rollover, toml, validity
from hsm_signer.cli import enrol, exits, options, terminal
from hsm_signer.cli.cert import CommonName, Days, Subject, common_name_of
from hsm_signer.cli.key import destroy
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError, HsmSignerError, KeyNotFoundError, ProfileNotChangedError
from hsm_signer.hsm.uri import key_uri

if TYPE_CHECKING:
    from hsm_signer.oauth.response import TokenResponse

app = typer.Typer()
group = typer.Typer(name="rollover", help="Change to the next key, step by step.", no_args_is_help=True)
app.add_typer(group)

_DROP_IT = (
    "hsm-token rollover abandon drops it from the profile, and rollover prepare makes another; "
    "not where its certificate is registered already"
)


@group.command()
@options.configured(*options.KEY, "client_id")
def prepare(
    settings: Settings,
    next_key: Annotated[str, typer.Argument(help="Label of the next key, there or to be made.")],
    out: enrol.Folder = None,
    common_name: CommonName = None,
    subject: Subject = None,
    days: Days = validity.DAYS,
    store: enrol.Store = False,
    as_json: options.Json = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Make the next key and the folder that registers it.

    Example: hsm-token rollover prepare das-2028 --profile das --out das-2028
    """
    from hsm_signer import enrolment

    path, profile = _profile(settings)
    settings.require("client_id")
    rollover.check_none_is_prepared(path, profile)
    name = common_name_of(settings, common_name, subject)
    folder = out or Path(_label(next_key))
    upcoming = rollover.following(replace(settings, next_key=next_key))
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        made = enrol.make(
            upcoming,
            token,
            folder,
            common_name=name,
            subject=subject,
            days=days,
            store=store,
            in_use=rollover.in_use(settings, token),
        )
        try:
            rollover.prepare(
                token,
                made.certificate.thumbprint,
                enrol.relative_to_config(settings, folder / enrolment.CERTIFICATE),
                path,
                profile,
                state_directory=assembly.state_directory(settings),
            )
        except ProfileNotChangedError as failed:
            enrol.show_lines(failed)
    enrol.report(made, folder, as_json=as_json)
    terminal.note("once it is registered: hsm-token rollover try, then hsm-token rollover switch")


@group.command()
@options.configured(*options.TOKEN)
def status(settings: Settings, as_json: options.Json = False, retry_pin: options.RetryPin = False) -> None:
    """Show the keys in use and next, their certificates and days left.

    Example: hsm-token rollover status --profile das
    """
    if settings.key is None:
        raise ConfigError(
            "the profile names no key in use", hint="hsm-token enroll makes one and writes it there"
        )
    with assembly.open_token(settings, options.login(retry_pin)) as token:
        states = rollover.status(settings, token)
    rows = [state.as_dict(int(time.time())) for state in states]
    for state in states:
        if state.role == "next" and not state.on_token:
            terminal.note(f"the next key was not found on the token; if it is lost: {_DROP_IT}")
    if as_json:
        terminal.json_result(rows)
        return
    terminal.table(
        ("role", "key", "thumbprint", "on the token", "certificate fits", "until", "days left"),
        [tuple(_cell(value) for value in _short(row).values()) for row in rows],
    )


def _short(row: dict[str, object]) -> dict[str, object]:
    """What people call it: the label of the key, the day on which its certificate ends."""
    until = row["not_after"]
    return row | {
        "key": key_uri(str(row["key"])).object or row["key"],
        "not_after": until and str(until)[:10],
    }


def _label(key: str) -> str:
    """The key's label, as the name of a folder."""
    label = key_uri(key).object
    if label is None or Path(label).name != label:
        raise ConfigError(f"no folder is called like {key}", hint="use --out")
    return label


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "NO"
    return str(value)


@group.command("try")
@options.configured(*options.TOKEN, *options.OAUTH)
def try_next(settings: Settings, as_json: options.Json = False, retry_pin: options.RetryPin = False) -> None:
    """Ask the server with the next key; nothing is cached or changed.

    Example: hsm-token rollover try --profile das
    """
    response = _attempt(settings, retry_pin)
    if as_json:
        terminal.json_result({"accepted": True, "scope": response.scope, "expires_at": response.expires_at})
    else:
        terminal.result(f"the server takes the next key, for scope {response.scope}")


def _attempt(settings: Settings, retry_pin: bool) -> "TokenResponse":
    client = assembly.token_client(rollover.following(settings), options.login(retry_pin), cached=False)
    try:
        with terminal.working("asking the authorization server"):
            return client.fetch()
    except KeyNotFoundError as lost:
        lost.hint = "; ".join(filter(None, (lost.hint, f"if it is lost: {_DROP_IT}")))
        raise


@group.command()
@options.configured(*options.TOKEN, *options.OAUTH)
def switch(
    settings: Settings,
    force: Annotated[bool, typer.Option("--force", help="Switch without asking the server first.")] = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Make the next key the key in use, if the server takes it.

    The old one stays on the token. Where the profile cannot be written, the lines to change are printed.

    Example: hsm-token rollover switch --profile das
    """
    path, profile = _profile(settings)
    thumbprint = rollover.following(settings).key_thumbprint
    if thumbprint is None:
        raise ConfigError(
            "the next key is pinned to no thumbprint", hint="add next-key-thumbprint to the profile"
        )
    if not force:
        _attempt(settings, retry_pin)
    try:
        rollover.switch(path, profile, thumbprint, state_directory=assembly.state_directory(settings))
    except ProfileNotChangedError as failed:
        terminal.note(f"{failed}; nothing is switched before these lines are changed:")
        terminal.result("\n".join(failed.lines))
        raise typer.Exit(exits.USAGE) from None  # a script must not go on to retire the key in use
    terminal.note(f"profile {profile} now uses the key {thumbprint}; the old key stays on the token")
    if force:  # no word of retiring: the old key may be the only one that the server takes
        terminal.note(
            "the server was not asked for it: hsm-token fetch --force shows whether it takes this key"
        )
    else:
        terminal.note("when it is needed no more: hsm-token rollover retire")


@group.command()
@options.configured()
def abandon(
    settings: Settings,
    force: Annotated[bool, typer.Option("--force", help="Drop it without a question.")] = False,
) -> None:
    """Drop the next key from the profile, as when it was lost. No key is deleted, no token needed.

    Only where its certificate is not registered: else the server takes this key and no other. It asks on a
    terminal, and needs --force without one. What the profile said of the key is shown, for it to be put back.

    Example: hsm-token rollover abandon --profile das
    """
    path, profile = _profile(settings)
    rollover.check_one_is_prepared(path, profile)
    if not force:
        _agree_to_abandon(settings)
    try:
        said = rollover.abandon(path, profile, state_directory=assembly.state_directory(settings))
    except ProfileNotChangedError as failed:
        terminal.note(f"{failed}; nothing is abandoned before these lines are changed:")
        terminal.result("\n".join(failed.lines))
        raise typer.Exit(exits.USAGE) from None
    terminal.note(f"profile {profile} has no next key any more; removed from {path}:")
    terminal.copyable(f"{name} = {toml.text(value)}" for name, value in said.items())
    terminal.note(
        "where the key is on the token it stays; if its certificate is not registered: hsm-token key delete"
    )


def _agree_to_abandon(settings: Settings) -> None:
    """Have somebody say so before the profile loses what may be the only key that the server takes."""
    terminal.note(f"the next key is {settings.next_key}: {settings.next_key_thumbprint or 'not pinned'}")
    terminal.note("if its certificate is registered, the server takes no other key of this client")
    if terminal.somebody_there() and terminal.ask("abandon it? yes or no", "no") == "yes":
        return
    raise ConfigError(
        "the next key is not abandoned",
        hint="hsm-token rollover try shows whether the server takes it; if it does not: --force",
    )


@group.command()
@options.configured(*options.TOKEN, *options.OAUTH)
def retire(
    settings: Settings,
    thumbprint: options.Thumbprint = None,
    force: Annotated[bool, typer.Option("--force", help="Retire without asking the server first.")] = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Destroy the old key and its certificates on the token, if the server takes the key in use.

    No profile may use the old key any more. There is no way back.

    Example: hsm-token rollover retire --profile das
    """
    path, profile = _profile(settings)
    if thumbprint is not None:
        rollover.require_unused(path, thumbprint)
    elif settings.previous_key is None:
        raise ConfigError(
            f"profile {profile} has no previous key",
            hint="there is nothing to retire; another key that no profile uses: hsm-token key delete",
        )
    elif not terminal.somebody_there():
        raise ConfigError("retiring a key needs its thumbprint", hint="use --thumbprint")
    login = options.login(retry_pin)
    with assembly.open_token(settings, login) as token:
        if not force:
            _require_taken(settings, login)
        if thumbprint is None:
            previous = rollover.previous(settings, token) or "not found on the token"
            terminal.note(f"the previous key is {settings.previous_key}: {previous}")
            terminal.note(f"what is destroyed on {token.info.label} is gone for ever")
            thumbprint = terminal.ask("type the thumbprint of the key that is to go")
        destroy(settings, token, thumbprint)


def _require_taken(settings: Settings, login: "assembly.Login") -> None:
    """Have the server take the key in use, before the one goes that it may know in its place."""
    try:
        client = assembly.token_client(settings, login, cached=False)
        with terminal.working("asking the authorization server"):
            client.fetch()
    except HsmSignerError as failed:
        nothing = "nothing is destroyed before the server takes the key in use; --force does not ask it"
        failed.hint = "\n".join(filter(None, (failed.hint, nothing)))
        raise


def _profile(settings: Settings) -> tuple[Path, str]:
    """Where the state of a rollover is."""
    if settings.config is None or settings.profile is None:
        raise ConfigError(
            "a rollover needs a profile: that is where its state is", hint="hsm-token config init writes one"
        )
    return settings.config, settings.profile
