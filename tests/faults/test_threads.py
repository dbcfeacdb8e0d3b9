"""Threads that share one signer: no crash, and every signature verifies."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import SoftToken

from faults.behind import KEY, make_keys, verify
from hsm_signer import open_token
from hsm_signer.hsm.signer import HsmSigner

THREADS, SIGNATURES = 16, 1000


@pytest.fixture(scope="session")
def token(new_token: Callable[[], SoftToken]) -> SoftToken:
    token = new_token()
    make_keys(token)
    return token


@pytest.mark.parametrize("run", range(3))
@pytest.mark.parametrize("sessions", [1, 8])
def test_signatures_of_16_threads_verify(token: SoftToken, sessions: int, run: int) -> None:
    sign_in_threads(token, sessions)


def sign_in_threads(token: SoftToken, sessions: int) -> None:
    with open_token(token.uri, module=token.module, pin=token.pin, sessions=sessions) as opened:
        signer = opened.signer(KEY)
        with ThreadPoolExecutor(THREADS) as pool:
            threads = [pool.submit(sign_and_verify, signer, number) for number in range(THREADS)]
            for thread in threads:
                thread.result()


def sign_and_verify(signer: HsmSigner, thread: int) -> None:
    for number in range(SIGNATURES):
        data = f"{thread}.{number}".encode()
        verify(signer, signer.sign(data), data)
