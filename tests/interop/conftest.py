"""A client whose keys are in SoftHSM, registered with its certificates."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from conftest import SoftToken

from hsm_signer import ecdsa, open_token, x509
from hsm_signer.hsm.signer import HsmSigner


@dataclass(frozen=True)
class Office:
    """The client. ``k1`` and ``k2`` sign in the token; ``certificates``: PEM files as sent to an operator."""

    token: SoftToken
    k1: HsmSigner
    k2: HsmSigner
    certificates: dict[str, Path]


@pytest.fixture(scope="session")
def office(new_token: Callable[..., SoftToken], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    soft_token = new_token()
    with open_token(soft_token.uri, module=soft_token.module, pin=soft_token.pin) as token:
        signers, certificates = {}, {}
        for label in ("k1", "k2"):
            token.generate_key(label)
            signers[label] = token.signer(label)
            der = x509.self_signed(
                signers[label],
                common_name=x509.default_common_name("office"),
                not_before=int(time.time()) - 60,
                days=1,
            )
            certificates[label] = tmp_path_factory.mktemp(label) / "es256_cert.pem"
            certificates[label].write_text(ecdsa.pem("CERTIFICATE", der))
        yield Office(soft_token, **signers, certificates=certificates)


@pytest.fixture(scope="session")
def server_files(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Private key and certificate chain of the test servers, in PEM files."""
    directory = tmp_path_factory.mktemp("tls")
    leaf = ca.issue_cert("localhost", "127.0.0.1")
    leaf.private_key_pem.write_to_path(directory / "key.pem")
    (directory / "cert.pem").write_bytes(b"".join(part.bytes() for part in leaf.cert_chain_pems))
    return {"key": str(directory / "key.pem"), "cert": str(directory / "cert.pem")}


@pytest.fixture(scope="session")
def server_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
