"""A module that hangs: Ctrl-C ends the command at once, wherever the module hangs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from interop.waiting import wait_until

from faults.behind import KEY, Behind


def start(behind: Behind, state: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hsm_signer.cli", "assertion"]
    command += ["--module", behind.faulty.path, "--token", behind.token.uri, "--key", KEY]
    command += [
        "--client-id",
        "office",
        "--token-endpoint",
        "https://127.0.0.1/token",
        "--pin-source",
        "env:PIN",
    ]
    environment = os.environ | {"PIN": behind.token.pin, "XDG_STATE_HOME": str(state)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    )


def test_ctrl_c_ends_a_command_wherever_its_module_hangs(modules: Iterator[Behind], tmp_path: Path) -> None:
    good = next(modules)
    with start(good, tmp_path) as process:
        assert len(process.communicate()[0].split(".")) == 3
    functions = sorted({call.function for call in good.faulty.log()})
    assert {"C_Initialize", "C_Login", "C_Sign"} <= set(functions)
    wrong = []
    for function in functions:
        behind = next(modules)
        behind.faulty.set(f"hang {function}")
        with start(behind, tmp_path / function) as process:
            wait_until(lambda: behind.faulty.calls(function) > 0)  # noqa: B023  # called in this turn of the loop
            process.send_signal(signal.SIGINT)
            try:
                _, stderr = process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                stderr = "it did not end"
            if process.returncode not in (130, -signal.SIGINT) or "Traceback" in stderr:
                wrong.append(f"{function}: {process.returncode} {stderr}")
    assert not wrong, "\n".join(wrong)
