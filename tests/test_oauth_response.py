"""The judge of token responses: RFC 6749 §5, and what real servers do instead."""

import json
from typing import Any

import pytest
from canary import assert_no_trace
from hypothesis import given
from hypothesis import strategies as st

from hsm_signer.errors import ConfigError, HsmSignerError, OAuthError, TokenResponseError, TransportError
from hsm_signer.oauth.response import TokenResponse, parse, require_scope

NOW = 1_795_507_000
SCOPE = "das-api/das-access"
JSON = "application/json"
CANARY = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJjYW5hcnkifQ.c2lnbmF0dXJlLW9mLXRoZS1jYW5hcnk"


def judge(
    body: object = None,
    *,
    status: int = 200,
    media_type: str | None = JSON,
    scope: str = SCOPE,
    **options: Any,
) -> TokenResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse(status, media_type, raw, asked_scope=scope, now=NOW, **options)


def grant(**changes: object) -> dict[str, object]:
    members = {"access_token": "abc", "token_type": "Bearer", "expires_in": 3599, "scope": SCOPE} | changes
    return {name: value for name, value in members.items() if value is not ...}


def test_the_answer_of_wipo_becomes_a_token_response() -> None:
    response = judge(
        b'{"access_token":"eyJ0.eyJ1.c2ln","scope":"das-api/das-access","token_type":"Bearer","expires_in":3599}'
    )
    assert response.access_token == "eyJ0.eyJ1.c2ln"
    assert response.token_type == "Bearer"
    assert response.expires_at == NOW + 3599
    assert response.scope == SCOPE
    assert response.raw["expires_in"] == 3599


def test_a_token_response_shows_no_token() -> None:
    response = judge(grant(access_token=CANARY, refresh_token=CANARY))
    assert "eyJ" not in f"{response!r} {response}"
    assert hash(response) == hash(judge(grant(access_token=CANARY)))


@pytest.mark.parametrize(
    "media_type", [JSON, "application/json;charset=UTF-8", "Application/JSON ; charset=utf-8"]
)
def test_parameters_and_case_of_the_media_type_do_not_matter(media_type: str) -> None:
    assert judge(grant(), media_type=media_type).access_token == "abc"


@pytest.mark.parametrize(
    "media_type", [None, "", "text/html", "text/plain", "application/jsonp", "application/jwt", "json"]
)
def test_a_success_in_another_media_type_is_refused(media_type: str | None) -> None:
    with pytest.raises(TokenResponseError, match="media type"):
        judge(grant(), media_type=media_type)


@pytest.mark.parametrize("token_type", ["Bearer", "bearer", "BEARER"])
def test_the_token_type_is_bearer_in_any_case(token_type: str) -> None:
    assert judge(grant(token_type=token_type)).token_type == token_type


@pytest.mark.parametrize(
    "token_type", [..., None, "", "MAC", "DPoP", "Bearer ", ["Bearer"], 1, "\u202ebearer", "Béarer"]
)
def test_any_other_token_type_is_refused(token_type: object) -> None:
    with pytest.raises(TokenResponseError, match="token_type Bearer"):
        judge(grant(token_type=token_type))


@pytest.mark.parametrize(
    ("expires_in", "expires_at"),
    [
        (1, NOW + 1),
        ("3599", NOW + 3599),
        (3599.0, NOW + 3599),
        (86_400, NOW + 86_400),
        (10**9, NOW + 86_400),
        (10**30, NOW + 86_400),
        ("99999999999", NOW + 86_400),
        (..., None),
        (None, None),
    ],
)
def test_the_lifetime_is_read_as_servers_write_it_and_believed_for_a_day(
    expires_in: object, expires_at: int | None
) -> None:
    assert judge(grant(expires_in=expires_in)).expires_at == expires_at


@pytest.mark.parametrize(
    "expires_in",
    [0, -1, "-5", "0", True, False, "soon", "", " 5", "5 ", "1e3", "٣", 1.5, 1e400, [3599], {}, "9" * 21],
)
def test_a_lifetime_that_is_over_or_no_number_is_refused(expires_in: object) -> None:
    with pytest.raises(TokenResponseError, match=r"expire|no JSON"):
        judge(grant(expires_in=expires_in))


@pytest.mark.parametrize("access_token", ["a", "A-Za-z0-9._~+/==", "a" * 16384])
def test_an_access_token_is_a_b64token(access_token: str) -> None:
    assert judge(grant(access_token=access_token)).access_token == access_token


@pytest.mark.parametrize(
    "access_token",
    [
        *(..., None, "", "=", ["a"], {"a": 1}, 5, True, "a" * 16385, "a=b", "ä", "a\x00", "a\u202e"),
        *('a"b', "a\nb", "a\n", "$(reboot)", "`id`", "a b", "a;b", "a'b"),
    ],
)
def test_an_access_token_that_a_shell_or_a_header_could_misread_is_refused(access_token: object) -> None:
    with pytest.raises(TokenResponseError, match="access_token"):
        judge(grant(access_token=access_token))


@pytest.mark.parametrize(
    ("asked", "granted", "scope"),
    [
        (SCOPE, ..., SCOPE),
        (SCOPE, None, SCOPE),
        ("a b", "b a", "b a"),
        ("a", "a b c", "a b c"),
        ("a b", " a  b ".replace("  ", " "), "a b"),
        ("", "whatever", "whatever"),
        ("X", "X", "X"),
        ("", "", ""),
        ("", ..., ""),
    ],
)
def test_the_granted_scope_holds_what_was_asked_for(asked: str, granted: object, scope: str) -> None:
    assert judge(grant(scope=granted), scope=asked).scope == scope


@pytest.mark.parametrize("granted", ["a", "", "a bb", "b A", "c"])
def test_a_smaller_scope_is_an_error_unless_allowed(granted: str) -> None:
    with pytest.raises(TokenResponseError, match="leaves out '") as caught:
        judge(grant(scope=granted), scope="a b")
    assert caught.value.hint
    assert judge(grant(scope=granted), scope="a b", allow_narrower_scope=True).scope == granted


@pytest.mark.parametrize(
    "granted", [["a"], 5, True, {}, 'a"b', "a\\b", "a\nb", "a\tb", "a\n", "ä", "a  b", "a  X"]
)
def test_a_scope_that_is_no_list_in_text_is_refused(granted: object) -> None:
    with pytest.raises(TokenResponseError, match="no list of scopes"):
        judge(grant(scope=granted), scope="a", allow_narrower_scope=True)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "no JSON"),
        (b"access_token=abc&token_type=bearer", "no JSON"),
        (b"<html>Bearer</html>", "no JSON"),
        (b'{"access_token":"abc","token_type":"Bearer"', "no JSON"),
        (b'{"access_token":"abc","token_type":"Bearer"}}', "no JSON"),
        (b'{"access_token":"abc","token_type":"Bearer","expires_in":NaN}', "no JSON"),
        (b'{"access_token":"abc","token_type":"Bearer","x":-Infinity}', "no JSON"),
        (b'{"x":' + b"9" * 5000 + b"}", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":' * 100_000, "no JSON"),
        ("\ufeff{}".encode(), "no JSON"),
        (b'{"access_token":"\xff"}', "no UTF-8"),
        ('{"access_token":"abc"}'.encode("utf-16"), "no UTF-8"),
        (b"[]", "no object"),
        (b'"abc"', "no object"),
        (b"null", "no object"),
        (b"5", "no object"),
        (b'{"access_token":"abc","access_token":"def","token_type":"Bearer"}', "twice"),
        (b'{"access_token":"abc","token_type":"Bearer","x":{"y":1,"y":2}}', "twice"),
        (b'{"access_token":"abc","\\u0061ccess_token":"def","token_type":"Bearer"}', "twice"),
    ],
)
def test_a_success_that_is_no_plain_json_object_is_refused(body: bytes, fault: str) -> None:
    with pytest.raises(TokenResponseError, match=fault) as caught:
        judge(body)
    assert caught.value.status == 200


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 499])
@pytest.mark.parametrize(
    ("media_type", "body", "error", "description"),
    [
        (JSON, b'{"error":"invalid_client","error_description":"no"}', "invalid_client", "no"),
        ("text/plain", b'{"error":"invalid_client"}', "invalid_client", None),
        ("text/html", b"<html><script>alert(1)</script></html>", None, None),
        (None, b"", None, None),
        (JSON, b"{}", None, None),
        (JSON, b'{"error":5,"error_description":["x"]}', None, None),
        (JSON, b'{"error":"a","error":"b"}', None, None),
        (JSON, b'{"error":"invalid_sc', None, None),
        (JSON, b"\xff\xfe", None, None),
        (JSON, b'{"access_token":"abc","token_type":"Bearer"}', None, None),
    ],
)
def test_a_refusal_carries_the_servers_words_if_there_are_any(
    status: int, media_type: str | None, body: bytes, error: str | None, description: str | None
) -> None:
    with pytest.raises(OAuthError, match=f"refused with {status}") as caught:
        judge(body, status=status, media_type=media_type)
    assert type(caught.value) is OAuthError
    assert (caught.value.error, caught.value.description, caught.value.status) == (error, description, status)
    assert "script" not in str(caught.value)


def test_an_error_in_a_success_is_a_refusal_even_beside_a_token() -> None:
    for error in ("invalid_client", 5, "", {}):
        with pytest.raises(OAuthError) as caught:
            judge(grant(error=error))
        assert caught.value.status == 200
        assert caught.value.error == (error if error == "invalid_client" else None)
    assert judge(grant(error=None)).access_token == "abc"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 599])
@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error":"server_error"}', b'{"access_token":"abc"}'])
def test_trouble_of_the_server_is_no_verdict(status: int, body: bytes) -> None:
    with pytest.raises(TransportError, match=f"answered {status}") as caught:
        judge(body, status=status)
    assert caught.value.transient
    assert caught.value.sent


@pytest.mark.parametrize("status", [201, 202, 204, 206, 301, 302, 303, 307, 308, 304, 100])
def test_a_token_comes_with_200_and_with_nothing_else(status: int) -> None:
    with pytest.raises(TokenResponseError, match=str(status)) as caught:
        judge(grant(), status=status)
    assert caught.value.status == status


def test_what_a_server_echoes_is_made_printable() -> None:
    echo = f"{CANARY} \x1b[31mred \u202egnp [bold]x[/bold]" + "y" * 1000
    with pytest.raises(OAuthError) as caught:
        judge({"error": f"bad {CANARY}", "error_description": echo}, status=401)
    for text in (str(caught.value), caught.value.error, caught.value.description):
        assert text
        assert text.isprintable()
        assert "eyJ" not in text
        assert "[bold]" not in text
        assert len(text) < 1100
    with pytest.raises(TokenResponseError) as refused:
        judge(grant(token_type=echo))
    assert "eyJ" not in str(refused.value)


def test_an_error_holds_no_part_of_the_body() -> None:
    body = json.dumps(grant(access_token=CANARY))
    for broken in (body.encode()[:-1], body.encode() + b"\xff", (body[:-1] + ',"scope":"x"}').encode()):
        with pytest.raises(TokenResponseError) as caught:
            judge(broken)
        error = caught.value.with_traceback(None)  # whose frames hold what the caller passed in
        assert_no_trace(error, [CANARY])
        assert error.__context__ is None
        assert error.__cause__ is None


SUCCESS = "the answer of the token endpoint "
TOO_NARROW = "ask the operator of the authorization server to grant it to this client, or ask for less"


@pytest.mark.parametrize(
    ("answer", "text", "hint"),
    [
        ({"status": 429, "body": b"x"}, "the server answered 429", None),
        (
            {"status": 500, "body": {"error": "a", "error_description": "b"}},
            "the server answered 500: a: b",
            None,
        ),
        (
            {"status": 401, "body": {"error": "a", "error_description": "b"}},
            "the authorization server refused with 401: a: b",
            None,
        ),
        (
            {"status": 400, "body": b""},
            "the authorization server refused with 400: without an OAuth error in the answer",
            None,
        ),
        ({"status": 399}, "the token endpoint answered 399, success is 200", None),
        ({"media_type": "text/html; a=b"}, SUCCESS + "has media type text/html, not application/json", None),
        ({"media_type": None}, SUCCESS + "has media type none, not application/json", None),
        ({"media_type": "a " * 45}, SUCCESS + f"has media type {'a ' * 39}a…, not application/json", None),
        ({"body": b"\xff"}, SUCCESS + "is no UTF-8", None),
        ({"body": b"{"}, SUCCESS + "is no JSON", None),
        ({"body": b"[]"}, SUCCESS + "is JSON, but no object", None),
        (
            {"body": b'{"a":1,"a":2}'},
            SUCCESS + "has a member twice, so nobody can tell which one is meant",
            None,
        ),
        ({"body": grant(access_token=None)}, SUCCESS + "has no access_token", None),
        ({"body": grant(access_token=1)}, SUCCESS + "has an access_token that is no text", None),
        (
            {"body": grant(access_token="a" * 16385)},
            SUCCESS + "has an access_token of 16385 characters, more than 16384",
            None,
        ),
        (
            {"body": grant(access_token="ä")},
            SUCCESS + "has an access_token that cannot be sent as a bearer token (RFC 6750 §2.1)",
            None,
        ),
        ({"body": grant(token_type="MAC")}, SUCCESS + "needs token_type Bearer, found 'MAC'", None),
        (
            {"body": grant(token_type="a " * 45)},
            SUCCESS + f"needs token_type Bearer, found '{'a ' * 39}a…'",
            None,
        ),
        ({"body": grant(token_type=1)}, SUCCESS + "needs token_type Bearer, found none that is text", None),
        (
            {"body": grant(expires_in="x")},
            SUCCESS + "has an expires_in that is no whole number of seconds",
            None,
        ),
        ({"body": grant(expires_in=0)}, SUCCESS + "has an access_token that has expired already", None),
        ({"body": grant(scope=1)}, SUCCESS + "has a scope that is no list of scopes in text", None),
        (
            {"body": grant(scope="c"), "scope": "b a"},
            SUCCESS + "grants scope 'c' and leaves out 'a b'",
            TOO_NARROW,
        ),
        (
            {"body": grant(scope="c " * 110 + "c"), "scope": "a"},
            SUCCESS + f"grants scope '{'c ' * 99}c…' and leaves out 'a'",
            TOO_NARROW,
        ),
    ],
)
def test_a_refusal_says_what_was_found(answer: dict[str, Any], text: str, hint: str | None) -> None:
    with pytest.raises(HsmSignerError) as refused:
        judge(**{"body": grant(), **answer})
    assert str(refused.value) == text
    assert refused.value.hint == hint
    assert getattr(refused.value, "status", None) == (
        None if isinstance(refused.value, TransportError) else answer.get("status", 200)
    )


@pytest.mark.parametrize("scope", ["", "a", "a b", "!#[]~"])
def test_a_scope_to_ask_for_is_names_with_single_spaces(scope: str) -> None:
    require_scope(scope)


@pytest.mark.parametrize("scope", [" ", "a  b", "a ", 'a"', "a\\", "ä", "a\n"])
def test_what_is_no_scope_is_not_asked_for(scope: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_scope(scope)
    found = f"scope is names with single spaces between them (RFC 6749 §3.3), found {scope!r}"
    assert str(refused.value) == found


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([CANARY, "bearer"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
_GRANTS = st.fixed_dictionaries(
    {},
    optional={
        "access_token": st.just("abc") | st.text('aA09-._~+/=\n"$', max_size=6) | _VALUES,
        "token_type": st.sampled_from(["Bearer", "bearer", "mac"]) | _VALUES,
        "expires_in": st.integers(-3, 10**7) | st.integers(-3, 9999).map(str) | _VALUES,
        "scope": st.sampled_from(["a", "a b", "b"]) | _VALUES,
        "error": st.none() | _VALUES,
    },
)
_BODIES = (
    _GRANTS.map(lambda grant: json.dumps(grant).encode())
    | _VALUES.map(lambda v: json.dumps(v).encode())
    | st.binary()
)


@given(
    st.just(200) | st.integers(100, 599),
    st.just(JSON) | st.none() | st.text(max_size=20),
    _BODIES
    | st.tuples(_BODIES, st.integers(0, 200), st.binary(max_size=3)).map(lambda t: t[0][: t[1]] + t[2]),
    st.sampled_from(["", "a", "a b"]),
    st.booleans(),
)
def test_no_bytes_raise_anything_but_our_errors_and_a_token_is_always_the_servers(
    status: int, media_type: str | None, body: bytes, asked: str, narrower: bool
) -> None:
    try:
        response = parse(status, media_type, body, asked_scope=asked, now=NOW, allow_narrower_scope=narrower)
    except HsmSignerError as error:
        assert isinstance(error, OAuthError | TransportError)
        assert str(error).isprintable()
        assert error.__context__ is None
        return
    assert status == 200
    members = json.loads(body)
    assert response.access_token == members["access_token"] != ""
    assert response.raw == members
    assert response.token_type.lower() == "bearer"
    assert response.expires_at is None or NOW < response.expires_at <= NOW + 86_400
    assert members.get("error") is None
    assert narrower or set(asked.split()) <= set(response.scope.split())
