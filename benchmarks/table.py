"""Measure all themes, or those that are named, and print one table: MODULE [THEME…]; started by ``run``."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import bearer
import calls
import herd
import processes
import signing
from measure import Row
from office import office

THEMES = {each.__name__: each.rows for each in (signing, bearer, processes, calls, herd)}
RESULTS = Path(__file__).with_name("results.json")
LIBRARIES = ("python-pkcs11", "asn1crypto", "cryptography", "urllib3", "requests", "typer")


def machine() -> dict[str, object]:
    """Of what the figures are; no names of hosts or people."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    softhsm = subprocess.check_output(["softhsm2-util", "--version"], text=True)
    openssl = subprocess.check_output(["openssl", "version"], text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_version()}, {platform.python_compiler()}",
        "softhsm": softhsm.strip(),
        "openssl": openssl.strip(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def line(row: Row) -> str:
    """A row in Markdown; the quartiles of the rounds stand in parentheses."""
    sign = "≥" if row.at_least else "≤"
    reached = f"{row.reached:.4g}{row.unit}"
    if row.low is not None and row.high is not None:
        reached += f" ({row.low:.3g} to {row.high:.3g})"
    aim = "" if row.aim is None else f"{sign} {row.aim:g}{row.unit}"
    verdict = "" if row.holds else " **missed**"
    return f"| {row.what} | {row.against} | {reached}{verdict} | {sign} {row.must:g}{row.unit} | {aim} |"


def main(module: str, *wanted: str) -> None:
    unknown = set(wanted) - set(THEMES)
    if unknown:
        sys.exit(f"no such theme: {', '.join(unknown)}; there are {', '.join(THEMES)}")
    before = os.getloadavg()[0]
    print("| what | against | reached | must reach | aim for |\n|---|---|---|---|---|")
    rows: list[Row] = []
    with office(module) as place:
        for name in wanted or THEMES:
            for row in THEMES[name](place):
                print(line(row), flush=True)
                rows.append(row)
    if not wanted:
        table = [dataclasses.asdict(row) | {"holds": row.holds} for row in rows]
        load = {"load_before": before, "load_after": os.getloadavg()[0]}
        RESULTS.write_text(
            json.dumps({"machine": machine() | load, "rows": table}, indent=2, ensure_ascii=False) + "\n"
        )
    if before > 0.5:
        print(
            f"the load average was {before:.1f} at the start: measure again on a quiet machine",
            file=sys.stderr,
        )


main(*sys.argv[1:])
