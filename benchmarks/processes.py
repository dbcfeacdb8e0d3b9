"""Whole commands, from start to end: against the libraries that they load, and against the shell."""

import statistics
import sys
from collections.abc import Iterator

from measure import Row, Run, in_turn, process, ratio
from office import CLIENT_ID, HERE, HSM_TOKEN, KEY, LABEL, SCOPE, Office

ROUNDS = 25
TYPER = "import typer"
ALL = "import typer, pkcs11, requests, asn1crypto.x509, cryptography.hazmat.primitives.asymmetric.ec"


def rows(office: Office) -> Iterator[Row]:
    shell = {"MODULE": office.module, "TOKEN": LABEL, "KEY": KEY, "CLIENT_ID": CLIENT_ID}
    shell |= {"ENDPOINT": office.endpoint, "SCOPE": SCOPE, "CA": office.ca}

    def run(*command: str) -> Run:
        return process(command, office.environment | shell)

    runs = in_turn(  # noqa: S604  # shell is the name of a row
        ROUNDS,
        typer=lambda: run(sys.executable, "-c", TYPER),
        hit=lambda: run(HSM_TOKEN, "fetch"),
        libraries=lambda: run(sys.executable, "-c", ALL),
        cold=lambda: run(HSM_TOKEN, "fetch", "--no-cache"),
        shell=lambda: run(str(HERE / "shell-way")),
    )
    seconds = {name: [each.seconds for each in found] for name, found in runs.items()}
    hit, cold, shell_way = "`hsm-token fetch`, cache hit", "`hsm-token fetch`, no cache", "the shell way"
    libraries = (
        "a process that just imports typer, pkcs11, requests, asn1crypto.x509 and cryptography's EC part"
    )
    yield ratio(hit, seconds["hit"], "a process that just imports typer", seconds["typer"], 1.3, 1.15)
    yield ratio(cold, seconds["cold"], libraries, seconds["libraries"], 1.4, 1.2)
    yield ratio(hit, seconds["hit"], shell_way, seconds["shell"], 1.7, 1.4)
    yield ratio(cold, seconds["cold"], shell_way, seconds["shell"], 4.5, 3.5)
    memory = {name: statistics.median(each.memory for each in runs[name]) for name in ("cold", "libraries")}
    more = memory["cold"] - memory["libraries"]
    yield Row("peak memory, cold fetch", "the process of imports above", more, 6, 2, unit=" MB more")
