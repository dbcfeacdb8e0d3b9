"""A wrong PIN in a file, and every command that logs in with it at the same moment."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import leaks
import office as offices
import pytest
from conftest import SoftToken
from faults import FaultyModule

COMMANDS = (
    ("fetch", "--no-cache"),
    ("fetch",),
    ("assertion",),
    ("key", "list"),
    ("key", "prove"),
    ("key", "export"),
    ("key", "generate", "another"),
    ("cert", "self-signed"),
    ("cert", "request"),
    ("doctor", "--offline", "--login"),
)
PROCESSES = 50


@pytest.mark.parametrize("retry", [(), ("--retry-pin",)], ids=["", "retry"])
def test_fifty_processes_of_mixed_commands_spend_one_try(
    new_token: Callable[..., SoftToken], faulty: FaultyModule, tmp_path: Path, retry: tuple[str, ...]
) -> None:
    """Also where each of them may pass over the marker that an earlier try has left."""
    token = new_token()
    office = offices.found(
        tmp_path, token, **{"module": faulty.path, "token-endpoint": "http://127.0.0.1:1/token"}
    )
    (tmp_path / "pin").write_text(leaks.pin())
    if retry:
        assert office.run("key", "list").status == 4
        faulty.forget()
    environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
    running = [
        subprocess.Popen(
            office.command(*COMMANDS[number % len(COMMANDS)], *retry),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    errors = [process.communicate(timeout=100)[1] for process in running]
    assert {process.returncode for process in running} == {4}, errors
    assert faulty.calls("C_Login") == 1
    assert sum("CKR_PIN_INCORRECT" in error for error in errors) <= 1
