"""Somebody without a PIN: what anybody can plant on a token beside a key of ours."""

import time
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from software_signer import SoftwareSigner

from hsm_signer import x509


def plant(token: object, label: str, key_id: bytes, directory: Path) -> None:
    """Write a public key and a certificate of a key of the stranger's under a label and CKA_ID of ours."""
    signer = SoftwareSigner()
    public = signer.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    certificate = x509.self_signed(signer, common_name="stranger", not_before=int(time.time()), days=9)
    for kind, der in (("pubkey", public), ("cert", certificate)):
        (directory / kind).write_bytes(der)
        token.pkcs11_tool(  # conftest.SoftToken
            *(
                "--write-object",
                str(directory / kind),
                "--type",
                kind,
                "--label",
                label,
                "--id",
                key_id.hex(),
            ),
            login=False,
        )
