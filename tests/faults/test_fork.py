"""Forking servers: a parent that has signed, and workers that open their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SoftToken
from interop.test_p11_kit import Remote

from faults.behind import KEY, make_keys

TESTS = Path(__file__).parents[1]


def run(module: str, token: SoftToken) -> None:
    command = [sys.executable, "-m", "faults.forked", module, token.uri, KEY]
    environment = os.environ | {"PIN": token.pin, "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def token(new_token: Callable[[], SoftToken]) -> SoftToken:
    token = new_token()
    make_keys(token)
    return token


def test_workers_of_a_parent_that_has_signed_sign_with_softhsm(token: SoftToken) -> None:
    run(token.module, token)


def test_workers_of_a_parent_that_has_signed_sign_with_p11_kit(token: SoftToken, tmp_path: Path) -> None:
    remote = Remote(token, tmp_path)
    try:
        run(remote.module, token)
    finally:
        remote.close()
