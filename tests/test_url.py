"""What is judged is what is sent: our grammar against those of requests and urllib3."""

import pytest
import requests
import urllib3
from hypothesis import example, given
from hypothesis import strategies as st

from hsm_signer.errors import ConfigError
from hsm_signer.oauth.connections import Connections
from hsm_signer.url import Url, parse, parse_origin, parse_proxy, same_origin, without_password

GOOD = [
    ("https://www5.wipo.int/am/oauth2/access_token", "https://www5.wipo.int"),
    ("https://logindev.wipo.int:443/am/oauth2/access_token", "https://logindev.wipo.int"),
    ("https://as.example", "https://as.example"),
    ("https://as.example/", "https://as.example"),
    ("https://as.example:8443/token?tenant=a&x=%5B1%5D", "https://as.example:8443"),
    ("https://as.example/a;b/c:d@e/~f_g/(h)*i,j=k+l!m$n'/%2F%20%C3%A9/", "https://as.example"),
    ("https://as.example/a//b/.well-known/x..y/...", "https://as.example"),
    ("https://as.example/?a/b?c", "https://as.example"),
    ("https://xn--bcher-kva.example/", "https://xn--bcher-kva.example"),
    ("https://localhost/", "https://localhost"),
    ("https://192.0.2.7:9/x", "https://192.0.2.7:9"),
    ("https://[2001:db8::7]:8443/x", "https://[2001:db8::7]:8443"),
    ("http://127.0.0.1/x", "http://127.0.0.1"),
    ("http://127.9.8.7:80/x", "http://127.9.8.7"),
    ("http://[::1]:8080/x", "http://[::1]:8080"),
]

BAD = [
    ("", "begin with https"),
    ("as.example/token", "begin with https"),
    ("HTTPS://as.example/", "begin with https"),
    ("ftp://as.example/", "begin with https"),
    ("file:///etc/passwd", "begin with https"),
    ("https:/as.example/", "begin with https"),
    ("https://", "no URL"),
    ("https:///path", "no URL"),
    ("http://as.example/", "https is needed"),
    ("http://localhost/", "https is needed"),
    ("http://127.0.0.1.example/", "https is needed"),
    ("http://[::2]/", "https is needed"),
    ("https://user:password@as.example/", "user information"),
    ("https://good.example@evil.example/", "user information"),
    ("https://evil.example\\@good.example/", "backslash"),
    ("https://as.example/a\\b", "backslash"),
    ("https://as.example/#x", "fragment"),
    ("https://as.example#@good.example/", "fragment"),
    (" https://as.example/", "white space"),
    ("https://as.example/ ", "white space"),
    ("https://as.example/\n", "white space"),
    ("https://as.example/\tx", "white space"),
    ("https://as.ex\x00ample/", "white space"),
    ("https://bücher.example/", "non-ASCII"),
    ("https://ａs.example/", "non-ASCII"),
    ("https://As.example/", "lower case"),
    ("https://[2001:DB8::7]/", "lower case"),
    ("https://as.example/a/../b", "dot segments"),
    ("https://as.example/./b", "dot segments"),
    ("https://as.example/b/..", "dot segments"),
    ("https://as.example/b/.?x", "dot segments"),
    ("https://as.example/%7Euser", "needless percent-encoding"),
    ("https://as.example/%2e%2e/x", "upper case"),
    ("https://as.example/%2E%2E/x", "needless percent-encoding"),
    ("https://as.example/%c3%a9", "upper case"),
    ("https://as.example/100%", "upper case"),
    ("https://as.example/%zz", "upper case"),
    ("https://as.example//x", "no URL"),
    ("https://as.example/?", "no URL"),
    ("https://as.example?x=1", "no URL"),
    ("https://as.example/[x]", "no URL"),
    ('https://as.example/"x"', "no URL"),
    ("https://as.example/{x}|^`<>", "no URL"),
    ("https://as.example./", "no URL"),
    ("https://.as.example/", "no URL"),
    ("https://as..example/", "no URL"),
    ("https://-as.example/", "no URL"),
    ("https://*.example/", "no URL"),
    ("https://a_b.example/", "no URL"),
    ("https://as.example:/", "no URL"),
    ("https://as.example:0/", "no URL"),
    ("https://as.example:0443/", "no URL"),
    ("https://as.example:+443/", "no URL"),
    ("https://as.example:65536/", "no host name"),
    ("https://as.example:99999/", "no host name"),
    ("https://" + "a" * 64 + ".example/", "no URL"),
    ("https://" + "a." * 126 + "ab/", "no host name"),
    ("https://as.example/" + "a" * 2048, "longer than"),
    ("https://127.1/", "no host name"),
    ("https://2130706433/", "no host name"),
    ("https://0x7f.0.0.1/", "no host name"),
    ("https://0177.0.0.1/", "no host name"),
    ("https://127.0.0.01/", "no host name"),
    ("https://1.2.3.4.5/", "no host name"),
    ("https://256.1.1.1/", "no host name"),
    ("https://as.example.0x1/", "no host name"),
    ("https://[::1%25eth0]/", "no URL"),
    ("https://[0:0:0:0:0:0:0:1]/", "no host name"),
    ("https://[::ffff:7f00:1]/", "no host name"),
    ("https://[1::2::3]/", "no host name"),
    ("https://[]/", "no URL"),
    ("https://[::1/", "no URL"),
]


def where_requests_goes(url: str) -> tuple[str, str]:
    """The text that requests sends, and the origin of the pool that our connection comes from."""
    import ssl

    pools = Connections(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), None)
    pool = pools.direct.connection_from_url(url)
    host = f"[{pool.host}]" if ":" in pool.host else pool.host
    return requests.Request("POST", url).prepare().url, f"{pool.scheme}://{host}:{pool.port}"


def assert_sent_as_judged(url: Url) -> None:
    sent, origin = where_requests_goes(url.text)
    path_left_out = url.text.count("/") == 2
    assert sent == url.text + "/" * path_left_out
    assert origin == f"{url.scheme}://{url.host}:{url.port}"
    assert origin in url.origins
    theirs = urllib3.util.parse_url(url.text)
    assert (theirs.scheme, theirs.host) == (url.scheme, url.host)
    assert theirs.port in (url.port, None)
    assert theirs.auth is None
    assert theirs.fragment is None
    assert urllib3.connectionpool._encode_target(theirs.request_uri) == theirs.request_uri


@pytest.mark.parametrize(("text", "origin"), GOOD)
def test_a_plain_url_is_kept_as_it_is_and_requests_goes_where_we_say(text: str, origin: str) -> None:
    url = parse(text, what="token endpoint")
    assert str(url) == url.text == text
    assert url.origin == origin
    assert_sent_as_judged(url)


@pytest.mark.parametrize(("text", "fault"), BAD)
def test_whatever_could_be_read_in_two_ways_is_refused_by_name(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"^token endpoint: .*{fault}") as caught:
        parse(text, what="token endpoint")
    assert "password" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_discovered_url_has_no_loopback_exception() -> None:
    assert parse("http://127.0.0.1:8080/x", what="x").is_loopback
    for text in ("http://127.0.0.1:8080/x", "http://[::1]/x"):
        with pytest.raises(ConfigError, match="https is needed; found"):
            parse(text, what="jwks_uri", http_loopback=False)


_WORDS = "// .. https:// http:// 127.0.0.1 ::1 [::1] %2F %2f %41 as.example 0x7f :443 @evil.example xn--"
_PIECES = st.sampled_from([*"abAB09.-_~%:/?#@[]\\&= \t\n\x00ü", *_WORDS.split()])


@given(
    st.lists(_PIECES, max_size=12).map("".join),
    st.sampled_from(["", "https://", "https://as.example", "https://as.example/"]),
)
@example("\\@good.example/", "https://evil.example")
@example("1.1/", "https://1.")
def test_every_url_that_is_accepted_is_sent_unchanged_to_its_origin(rest: str, start: str) -> None:
    try:
        url = parse(start + rest, what="x")
    except ConfigError:
        return
    assert_sent_as_judged(url)


@given(
    st.sampled_from(["as.example", "a-b.c1", "192.0.2.1", "[2001:db8::1]"]),
    st.sampled_from(["", ":443", ":8443", ":65535"]),
    st.text(st.sampled_from("aZ09-._~!$&'()*+,;=:@/%2FC3?"), max_size=30),
)
def test_every_path_that_is_accepted_is_sent_unchanged(host: str, port: str, path: str) -> None:
    try:
        url = parse(f"https://{host}{port}/{path}", what="x")
    except ConfigError:
        return
    assert_sent_as_judged(url)


def test_origins_are_compared_by_scheme_host_and_effective_port() -> None:
    def same(first: str, second: str) -> bool:
        return same_origin(parse(first, what="x"), parse(second, what="x"))

    assert same("https://as.example/token", "https://as.example:443/other")
    assert not same("https://as.example/", "https://as.example:8443/")
    assert not same("https://as.example/", "https://as.example.evil/")
    assert not same("https://127.0.0.1:80/", "http://127.0.0.1/")


def test_an_origin_has_nothing_behind_the_port() -> None:
    for text in ("https://api.example", "https://api.example/", "https://api.example:443"):
        assert parse_origin(text, what="origin").origin == "https://api.example"
    for text in ("https://api.example/v1", "https://api.example/?x", "https://api.example//"):
        with pytest.raises(ConfigError, match=r"^origin: "):
            parse_origin(text, what="origin")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("proxy.example:3128", "http://proxy.example:3128"),
        ("http://proxy.example:3128/", "http://proxy.example:3128"),
        ("https://proxy.example", "https://proxy.example"),
        ("http://user:p%40ss@proxy.example:3128", "http://user:p%40ss@proxy.example:3128"),
        ("user:pass@10.0.0.1:3128", "http://user:pass@10.0.0.1:3128"),
    ],
)
def test_a_proxy_may_be_http_and_have_a_password(given: str, used: str) -> None:
    assert parse_proxy(given) == used


@pytest.mark.parametrize(
    "text", ["", "socks5://p.example", "http://s3cret:s3cret@p.example/x", "http://a@b@c", "p.example:x"]
)
def test_a_proxy_that_is_none_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^proxy: ") as caught:
        parse_proxy(text)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        ("http://user:secretpw@proxy.example:3128", "http://user:…@proxy.example:3128"),
        ("user:secretpw@proxy.example", "user:…@proxy.example"),
        ("http://user@proxy.example", "http://user@proxy.example"),
        ("http://proxy.example:3128/", "http://proxy.example:3128/"),
        ("http://user:sec@secretpw@proxy.example", "http://user:…@proxy.example"),
        ("ftp://user:secretpw@proxy.example", "ftp:…@proxy.example"),
        ("http://user:secretpw secretpw@proxy.example", "http://user:…@proxy.example"),
    ],
)
def test_a_proxy_is_shown_without_its_password(proxy: str, shown: str) -> None:
    assert without_password(proxy) == shown
