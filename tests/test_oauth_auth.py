"""BearerAuth over real TLS: the access token goes to its origins and nowhere else, and is replaced in time."""

import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
from endpoint import Endpoint, Reply, Seen
from software_signer import SoftwareSigner

from hsm_signer import BearerAuth, ClientAssertion, TokenClient
from hsm_signer.errors import ConfigError, OAuthError, TransportError

INVALID = {"WWW-Authenticate": 'Bearer realm="api", error="invalid_token", error_description="expired"'}
OK = Reply(200, b"fine", {})
REFUSED = Reply(401, b"no", INVALID)


@pytest.fixture
def tokens(endpoint: Endpoint, ca_bundle: str) -> TokenClient:
    """Gets access-token-1, access-token-2, … from ``endpoint``."""
    endpoint.answer = granting(endpoint)
    assertion = ClientAssertion("das-api-auth", endpoint.url)
    return TokenClient(
        endpoint.url,
        assertion=assertion,
        signer=SoftwareSigner(),
        scope="a",
        ca_bundle=ca_bundle,
        deadline=20,
    )


def granting(endpoint: Endpoint, lifetime: int = 3600) -> Callable[[Seen], Reply]:
    def grant(_: Seen) -> Reply:
        token = f"access-token-{len(endpoint.seen)}"
        return Reply(body={"access_token": token, "token_type": "Bearer", "expires_in": lifetime})

    return grant


@pytest.fixture
def api(ca: trustme.CA) -> Iterator[Endpoint]:
    """The API; ``answer`` as it comes is 200."""
    with Endpoint(ca, OK) as api:
        yield api


@pytest.fixture
def session(tokens: TokenClient, api: Endpoint, ca_bundle: str) -> Iterator[requests.Session]:
    """A user's session, bound to the API."""
    with requests.Session() as session:
        session.trust_env = False
        session.verify = ca_bundle
        session.auth = BearerAuth(tokens, origins=[api.origin])
        yield session


def bearers(api: Endpoint) -> list[str | None]:
    return [seen.headers.get("Authorization") for seen in api.seen]


def takes(*accepted: str) -> Callable[[Seen], Reply]:
    """An API that takes these access tokens and refuses others."""
    return lambda seen: OK if seen.headers.get("Authorization", "")[7:] in accepted else REFUSED


def test_requests_to_the_origin_share_one_access_token(
    session: requests.Session, api: Endpoint, endpoint: Endpoint
) -> None:
    for path in ("/", "/a/b?c=d", "/upload%20x"):
        assert session.post(api.origin + path, data={"x": "y"}).text == "fine"
    assert bearers(api) == ["Bearer access-token-1"] * 3
    assert len(endpoint.seen) == 1


def test_another_host_gets_no_access_token_and_causes_none_to_be_fetched(
    session: requests.Session, ca: trustme.CA, endpoint: Endpoint
) -> None:
    with Endpoint(ca, REFUSED) as other:
        response = session.put(f"{other.origin}/presigned?signature=x", data=b"file")
        assert response.status_code == 401
        assert bearers(other) == [None]
    assert endpoint.seen == []


ORIGINS = [
    "https://api.example",
    "https://files.example:8443",
    "http://127.0.0.1:8080",
    "https://[2001:db8::1]",
]


def header_for(auth: BearerAuth, url: str) -> str | None:
    request = requests.Request("GET", "https://placeholder.example/").prepare()
    request.url = url
    return auth(request).headers.get("Authorization")


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example/",
        "https://api.example:443/x?y=https://evil.example/",
        "https://API.example/x",
        "https://files.example:8443/a//b",
        "http://127.0.0.1:8080/",
        "https://[2001:db8::1]/x",
        "https://[2001:db8::1]:443/x",
    ],
)
def test_every_spelling_of_an_origin_that_requests_makes_gets_the_access_token(
    url: str, tokens: TokenClient
) -> None:
    prepared = requests.Request("GET", url).prepare().url
    assert header_for(BearerAuth(tokens, origins=ORIGINS), prepared) == "Bearer access-token-1"


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example/",
        "https://api.example:8443/",
        "https://api.example.evil.example/",
        "https://evil.example/https://api.example/",
        "https://evil.example/?https://api.example/",
        "https://sub.api.example/",
        "https://api.example@evil.example/",
        "https://api.example:443@evil.example/",
        "https://evil.example\\@api.example/",
        "https://api.example\\@evil.example/",
        "https://api.example\\.evil.example/",
        "https://api.example?@evil.example/",
        "https://api.example#@evil.example/",
        "https://api.example",
        "https://api.exampleX",
        "https://api.example./",
        "https://api.example;x/",
        "https:/api.example/",
        "https:///api.example/",
        "//api.example/",
        "http://127.0.0.1/",
        "https://files.example/",
        "",
    ],
)
def test_whatever_only_looks_like_an_origin_gets_nothing(url: str, tokens: TokenClient) -> None:
    assert header_for(BearerAuth(tokens, origins=ORIGINS), url) is None


@pytest.mark.parametrize(
    ("origins", "fault"),
    [
        ("https://api.example", "found one text"),
        ([], "empty"),
        (["https://api.example/v1"], "nothing may follow"),
        (["http://api.example"], "https is needed"),
        (["*"], "begin with https"),
        (["https://*.example"], "no URL"),
    ],
)
def test_an_origin_that_is_none_is_a_configuration_error(
    origins: Any, fault: str, tokens: TokenClient
) -> None:
    with pytest.raises(ConfigError, match=fault):
        BearerAuth(tokens, origins=origins)


# --- 401 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, b"bytes", "text", {"form": "x"}])
def test_an_access_token_that_the_api_refuses_is_replaced_once_and_the_request_repeated(
    body: object, session: requests.Session, api: Endpoint, endpoint: Endpoint
) -> None:
    api.answer = takes("access-token-2")
    response = session.post(f"{api.origin}/x?y", data=body)
    assert response.text == "fine"
    assert [r.status_code for r in response.history] == [401]
    assert bearers(api) == ["Bearer access-token-1", "Bearer access-token-2"]
    first, second = api.seen
    assert (first.method, first.path, first.body) == (second.method, second.path, second.body)
    session.get(api.origin)
    assert bearers(api)[2:] == ["Bearer access-token-2"]
    assert len(endpoint.seen) == 2


def test_an_api_that_refuses_again_gets_no_third_request(
    session: requests.Session, api: Endpoint, endpoint: Endpoint
) -> None:
    api.answer = REFUSED
    response = session.get(api.origin)
    assert (response.status_code, response.text) == (401, "no")
    assert len(api.seen) == len(endpoint.seen) == 2


@pytest.mark.parametrize(
    ("challenge", "asked"),
    [
        ("Bearer error=invalid_token", True),
        ('bearer  Error = "invalid_token"', True),
        ('Basic realm="x, y", Bearer scope="a b",error="invalid_token"', True),
        ('Bearer error="invalid_token", Basic realm="x"', True),
        ("Negotiate YII=, Bearer error=invalid_token", True),
        ("", False),
        ("Bearer", False),
        ('Bearer realm="api"', False),
        ('Bearer error="insufficient_scope"', False),
        ('Bearer error="invalid_token2"', False),
        ('Basic error="invalid_token"', False),
        ('DPoP error="invalid_token"', False),
        ('Basic realm="Bearer error=\\"invalid_token\\""', False),
        ('Bearer error_description="error=invalid_token"', False),
        ('Bearer realm="x", Basic error="invalid_token"', False),
        ("invalid_token", False),
    ],
)
def test_only_invalid_token_in_a_bearer_challenge_replaces(
    challenge: str, asked: bool, session: requests.Session, api: Endpoint, endpoint: Endpoint
) -> None:
    api.answer = Reply(401, b"", {"WWW-Authenticate": challenge} if challenge else {})
    assert session.get(api.origin).status_code == 401
    assert len(api.seen) == len(endpoint.seen) == (2 if asked else 1)


def test_another_status_with_invalid_token_replaces_nothing(
    session: requests.Session, api: Endpoint, endpoint: Endpoint
) -> None:
    for status in (200, 400, 403, 500):
        api.answer = Reply(status, b"", INVALID)
        assert session.get(api.origin).status_code == status
    assert len(api.seen) == 4
    assert len(endpoint.seen) == 1


def test_a_file_is_sent_again_from_where_it_began(
    session: requests.Session, api: Endpoint, tmp_path: Path
) -> None:
    (tmp_path / "upload").write_bytes(b"skipped" + b"content")
    api.answer = takes("access-token-2")
    with (tmp_path / "upload").open("rb") as file:
        file.seek(7)
        assert session.post(api.origin, data=file).text == "fine"
    assert [seen.body for seen in api.seen] == [b"content", b"content"]


class Pipe:
    """A stream that knows its length and cannot be rewound."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self.len = len(data)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._data)

    def read(self, size: int = -1) -> bytes:
        return self._data.read(size)


def test_a_stream_that_is_gone_is_not_sent_again_but_the_next_request_works(
    session: requests.Session, api: Endpoint
) -> None:
    api.answer = takes("access-token-2")
    assert session.post(api.origin, data=Pipe(b"content")).status_code == 401
    assert [seen.body for seen in api.seen] == [b"content"]
    assert session.post(api.origin, data=Pipe(b"content")).text == "fine"
    assert bearers(api) == ["Bearer access-token-1", "Bearer access-token-2"]


def test_threads_whose_access_token_was_refused_fetch_one(
    session: requests.Session, api: Endpoint, endpoint: Endpoint, tokens: TokenClient
) -> None:
    tokens.fetch()
    api.answer = takes("access-token-2")
    results: list[str] = []

    def work() -> None:
        results.extend(session.get(api.origin).text for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["fine"] * 40
    assert len(endpoint.seen) == 2


# --- redirects -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_takes_nothing_there_and_triggers_nothing(
    status: int, session: requests.Session, api: Endpoint, ca: trustme.CA, endpoint: Endpoint
) -> None:
    with Endpoint(ca, REFUSED) as other:
        api.answer = Reply(status, b"", {"Location": f"{other.origin}/steal"})
        response = session.post(api.origin, data=b"x")
        assert response.status_code == 401
        assert bearers(other) == [None]
    assert bearers(api) == ["Bearer access-token-1"]
    assert len(endpoint.seen) == 1


def test_a_session_that_carries_authorization_along_makes_us_fetch_nothing_for_the_other_host(
    session: requests.Session,
    api: Endpoint,
    ca: trustme.CA,
    endpoint: Endpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "should_strip_auth", lambda *_: False)
    with Endpoint(ca, REFUSED) as other:
        api.answer = redirect(f"{other.origin}/steal")
        assert session.get(api.origin).status_code == 401
        assert bearers(other) == [
            "Bearer access-token-1"
        ]  # that was the session's doing, and it stays with one
    assert len(endpoint.seen) == 1


def test_a_redirect_back_from_another_host_gets_nothing_either(
    session: requests.Session, api: Endpoint, ca: trustme.CA, endpoint: Endpoint
) -> None:
    with Endpoint(ca, Reply(302, b"", {"Location": f"{api.origin}/delete"})) as other:
        api.answer = lambda seen: REFUSED if seen.path == "/delete" else redirect(f"{other.origin}/")
        assert session.get(f"{api.origin}/start").status_code == 401
    assert bearers(api) == ["Bearer access-token-1", None]
    assert len(endpoint.seen) == 1


def redirect(location: str) -> Reply:
    return Reply(302, b"", {"Location": location})


def test_a_redirect_within_the_origin_keeps_the_access_token(
    session: requests.Session, api: Endpoint, endpoint: Endpoint
) -> None:
    api.answer = lambda seen: redirect("/b") if seen.path == "/a" else takes("access-token-2")(seen)
    assert session.get(f"{api.origin}/a").text == "fine"
    assert bearers(api) == ["Bearer access-token-1", "Bearer access-token-1", "Bearer access-token-2"]
    assert len(endpoint.seen) == 2


# --- ahead of the end ------------------------------------------------------------------------------


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the clocks of this process run ahead by so many seconds."""
    clocks = {name: getattr(time, name) for name in ("time", "monotonic")}

    def jump(seconds: float) -> None:
        for name, clock in clocks.items():
            monkeypatch.setattr(time, name, lambda clock=clock: clock() + seconds)

    return jump


@pytest.mark.parametrize(("lifetime", "at"), [(3600, 3540), (100, 75), (40, 30)])
def test_it_is_replaced_a_minute_or_a_quarter_of_its_life_ahead(
    lifetime: int,
    at: int,
    session: requests.Session,
    api: Endpoint,
    endpoint: Endpoint,
    later: Callable[[float], None],
) -> None:
    endpoint.answer = granting(endpoint, lifetime)
    session.get(api.origin)
    later(at - 9)
    session.get(api.origin)
    later(at + 1)
    session.get(api.origin)
    assert bearers(api) == ["Bearer access-token-1", "Bearer access-token-1", "Bearer access-token-2"]


def test_the_other_threads_go_on_with_the_live_one_meanwhile(
    session: requests.Session, api: Endpoint, endpoint: Endpoint, later: Callable[[float], None]
) -> None:
    session.get(api.origin)
    later(3550)
    asked, go_on = threading.Event(), threading.Event()

    def slow(seen: Seen) -> Reply:
        asked.set()
        assert go_on.wait(20)
        return granting(endpoint)(seen)

    endpoint.answer = slow
    thread = threading.Thread(target=session.get, args=(api.origin,))
    thread.start()
    assert asked.wait(20)
    session.get(api.origin)
    assert bearers(api) == ["Bearer access-token-1", "Bearer access-token-1"]
    go_on.set()
    thread.join()
    session.get(api.origin)
    assert bearers(api)[2:] == ["Bearer access-token-2", "Bearer access-token-2"]
    assert len(endpoint.seen) == 2


def test_one_that_cannot_be_replaced_yet_is_used_to_its_end(
    session: requests.Session,
    api: Endpoint,
    endpoint: Endpoint,
    later: Callable[[float], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    session.get(api.origin)
    endpoint.answer = Reply(403, b"")
    for seconds in (3541, 3543, 3552, 3553):
        later(seconds)
        assert session.get(api.origin).text == "fine"
    assert len(endpoint.seen) == 3  # every ten seconds, not with every request
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "could not be replaced" in warnings[0]
    later(3596)
    with pytest.raises(OAuthError, match="403"):
        session.get(api.origin)
    assert bearers(api) == ["Bearer access-token-1"] * 5


def test_an_endpoint_that_is_away_is_an_error_of_ours(
    session: requests.Session, api: Endpoint, endpoint: Endpoint
) -> None:
    endpoint.answer = Reply(503, b"", {"Retry-After": "999"})
    with pytest.raises(TransportError, match="503"):
        session.get(api.origin)
    assert api.seen == []
