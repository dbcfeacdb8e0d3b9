"""``hsm-token config``: the configuration file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hsm_signer import files, paths
from hsm_signer.cli import options, terminal
from hsm_signer.config import PRESETS, SETTINGS, Settings, prepared_module, toml_key, toml_text, variable
from hsm_signer.errors import ConfigError

app = typer.Typer()
config = typer.Typer(name="config", help="Write and show the configuration.", no_args_is_help=True)
app.add_typer(config)

ASKED = ("client_id", "token_endpoint", "module", "token", "key", "pin_source")
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
    rows = [(name.replace("_", "-"), getattr(settings, name), settings.origin(name)) for name in SETTINGS]
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
def init(
    config_file: Annotated[
        Path | None, typer.Option("--config", help=f"File to write [{variable('config')}].")
    ] = None,
    profile: Annotated[str, typer.Option(help="Name of the profile.")] = "default",
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = None,
    client_id: Annotated[str | None, typer.Option()] = None,
    token_endpoint: Annotated[str | None, typer.Option()] = None,
    module: Annotated[str | None, typer.Option()] = None,
    token: Annotated[str | None, typer.Option()] = None,
    key: Annotated[str | None, typer.Option()] = None,
    pin_source: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Write a commented configuration file of mode 0600; ask for what is not given, on a terminal.

    Example: hsm-token config init --preset wipo-das --client-id das-api-auth
    """
    target = config_file or paths.user_config_file()
    if target.exists():
        raise ConfigError(
            f"{target} exists; nothing is overwritten", hint="add a [profiles.NAME] to it by hand"
        )
    given = {"preset": preset, "client_id": client_id, "token_endpoint": token_endpoint, "module": module}
    given |= {"token": token, "key": key, "pin_source": pin_source}
    answers = _asked(given) if terminal.somebody_there() else given
    text = _document(profile, answers)
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.create(target, text.encode(), mode=0o600)
    except OSError as failed:
        raise ConfigError(f"cannot write {target}: {failed.strerror}") from None
    terminal.note(f"wrote {target}")
    terminal.note("next: hsm-token doctor --offline" + (f" --config {config_file}" if config_file else ""))


def _asked(given: dict[str, str | None]) -> dict[str, str | None]:
    """Ask for what is missing, in an order in which each answer helps with the next."""
    answers = dict(given)
    answers["preset"] = given["preset"] or terminal.choose("service", [*PRESETS, "other"])
    if answers["preset"] == "other":
        answers["preset"] = None
    if "token-endpoint" not in PRESETS.get(answers["preset"] or "", {}):
        answers["token_endpoint"] = given["token_endpoint"] or terminal.ask("token endpoint (URL)")
    answers["client_id"] = given["client_id"] or terminal.ask("client id")
    answers["module"] = module = given["module"] or ask_module()
    answers["token"] = given["token"] or ask_token(module)
    answers["key"] = given["key"] or terminal.ask("label of the key, there or to be made", "das-key")
    answers["pin_source"] = given["pin_source"] or terminal.ask("where the PIN comes from", "prompt")
    return answers


def ask_module() -> str:
    """Let a person choose a PKCS#11 module; none is loaded."""
    from hsm_signer.hsm.known import known_modules

    found = [str(each) for each in known_modules()]
    return (
        terminal.choose("PKCS#11 module", found, or_other=True)
        if found
        else terminal.ask("path of the PKCS#11 module")
    )


def ask_token(module: str) -> str:
    """Load the module that was just chosen and let the person pick a token; no PIN is sent."""
    path = prepared_module(Settings(module=module))
    from hsm_signer.hsm.module import slots

    found = [each.token.identity for each in slots(path) if each.token and each.token.initialized]
    if not found:
        raise ConfigError(f"{module} has no initialised token", hint="initialise it with its vendor's tool")
    return terminal.choose("token", found)


def _document(profile: str, answers: dict[str, str | None]) -> str:

    lines = [HEAD, f"[profiles.{toml_key(profile)}]"]
    for name, value in answers.items():
        hyphened = name.replace("_", "-")
        about = SETTINGS[name].metadata["about"]
        lines.append(
            f"{hyphened} = {toml_text(value)}  # {about}" if value else f"# {hyphened} =   # {about}"
        )
    lines.append("# key-thumbprint =   # pin the key: hsm-token key export --format thumbprint")
    return "\n".join(lines) + "\n"
