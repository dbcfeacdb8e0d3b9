"""How often a module is called, as pkcs11-spy of OpenSC counts."""

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import Row, process
from office import HSM_TOKEN, KEY, LABEL, Office

SIGN = f"""
import os, sys
from hsm_signer import open_token
with open_token("pkcs11:token={LABEL}", module=sys.argv[1], pin=os.environ["PIN"]) as token:
    signer = token.signer("pkcs11:object={KEY}")
    for _ in range(int(sys.argv[2])):
        signer.sign(b"some bytes")
"""


def rows(office: Office) -> Iterator[Row]:
    spy = str(next(path for place in (".", "*") for path in Path("/usr/lib").glob(f"{place}/pkcs11-spy.so")))
    fetch = [HSM_TOKEN, "fetch", "--no-cache", "--module", spy]
    counted = "PKCS#11 calls, counted by `pkcs11-spy`"
    yield Row("`hsm-token fetch`, no cache", counted, _calls(office, fetch), 42, 34)
    bare = office.home / "bare.toml"
    with (office.home / "config.toml").open() as config:
        bare.write_text(
            "".join(each for each in config if not each.startswith(("certificate", "key-thumbprint")))
        )
    bare.chmod(0o600)
    without = "the same, by a profile without `certificate` and `key-thumbprint`"
    yield Row(without, counted, _calls(office, [*fetch, "--config", str(bare)]), 42, 34)
    stored = [HSM_TOKEN, "cert", "import", str(office.home / "es256_cert.pem")]
    process(stored, office.environment)
    beside = "the same again, with a certificate on the token"
    yield Row(beside, counted, _calls(office, [*fetch, "--config", str(bare)]), 42, 34)
    one, two = (_calls(office, [sys.executable, "-c", SIGN, spy, count]) for count in ("1", "2"))
    yield Row("one more signature in the same process", "PKCS#11 calls", two - one, 3)


def _calls(office: Office, command: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        process(command, office.environment | {"PKCS11SPY": office.module, "PKCS11SPY_OUTPUT": str(log)})
        return len(re.findall(r"^\d+: C_", log.read_text(), re.MULTILINE))
