"""How a run ends: one error line, where it helps hint lines, and the status that scripts rely on."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hsm_signer import errors
from hsm_signer.cli.interrupt import interruptible
from hsm_signer.cli.streams import StdoutError
from hsm_signer.cli.terminal import tell
from hsm_signer.text import shown

UNEXPECTED = 1
USAGE = 2
CHECK = 8
INTERRUPTED = 130
CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports it

STATUSES: tuple[tuple[type[errors.HsmSignerError], int], ...] = (
    (errors.ConfigError, USAGE),
    (errors.TokenError, 3),
    (errors.PinError, 4),
    (errors.SigningKeyError, 5),
    (errors.SignatureError, 5),
    (errors.OAuthError, 6),
    (errors.TransportError, 7),
    (errors.VerificationError, CHECK),
)


def status_of(error: errors.HsmSignerError) -> int:
    """The exit status of an error's class."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), UNEXPECTED)


def say(kind: str, text: str) -> None:
    """Write one line for a person: ``hsm-token: error: …``."""
    tell(f"hsm-token: {kind}: {shown(text)}")


@contextmanager
def statuses() -> Iterator[None]:
    """Turn what ends the run into an exit status, and lines on stderr: an error, and hints where there are."""
    try:
        with interruptible(INTERRUPTED):
            yield
    except errors.HsmSignerError as error:
        if isinstance(error, StdoutError) and error.closed_pipe:
            sys.exit(CLOSED_PIPE)
        _explain(str(error), error.hint, getattr(error, "candidates", ()))
        sys.exit(status_of(error))
    except typer.TyperException as error:
        _explain_usage(error)
        sys.exit(USAGE)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except Exception as unexpected:  # noqa: BLE001  # the last line of defence: no text, it could hold a secret
        frames = "".join(traceback.format_list(traceback.extract_tb(unexpected.__traceback__)))
        tell(frames.rstrip("\n"))
        _explain(f"unexpected {type(unexpected).__name__}", "this is a bug: please report the lines above")
        sys.exit(UNEXPECTED)


def _explain_usage(error: typer.TyperException) -> None:
    context, message = getattr(error, "ctx", None), error.format_message()
    if context and message == context.get_help():  # only a group was named, and help is the answer
        tell(message)
    else:
        _explain(message, f"{context.command_path} --help" if context else "hsm-token --help")


def _explain(message: str, hint: str | None, details: tuple[str, ...] = ()) -> None:
    say("error", message)
    for line in details:
        tell(f"  {shown(line)}")
    for line in (hint or "").splitlines():
        say("hint", line)
