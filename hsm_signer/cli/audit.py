"""``hsm-token audit``: the log of what the keys were used for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from hsm_signer import assembly
from hsm_signer.audit import AuditLog
from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError, VerificationError

app = typer.Typer()
audit = typer.Typer(name="audit", help="The log of what the keys were used for.", no_args_is_help=True)
app.add_typer(audit)


@audit.command()
@options.configured()
def head(settings: Settings, as_json: options.Json = False) -> None:
    """Print how many events the log holds, and the hash of its last line; note it elsewhere.

    Example: hsm-token audit head
    """
    with _readable(settings) as log:
        found = log.head()
    if as_json:
        terminal.json_result({"count": found.count, "hash": found.hash})
    else:
        terminal.table(("events", "hash"), [(str(found.count), found.hash)])


@audit.command()
@options.configured()
def verify(
    settings: Settings,
    noted: Annotated[
        str | None,
        typer.Option("--head", help="A hash noted earlier, which must be on the chain.", show_default=False),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check that no line of the log was changed, removed or inserted. Exit 8: something was found.

    Only a hash that was noted elsewhere shows that lines were cut off at the end.

    Example: hsm-token audit verify --head 61c5d6a9…
    """
    with _readable(settings) as log:
        verdict = log.verify(None if noted is None else noted.lower())
    findings = list(verdict.findings)
    if as_json:
        terminal.json_result(
            {
                "count": verdict.head.count,
                "hash": verdict.head.hash,
                "torn": verdict.torn,
                "findings": findings,
            }
        )
    else:
        terminal.table(("events", "hash"), [(str(verdict.head.count), verdict.head.hash)])
    if verdict.torn:
        terminal.note(f"{verdict.torn} lines were torn by crashes; later lines account for them")
    if findings:
        raise VerificationError(f"audit log {log.path}: {'; '.join(findings)}")


@contextmanager
def _readable(settings: Settings) -> Iterator[AuditLog]:
    log = AuditLog(assembly.state_directory(settings))
    try:
        yield log
    except OSError as unreadable:
        raise ConfigError(f"cannot read {log.path}: {unreadable.strerror}") from None
