"""Bearer authentication for requests (RFC 6750)."""

from collections.abc import Iterable
from typing import Any

import requests
from requests.auth import AuthBase
from requests.exceptions import UnrewindableBodyError
from requests.utils import rewind_body

from hsm_signer.oauth.bearer import BearerToken, invalid_token
from hsm_signer.oauth.client import TokenClient


class BearerAuth(AuthBase):
    """Send the access token of ``client`` to ``origins``, such as ``["https://api.example"]``, only.

    It is replaced ahead of its end, in the calling thread, and once after a 401 with ``invalid_token``
    (RFC 6750 §3.1) from one of the origins: then the request is sent again, unless its body is a stream that
    cannot be rewound. Safe from any thread. Raises :class:`ConfigError` for an origin that is none, and
    while a request is sent what :meth:`TokenClient.fetch` raises.
    """

    def __init__(self, client: TokenClient, *, origins: Iterable[str]) -> None:
        self._token = BearerToken(client, origins)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Set ``Authorization``, if the request goes to one of the origins."""
        if self._token.belongs_to(request.url or ""):
            request.headers["Authorization"] = self._token.header()
            request.hooks["response"].append(self._answered)
        return request

    def _answered(self, response: requests.Response, **options: Any) -> requests.Response:  # noqa: ANN401  # what requests gives its hooks
        """Repeat a request once with another access token (a hook of requests, which follows redirects)."""
        refused = response.request.headers.get("Authorization", "")
        asked_again = (
            response.status_code == requests.codes.unauthorized
            and self._token.belongs_to(response.request.url or "")
            and refused.startswith("Bearer ")
            and invalid_token(response.headers.get("WWW-Authenticate", ""))
        )
        if not asked_again:
            return response
        request = response.request.copy()
        request.headers["Authorization"] = self._token.replaced(refused)
        if not _rewound(request):
            return response
        response.close()
        repeated: requests.Response = response.connection.send(request, **options)
        repeated.history = [*response.history, response]
        return repeated


def _rewound(request: requests.PreparedRequest) -> bool:
    """Whether the body is there to be sent once more, from its start."""
    if request.body is None or isinstance(request.body, bytes | str):
        return True
    try:
        rewind_body(request)
    except UnrewindableBodyError:
        return False
    return True
