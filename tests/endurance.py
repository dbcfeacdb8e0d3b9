"""What takes too long for every run: ``pytest tests/endurance.py -s``; the results are in docs/tokens.md."""

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SoftToken
from faults import FaultyModule
from faults.behind import KEY, Behind, make_keys, verify
from faults.test_threads import SIGNATURES, THREADS, sign_in_threads

RUNS = 20
SOAK = 200_000
SAMPLES = 20


@pytest.fixture(scope="module")
def token(new_token: Any) -> SoftToken:
    token: SoftToken = new_token()
    make_keys(token)
    return token


def resident() -> int:
    """Memory of this process in kB (``VmRSS``)."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("sessions", [1, 8])
def test_threads_twenty_times(token: SoftToken, sessions: int) -> None:
    start = time.monotonic()
    for _ in range(RUNS):
        sign_in_threads(token, sessions)
    seconds = time.monotonic() - start
    print(
        f"\nsessions={sessions}: {RUNS} x {THREADS} threads x {SIGNATURES} signatures verify, {seconds:.0f} s"
    )


@pytest.mark.timeout(7200)
def test_soak(token: SoftToken, faulty: FaultyModule) -> None:
    """One process, one opened token; memory and sessions are those of the first tenth at the end as well."""
    behind = Behind(token, faulty)
    samples: list[tuple[int, int]] = []
    with behind.open() as opened:
        signer = opened.signer(KEY)
        for number in range(1, SOAK + 1):
            data = number.to_bytes(8)
            verify(signer, signer.sign(data), data)
            if number % (SOAK // SAMPLES) == 0:
                samples.append((resident(), faulty.sessions()))
                os.truncate(f"{faulty.path}.log", 0)
                print(
                    f"\n{number} signatures: {samples[-1][0]} kB, {samples[-1][1]} sessions",
                    end="",
                    flush=True,
                )
    memory = [kilobytes for kilobytes, _ in samples]
    assert {count for _, count in samples} == {samples[0][1]}
    assert memory[-1] - memory[SAMPLES // 10] < 1024
