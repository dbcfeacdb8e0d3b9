"""Where an authorization server lives, found from its issuer and pinned to it (RFC 8414, OpenID Discovery).

The document says where assertions go, so whoever forges it chooses who gets them (CVE-2025-27370). It is
fetched with verification, names the pinned issuer to the letter, and its endpoints lie on the issuer's origin
or are named in the profile.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hsm_signer.errors import ConfigError, MetadataError, TransportError
from hsm_signer.oauth.records import RecordFile
from hsm_signer.oauth.response import json_object
from hsm_signer.oauth.retry import retry_after, until_verdict
from hsm_signer.oauth.transport import Answer, Transport
from hsm_signer.text import printable
from hsm_signer.url import Url, same_origin
from hsm_signer.url import parse as parse_url

MAX_AGE = 86_400  # seconds that a document is believed: as long as any access token is kept
_OAUTH = "/.well-known/oauth-authorization-server"
_OPENID = "/.well-known/openid-configuration"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerMetadata:
    """What we use of the metadata (RFC 8414 §2); every URL in it was judged."""

    issuer: str
    token_endpoint: str
    jwks_uri: str | None


class MetadataCache:
    """The kept metadata of one identity, as :class:`hsm_signer.oauth.cache.TokenCache` has access tokens."""

    def __init__(self, directory: Path, identity: Mapping[str, object]) -> None:
        self._file = RecordFile(directory, ".metadata", identity)

    def load(self, now: int) -> Mapping[str, object] | None:
        """Look for members of a document that is younger than a day; ``now`` in Unix seconds."""
        record = self._file.load()
        return record.members if record and record.left(now) > 0 else None

    def store(self, metadata: ServerMetadata, now: int) -> None:
        """Keep what came at ``now`` (Unix seconds)."""
        self._file.store(asdict(metadata), MAX_AGE, now)


def discover(
    issuer: str,
    transport: Transport,
    *,
    deadline: float,
    allowed: Collection[str] = (),
    cache: MetadataCache | None = None,
) -> ServerMetadata:
    """Find the metadata of an issuer, in the cache or at the places of RFC 8414 §3 and OpenID Discovery §4.

    ``allowed``: URLs or origins, named in the profile, where endpoints may lie besides the issuer's origin.
    ``deadline``: of ``time.monotonic``. Raises :class:`ConfigError` for an issuer that is none,
    :class:`MetadataError` for a document that is missing or not to be believed, and
    :class:`TransportError`.
    """
    pinned = _issuer(issuer)
    known = cache.load(int(time.time())) if cache else None
    if known is not None:
        try:
            return _judged(known, pinned, allowed)
        except MetadataError:
            _log.debug("the kept metadata does not fit any more")
    metadata = _judged(_fetched(pinned, transport, deadline), pinned, allowed)
    if cache:
        cache.store(metadata, int(time.time()))
    return metadata


def _issuer(text: str) -> Url:
    try:
        issuer = parse_url(text, what="issuer", http_loopback=False)
    except ConfigError as refused:
        if text.startswith("http://"):
            refused.hint = (
                "without https, name the token endpoint itself, and give verify the keys with --jwks"
            )
        raise
    if "?" in text:
        raise ConfigError(f"issuer: a query is refused (RFC 8414 §2); found {printable(text, 200)!r}")
    return issuer


def _locations(issuer: Url) -> Iterator[Url]:
    base = issuer.text.removesuffix("/")
    host_part = "/".join(base.split("/")[:3])
    path = base.removeprefix(host_part)
    # OpenID's first: WIPO and most others have it, some have only that
    for text in dict.fromkeys((base + _OPENID, host_part + _OAUTH + path, host_part + _OPENID + path)):
        yield parse_url(text, what="metadata location", http_loopback=False)


def _fetched(issuer: Url, transport: Transport, deadline: float) -> dict[str, object]:
    tried = []
    for location in _locations(issuer):
        _log.info("looking for the metadata of the issuer at %s", location)
        answer = _answer(location, transport, deadline)
        media_type = (answer.content_type or "").partition(";")[0].strip().lower()
        if answer.status != 200:
            tried.append(f"{location}: status {answer.status}")
        elif media_type != "application/json":
            tried.append(f"{location}: media type {printable(media_type, 80) or 'none'}")
        else:
            members, fault = json_object(answer.body)
            if fault:
                raise MetadataError(f"the metadata at {location} {fault}", status=answer.status)
            return members
    raise MetadataError(
        f"issuer {issuer} publishes no metadata; tried {'; '.join(tried)}",
        hint="is this the issuer to the letter? Else name the token endpoint itself",
    )


def _answer(location: Url, transport: Transport, deadline: float) -> Answer:
    def attempt(_: int) -> Answer | TransportError:
        try:
            answer = transport.request("GET", location, deadline=deadline)
        except TransportError as trouble:
            return trouble
        if answer.status == 429 or answer.status >= 500:
            return TransportError(
                f"the server answered {answer.status} when asked for its metadata",
                retry_after=retry_after(answer),
            )
        return answer

    outcome = until_verdict(attempt, deadline)
    if isinstance(outcome, TransportError):
        raise outcome
    return outcome


def _judged(members: Mapping[str, object], pinned: Url, allowed: Collection[str]) -> ServerMetadata:
    if members.get("issuer") != pinned.text:
        found = printable(str(members.get("issuer")), 200)
        raise MetadataError(
            f"the metadata must name the issuer {pinned.text!r}, found {found!r}",
            hint="the issuer is compared to the letter, port and last slash included",
        )
    token_endpoint = _endpoint(members, "token_endpoint", pinned, allowed)
    if token_endpoint is None:
        raise MetadataError("the metadata names no token_endpoint")
    return ServerMetadata(pinned.text, token_endpoint, _endpoint(members, "jwks_uri", pinned, allowed))


def _endpoint(members: Mapping[str, object], name: str, pinned: Url, allowed: Collection[str]) -> str | None:
    value = members.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise MetadataError(f"{name} in the metadata is no text")
    try:
        url = parse_url(value, what=f"{name} in the metadata", http_loopback=False)
    except ConfigError as exc:
        raise MetadataError(str(exc)) from None
    if not (same_origin(url, pinned) or url.text in allowed or url.origin in allowed):
        raise MetadataError(
            f"{name} in the metadata is {value!r}, which is not on the issuer's origin {pinned.origin}",
            hint="if the operator confirms it, set token-endpoint itself, and give verify the keys with --jwks",
        )
    return url.text
