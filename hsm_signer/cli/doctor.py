"""``hsm-token doctor``: what is wrong, found out one step at a time."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsm_signer.cli import exits, options, terminal
from hsm_signer.cli.cert import require_free, write
from hsm_signer.config import Settings
from hsm_signer.errors import ConfigError
from hsm_signer.text import shown

if TYPE_CHECKING:
    from hsm_signer.doctor import Finding

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "not checked": "dim"}

app = typer.Typer()


@app.command()
@options.configured(*options.KEY, *options.OAUTH, how=options.lazily)
def doctor(
    settings: Callable[[], Settings],
    offline: Annotated[bool, typer.Option("--offline", help="Leave out what needs the network.")] = False,
    log_in: Annotated[bool, typer.Option("--login", help="Send the PIN to the token, once.")] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="Write a file for a support mail: no name, path, address or serial.")
    ] = None,
    as_json: options.Json = False,
    retry_pin: options.RetryPin = False,
) -> None:
    """Check an installation, from module to granted scope.

    Each check has its evidence and a remedy. The exit status is that of the first check that failed.

    Example: hsm-token doctor --profile das --login
    """
    require_free(bundle)
    findings = []
    for finding in _findings(settings, offline, log_in, retry_pin):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        terminal.json_result([each.as_dict() for each in findings])
    if bundle:
        from hsm_signer import doctor

        write(bundle, json.dumps(doctor.bundle(findings), indent=2) + "\n")
    raise typer.Exit(_status(findings))


def _findings(
    settings: Callable[[], Settings], offline: bool, log_in: bool, retry_pin: bool
) -> "Iterator[Finding]":
    from hsm_signer import doctor

    try:
        loaded = settings()
    except ConfigError as error:
        yield from doctor.unconfigured(error)
        return
    login = options.login(retry_pin)
    yield from doctor.examine(doctor.Examination(loaded, login, may_log_in=log_in, offline=offline))


def _show(finding: "Finding") -> None:
    """One line a check in a pipe; on a terminal with the remedy below it."""
    verdict, check = str(finding.verdict), finding.check
    evidence, remedies = shown(finding.evidence), [*map(shown, (finding.remedy or "").splitlines())]
    if not sys.stdout.isatty():
        print(verdict, check, evidence, "; ".join(remedies), sep="\t", flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{verdict:<12}", STYLES[verdict]), f" {check:<14} {evidence}")
    for remedy in remedies:
        line.append(f"\n{'':<27} → {remedy}")
    Console(highlight=False, soft_wrap=True).print(line)


def _status(findings: "Iterable[Finding]") -> int:
    return next((exits.status_of(each.error) for each in findings if each.error), 0)
