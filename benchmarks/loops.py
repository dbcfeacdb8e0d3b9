"""How often something is done in a second, in a process of its own: WHAT SECONDS [THREADS].

WHAT is one of ``LOOPS``; MODULE, TOKEN, KEY and PIN in the environment say with what.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial

MODULE, TOKEN, KEY, PIN = (os.environ.get(name, "") for name in ("MODULE", "TOKEN", "KEY", "PIN"))
DATA = b"some forty bytes that a client would sign"
ENDPOINT = "https://as.example/am/oauth2/access_token"

Step = Callable[[], object]


@contextmanager
def bare() -> Iterator[Step]:
    """python-pkcs11 as its documentation has it, on a digest that is there."""
    import pkcs11
    from pkcs11 import KeyType, Mechanism, ObjectClass

    token = pkcs11.lib(MODULE).get_token(token_label=TOKEN)
    with token.open(user_pin=PIN) as session:
        key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, key_type=KeyType.EC, label=KEY)
        digest = hashlib.sha256(DATA).digest()
        yield lambda: key.sign(digest, mechanism=Mechanism.ECDSA)


@contextmanager
def signature(sessions: int = 1) -> Iterator[Step]:
    """HsmSigner.sign without verification."""
    from hsm_signer import open_token

    with open_token(TOKEN, module=MODULE, pin=PIN, verify=False, sessions=sessions) as token:
        signer = token.signer(KEY)
        yield lambda: signer.sign(DATA)


@contextmanager
def assertion(*, verify: bool) -> Iterator[Step]:
    """Complete assertions, each with a jti of its own."""
    from hsm_signer import ClientAssertion, open_token

    with open_token(TOKEN, module=MODULE, pin=PIN, verify=verify) as token:
        signer, claims = token.signer(KEY), ClientAssertion("das-api-auth", ENDPOINT, claims="oidc")
        yield lambda: claims.issue(signer)


LOOPS: dict[str, Callable[[], AbstractContextManager[Step]]] = {
    "bare": bare,
    "signature": signature,
    "signature with 8 sessions": partial(signature, sessions=8),
    "assertion": partial(assertion, verify=False),
    "verified assertion": partial(assertion, verify=True),
}


def repeated(step: Step, seconds: float) -> int:
    """Do it as often as possible; how often it was."""
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        step()
        count += 1
    return count


def main(what: str, seconds: str, threads: str = "1") -> None:
    others = int(threads) - 1  # a process with one thread is quicker at many things, malloc(3) among them
    with LOOPS[what]() as step, ThreadPoolExecutor(others or None) as pool:
        step()
        began = time.perf_counter()
        running = [pool.submit(repeated, step, float(seconds)) for _ in range(others)]
        count = repeated(step, float(seconds)) + sum(each.result() for each in running)
        print(count / (time.perf_counter() - began))


main(*sys.argv[1:])
