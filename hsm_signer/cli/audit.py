"""``hsm-token audit``: the log of what the keys were used for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from hsm_signer.audit import AuditLog, Head, Verdict
from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError, VerificationError

_SHOWN = 10  # numbers of lines

app = typer.Typer()
audit = typer.Typer(name="audit", help="The log of what the keys were used for.", no_args_is_help=True)
app.add_typer(audit)


@audit.command()
@options.configured("audit_log")
def head(settings: Settings, as_json: options.Json = False) -> None:
    """Print COUNT:HEAD, the number of the last line and its hash, as it stands there: verify checks it.

    Example: hsm-token audit head --profile das
    """
    with _log(settings) as log:
        found = log.head()
    if not found.count:
        terminal.remark(f"the audit log {log.path} is empty: its head holds of every log")
    terminal.json_result(found) if as_json else terminal.result(str(found))


@audit.command()
@options.configured("audit_log")
def verify(
    settings: Settings,
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT:HEAD", help="A head noted earlier, which the log must have.", show_default=False
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check that no line of the log was changed, removed or moved. Exit 8: something was found.

    Only a head that was noted elsewhere shows lines that were changed or cut off at the end, and another
    history. Prints the head of a log in which nothing was found: note that one next.

    Example: hsm-token audit verify --profile das --expect "$(ssh safe cat head)"
    """
    noted = None if expect is None else Head.parse(expect)
    with _log(settings) as log:
        verdict = _verdict(log, noted)
    if as_json:
        terminal.json_result(
            {
                "count": verdict.head.count,
                "hash": verdict.head.hash,
                "anchored": not verdict.unanchored,
                "torn": verdict.torn,
                "open": verdict.open,
                "findings": verdict.findings,
            }
        )
    else:
        _tell(verdict)
    if verdict.findings:
        first, *more = verdict.findings
        rest = f"; and {len(more)} more, which --json tells" if more else ""
        raise VerificationError(f"audit log {log.path}: {first}{rest}")


def _tell(verdict: Verdict) -> None:
    """The head, unless nobody should note it, and what is no finding but good to know."""
    if not verdict.findings:
        terminal.result(str(verdict.head))
    if verdict.torn:
        terminal.remark(f"pieces that are no whole lines, as crashes leave them: {verdict.torn}")
    if verdict.open:
        numbers = ", ".join([*map(str, verdict.open[:_SHOWN]), *["…"] * (len(verdict.open) > _SHOWN)])
        terminal.remark(
            f"uses without an outcome, of a process that ended in between or is at work: {numbers}"
        )
    if verdict.unanchored:
        terminal.remark(
            "the end is not anchored: lines cut off there, or another history, show by --expect alone"
        )


def _verdict(log: AuditLog, noted: Head | None) -> Verdict:
    try:
        return log.verify(noted)
    except FileNotFoundError:
        raise VerificationError(
            f"there is no audit log {log.path}: it was removed, or no key was used yet"
        ) from None


@contextmanager
def _log(settings: Settings) -> Iterator[AuditLog]:
    settings.require("audit_log")
    log = AuditLog(str(settings.audit_log))
    try:
        yield log
    except OSError as unreadable:
        raise ConfigError(f"cannot read {log.path}: {unreadable.strerror}") from None
