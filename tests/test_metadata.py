"""Discovery finds what the pinned issuer says, and believes no document that lies."""

import json
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.servers import Behaviour, Connection, Server, respond

from hsm_signer.errors import ConfigError, MetadataError, TransportError
from hsm_signer.oauth.metadata import MAX_AGE, MetadataCache, ServerMetadata, discover
from hsm_signer.oauth.transport import Transport
from hsm_signer.verify import issuer_keys

OPENID = "/.well-known/openid-configuration"
OAUTH = "/.well-known/oauth-authorization-server"


@pytest.fixture
def server(server_tls: ssl.SSLContext) -> Iterator[Server]:
    with Server(server_tls, respond(404, b"", None)) as server:
        yield server


@pytest.fixture
def issuer(server: Server) -> str:
    return f"{server.url}/am/oauth2"


@pytest.fixture
def transport(ca_bundle: str) -> Transport:
    return Transport(ca_bundle)


@pytest.fixture
def find(issuer: str, transport: Transport) -> Callable[..., ServerMetadata]:
    def find(pinned: str = issuer, seconds: float = 60, **options: Any) -> ServerMetadata:
        return discover(pinned, transport, deadline=time.monotonic() + seconds, **options)

    return find


def document(pinned: str, **changed: object) -> dict[str, object]:
    base = pinned.removesuffix("/")
    members = {"issuer": pinned, "token_endpoint": f"{base}/access_token", "jwks_uri": f"{base}/keys"}
    return {name: value for name, value in (members | changed).items() if value is not None}


def publish(server: Server, behaviour: Behaviour, path: str = f"/am/oauth2{OPENID}") -> None:
    def behave(connection: Connection) -> bool | None:
        return (behaviour if connection.path == path else respond(404, b"", None))(connection)

    server.behaviours[:] = [behave]


def asked(server: Server) -> list[str]:
    return [request.split(b" ", 2)[1].decode() for request in server.requests]


@pytest.mark.parametrize(
    ("issuer_path", "published"),
    [
        ("/am/oauth2", f"/am/oauth2{OPENID}"),
        ("/am/oauth2", f"{OAUTH}/am/oauth2"),
        ("/am/oauth2", f"{OPENID}/am/oauth2"),
        ("/am/oauth2/", f"/am/oauth2{OPENID}"),
        ("/am/oauth2/", f"{OAUTH}/am/oauth2"),
        ("", OPENID),
        ("", OAUTH),
        ("/", OPENID),
        ("/", OAUTH),
    ],
)
def test_the_document_is_found_at_the_places_of_both_standards(
    server: Server, find: Callable[..., ServerMetadata], issuer_path: str, published: str
) -> None:
    issuer = server.url + issuer_path
    publish(server, respond(body=document(issuer)), published)
    base = issuer.removesuffix("/")
    assert find(issuer) == ServerMetadata(issuer, f"{base}/access_token", f"{base}/keys")
    assert len(set(asked(server))) == len(asked(server))


@pytest.mark.parametrize(
    "elsewhere",
    [
        respond(403, b"", None),
        respond(302, b"", None, Location="https://localhost:1/"),
        respond(200, b"<html>welcome</html>", "text/html"),
    ],
    ids=["forbidden", "redirect", "page"],
)
def test_what_is_no_document_sends_us_to_the_next_place(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], elsewhere: Behaviour
) -> None:
    def behave(connection: Connection) -> bool | None:
        there = connection.path == f"{OAUTH}/am/oauth2"
        return (respond(body=document(issuer)) if there else elsewhere)(connection)

    server.behaviours[:] = [behave]
    assert find().token_endpoint == f"{issuer}/access_token"


def test_a_server_without_a_document_is_an_error_that_names_the_places(
    server: Server, issuer: str, find: Callable[..., ServerMetadata]
) -> None:
    with pytest.raises(MetadataError) as caught:
        find()
    assert asked(server) == [f"/am/oauth2{OPENID}", f"{OAUTH}/am/oauth2", f"{OPENID}/am/oauth2"]
    assert all(f"{server.url}{path}: status 404" in str(caught.value) for path in asked(server))
    assert caught.value.hint


def test_keys_are_optional(server: Server, issuer: str, find: Callable[..., ServerMetadata]) -> None:
    publish(server, respond(body=document(issuer, jwks_uri=None)))
    assert find().jwks_uri is None


# Lies


@pytest.mark.parametrize(
    "lie",
    [
        "{server}/am/oauth2/",
        "{server}/am",
        "{server}/am/oauth2?",
        "{server}/AM/oauth2",
        "https://localhost/am/oauth2",
        "https://evil.example/am/oauth2",
        "http://localhost/am/oauth2",
        "",
        ["{server}/am/oauth2"],
        None,
        7,
    ],
)
def test_a_document_of_another_issuer_is_refused(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], lie: Any
) -> None:
    if isinstance(lie, list):
        lie = [issuer]
    lie = lie.format(server=server.url) if isinstance(lie, str) else lie
    publish(server, respond(body=document(issuer, issuer=lie)))
    with pytest.raises(MetadataError, match="must name the issuer"):
        find()
    assert asked(server) == [f"/am/oauth2{OPENID}"]  # a liar is not given a second chance


def test_the_issuer_is_compared_with_its_last_slash(
    server: Server, issuer: str, find: Callable[..., ServerMetadata]
) -> None:
    publish(server, respond(body=document(issuer)))
    with pytest.raises(MetadataError, match="must name the issuer"):
        find(issuer + "/")


@pytest.mark.parametrize("name", ["token_endpoint", "jwks_uri"])
@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("https://evil.example/token", "not on the issuer's origin"),
        ("https://localhost/token", "not on the issuer's origin"),
        ("https://localhost:1/token", "not on the issuer's origin"),
        ("https://127.0.0.1:{port}/token", "not on the issuer's origin"),
        ("https://evil.localhost:{port}/token", "not on the issuer's origin"),
        ("http://localhost:{port}/token", "https is needed"),
        ("http://127.0.0.1:{port}/token", "https is needed"),
        ("https://evil.example\\@localhost:{port}/token", "backslash"),
        ("https://localhost:{port}@evil.example/token", "user"),
        ("https://localhost:{port}/token#fragment", "fragment"),
        ("//localhost:{port}/token", "https"),
        ("/token", "https"),
        ("file:///etc/passwd", "https"),
        ("", "https"),
        (["https://localhost:{port}/token"], "is no text"),
        (7, "is no text"),
        ({}, "is no text"),
    ],
)
def test_an_endpoint_elsewhere_is_refused(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], name: str, lie: Any, said: str
) -> None:
    lie = lie.format(port=server.port) if isinstance(lie, str) else lie
    publish(server, respond(body=document(issuer, **{name: lie})))
    with pytest.raises(MetadataError, match=said) as caught:
        find()
    assert name in str(caught.value)


@pytest.mark.parametrize("allowed", ["https://api.example", "https://api.example/token"])
def test_an_endpoint_that_the_profile_names_is_taken(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], allowed: str
) -> None:
    publish(server, respond(body=document(issuer, token_endpoint="https://api.example/token")))
    assert find(allowed=[allowed]).token_endpoint == "https://api.example/token"
    for other in ("https://api.example/other", "https://api.example:8443", "https://api.example/"):
        with pytest.raises(MetadataError, match="not on the issuer's origin"):
            find(allowed=[other])


def test_keys_are_found_beside_a_token_endpoint_that_the_profile_names(
    server: Server, issuer: str, transport: Transport
) -> None:
    named = "https://api.example/token"
    metadata = respond(body=document(issuer, token_endpoint=named))

    def behave(connection: Connection) -> bool | None:
        return (respond(body={"keys": []}) if connection.path == "/am/oauth2/keys" else metadata)(connection)

    server.behaviours[:] = [behave]
    assert issuer_keys(issuer, transport, allowed=[named])() == {"keys": []}
    with pytest.raises(MetadataError, match="not on the issuer's origin"):
        issuer_keys(issuer, transport)()


def test_naming_an_http_endpoint_does_not_help_it(
    server: Server, issuer: str, find: Callable[..., ServerMetadata]
) -> None:
    lie = "http://127.0.0.1:1/token"
    publish(server, respond(body=document(issuer, token_endpoint=lie)))
    with pytest.raises(MetadataError, match="https is needed"):
        find(allowed=[lie, "http://127.0.0.1:1"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is no JSON"),
        (b"[]", "no object"),
        (b'{"issuer":', "is no JSON"),
        (b"\xff", "is no UTF-8"),
        (b'{"issuer":"ISSUER","issuer":"ISSUER","token_endpoint":"ISSUER/t"}', "twice"),
        (b'{"issuer":"ISSUER"}', "no token_endpoint"),
        (b'{"issuer":"ISSUER","token_endpoint":null}', "no token_endpoint"),
    ],
)
def test_a_malformed_document_is_refused(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], body: bytes, said: str
) -> None:
    publish(server, respond(body=body.replace(b"ISSUER", issuer.encode())))
    with pytest.raises(MetadataError, match=said):
        find()


def test_what_a_document_says_is_shown_without_its_escapes(
    server: Server, issuer: str, find: Callable[..., ServerMetadata]
) -> None:
    publish(server, respond(body=document(issuer, issuer="\x1b[31mevil\u202e" + "eyJhbGciOiJF." * 3)))
    with pytest.raises(MetadataError) as caught:
        find()
    assert str(caught.value).isprintable()
    assert "eyJ" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:9/am",
        "http://as.example",
        "https://as.example/am?x=1",
        "https://as.example/am#f",
        "https://user@as.example/",
        "as.example",
    ],
)
def test_an_issuer_that_is_none_is_a_configuration_error(
    find: Callable[..., ServerMetadata], text: str
) -> None:
    with pytest.raises(ConfigError, match="issuer"):
        find(text)


# Transport


def test_the_document_is_fetched_with_verification(server: Server, issuer: str) -> None:
    publish(server, respond(body=document(issuer)))
    with pytest.raises(TransportError, match="certificate"):
        discover(issuer, Transport(), deadline=time.monotonic() + 60)
    assert server.requests == []


def test_a_busy_server_is_asked_again(
    server: Server, issuer: str, find: Callable[..., ServerMetadata]
) -> None:
    server.behaviours[:] = [respond(503, b"", None), respond(429, b"", None, Retry_After="0")]
    server.behaviours += [respond(body=document(issuer))]
    assert find().token_endpoint == f"{issuer}/access_token"
    assert asked(server) == [f"/am/oauth2{OPENID}"] * 3


def test_a_server_in_trouble_is_left_at_the_deadline(
    server: Server, find: Callable[..., ServerMetadata]
) -> None:
    server.behaviours[:] = [respond(503, b"", None, Retry_After="3600")]
    with pytest.raises(TransportError, match="503"):
        find(seconds=5)
    assert len(server.requests) == 1


# Cache


@pytest.fixture
def cache(tmp_path: Path, issuer: str) -> MetadataCache:
    return MetadataCache(tmp_path / "cache", {"issuer": issuer})


def test_a_document_is_fetched_once_a_day(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], cache: MetadataCache
) -> None:
    publish(server, respond(body=document(issuer)))
    found = find(cache=cache)
    now = int(time.time())
    assert cache.load(now + MAX_AGE - 60)
    assert cache.load(now + MAX_AGE) is None
    server.behaviours[:] = [respond(404, b"", None)]
    assert find(cache=cache) == found
    assert len(server.requests) == 1


def test_a_kept_document_is_judged_again(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], cache: MetadataCache
) -> None:
    cache.store(ServerMetadata(issuer, "https://api.example/token", None), int(time.time()))
    assert find(cache=cache, allowed=["https://api.example"]).token_endpoint == "https://api.example/token"
    publish(server, respond(body=document(issuer)))
    assert find(cache=cache).token_endpoint == f"{issuer}/access_token"


def test_a_lie_is_not_kept(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], cache: MetadataCache, tmp_path: Path
) -> None:
    publish(server, respond(body=document(issuer, token_endpoint="https://evil.example/token")))
    with pytest.raises(MetadataError):
        find(cache=cache)
    assert not (tmp_path / "cache").exists()


def test_a_damaged_document_is_fetched_again(
    server: Server, issuer: str, find: Callable[..., ServerMetadata], cache: MetadataCache, tmp_path: Path
) -> None:
    publish(server, respond(body=document(issuer)))
    find(cache=cache)
    [path] = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes().replace(b"access_token", b"excess_token"))
    assert find(cache=cache).token_endpoint == f"{issuer}/access_token"
    assert json.loads(path.read_bytes().partition(b"\n")[2])["members"]["issuer"] == issuer
