"""HttpxBearerAuth: the same bounds as for requests, in sync and async clients."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
import trustme
from endpoint import Endpoint, Reply, Seen
from software_signer import SoftwareSigner

from hsm_signer import ClientAssertion, TokenClient
from hsm_signer.oauth.httpx_auth import HttpxBearerAuth

OK = Reply(200, b"fine", {})
REFUSED = Reply(401, b"no", {"WWW-Authenticate": 'Bearer error="invalid_token"'})


@pytest.fixture
def api(ca: trustme.CA) -> Iterator[Endpoint]:
    with Endpoint(ca, OK) as api:
        yield api


@pytest.fixture
def ask(
    endpoint: Endpoint, api: Endpoint, ca_bundle: str, request: pytest.FixtureRequest
) -> Callable[..., httpx.Response]:
    """Send one request as a user would, sync or async as the test is parametrised."""

    def grant(_: Seen) -> Reply:
        return Reply(
            body={
                "access_token": f"access-token-{len(endpoint.seen)}",
                "token_type": "Bearer",
                "expires_in": 99,
            }
        )

    endpoint.answer = grant
    tokens = TokenClient(
        endpoint.url,
        assertion=ClientAssertion("das-api-auth", endpoint.url),
        signer=SoftwareSigner(),
        scope="a",
        ca_bundle=ca_bundle,
    )
    options = {
        "auth": HttpxBearerAuth(tokens, origins=[api.origin]),
        "verify": ssl.create_default_context(cafile=ca_bundle),
        "trust_env": False,
        "follow_redirects": True,
    }

    def in_sync(*arguments: object, **more: object) -> httpx.Response:
        with httpx.Client(**options) as client:
            return client.request(*arguments, **more)

    def in_async(*arguments: object, **more: object) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(**options) as client:
                return await client.request(*arguments, **more)

        return asyncio.run(send())

    return in_async if request.param else in_sync


def bearers(api: Endpoint) -> list[str | None]:
    return [seen.headers.get("Authorization") or seen.headers.get("authorization") for seen in api.seen]


both = pytest.mark.parametrize("ask", [False, True], ids=["sync", "async"], indirect=True)


@both
def test_the_origin_gets_the_access_token_and_another_host_does_not(
    ask: Callable[..., httpx.Response], api: Endpoint, endpoint: Endpoint, ca: trustme.CA
) -> None:
    with Endpoint(ca, REFUSED) as other:
        assert ask("GET", other.origin).status_code == 401
        assert bearers(other) == [None]
    assert endpoint.seen == []
    assert ask("GET", api.origin).text == ask("POST", f"{api.origin}/x", content=b"y").text == "fine"
    assert bearers(api) == ["Bearer access-token-1"] * 2


@both
def test_an_access_token_that_is_refused_is_replaced_once(
    ask: Callable[..., httpx.Response], api: Endpoint, endpoint: Endpoint
) -> None:
    api.answer = REFUSED
    assert ask("POST", api.origin, content=b"y").status_code == 401
    assert bearers(api) == ["Bearer access-token-1", "Bearer access-token-2"]
    assert [seen.body for seen in api.seen] == [b"y", b"y"]
    assert len(endpoint.seen) == 2


@both
@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_to_another_host_takes_and_triggers_nothing(
    status: int, ask: Callable[..., httpx.Response], api: Endpoint, endpoint: Endpoint, ca: trustme.CA
) -> None:
    with Endpoint(ca, REFUSED) as other:
        api.answer = Reply(status, b"", {"Location": other.origin})
        assert ask("POST", api.origin, content=b"y").status_code == 401
        assert bearers(other) == [None]
    assert bearers(api) == ["Bearer access-token-1"]
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize("ask", [True], ids=["async"], indirect=True)
def test_a_stream_is_not_sent_again(ask: Callable[..., httpx.Response], api: Endpoint) -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield b"y"

    api.answer = REFUSED
    assert ask("POST", api.origin, content=stream(), headers={"Content-Length": "1"}).status_code == 401
    assert len(api.seen) == 1
