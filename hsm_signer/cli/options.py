"""The options that commands share, made from the table of settings in config.py, and the log behind ``-v``."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsm_signer import config
from hsm_signer.cli import terminal
from hsm_signer.cli.exits import say
from hsm_signer.config import SETTINGS, Settings
from hsm_signer.errors import ConfigError
from hsm_signer.text import shown

if TYPE_CHECKING:
    from hsm_signer.assembly import Login

TOKEN = ("module", "token", "pin_source", "audit_log")
KEY = (*TOKEN, "key")
ASSERTION = ("client_id", "token_endpoint", "issuer", "audience", "lifetime", "claims")
OAUTH = (*ASSERTION, "scope", "ca_bundle", "proxy")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RetryPin = Annotated[
    bool, typer.Option("--retry-pin", help="Try the PIN although an earlier try is unresolved.")
]

Thumbprint = Annotated[
    str | None, typer.Option(help="Thumbprint of the key that is to go; asked for on a terminal.")
]

Command = Callable[..., None]
Options = Mapping[str, object]


def lazily(options: Options) -> Callable[[], Settings]:
    """For a command that wants to look at what is wrong with the settings itself."""
    return functools.partial(config.load, options)


def configured(*names: str, how: Callable[[Options], object] = config.load) -> Callable[[Command], Command]:
    """Give a command the named settings as options; it gets one ``settings`` in their place.

    ``how`` makes them from the options: :func:`lazily`, or without a configuration file.
    """

    def decorate(command: Command) -> Command:
        shared = [_parameter(name, SETTINGS[name].metadata["about"]) for name in names]
        shared += [
            _parameter("profile", "profile in the configuration file"),
            _parameter("config", "configuration file"),
        ]

        def run(**given: Any) -> None:  # noqa: ANN401  # typer fills them in
            options = {each.name: given.pop(each.name) for each in shared}
            command(settings=how(options), **given)

        own = [each for each in _parameters_of(command) if each.name != "settings"]
        return logged(_with_parameters(functools.wraps(command)(run), [*own, *shared]))

    return decorate


def logged(command: Command) -> Command:
    """Give a command ``-v`` and ``-q``."""

    def run(*, verbose: int, quiet: bool, **given: Any) -> None:  # noqa: ANN401  # typer fills them in
        _log(verbose, quiet)
        command(**given)

    return _with_parameters(functools.wraps(command)(run), [*_parameters_of(command), _VERBOSE, _QUIET])


def _parameters_of(command: Command) -> list[inspect.Parameter]:
    return list(inspect.signature(command, eval_str=True).parameters.values())


def _with_parameters(run: Command, parameters: list[inspect.Parameter]) -> Command:
    """Let typer see these parameters."""
    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {each.name: each.annotation for each in keywords}
    del run.__wrapped__  # type: ignore[attr-defined]  # set by functools.wraps
    return run


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Say which extra brings the library whose import fails in the block."""
    try:
        yield
    except ImportError as missing:
        raise ConfigError(
            f"this command needs {missing.name}", hint=f"pip install 'hsm-signer[{name}]'"
        ) from None


def login(retry_pin: bool = False) -> "Login":
    """How this run may ask for a PIN."""
    from hsm_signer.assembly import Login

    return Login(terminal.ask_secret if terminal.somebody_there() else None, retry_pin)


def _parameter(name: str, about: str) -> inspect.Parameter:
    hyphened = name.replace("_", "-")
    read = name not in SETTINGS or SETTINGS[name].metadata["option"]
    variable = f" [{config.variable(name)}]" if read else ""
    help_text = f"{about[0].upper()}{about[1:]}{variable}."
    option = typer.Option(
        f"--{hyphened}", help=help_text, show_default=False, metavar=hyphened.rsplit("-", 1)[-1].upper()
    )
    return _keyword(name, Annotated[str | None, option], None)


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_VERBOSE = _keyword(
    "verbose",
    Annotated[
        int, typer.Option("-v", "--verbose", count=True, help="Show steps; -vv more.", show_default=False)
    ],
    0,
)
_QUIET = _keyword(
    "quiet", Annotated[bool, typer.Option("-q", "--quiet", help="No warnings, no spinner.")], False
)


class _Handler(logging.Handler):
    """Warnings as a person reads them, and with ``-v`` each step with the time since the start."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            say("warning", record.getMessage())
        else:
            since_start = record.relativeCreated / 1000
            terminal.tell(f"hsm-token: {since_start:7.3f} s  {shown(record.getMessage())}")


def _log(verbose: int, quiet: bool) -> None:
    terminal.quiet = quiet
    logger = logging.getLogger("hsm_signer")
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    level = logging.ERROR if quiet else levels[min(verbose, 2)]
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers = [_Handler(level)]  # the spinner hears what is not for its level
