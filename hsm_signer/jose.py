"""Compact JWS, EC JWK and its thumbprint; and the one seam of the project, :class:`Signer`.

RFC 7515 (JWS), RFC 7517 (JWK), RFC 7518 §3.4 and §6.2 (ES256, EC keys), RFC 7638 (thumbprint).
"""

import hashlib
import json
import re
from base64 import b64encode, urlsafe_b64decode
from binascii import b2a_base64
from collections.abc import Mapping
from typing import Any, Protocol

from hsm_signer.errors import ConfigError

_JWS = re.compile(r"[A-Za-z0-9_-]+\.([A-Za-z0-9_-]+)(?:\.[A-Za-z0-9_-]+)?")
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
compact_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


class Signer(Protocol):
    """A private key that signs and never shows itself."""

    @property
    def alg(self) -> str:
        """JWS algorithm, ``"ES256"``."""

    @property
    def kid(self) -> str:
        """RFC 7638 thumbprint, 43 characters."""

    @property
    def jwk(self) -> dict[str, str]:
        """The public half: ``kty``, ``crv``, ``x``, ``y``."""

    def sign(self, data: bytes) -> bytes:
        """Sign ``data`` of any length; for ES256 r‖s, 64 bytes (RFC 7518 §3.4)."""


def b64url(data: bytes) -> str:
    """Base64url without padding (RFC 7515 §2)."""
    return b2a_base64(data, newline=False).translate(_URL_SAFE).rstrip(b"=").decode("ascii")


def json_b64url(value: Mapping[str, object]) -> str:
    """UTF-8 JSON without spaces, members in the order given, as base64url."""
    return b64url(compact_json(value).encode())


def sign_compact(header: Mapping[str, object], claims: Mapping[str, object], signer: Signer) -> str:
    """JWS Compact Serialization of a JSON payload (RFC 7515 §3.1)."""
    return signed(f"{json_b64url(header)}.{json_b64url(claims)}", signer)


def signed(signing_input: str, signer: Signer) -> str:
    """``signing_input`` (RFC 7515 §2), a dot and its signature."""
    return f"{signing_input}.{b64url(signer.sign(signing_input.encode('ascii')))}"


def unverified_claims(jws: str) -> dict[str, Any] | None:
    """What a compact JWS, or its signing input, says; ``None`` for what has no claims. Nothing is verified."""
    match = _JWS.fullmatch(jws)
    try:
        claims = json.loads(urlsafe_b64decode(match[1] + "==")) if match else None
    except (ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


def jwk_set(signer: Signer, certificate: bytes | None = None) -> dict[str, list[dict[str, object]]]:
    """JWK Set with the one public key (RFC 7517 §5); ``certificate`` in DER adds ``x5c`` and ``x5t#S256``."""
    key: dict[str, object] = {**signer.jwk, "use": "sig", "alg": signer.alg, "kid": signer.kid}
    if certificate is not None:
        key["x5c"] = [b64encode(certificate).decode("ascii")]
        key["x5t#S256"] = b64url(hashlib.sha256(certificate).digest())
    return {"keys": [key]}


def thumbprint(jwk: Mapping[str, str]) -> str:
    """SHA-256 thumbprint of an EC JWK (RFC 7638 §3); further members do not count.

    Raises :class:`ConfigError` for a JWK of another kind, or one that lacks a member.
    """
    required = {name: jwk.get(name) for name in ("crv", "kty", "x", "y")}
    if required["kty"] != "EC" or not all(isinstance(each, str) and each for each in required.values()):
        raise ConfigError("a thumbprint is made of an EC JWK with kty, crv, x and y; this is none")
    return b64url(hashlib.sha256(compact_json(required).encode()).digest())
