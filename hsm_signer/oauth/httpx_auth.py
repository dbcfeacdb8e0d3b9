"""Bearer authentication for httpx (extra ``httpx``), as :class:`hsm_signer.BearerAuth` is for requests."""

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable

import httpx

from hsm_signer.oauth.bearer import BearerToken, invalid_token
from hsm_signer.oauth.client import TokenClient


class HttpxBearerAuth(httpx.Auth):
    """Send the access token of ``client`` to ``origins`` and nowhere else, from sync and async clients."""

    def __init__(self, client: TokenClient, *, origins: Iterable[str]) -> None:
        self._token = BearerToken(client, origins)

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Set ``Authorization``; repeat the request once after ``invalid_token``."""
        if not self._token.belongs_to(_origin(request.url)):
            yield request
            return
        header = request.headers["Authorization"] = self._token.header()
        response = yield request
        if self._asked_again(response):
            request.headers["Authorization"] = self._token.replaced(header)
            yield request

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """As above; the access token is fetched in a thread, so that the event loop goes on."""
        if not self._token.belongs_to(_origin(request.url)):
            yield request
            return
        header = request.headers["Authorization"] = await asyncio.to_thread(self._token.header)
        response = yield request
        if self._asked_again(response):
            request.headers["Authorization"] = await asyncio.to_thread(self._token.replaced, header)
            yield request

    def _asked_again(self, response: httpx.Response) -> bool:
        return (
            response.status_code == httpx.codes.UNAUTHORIZED
            and not response.history  # nothing that happened after a redirect concerns us
            and isinstance(response.request.stream, httpx.ByteStream)  # a stream is gone
            and invalid_token(response.headers.get("WWW-Authenticate", ""))
        )


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii')}/"  # of the object that httpx connects by
