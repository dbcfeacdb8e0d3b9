"""Does this signature belong to this public key? In software, off the token, by another implementation.

The only door to ``cryptography``, and public keys only. FIPS 186-4 §6.4 (ECDSA), SEC 1 §2.3.4 (points).
"""

from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from hsm_signer.ecdsa import integers_from_raw
from hsm_signer.errors import KeyMismatchError, SignatureInvalidError

_P256 = ec.SECP256R1()
_ECDSA = ec.ECDSA(Prehashed(SHA256()))  # quicker than to have OpenSSL look up and set up its SHA-256 again


class PublicKey:
    """A public key of P-256 that checks ES256 signatures (RFC 7518 §3.4).

    ``point``: uncompressed, 65 bytes. Raises :class:`KeyMismatchError` unless it lies on the curve.
    """

    def __init__(self, point: bytes) -> None:
        try:
            self._key = ec.EllipticCurvePublicKey.from_encoded_point(_P256, point)
        except ValueError:
            raise KeyMismatchError(f"{len(point)} bytes that are no point of P-256") from None

    def verify(self, signature: bytes, data: bytes) -> None:
        """Return if ``signature``, r‖s of 64 bytes, is one of SHA-256 over ``data`` by this key.

        Raises :class:`SignatureFormatError` for what is no signature, else :class:`SignatureInvalidError`.
        """
        r, s = integers_from_raw(signature)
        try:
            self._key.verify(encode_dss_signature(r, s), sha256(data).digest(), _ECDSA)
        except InvalidSignature:
            raise SignatureInvalidError("the signature does not verify under the public key") from None
