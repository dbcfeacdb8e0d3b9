"""A bearer token that is bound to origins and replaced in time: what the doors to requests and httpx share.

An access token opens every door that its API has. So it goes to the origins that were named and nowhere else:
neither to another host, such as that of a pre-signed upload URL, nor along a redirect; and no answer from
elsewhere makes us ask for another one.
"""

import logging
import re
import time
from collections.abc import Iterable

from hsm_signer.errors import ConfigError, HsmSignerError
from hsm_signer.oauth.cache import UNKNOWN_LIFETIME
from hsm_signer.oauth.client import TokenClient
from hsm_signer.oauth.response import TokenResponse
from hsm_signer.url import parse_origin

_log = logging.getLogger(__name__)

# Seconds before its end that an access token is replaced; a quarter of its life where that is less
_AHEAD = 60
_PAUSE = 10  # seconds until it is tried again
_MARGIN = 5  # seconds that an access token must live to be worth sending
_NAME = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # RFC 9110 §5.6.2
_CHALLENGES = re.compile(rf'({_NAME})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_NAME}))|({_NAME})')


class BearerToken:
    """The access token of ``client``, for ``origins`` only. Safe from any thread.

    Raises :class:`ConfigError` for an origin that is none.
    """

    def __init__(self, client: TokenClient, origins: Iterable[str]) -> None:
        if isinstance(origins, str):
            raise ConfigError("origins is a list of origins, found one text")
        self._client = client
        urls = [parse_origin(origin, what="origin") for origin in origins]
        if not urls:
            raise ConfigError("origins is empty: the access token could be sent nowhere")
        self._starts = frozenset(f"{origin}/" for url in urls for origin in url.origins)
        self._header, self._replace_at, self._dies_at = "", 0.0, 0.0

    def belongs_to(self, url: str) -> bool:
        """Whether a URL, as the library that sends it has prepared it, lies on one of the origins."""
        # What stands before the third slash is compared as a whole, so there is no grammar to disagree on
        return url[: url.find("/", 8) + 1] in self._starts

    def header(self) -> str:
        """Value for ``Authorization`` (RFC 6750 §2.1), of an access token that still lives."""
        if time.time() < self._replace_at:
            return self._header
        return self._replaced()

    def replaced(self, refused: str) -> str:
        """Value for ``Authorization`` after a server did not take ``refused`` any more."""
        return self._keep(self._client.replace(refused.removeprefix("Bearer ")))

    def _replaced(self) -> str:
        still_good_until = self._dies_at - _MARGIN
        if time.time() >= still_good_until:
            return self._keep(self._client.fetch(min_validity=_AHEAD))
        self._replace_at = min(time.time() + _PAUSE, still_good_until)  # till then the other threads go on
        try:
            return self._keep(self._client.fetch(min_validity=_AHEAD))
        except HsmSignerError as error:
            _log.warning("the access token is near its end and could not be replaced yet: %s", error)
            return self._header

    def _keep(self, response: TokenResponse) -> str:
        now = time.time()
        dies_at = now + UNKNOWN_LIFETIME if response.expires_at is None else response.expires_at
        header = f"Bearer {response.access_token}"
        self._header, self._dies_at = header, dies_at
        self._replace_at = dies_at - min(_AHEAD, (dies_at - now) / 4)
        return header


def invalid_token(challenges: str) -> bool:
    """Whether a ``WWW-Authenticate`` field says ``invalid_token`` (RFC 6750 §3, RFC 9110 §11.6.1)."""
    scheme = ""
    for name, quoted, plain, begun in _CHALLENGES.findall(challenges):
        scheme = begun.lower() or scheme
        if scheme == "bearer" and name.lower() == "error" and (quoted or plain) == "invalid_token":
            return True
    return False
