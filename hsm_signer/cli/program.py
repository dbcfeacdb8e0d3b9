"""The program with its commands. A run imports the file of its own command alone: the others only cost time."""

import sys
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from hsm_signer import __version__
from hsm_signer.cli.exits import statuses

PROGRAM = "hsm-token"

HOMES = {
    "fetch": "fetch",
    "assertion": "assertion",
    "exchange": "assertion",
    "key": "key",
    "cert": "cert",
    "enroll": "enrol",
    "rollover": "rollover",
    "slots": "slots",
    "rehearse": "rehearse",
    "config": "config",
    "cache": "cache",
    "doctor": "doctor",
    "verify": "verify",
    "audit": "audit",
}


def application(command: str | None = None) -> typer.Typer:
    """The program with all its commands, or with the file of one command only."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,  # a traceback with local variables would show the PIN
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(root)
    wanted = [HOMES[command]] if command in HOMES else list(dict.fromkeys(HOMES.values()))
    for home in wanted:
        app.add_typer(import_module(f"hsm_signer.cli.{home}").app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Log in to an OAuth API with a key that never leaves its hardware.

    The first command to try: hsm-token config init
    """


def run() -> NoReturn:
    """Do what the arguments of the process say."""
    command = sys.argv[1] if len(sys.argv) > 1 else None  # a shell that asks for completions gives none
    with statuses():
        status = application(command)(prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()  # here, where what fails is still ours to tell
        sys.exit(status if isinstance(status, int) else 0)
