"""``hsm-token config``: the configuration file."""

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import typer

from hsm_signer import files, paths, profile_file, toml
from hsm_signer.cli import options, terminal
from hsm_signer.config import (
    PRESETS,
    SETTINGS,
    Settings,
    absolute,
    check,
    given_values,
    new_file,
    prepared_module,
)
from hsm_signer.errors import ConfigError, ModuleError, TokenError

app = typer.Typer()
config = typer.Typer(name="config", help="Write and show the configuration.", no_args_is_help=True)
app.add_typer(config)

ASKED = ("preset", "token_endpoint", "issuer", "scope", "client_id", "module", "token", "key", "pin_source")
SERVICES = {
    "wipo-das": "WIPO DAS",
    "wipo-das-test": "WIPO DAS, test",
    "oidc": "an OpenID Connect server",
    "fapi2": "a server with the FAPI 2.0 security profile",
}
OTHER = "another one"
AUDIT_LOG = "audit.jsonl"  # in the state directory
HEAD = """\
# hsm-token: one table a profile. Options and environment variables override what stands here.
# Never a PIN in here: pin-source says where it comes from.
"""


@config.command()
@options.configured(*options.KEY, *options.OAUTH)
def show(settings: Settings, as_json: options.Json = False) -> None:
    """Print every setting with its value and where it came from.

    Example: hsm-token config show --profile das
    """
    rows = [(name.replace("_", "-"), settings.shown(name), settings.origin(name)) for name in SETTINGS]
    if as_json:
        document = {name: {"value": value, "from": origin} for name, value, origin in rows}
        terminal.json_result(
            {"config": str(settings.config or ""), "profile": settings.profile, "settings": document}
        )
        return
    terminal.note(f"configuration file {settings.config or 'none'}, profile {settings.profile or 'none'}")
    shown = (
        ("" if value is None else value if isinstance(value, str) else json.dumps(value))
        for _, value, _ in rows
    )
    terminal.table(
        ("setting", "value", "from"), [(row[0], text, row[2]) for row, text in zip(rows, shown, strict=True)]
    )


@config.command()
@options.logged
def presets(as_json: options.Json = False) -> None:
    """Print the presets, the values of services that are known.

    Example: hsm-token config presets
    """
    if as_json:
        terminal.json_result(PRESETS)
        return
    terminal.table(
        ("preset", "setting", "value"),
        [(preset, name, str(value)) for preset, values in PRESETS.items() for name, value in values.items()],
    )


@config.command()
@options.configured(
    "preset", *options.KEY, "client_id", "token_endpoint", "issuer", "scope", how=given_values
)
def init(settings: tuple[Mapping[str, str | None], list[str]]) -> None:
    """Write a profile, commented, into a new file or below those of a file that is there.

    On a terminal it asks for what is not given.

    Example: hsm-token config init --preset wipo-das --client-id das-api-auth
    """
    values, variables = settings
    target, profile = new_file(values["config"]), values["profile"]
    there = target.exists()
    if there:
        _require_free(target, profile)
    profile = profile or "default"
    given = {name: values[name] for name in (*ASKED, "audit_log")}
    if not given["audit_log"]:
        with suppress(ConfigError):  # a user without a home
            given["audit_log"] = str(paths.state_directory() / AUDIT_LOG)
    check(given)
    if variables:
        terminal.note(f"taken from the environment, into the file: {', '.join(variables)}")
    table = _table(profile, _asked(given) if terminal.somebody_there() else given)
    if there:
        with profile_file.exclusive(paths.state_directory()):
            profile_file.add(target, profile, table)
        terminal.note(f"added profile {profile} to {target}")
    else:
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.create(target, f"{HEAD}\n{table}".encode(), mode=0o600)
        except OSError as failed:
            raise ConfigError(f"cannot write {target}: {failed.strerror}") from None
        terminal.note(f"wrote {target}")
    named = f" --profile {shlex.quote(profile)}" if there else ""
    terminal.note(f"next: hsm-token doctor --offline{named} --config {shlex.quote(str(target))}")


def _require_free(target: Path, profile: str | None) -> None:
    """Refuse before anything is asked; without a name it would become the one that all commands take."""
    if profile is None:
        raise ConfigError(
            f"{target} exists; nothing is overwritten", hint="--profile NAME adds another profile to it"
        )
    if profile in profile_file.profiles(target):
        raise ConfigError(
            f"{target} has a profile {profile!r} already; nothing is overwritten",
            hint="name another one, or change this one there",
        )


def _asked(given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Ask for what is missing, in an order in which each answer helps with the next."""
    answers = dict(given)

    def ask(name: str, question: Callable[[], str]) -> None:
        while not answers[name]:
            answer = question()
            try:
                check({name: answer or None})
            except ConfigError as wrong:
                terminal.note(str(wrong))
                continue
            answers[name] = answer or None
            return

    ask("preset", lambda: _preset_of(terminal.choose("service", [*SERVICES.values(), OTHER])))
    known = PRESETS.get(answers["preset"] or "", {})
    if "token-endpoint" not in known:
        ask("token_endpoint", lambda: terminal.ask("token endpoint (URL)"))
        ask("scope", lambda: terminal.ask("scope, if any", ""))
    if answers["preset"] == "fapi2":
        ask("issuer", lambda: terminal.ask("issuer (URL), the audience of the assertion"))
    ask("client_id", lambda: terminal.ask("client id"))
    while not (answers["module"] and answers["token"]):
        ask("module", ask_module)
        try:
            ask("token", lambda: ask_token(str(answers["module"])))
        except (ConfigError, TokenError) as wrong:  # another module may do, and nothing else is asked again
            terminal.note(str(wrong))
            answers["module"] = None
    ask("key", lambda: terminal.ask("label of the key, there or to be made", "das-key"))
    ask("pin_source", lambda: terminal.ask("where the PIN comes from", "prompt"))
    return answers


def _preset_of(service: str) -> str:
    return next((preset for preset, name in SERVICES.items() if name == service), "")


def ask_module() -> str:
    """Let a person choose a PKCS#11 module, until it is one that may be loaded; none is."""
    from hsm_signer.hsm.known import known_modules

    found = [str(each) for each in known_modules()]
    while True:
        answer = (
            terminal.choose("PKCS#11 module", found, or_other=True)
            if found
            else terminal.ask("path of the PKCS#11 module")
        )
        try:
            return prepared_module(Settings(module=answer))
        except (ConfigError, ModuleError) as wrong:
            terminal.note(str(wrong))


def ask_token(module: str) -> str:
    """Load the module that was just chosen and let the person pick a token; no PIN is sent."""
    path = prepared_module(Settings(module=module))
    from hsm_signer.hsm.module import slots

    found = [each.token for each in slots(path) if each.token and each.token.initialized]
    if not found:
        raise ConfigError(f"{module} has no initialised token", hint="initialise it with its vendor's tool")
    return terminal.choose("token", [each.identity for each in found], labels=[each.label for each in found])


def _table(profile: str, answers: Mapping[str, str | None]) -> str:
    lines = [f"[profiles.{toml.key(profile)}]"]
    for name, value in answers.items():
        hyphened = name.replace("_", "-")
        about = SETTINGS[name].metadata["about"]
        lines.append(
            f"{hyphened} = {toml.text(absolute(name, value))}  # {about}"
            if value
            else f"# {hyphened} =   # {about}"
        )
    lines.append("# key-thumbprint =   # pin the key: hsm-token key export --format thumbprint")
    return "\n".join(lines) + "\n"
