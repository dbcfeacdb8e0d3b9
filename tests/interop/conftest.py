"""A client whose keys are in SoftHSM, registered with its certificates."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from conftest import SoftToken

from hsm_signer import enrolment, open_token, x509
from hsm_signer.hsm.signer import HsmSigner


@dataclass(frozen=True)
class Office:
    """The client. ``k1`` and ``k2`` sign in the token; ``folders``: what was enrolled, as sent to an operator."""

    token: SoftToken
    k1: HsmSigner
    k2: HsmSigner
    folders: dict[str, Path]

    def files(self, name: str) -> dict[str, str]:
        """The paths of one file of both folders."""
        return {key: str(folder / name) for key, folder in self.folders.items()}


@pytest.fixture(scope="module")
def office(new_token: Callable[..., SoftToken], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    # For one module: while a token is open, SoftHSM in this process sees no token that was made since.
    soft_token = new_token()
    with open_token(soft_token.uri, module=soft_token.module, pin=soft_token.pin) as token:
        signers, folders = {}, {}
        for label in ("k1", "k2"):
            enrolment.ensure_key(token, label, thumbprint=None)
            signers[label] = token.signer(label)
            name = x509.default_common_name("office")
            made = enrolment.enrol(
                token, label, client_id="office", common_name=name, days=1, now=int(time.time())
            )
            folders[label] = tmp_path_factory.mktemp("enrolled") / label
            enrolment.write(made, folders[label])
        yield Office(soft_token, **signers, folders=folders)


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
