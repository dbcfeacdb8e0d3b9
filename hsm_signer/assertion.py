"""The client assertion of ``private_key_jwt`` (RFC 7523 §2.2 and §3, OpenID Connect Core §9)."""

import secrets
import time
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

from hsm_signer.errors import ConfigError
from hsm_signer.jose import Signer, b64url, compact_json, json_b64url, signed

MAX_LIFETIME = 1800  # seconds; ForgeRock AM refuses more: "JWT expiration time is unreasonable"
MAX_CLOCK_OFFSET = 600  # seconds

_random_bytes = secrets.SystemRandom().randbytes


@dataclass(frozen=True)
class ClientAssertion:
    """What a client says of itself to one authorization server.

    ``audience`` is an opaque string and is sent as it stands. ``claims="minimal"`` is WIPO's set
    (``iss, sub, aud, exp``), ``"oidc"`` adds ``iat`` and ``jti``. ``lifetime`` is 1 to 1800 seconds;
    ``clock_offset`` is added to our clock, at most 600 seconds either way. ``kid``: ``True`` puts the key's
    thumbprint into the header, a text the name that the server gave the key. ``typ=""`` leaves ``typ`` out.

    Raises :class:`ConfigError` for values that no server takes.
    """

    client_id: str
    audience: str
    lifetime: int = field(default=60, kw_only=True)
    claims: Literal["minimal", "oidc"] = field(default="minimal", kw_only=True)
    typ: str = field(default="JWT", kw_only=True)
    kid: bool | str = field(default=False, kw_only=True)
    clock_offset: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("client_id", "audience"):
            value = getattr(self, name)
            if not value or not _is_printable_ascii(value):
                raise ConfigError(f"{name} must be printable ASCII and not empty, found {value!r}")
        # type() and not isinstance(): True is an int
        if type(self.lifetime) is not int or not 1 <= self.lifetime <= MAX_LIFETIME:
            raise ConfigError(f"lifetime must be 1 to {MAX_LIFETIME} seconds, found {self.lifetime!r}")
        if type(self.clock_offset) is not int or abs(self.clock_offset) > MAX_CLOCK_OFFSET:
            raise ConfigError(
                f"clock offset is at most {MAX_CLOCK_OFFSET} whole seconds, found {self.clock_offset!r}"
            )
        if not _is_printable_ascii(self.typ):
            raise ConfigError(f"typ must be printable ASCII, or empty to leave it out, found {self.typ!r}")
        if type(self.kid) is not bool and not _is_name(self.kid):
            raise ConfigError(f"kid must be true, false or a printable name, found {self.kid!r}")
        if self.claims not in ("minimal", "oidc"):
            raise ConfigError(f'claims must be "minimal" or "oidc", found {self.claims!r}')

    def header(self, signer: Signer) -> dict[str, str]:
        """JOSE header (RFC 7515 §4.1): ``alg``, ``typ`` and, where asked for, ``kid``."""
        return _header(signer.alg, self.typ, self._kid(signer))

    def claims_at(self, now: int, jti: str) -> dict[str, str | int]:
        """Claims of RFC 7523 §3 in WIPO's order; ``now`` in Unix seconds of our clock."""
        issued_at = now + self.clock_offset
        claims: dict[str, str | int] = {
            "iss": self.client_id,
            "sub": self.client_id,
            "aud": self.audience,
            "exp": issued_at + self.lifetime,
        }
        if self.claims == "oidc":
            claims |= {"iat": issued_at, "jti": jti}
        return claims

    def issue(self, signer: Signer, *, now: int | None = None, jti: str | None = None) -> str:
        """Stamp and sign, in this order and at once: the compact JWS.

        ``now`` defaults to the clock, ``jti`` to 128 random bits.
        """
        now = int(time.time()) if now is None else now
        jti = f'"{b64url(_random_bytes(16))}"' if jti is None else compact_json(jti)
        header = _encoded_header(signer.alg, self.typ, self._kid(signer) if self.kid else "")
        return signed(f"{header}.{b64url(self._payload(now, jti).encode())}", signer)

    def _kid(self, signer: Signer) -> str:
        return signer.kid if self.kid is True else self.kid or ""

    def _payload(self, now: int, jti: str) -> str:
        """:meth:`claims_at` as JSON, without an encoder: that takes a seventh of an assertion's time.

        ``jti``: as JSON.
        """
        issued_at = now + self.clock_offset
        ours = f'{self._identity},"exp":{issued_at + self.lifetime}'
        if self.claims == "oidc":
            return f'{ours},"iat":{issued_at},"jti":{jti}}}'
        return ours + "}"

    @cached_property
    def _identity(self) -> str:
        who = {"iss": self.client_id, "sub": self.client_id, "aud": self.audience}
        return compact_json(who).removesuffix("}")


def _header(alg: str, typ: str, kid: str) -> dict[str, str]:
    return {"alg": alg} | ({"typ": typ} if typ else {}) | ({"kid": kid} if kid else {})


@lru_cache(maxsize=16)
def _encoded_header(alg: str, typ: str, kid: str) -> str:
    return json_b64url(_header(alg, typ, kid))


def _is_printable_ascii(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable()


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()
