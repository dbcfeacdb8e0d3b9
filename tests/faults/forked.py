"""A forking server in small: the parent signs, then forks workers, as gunicorn does with --preload.

``python -m faults.forked MODULE TOKEN KEY``, the PIN in the variable ``PIN``. Exits 0 if all is as it must be.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from faults.behind import DATA, verify
from hsm_signer import open_token
from hsm_signer.errors import ForkedError
from hsm_signer.hsm.token import Token

WORKERS = 8
SECONDS = 60


def expect_forked(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except ForkedError:
        return
    raise AssertionError(f"{what} did not raise ForkedError")


def main(module: str, uri: str, key: str) -> None:
    def opened() -> AbstractContextManager[Token]:
        return open_token(uri, module=module, pin=os.environ["PIN"])

    def worker() -> None:
        signal.alarm(SECONDS)  # a worker that hangs is killed by SIGALRM
        expect_forked("an inherited signer", lambda: signer.sign(DATA))
        expect_forked("an inherited token", lambda: token.signer(key))
        for _ in range(2):
            with opened() as own:
                mine = own.signer(key)
                for _ in range(20):
                    verify(mine, mine.sign(DATA))
        expect_forked("an inherited signer, after our own", lambda: signer.sign(DATA))

    with opened() as token:
        signer = token.signer(key)
        verify(signer, signer.sign(DATA))
        children = []
        for _ in range(WORKERS):
            if (child := os.fork()) == 0:
                worker()
                sys.exit(0)  # through the with statement and every exit handler
            children.append(child)
        for _ in range(50):
            verify(signer, signer.sign(DATA))
        statuses = [os.waitpid(child, 0)[1] for child in children]
        assert statuses == [0] * WORKERS, statuses
        verify(signer, signer.sign(DATA))


if __name__ == "__main__":
    main(*sys.argv[1:])
