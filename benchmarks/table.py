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
import quote
import signing
from measure import HEAD, Row, line
from office import office

THEMES = {each.__name__: each.rows for each in (signing, bearer, processes, calls, herd)}
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
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": f"{platform.python_version()}, {platform.python_compiler()}",
        "softhsm": softhsm.strip(),
        "openssl": openssl.partition(" (")[0].strip(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def main(module: str, *wanted: str) -> None:
    unknown = set(wanted) - set(THEMES)
    if unknown:
        sys.exit(f"no such theme: {', '.join(unknown)}; there are {', '.join(THEMES)}")
    before = os.getloadavg()[0]
    print(*HEAD, sep="\n", flush=True)
    rows: list[Row] = []
    with office(module) as place:
        for name in wanted or THEMES:
            for row in THEMES[name](place):
                print(line(row), flush=True)
                rows.append(row)
    if not wanted:
        machine_of_today = machine() | {"load_before": before}
        results = {"machine": machine_of_today, "rows": [dataclasses.asdict(row) for row in rows]}
        quote.RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        quote.main()
    if before > 0.5:
        print(
            f"the load average was {before:.1f} at the start: measure again on a quiet machine",
            file=sys.stderr,
        )


main(*sys.argv[1:])
