"""Access tokens checked against their issuer's keys (extra ``verify``).

RFC 7519 §7.2, RFC 7515 §5.2, RFC 8725 (best practices), RFC 9068 §4::

    from pathlib import Path
    from hsm_signer.verify import AccessTokenVerifier, jwks_file

    verifier = AccessTokenVerifier(
        jwks_file(Path("wipo-jwks.json")), issuer="https://www5.wipo.int/am/oauth2", audience="das-api-auth"
    )
    token = verifier.verify(access_token)
    token.subject, token.scopes, token.expires_at

Which checks are made is the verifier's choice and never the token's: of the header only ``alg`` and ``kid``
are believed, as far as a key of the issuer bears them out. ``typ`` refuses what says that it is something else.
WIPO's access tokens say ``JWT``, so it cannot tell an ID token of the same issuer and audience from them.
"""

import math
import os
import re
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from joserfc.errors import JoseError
from joserfc.jwk import Key, import_key
from joserfc.jws import JWSRegistry

from hsm_signer import files
from hsm_signer.errors import ConfigError, HsmSignerError, TransportError, VerificationError
from hsm_signer.jose import b64url
from hsm_signer.oauth.metadata import discover
from hsm_signer.oauth.response import json_object
from hsm_signer.oauth.transport import Transport
from hsm_signer.text import printable
from hsm_signer.url import parse as parse_url

MAX_SIZE = 16 * 1024  # characters of an access token
MAX_JWKS_SIZE = 1024 * 1024  # bytes
MAX_LEEWAY = 60  # seconds
MAX_KEY_AGE = 3600  # seconds that keys are used before they are fetched anew
FETCH_SECONDS = 15  # for each request
MIN_REFETCH = 60  # seconds between two fetches for the sake of an unknown kid
RETRY_AFTER = 5  # seconds in which a failed fetch is not tried again: many threads may be waiting for it
RSA_BITS = range(2048, 16385)  # RFC 7518 §3.3; above, a check takes so long that it stops the checker

# What each algorithm needs of a key: kty and crv (RFC 7518 §3.1, RFC 8037 §3.1, RFC 9864). Public keys only:
# with none and HS* whoever knows the issuer's public key could make a token.
ALGORITHMS: Mapping[str, frozenset[tuple[str, str]]] = {
    **{f"{family}{bits}": frozenset({("RSA", "")}) for family in ("RS", "PS") for bits in (256, 384, 512)},
    "ES256": frozenset({("EC", "P-256")}),
    "ES384": frozenset({("EC", "P-384")}),
    "ES512": frozenset({("EC", "P-521")}),
    "EdDSA": frozenset({("OKP", "Ed25519"), ("OKP", "Ed448")}),
    "Ed25519": frozenset({("OKP", "Ed25519")}),
    "Ed448": frozenset({("OKP", "Ed448")}),
}


@dataclass(frozen=True)
class VerifiedToken:
    """An access token that passed every check. ``expires_at``: Unix seconds."""

    claims: Mapping[str, object]
    subject: str | None
    scopes: tuple[str, ...]
    expires_at: float


class AccessTokenVerifier:
    """Check access tokens of one issuer that are meant for one audience. Safe from any thread.

    ``keys``: a JWK Set (RFC 7517 §5), or a callable that fetches one; what that raises passes through.
    ``scope``: what a token must at least grant, separated by spaces. ``leeway``: seconds that our clock and
    the issuer's may differ, at most 60. ``clock``: Unix seconds.

    Raises :class:`ConfigError` for what must not be configured.
    """

    def __init__(
        self,
        keys: Mapping[str, object] | Callable[[], object],
        *,
        issuer: str,
        audience: str,
        scope: str = "",
        leeway: int = 0,
        algorithms: Collection[str] = tuple(ALGORITHMS),
        clock: Callable[[], float] = time.time,
    ) -> None:
        refused = set(algorithms) - set(ALGORITHMS)
        if refused or not algorithms:
            found = ", ".join(sorted(refused)) or "none at all"
            raise ConfigError(f"algorithms must be among {', '.join(ALGORITHMS)}, found {found}")
        if not issuer or not audience:
            raise ConfigError(
                "an access token is checked for its issuer and its audience: both must be named"
            )
        if not 0 <= leeway <= MAX_LEEWAY:
            raise ConfigError(f"leeway must be 0 to {MAX_LEEWAY} seconds, found {leeway}")
        self.issuer, self.audience, self.leeway = issuer, audience, leeway
        self.scope, self.algorithms = frozenset(scope.split()), frozenset(algorithms)
        self._clock = clock
        self._keys = _Keys(keys if callable(keys) else lambda: keys, clock)

    def verify(self, access_token: str | bytes) -> VerifiedToken:
        """Check signature and claims; :class:`VerificationError` names the first clause that fails."""
        header, payload, signing_input, signature = _parts(access_token)
        alg = _algorithm(header, self.algorithms)
        _refuse_other_types(header)
        key = self._keys.one(alg, _kid(header))
        try:
            valid = JWSRegistry.algorithms[alg].verify(signing_input, signature, key)
        except (JoseError, ValueError):
            valid = False
        if not valid:
            raise VerificationError("the signature is not by the issuer's key", clause="signature")
        return self._checked(_json_object(payload, "payload"), self._clock())

    def _checked(self, claims: dict[str, object], now: float) -> VerifiedToken:
        """Claims of RFC 7519 §4.1; ``now`` in Unix seconds."""
        if claims.get("iss") != self.issuer:
            raise _unexpected("iss", claims, f"expected {self.issuer!r}")
        audiences = claims.get("aud")
        if self.audience not in (audiences if isinstance(audiences, list) else [audiences]):
            raise _unexpected("aud", claims, f"expected {self.audience!r}")
        expires_at = _time(claims, "exp")
        if expires_at is None:
            raise VerificationError("the access token has no exp", clause="exp")
        if now >= expires_at + self.leeway:
            raise VerificationError(f"the access token expired {now - expires_at:.0f} s ago", clause="exp")
        not_before = _time(claims, "nbf")
        if not_before is not None and now < not_before - self.leeway:
            raise VerificationError(
                f"the access token becomes valid in {not_before - now:.0f} s only",
                clause="nbf",
                hint="compare the clock of this machine with the true time",
            )
        scopes = _scopes(claims)
        missing = self.scope - set(scopes)
        if missing:
            raise _unexpected("scope", claims, f"{' '.join(sorted(missing))!r} is missing")
        subject = claims.get("sub")
        if subject is not None and not isinstance(subject, str):
            raise _unexpected("sub", claims, "expected a text")
        return VerifiedToken(MappingProxyType(claims), subject, scopes, expires_at)


def jwks_file(path: Path) -> Callable[[], object]:
    """Read a JWK Set from a file that only we or root can write: who writes it chooses whom we believe."""

    def read() -> object:
        try:
            content = files.read_bytes(files.guarded(path), max_size=MAX_JWKS_SIZE, forbidden=files.UNTOUCHED)
        except OSError as unreadable:
            raise ConfigError(f"cannot read the JWK Set {path}: {unreadable.strerror}") from None
        jwks, fault = json_object(content)
        if fault or not isinstance(jwks.get("keys"), list):
            raise ConfigError(
                f"the file {path} holds no JWK Set (RFC 7517 §5)",
                hint="--jwks is the issuer's: a URL or a file",
            )
        return jwks

    return read


def jwks_url(url: str, transport: Transport) -> Callable[[], object]:
    """Fetch a JWK Set from a URL; raises :class:`ConfigError` for one that is none."""
    location = parse_url(url, what="JWK Set URL")

    def fetch() -> object:
        answer = transport.request("GET", location, deadline=time.monotonic() + FETCH_SECONDS)
        if answer.status != 200:
            raise TransportError(f"{location}: the answer is {answer.status}, not the JWK Set")
        return _json_object(answer.body, "JWK Set")

    return fetch


def issuer_keys(issuer: str, transport: Transport, *, allowed: Collection[str] = ()) -> Callable[[], object]:
    """Fetch the JWK Set that an issuer publishes (RFC 8414 §2, ``jwks_uri``).

    ``allowed``: endpoints that the profile names, as in :func:`hsm_signer.oauth.metadata.discover`.
    """

    def fetch() -> object:
        deadline = time.monotonic() + FETCH_SECONDS
        metadata = discover(issuer, transport, deadline=deadline, allowed=allowed)
        if metadata.jwks_uri is None:
            raise VerificationError(f"the issuer {issuer} publishes no keys", clause="jwks")
        return jwks_url(metadata.jwks_uri, transport)()

    return fetch


@dataclass(frozen=True)
class _IssuerKey:
    kid: object
    alg: object
    kind: tuple[str, str]
    key: Key

    def fits(self, alg: str) -> bool:
        return self.kind in ALGORITHMS[alg] and self.alg in (None, alg)


class _Keys:
    """The issuer's keys. Who finds the one it needs takes no lock: a slow issuer delays nobody else."""

    def __init__(self, fetch: Callable[[], object], clock: Callable[[], float]) -> None:
        self._fetch, self._clock = fetch, clock
        self._turn = (os.getpid(), Lock())
        self._fetched: tuple[float, tuple[_IssuerKey, ...]] = (-math.inf, ())
        self._refetched_at = -math.inf
        self._failed: tuple[float, HsmSignerError | None] = (-math.inf, None)

    def one(self, alg: str, kid: str | None) -> Key:
        """The one key that a token can have been signed with."""
        keys = self._matching(kid)
        if not keys and kid is not None:
            raise VerificationError(f"the issuer has no signing key with the kid {_shown(kid)}", clause="kid")
        fitting = [each.key for each in keys if each.fits(alg)]
        if len(fitting) != 1:
            named = "without kid" if kid is None else f"with the kid {_shown(kid)}"
            raise VerificationError(
                f"one key of the issuer must fit a token {named}, signed by {alg}; found {len(fitting)}",
                clause="kid" if kid is None else "alg",
            )
        return fitting[0]

    def _matching(self, kid: str | None) -> list[_IssuerKey]:
        if self._lacking(kid):
            with self._our_turn():
                if self._lacking(kid):  # not fetched by another thread while we waited
                    self._renew()
        return [each for each in self._fetched[1] if kid is None or each.kid == kid]

    def _our_turn(self) -> Lock:
        owner, lock = self._turn
        if owner != os.getpid():  # forked while another thread fetched: it is not here to let go
            lock = Lock()
            self._turn = (os.getpid(), lock)
        return lock

    def _lacking(self, kid: str | None) -> bool:
        fetched_at, keys = self._fetched
        unknown = kid is not None and all(each.kid != kid for each in keys)
        return self._passed(fetched_at, MAX_KEY_AGE) or (
            unknown and self._passed(self._refetched_at, MIN_REFETCH)
        )

    def _renew(self) -> None:
        failed_at, failure = self._failed
        if failure and not self._passed(failed_at, RETRY_AFTER):
            raise failure
        now = self._clock()
        is_refetch = not self._passed(self._fetched[0], MAX_KEY_AGE)
        try:
            self._fetched = (now, _issuer_keys(self._fetch()))
            self._failed = (now, None)
        except HsmSignerError as exc:
            self._failed = (self._clock(), exc)
            raise
        finally:
            if is_refetch:
                self._refetched_at = now

    def _passed(self, since: float, seconds: float) -> bool:
        """Whether so much time has passed; a clock that was set back counts as that."""
        return not 0 <= self._clock() - since < seconds


def _issuer_keys(jwks: object) -> tuple[_IssuerKey, ...]:
    """The keys that can check a signature; others in the set are none of our business (RFC 7517 §5)."""
    keys = jwks.get("keys") if isinstance(jwks, Mapping) else None
    if not isinstance(keys, list):
        raise VerificationError("what should be the issuer's JWK Set has no list of keys", clause="jwks")
    return tuple(key for jwk in keys if isinstance(jwk, dict) and (key := _issuer_key(jwk)))


def _issuer_key(jwk: Mapping[str, Any]) -> _IssuerKey | None:
    if "d" in jwk:  # everybody who can read the set can sign with it
        return None
    try:
        kind = (jwk["kty"], "" if jwk["kty"] == "RSA" else jwk["crv"])
        is_known = any(kind in kinds for kinds in ALGORITHMS.values())
        if not is_known or jwk.get("use", "sig") != "sig" or "verify" not in jwk.get("key_ops", ["verify"]):
            return None
        if kind[0] == "RSA" and int.from_bytes(_decoded(jwk["n"])).bit_length() not in RSA_BITS:
            return None
        key = import_key({name: jwk[name] for name in ("kty", "n", "e", "crv", "x", "y") if name in jwk})
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    return _IssuerKey(jwk.get("kid"), jwk.get("alg"), kind, key)


def _parts(access_token: str | bytes) -> tuple[dict[str, object], bytes, bytes, bytes]:
    """Header, payload, signing input and signature of a compact JWS (RFC 7515 §5.2)."""
    if len(access_token) > MAX_SIZE:
        raise VerificationError(f"an access token has at most {MAX_SIZE} characters", clause="format")
    try:
        text = access_token if isinstance(access_token, str) else access_token.decode("ascii")
        parts = text.split(".")
        if len(parts) == 5:
            raise VerificationError("the access token is encrypted (JWE)", clause="format")
        head, payload, signature = parts
        header = _json_object(_decoded(head), "header")
        return header, _decoded(payload), f"{head}.{payload}".encode(), _decoded(signature)
    except ValueError:
        raise VerificationError(
            "the access token is no JWT, three parts in base64url", clause="format"
        ) from None


def _algorithm(header: Mapping[str, object], allowed: Collection[str]) -> str:
    for name in ("crit", "b64", "enc"):  # RFC 7515 §4.1.11, RFC 7797, RFC 7516: each changes what was signed
        if name in header:
            raise VerificationError(f"the header has {name}, which is refused", clause=name)
    alg = header.get("alg")
    if not isinstance(alg, str) or alg not in allowed:
        raise VerificationError(
            f"alg must be among {', '.join(sorted(allowed))}; found {_shown(alg)}", clause="alg"
        )
    return alg


def _refuse_other_types(header: Mapping[str, object]) -> None:
    """``typ`` of RFC 9068 §4, or the ``JWT`` of those who came before it, or none (RFC 7515 §4.1.9)."""
    typ = header.get("typ", "JWT")
    if not isinstance(typ, str) or typ.lower().removeprefix("application/") not in ("jwt", "at+jwt"):
        raise VerificationError(f"typ must be at+jwt or JWT, found {_shown(typ)}", clause="typ")


def _kid(header: Mapping[str, object]) -> str | None:
    kid = header.get("kid")
    if "kid" in header and not isinstance(kid, str):
        raise VerificationError(f"kid must be a text, found {_shown(kid)}", clause="kid")
    return kid if isinstance(kid, str) else None


def _time(claims: Mapping[str, object], name: str) -> float | None:
    """A NumericDate (RFC 7519 §2)."""
    value = claims.get(name)
    if name not in claims:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**53:
        raise _unexpected(name, claims, "expected Unix seconds")
    return value


def _scopes(claims: Mapping[str, object]) -> tuple[str, ...]:
    """Text (RFC 9068 §2.2.3) or array (ForgeRock AM)."""
    scope = claims.get("scope", "")
    scopes = scope.split() if isinstance(scope, str) else scope
    if not isinstance(scopes, list) or not all(isinstance(each, str) for each in scopes):
        raise _unexpected("scope", claims, "expected a text or a list of texts")
    return tuple(scopes)


def _unexpected(name: str, claims: Mapping[str, object], expected: str) -> VerificationError:
    found = f"found {_shown(claims[name])}" if name in claims else "the access token has none"
    return VerificationError(f"{name}: {expected}, {found}", clause=name)


def _shown(value: object) -> str:
    return printable(repr(value), 200)


def _json_object(text: bytes, what: str) -> dict[str, object]:
    members, fault = json_object(text)
    if fault:
        raise VerificationError(f"the {what} {fault}", clause="format")
    return members


def _decoded(part: str) -> bytes:
    """Base64url without padding, in the one way to write it (RFC 7515 §2)."""
    if not re.fullmatch(r"[A-Za-z0-9_-]*", part):
        raise ValueError("not base64url")
    value = urlsafe_b64decode(part + "=" * (-len(part) % 4))
    if b64url(value) != part:
        raise ValueError("not canonical base64url")
    return value
