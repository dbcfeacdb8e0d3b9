"""The command ``hsm-token``: the only door to typer, the only place that prints, asks and knows exit statuses.

One file per group of commands.
"""

import gc
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; ends the process with a status of the table in docs/operating.md."""
    gc.disable()  # a run is short and what it loads stays: to look for garbage takes a sixth of its time
    try:
        from hsm_signer.cli import streams

        streams.prepare()
        from hsm_signer.cli.program import run

        run()
    finally:
        gc.freeze()  # for the last look, when the interpreter ends
