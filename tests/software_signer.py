"""A Signer over a key of ``cryptography``, for tests that are not about the token."""

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from hsm_signer import ecdsa
from hsm_signer.jose import thumbprint


class SoftwareSigner:
    """Counts its signatures in ``signed``."""

    alg = "ES256"

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        numbers = self.key.public_key().public_numbers()
        self.jwk = ecdsa.jwk_from_point(b"\x04" + numbers.x.to_bytes(32) + numbers.y.to_bytes(32))
        self.kid = thumbprint(self.jwk)
        self.signed = 0

    def sign(self, data: bytes) -> bytes:
        self.signed += 1
        return ecdsa.raw_from_der(self.key.sign(data, ec.ECDSA(SHA256())))
