"""Signatures and assertions per second: ours, python-pkcs11's, and a C program's; and with a slow token."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Row, in_turn, output, ratio
from office import HERE, KEY, LABEL, Office

ROUNDS, SECONDS = 9, 1.5
SIGNING, LOOPS = str(HERE / "build" / "signing"), str(HERE / "loops.py")
sys.path.append(str(HERE.parent / "tests"))  # the faulty module is at home there


def rows(office: Office) -> Iterator[Row]:
    environment = office.environment | {"MODULE": office.module, "TOKEN": LABEL, "KEY": KEY}

    def c(what: str) -> float:
        return float(output([SIGNING, office.module, LABEL, KEY, str(SECONDS), what], environment))

    def python(what: str) -> float:
        return float(output([sys.executable, LOOPS, what, str(SECONDS)], environment))

    rates = in_turn(
        ROUNDS,
        bare=lambda: python("bare"),
        signature=lambda: python("signature"),
        c=lambda: c("sign"),
        assertion=lambda: python("assertion"),
        c_verified=lambda: c("verify"),
        verified=lambda: python("verified assertion"),
    )
    yield ratio(
        "`HsmSigner.sign`, `verify=False`, one thread",
        rates["signature"],
        "bare python-pkcs11 loop on the same key",
        rates["bare"],
        0.92,
        0.97,
        at_least=True,
    )
    yield ratio(
        'complete assertion (`claims="oidc"`), `verify=False`',
        rates["assertion"],
        "a C loop of `C_SignInit`, `C_Sign`",
        rates["c"],
        0.72,
        0.80,
        at_least=True,
    )
    yield ratio(
        "complete assertion with verification",
        rates["verified"],
        "the same C loop with an OpenSSL verification added",
        rates["c_verified"],
        0.70,
        0.80,
        at_least=True,
    )
    yield ratio(
        "bare python-pkcs11 loop (for comparison)",
        rates["bare"],
        "a C loop of `C_SignInit`, `C_Sign`",
        rates["c"],
        0,
        None,
        at_least=True,
    )
    yield _eight_threads(office, environment)


def _eight_threads(office: Office, environment: dict[str, str]) -> Row:
    from faults import FaultyModule, compile_module

    with tempfile.TemporaryDirectory() as compiled, tempfile.TemporaryDirectory() as directory:
        faulty = FaultyModule(compile_module(Path(compiled)), Path(office.module), Path(directory))
        faulty.set("delay C_Sign 5")

        def threads(count: int) -> float:
            loop = [sys.executable, LOOPS, "signature with 8 sessions", str(SECONDS), str(count)]
            return float(output(loop, environment | {"MODULE": faulty.path}))

        rates = in_turn(5, one=lambda: threads(1), eight=lambda: threads(8))
    return ratio(
        "8 threads, `sessions=8`, 5 ms in `C_Sign`",
        rates["eight"],
        "one thread",
        rates["one"],
        7.0,
        7.8,
        at_least=True,
    )
