"""A token behind the faulty module, and what its tests do with it again and again."""

from contextlib import AbstractContextManager
from typing import Any

from conftest import SoftToken
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from faults import FaultyModule
from hsm_signer import open_token
from hsm_signer.hsm.signer import HsmSigner
from hsm_signer.hsm.token import Token

DATA = b"header.claims"
KEY, ALWAYS = "das-2026", "always"


def make_keys(token: SoftToken) -> None:
    """A key that signs after one login, and one that wants its PIN for each signature."""
    generate = ["--keypairgen", "--key-type", "EC:prime256v1", "--usage-sign"]
    token.pkcs11_tool(*generate, "--label", KEY, "--id", "01")
    token.pkcs11_tool(*generate, "--label", ALWAYS, "--id", "02", "--always-auth")


class Behind:
    """The token behind the faulty module."""

    def __init__(self, token: SoftToken, faulty: FaultyModule) -> None:
        self.token = token
        self.faulty = faulty

    def open(self, **options: Any) -> AbstractContextManager[Token]:
        return open_token(self.token.uri, module=self.faulty.path, **{"pin": self.token.pin} | options)


def verify(signer: HsmSigner, raw: bytes, data: bytes = DATA) -> None:
    """Check a signature independently of the signer's own check."""
    public = load_pem_public_key(signer.public_key_pem.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert len(raw) == 64
    r, s = int.from_bytes(raw[:32]), int.from_bytes(raw[32:])
    public.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(SHA256()))
