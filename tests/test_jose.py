"""Vectors of RFC 7515 A.3, RFC 7518 §3.4, RFC 7638 §3.1 and of WIPO's published sample."""

import json
import time
from base64 import urlsafe_b64decode
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from software_signer import SoftwareSigner

from hsm_signer import ClientAssertion
from hsm_signer.errors import ConfigError
from hsm_signer.jose import b64url, json_b64url, jwk_set, sign_compact, thumbprint, unverified_claims
from hsm_signer.verification import PublicKey

RFC_7515_A_3_KEY = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}
RFC_7515_A_3_HEADER = "eyJhbGciOiJFUzI1NiJ9"
RFC_7515_A_3_PAYLOAD = (
    "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
)
RFC_7515_A_3_SIGNATURE = (
    "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)

SEED_HEADER = "eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9"
SEED_PAYLOAD = (
    "eyJpc3MiOiJkYXMtYXBpLWF1dGgiLCJzdWIiOiJkYXMtYXBpLWF1dGgiLCJhdWQiOiJodHRwczovL2xvZ2luZGV2LndpcG8uaW50"
    "OjQ0My9hbS9vYXV0aDIvYWNjZXNzX3Rva2VuIiwiZXhwIjoxNjIyNDUwNzI4fQ"
)

SIGNER = SoftwareSigner()


def decoded(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_base64url_is_that_of_rfc_7515_appendix_c() -> None:
    assert b64url(bytes([3, 236, 255, 224, 193])) == "A-z_4ME"
    assert b64url(b"") == ""
    assert b64url(b"\0\0\x17") == "AAAX"


def test_the_signature_of_rfc_7515_a_3_verifies_and_is_r_then_s() -> None:
    point = b"\x04" + decoded(RFC_7515_A_3_KEY["x"]) + decoded(RFC_7515_A_3_KEY["y"])
    signature = decoded(RFC_7515_A_3_SIGNATURE)
    assert signature[:4] == bytes([14, 209, 33, 83])  # R as A.3.1 prints it
    assert signature[32:36] == bytes([197, 10, 7, 211])  # and S
    signing_input = f"{RFC_7515_A_3_HEADER}.{RFC_7515_A_3_PAYLOAD}".encode()
    PublicKey(point).verify(
        signature, signing_input
    )  # RFC 7518 §3.4: R and S as 32 bytes each, in this order


def test_the_header_of_rfc_7515_a_3_is_written_the_same() -> None:
    assert json_b64url({"alg": "ES256"}) == RFC_7515_A_3_HEADER


def test_a_compact_jws_of_ours_is_made_of_its_parts() -> None:
    signer = SoftwareSigner()
    header, payload, signature = sign_compact({"alg": "ES256"}, {"ü": [1, None]}, signer).split(".")
    assert decoded(header) == b'{"alg":"ES256"}'
    assert decoded(payload) == '{"ü":[1,null]}'.encode()
    point = b"\x04" + decoded(signer.jwk["x"]) + decoded(signer.jwk["y"])
    PublicKey(point).verify(decoded(signature), f"{header}.{payload}".encode())


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_b64url({"exp": float("nan")})


def test_the_thumbprint_of_rfc_7638_counts_only_required_members_in_order() -> None:
    # RFC 7638 §3.1 has an RSA key; §3.2 names crv, kty, x, y for EC keys. The value is that of RFC 7515's key,
    # as jwcrypto and joserfc print it.
    assert thumbprint(RFC_7515_A_3_KEY) == "oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U"
    shuffled = {"y": RFC_7515_A_3_KEY["y"], "kid": "1", "use": "sig", **RFC_7515_A_3_KEY}
    assert thumbprint(shuffled) == thumbprint(RFC_7515_A_3_KEY)


def test_the_thumbprint_is_the_one_that_joserfc_finds() -> None:
    from joserfc.jwk import ECKey

    for jwk in (RFC_7515_A_3_KEY, SoftwareSigner().jwk):
        assert thumbprint(jwk) == ECKey.import_key(dict(jwk)).thumbprint()


@pytest.mark.parametrize(
    "jwk",
    [
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
        RFC_7515_A_3_KEY | {"kty": "oct"},
        RFC_7515_A_3_KEY | {"x": ""},
        RFC_7515_A_3_KEY | {"y": 1},
        {},
    ],
)
def test_a_jwk_that_is_no_ec_key_has_no_thumbprint_here(jwk: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"\Aa thumbprint is made of an EC JWK .*; this is none\Z"):
        thumbprint(jwk)


def test_a_key_set_has_the_public_key_and_the_certificate_where_there_is_one() -> None:
    key = {**SIGNER.jwk, "use": "sig", "alg": "ES256", "kid": SIGNER.kid}
    assert jwk_set(SIGNER) == {"keys": [key]}
    # RFC 7517 §4.7 is base64, §4.9 is base64url of the SHA-256
    certificate = {"x5c": ["+/+/"], "x5t#S256": b64url(sha256(b"\xfb\xff\xbf").digest())}
    assert jwk_set(SIGNER, b"\xfb\xff\xbf") == {"keys": [key | certificate]}


@pytest.mark.parametrize("claims", [{}, {"a": 1}, {"a": 12}, {"a": 123}, {"iss": "ü", "n": {"x": [None]}}])
def test_the_claims_of_a_jws_are_read_from_it_and_from_its_signing_input(claims: dict[str, object]) -> None:
    jws = sign_compact({"alg": "ES256"}, claims, SIGNER)
    assert unverified_claims(jws) == unverified_claims(jws.rpartition(".")[0]) == claims


@pytest.mark.parametrize(
    "payload", [b"[]", b'"iss"', b"5", b"null", b"", b"{", b"\xff", b"[" * 100_000], ids=lambda each: each[:8]
)
def test_what_has_no_claims_gives_none(payload: bytes) -> None:
    assert unverified_claims(f"{RFC_7515_A_3_HEADER}.{b64url(payload)}.{RFC_7515_A_3_SIGNATURE}") is None


@pytest.mark.parametrize(
    "text", ["", "e30", "e30.", ".e30", "e30.e30.e30.e30", "e30.e3+.e30", "e30.e30=", "é.e30"]
)
def test_what_is_no_jws_has_no_claims(text: str) -> None:
    assert unverified_claims(text) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("client_id", value) for value in ("", "ü", "a\n", 5, None, b"client")),
        *(("audience", value) for value in ("", "ü", 5, None)),
        *(("lifetime", value) for value in (0, 1801, True, 1.5, "60", float("nan"), None)),
        *(("clock_offset", value) for value in (601, -601, True, 0.5, float("nan"), "0")),
        *(("kid", value) for value in ("", 1, None, "\ud800", "a\n")),
        *(("typ", value) for value in (5, None, ["JWT"], "ü")),
        *(("claims", value) for value in ("all", "", None, [])),
    ],
)
def test_an_assertion_that_no_server_takes_is_refused_when_it_is_made(name: str, value: object) -> None:
    values: dict[str, object] = {"client_id": "client", "audience": "https://example.com/token"}
    with pytest.raises(ConfigError, match=name.replace("_", ".")):
        ClientAssertion(**values | {name: value})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"client_id": ""}, "client_id must be printable ASCII and not empty, found ''"),
        ({"audience": "ü"}, "audience must be printable ASCII and not empty, found 'ü'"),
        ({"lifetime": 0}, "lifetime must be 1 to 1800 seconds, found 0"),
        ({"clock_offset": 601}, "clock offset is at most 600 whole seconds, found 601"),
        ({"typ": "ü"}, "typ must be printable ASCII, or empty to leave it out, found 'ü'"),
        ({"kid": ""}, "kid must be true, false or a printable name, found ''"),
        ({"claims": "all"}, 'claims must be "minimal" or "oidc", found \'all\''),
    ],
)
def test_a_refusal_says_what_was_found(changes: dict[str, object], text: str) -> None:
    values: dict[str, object] = {"client_id": "client", "audience": "https://example.com/token"}
    with pytest.raises(ConfigError) as refused:
        ClientAssertion(**values | changes)
    assert str(refused.value) == text


@pytest.mark.parametrize(("lifetime", "clock_offset"), [(1, -600), (1800, 600)])
def test_the_edges_belong_to_what_servers_take(lifetime: int, clock_offset: int) -> None:
    assertion = ClientAssertion("client", "aud", lifetime=lifetime, clock_offset=clock_offset, claims="oidc")
    claims = assertion.claims_at(10_000, "1")
    assert (claims["iat"], claims["exp"]) == (10_000 + clock_offset, 10_000 + clock_offset + lifetime)


def test_time_and_jti_are_the_clock_and_128_random_bits_unless_given() -> None:
    assertion = ClientAssertion("client", "aud", claims="oidc")
    before = int(time.time())
    claims = json.loads(decoded(assertion.issue(SIGNER).split(".")[1]))
    assert before <= claims["iat"] <= time.time()
    assert len(decoded(claims["jti"])) == 16
    assert json.loads(decoded(assertion.issue(SIGNER, jti="mine").split(".")[1]))["jti"] == "mine"


@pytest.mark.parametrize(
    ("kid", "typ", "header"),
    [
        (False, "", {"alg": "ES256"}),
        ("office/1=", "client-authentication+jwt", {"typ": "client-authentication+jwt", "kid": "office/1="}),
        (True, "JWT", {"typ": "JWT", "kid": "the thumbprint"}),
    ],
)
def test_the_header_has_what_was_asked_for(kid: bool | str, typ: str, header: dict[str, str]) -> None:
    signer = SoftwareSigner()
    expected = {"alg": "ES256", **header}
    if kid is True:
        expected["kid"] = signer.kid
    assertion = ClientAssertion("client", "https://example.com/token", kid=kid, typ=typ)
    assert assertion.header(signer) == expected


def test_wipos_published_sample_comes_out_byte_for_byte() -> None:
    assertion = ClientAssertion(
        client_id="das-api-auth", audience="https://logindev.wipo.int:443/am/oauth2/access_token", lifetime=60
    )
    header, payload, signature = assertion.issue(SoftwareSigner(), now=1622450728 - 60).split(".")
    assert header == SEED_HEADER
    assert payload == SEED_PAYLOAD
    assert len(signature) == 86


def test_an_oidc_assertion_names_its_time_and_is_used_once() -> None:
    assertion = ClientAssertion("client", "https://example.com/token", claims="oidc", lifetime=30)
    first, second = (
        json.loads(decoded(assertion.issue(SoftwareSigner(), now=1000).split(".")[1])) for _ in range(2)
    )
    assert list(first) == ["iss", "sub", "aud", "exp", "iat", "jti"]
    assert (first["iat"], first["exp"]) == (1000, 1030)
    assert first["jti"] != second["jti"]


PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1)


@given(
    assertion=st.builds(
        ClientAssertion,
        PRINTABLE,
        PRINTABLE,
        claims=st.sampled_from(["minimal", "oidc"]),
        typ=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)),
        kid=st.booleans() | PRINTABLE,
        clock_offset=st.integers(-600, 600),
        lifetime=st.integers(1, 1800),
    ),
    now=st.integers(0, 2**33),
    jti=st.text(),
)
def test_what_is_signed_is_the_header_and_the_claims_that_are_shown(
    assertion: ClientAssertion, now: int, jti: str
) -> None:
    shown = f"{json_b64url(assertion.header(SIGNER))}.{json_b64url(assertion.claims_at(now, jti))}"
    assert assertion.issue(SIGNER, now=now, jti=jti).rpartition(".")[0] == shown
