"""One forged access token per clause, made with cryptography alone: a good one but for one thing."""

import hmac
import json
import subprocess
import sys
import threading
import time
import warnings
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsm_signer.errors import ConfigError, HsmSignerError, TransportError, UnsafeFileError, VerificationError
from hsm_signer.verify import ALGORITHMS, AccessTokenVerifier, jwks_file

ISSUER, AUDIENCE, NOW = "https://op.example/am/oauth2", "das-api-auth", 1_800_000_000
KID = "wU3ifIIaLOUAReRB/FG6eM1P1QM+aZ0="  # as ForgeRock AM writes them


def b64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8))


RSA = rsa.generate_private_key(65537, 2048)
SMALL_RSA = rsa.generate_private_key(65537, 1024)  # noqa: S505  # the one that must be refused
EC = {
    curve.name: ec.generate_private_key(curve) for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())
}
P256 = EC["secp256r1"]
ED25519, ED448 = ed25519.Ed25519PrivateKey.generate(), ed448.Ed448PrivateKey.generate()
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


def jwk(key, **members) -> dict[str, object]:
    match key.public_key():
        case rsa.RSAPublicKey() as public:
            numbers = public.public_numbers()
            made = {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e)}
        case ec.EllipticCurvePublicKey() as public:
            point = public.public_bytes(
                serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
            )
            half = len(point) // 2
            x, y = b64(point[1 : half + 1]), b64(point[half + 1 :])
            made = {"kty": "EC", "crv": CURVES[public.curve.name], "x": x, "y": y}
        case public:
            curve = type(key).__name__.removesuffix("PrivateKey")
            made = {"kty": "OKP", "crv": curve, "x": b64(public.public_bytes_raw())}
    return {**made, "kid": KID, **members}


def sign(alg: str, key, data: bytes) -> bytes:
    hash_ = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}.get(alg[-3:], hashes.SHA256)()
    match alg[:2]:
        case "RS":
            return key.sign(data, padding.PKCS1v15(), hash_)
        case "PS":
            return key.sign(data, padding.PSS(padding.MGF1(hash_), hash_.digest_size), hash_)
        case "ES":
            size = (key.curve.key_size + 7) // 8
            return b"".join(
                part.to_bytes(size) for part in decode_dss_signature(key.sign(data, ec.ECDSA(hash_)))
            )
    return key.sign(data)


CLAIMS = {
    "sub": AUDIENCE,
    "auditTrackingId": "29f0e1e5-8d8b-4b5b-9d35-7c4e2f1f0a11-4711",
    "iss": ISSUER,
    "nbf": NOW - 10,
    "iat": NOW - 10,
    "exp": NOW + 3589,
    "aud": AUDIENCE,
    "scope": ["das-api/das-access"],
    "realm": "/",
    "jti": "mZ3vYlL2x3l0nE6yq8Xj",
}


def token(
    key=RSA, alg: str = "RS256", header: dict | None = None, payload: bytes | None = None, **claims
) -> str:
    """A good access token of WIPO's shape, but for what is given; ``None`` leaves a member out."""

    def part(members: dict) -> str:
        return b64(json.dumps({name: each for name, each in members.items() if each is not None}).encode())

    head = part({"typ": "JWT", "kid": KID, "alg": alg, **(header or {})})
    body = part(CLAIMS | claims) if payload is None else b64(payload)
    return f"{head}.{body}.{b64(sign(alg, key, f'{head}.{body}'.encode()))}"


def verifier(*keys: dict[str, object], at: float = NOW, **settings) -> AccessTokenVerifier:
    settings = {"issuer": ISSUER, "audience": AUDIENCE, "clock": lambda: at} | settings
    return AccessTokenVerifier({"keys": list(keys or [jwk(RSA, use="sig", alg="RS256")])}, **settings)


def refused(access_token: str | bytes, clause: str, by: AccessTokenVerifier | None = None) -> str:
    with pytest.raises(VerificationError) as caught:
        (by or verifier()).verify(access_token)
    assert caught.value.clause == clause, caught.value
    return str(caught.value)


def test_a_token_of_wipos_shape_passes_and_its_claims_come_back():
    verified = verifier(scope="das-api/das-access").verify(token())
    assert verified.claims == CLAIMS
    assert (verified.subject, verified.scopes, verified.expires_at) == (
        AUDIENCE,
        ("das-api/das-access",),
        NOW + 3589,
    )
    with pytest.raises(TypeError):
        verified.claims["aud"] = "another"


SIGNED = [
    *((f"{family}{bits}", RSA) for family in ("RS", "PS") for bits in (256, 384, 512)),
    ("ES256", EC["secp256r1"]),
    ("ES384", EC["secp384r1"]),
    ("ES512", EC["secp521r1"]),
    ("EdDSA", ED25519),
    ("EdDSA", ED448),
    ("Ed25519", ED25519),
    ("Ed448", ED448),
]


@pytest.mark.parametrize(("alg", "key"), SIGNED)
def test_each_asymmetric_algorithm_passes_and_a_changed_payload_fails(alg, key):
    by = verifier(jwk(key))
    good = token(key, alg)
    assert by.verify(good).subject == AUDIENCE
    assert by.verify(good.encode()).subject == AUDIENCE
    head, _, signature = good.split(".")
    refused(".".join((head, token(key, alg, sub="admin").split(".")[1], signature)), "signature", by)


def test_every_algorithm_that_is_offered_was_tried_above():
    assert {alg for alg, _ in SIGNED} == set(ALGORITHMS)


# --- the algorithm


def test_none_is_refused_with_and_without_a_signature():
    head, body, signature = token(header={"alg": "none"}).split(".")
    refused(f"{head}.{body}.", "alg")
    refused(f"{head}.{body}.{signature}", "alg")


def test_a_mac_keyed_with_the_issuers_public_key_is_refused():
    pem = RSA.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    head, body, _ = token(header={"alg": "HS256"}).split(".")
    forged = f"{head}.{body}.{b64(hmac.digest(pem, f'{head}.{body}'.encode(), 'sha256'))}"
    refused(forged, "alg")
    refused(forged, "alg", verifier(jwk(RSA), {"kty": "oct", "k": b64(pem), "kid": KID}))


@pytest.mark.parametrize("algorithms", [["none"], ["HS256"], ["RS256", "HS512"], ["ES256K"], []])
def test_none_and_macs_are_refused_even_if_configured(algorithms):
    with pytest.raises(ConfigError, match="algorithms"):
        verifier(algorithms=algorithms)


def test_only_the_configured_algorithms_pass():
    by = verifier(jwk(RSA), algorithms=["PS256"])
    assert by.verify(token(alg="PS256")).subject == AUDIENCE
    refused(token(alg="RS256"), "alg", by)


@pytest.mark.parametrize("alg", [None, "", "rs256", "RS1", 256, ["RS256"], {}, "ES256K"])
def test_an_alg_that_is_none_of_ours_is_refused(alg):
    refused(token(header={"alg": alg}), "alg")


def test_oct_keys_are_dropped():
    by = verifier({"kty": "oct", "k": b64(b"secret" * 8), "kid": KID, "alg": "RS256"})
    assert "no signing key" in refused(token(), "kid", by)


# --- the key


def test_keys_in_the_header_are_ignored():
    evil = rsa.generate_private_key(65537, 2048)
    own = jwk(evil)
    ways = {
        "jwk": own,
        "jku": "https://evil.example/jwks",
        "x5u": "https://evil.example/x",
        "x5c": ["MIIB"],
        "x5t": 7,
    }
    refused(token(evil, header=ways), "signature")
    assert (
        verifier().verify(token(header=ways | {"jwk": 5, "jku": [], "padding": "x" * 2000})).subject
        == AUDIENCE
    )


@pytest.mark.parametrize(
    "members", [{"alg": "PS256"}, {"alg": "RSA-OAEP"}, {"alg": 256}], ids=lambda members: str(members["alg"])
)
def test_the_alg_of_the_key_must_be_the_tokens(members):
    refused(token(), "alg", verifier(jwk(RSA, **members)))


@pytest.mark.parametrize(
    "members", [{"use": "enc"}, {"key_ops": ["encrypt"]}, {"use": ["sig"]}, {"key_ops": 5}]
)
def test_a_key_that_is_not_for_signatures_is_dropped(members):
    refused(token(), "kid", verifier(jwk(RSA, **members)))


@pytest.mark.parametrize(
    ("alg", "by", "key"),
    [
        ("ES256", jwk(RSA), P256),
        ("RS256", jwk(P256), RSA),
        ("ES256", jwk(EC["secp384r1"]), P256),
        ("EdDSA", jwk(P256), ED25519),
        ("Ed25519", jwk(ED448), ED25519),
    ],
)
def test_the_kind_of_the_key_must_fit_the_alg(alg, by, key):
    refused(token(key, alg), "alg", verifier(by))


def test_a_short_rsa_key_a_published_private_key_and_broken_keys_are_dropped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(token(SMALL_RSA), "kid", verifier(jwk(SMALL_RSA)))
    refused(token(), "kid", verifier(jwk(RSA, d=number(RSA.private_numbers().d))))
    exchange = x25519.X25519PrivateKey.generate()
    broken = [
        {},
        {"kty": ["RSA"], "kid": KID},
        {"kty": "RSA", "kid": KID},
        {"kty": "EC", "crv": {}, "kid": KID},
        jwk(RSA) | {"n": 5},
        jwk(RSA) | {"n": "!"},
        jwk(RSA) | {"e": "AA"},
        jwk(P256) | {"x": b64(bytes(32))},
        jwk(P256) | {"y": jwk(P256)["x"]},
        jwk(ED25519) | {"x": "AA"},
        jwk(exchange),
    ]
    refused(token(), "kid", verifier(*broken))
    assert verifier(*broken, jwk(RSA), "text", None).verify(token()).subject == AUDIENCE


def test_another_key_with_the_right_kid_fails_the_signature():
    refused(token(rsa.generate_private_key(65537, 2048)), "signature")


def test_without_kid_exactly_one_key_must_fit():
    anonymous = token(header={"kid": None})
    assert verifier(jwk(RSA), jwk(P256, kid="b")).verify(anonymous).subject == AUDIENCE
    assert verifier(jwk(RSA, kid=None), jwk(P256)).verify(anonymous).subject == AUDIENCE
    other = jwk(rsa.generate_private_key(65537, 2048), kid="b")
    assert "found 2" in refused(anonymous, "kid", verifier(jwk(RSA), other))
    assert "found 0" in refused(anonymous, "kid", verifier(jwk(P256)))


def test_two_fitting_keys_of_one_kid_are_refused_and_unfit_ones_do_not_count():
    assert verifier(jwk(P256), jwk(RSA)).verify(token()).subject == AUDIENCE
    refused(token(), "alg", verifier(jwk(RSA), jwk(rsa.generate_private_key(65537, 2048))))


@pytest.mark.parametrize(
    "kid", ["", "another", KID.rstrip("="), KID.replace("+", " "), KID.replace("/", "_")]
)
def test_a_kid_is_compared_as_it_stands(kid):
    refused(token(header={"kid": kid}), "kid")


@pytest.mark.parametrize("kid", [5, ["a"], {}, True])
def test_a_kid_that_is_no_text_is_refused(kid):
    refused(token(header={"kid": kid}), "kid", verifier(jwk(RSA, kid=kid)))


# --- what changes the meaning of the signed text


@pytest.mark.parametrize(
    ("clause", "members"),
    [
        ("crit", {"crit": ["exp"], "exp": 5}),
        ("crit", {"crit": []}),
        ("crit", {"crit": ["b64"], "b64": True}),
        ("b64", {"b64": True}),
        ("b64", {"b64": False}),
        ("enc", {"enc": "A256GCM"}),
    ],
)
def test_crit_b64_and_enc_are_refused(clause, members):
    refused(token(header=members), clause)


def test_jwe_is_refused_by_name():
    head, body, signature = token().split(".")
    assert "JWE" in refused(f"{head}.{body}.{signature}.AAAA.AAAA", "format")


def test_only_the_one_encoding_of_each_part_passes():
    head, body, signature = token().split(".")
    for bad in (
        f"{head}.{body}",
        f"{head}.{body}.{signature}.",
        f"{head}=.{body}.{signature}",
        f"{head}.{body}.{signature}==",
        f"{head}.{body}.{signature}\n",
        f" {head}.{body}.{signature}",
        f"{head}.{body}.{_other_spelling(signature)}",
        f"{head}.{body}.{signature.replace(signature[5], '+')}",
        f"{head}.{body}.é",
        "",
        "..",
        json.dumps({"payload": body, "protected": head, "signature": signature}),
    ):
        refused(bad, "format")
        refused(bad.encode(), "format")


def _other_spelling(part: str) -> str:
    """The same bytes with other unused bits in the last character."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = part[:-1] + alphabet[alphabet.index(part[-1]) ^ 1]
    assert urlsafe_b64decode(other + "==") == urlsafe_b64decode(part + "==")
    return other


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b'"text"',
        b"",
        b"{",
        b"\xff{}",
        b'{"exp": NaN}',
        b'{"sub": "a", "sub": "b"}',
        b"[" * 9000,
        b"1" * 5000,
        json.dumps(CLAIMS).encode("utf-16"),
    ],
    ids=lambda payload: repr(payload[:12]),
)
def test_claims_must_be_one_unambiguous_json_object(payload):
    refused(token(payload=payload), "format")


def test_a_header_that_names_alg_twice_is_refused():
    head = b64(b'{"alg":"none","alg":"RS256","kid":"' + KID.encode() + b'"}')
    body = token().split(".")[1]
    refused(f"{head}.{body}.{b64(sign('RS256', RSA, f'{head}.{body}'.encode()))}", "format")


def test_a_token_of_more_than_16_kib_is_refused():
    assert verifier().verify(token(realm="x" * 8000)).subject == AUDIENCE
    refused(token(realm="x" * 16000), "format")


# --- claims


@pytest.mark.parametrize(
    "issuer", [None, "", ISSUER + "/", ISSUER.upper(), "https://evil.example", [ISSUER], 5]
)
def test_iss_must_be_there_and_be_the_issuer_to_the_letter(issuer):
    refused(token(iss=issuer), "iss")


@pytest.mark.parametrize(
    "audience", [None, "", "das-api", [], ["a", "b"], [[AUDIENCE]], {AUDIENCE: 1}, 5, True]
)
def test_aud_must_be_there_and_name_us(audience):
    refused(token(aud=audience), "aud")


def test_aud_may_name_others_too():
    assert verifier().verify(token(aud=["other", AUDIENCE])).subject == AUDIENCE


def test_issuer_and_audience_have_no_default():
    keys = {"keys": [jwk(RSA)]}
    for missing in ("issuer", "audience"):
        settings = {"issuer": ISSUER, "audience": AUDIENCE}
        with pytest.raises(ConfigError, match="both must be named"):
            AccessTokenVerifier(keys, **settings | {missing: ""})
        del settings[missing]
        with pytest.raises(TypeError, match=missing):
            AccessTokenVerifier(keys, **settings)


@pytest.mark.parametrize("expiry", [None, NOW, NOW - 1, "9999999999", True, [NOW + 9]])
def test_exp_must_be_there_and_lie_ahead(expiry):
    refused(token(exp=expiry), "exp")


@pytest.mark.parametrize("text", ["1e400", "-1e400", "1" + "0" * 400])
def test_a_time_out_of_all_bounds_is_refused(text):
    payload = json.dumps(CLAIMS).replace(str(NOW + 3589), text)
    refused(token(payload=payload.encode()), "exp")


def test_leeway_bridges_a_difference_of_the_clocks_and_no_more():
    by = verifier(leeway=30)
    assert by.verify(token(exp=NOW - 29)).subject == AUDIENCE
    assert by.verify(token(nbf=NOW + 30)).subject == AUDIENCE
    assert "expired 30 s ago" in refused(token(exp=NOW - 30), "exp", by)
    assert "in 31 s" in refused(token(nbf=NOW + 31), "nbf", by)


@pytest.mark.parametrize("leeway", [-1, 61, 3600])
def test_leeway_is_a_minute_at_most(leeway):
    with pytest.raises(ConfigError, match="leeway"):
        verifier(leeway=leeway)
    assert verifier(leeway=60).leeway == 60


@pytest.mark.parametrize("not_before", [NOW + 1, "soon", False])
def test_nbf_must_have_come(not_before):
    refused(token(nbf=not_before), "nbf")


def test_nbf_may_be_missing():
    assert verifier().verify(token(nbf=None)).subject == AUDIENCE


@pytest.mark.parametrize(
    ("scope", "scopes"),
    [(None, ()), ("", ()), ("a b", ("a", "b")), ([], ()), (["a", "b"], ("a", "b")), (["a b"], ("a b",))],
)
def test_scope_is_read_as_text_and_as_array(scope, scopes):
    assert verifier().verify(token(scope=scope)).scopes == scopes


@pytest.mark.parametrize("scope", [5, {"a": 1}, [["a"]], [None], True])
def test_a_scope_that_is_neither_is_refused(scope):
    refused(token(scope=scope), "scope")


@pytest.mark.parametrize("scope", ["a", None, ["a b"], "a ab"])
def test_a_scope_that_was_asked_for_must_be_granted(scope):
    by = verifier(scope="b a")
    assert by.verify(token(scope="c a b")).scopes == ("c", "a", "b")
    assert "is missing" in refused(token(scope=scope), "scope", by)


def test_sub_must_be_a_text_where_it_is():
    assert verifier().verify(token(sub=None)).subject is None
    refused(token(sub=[AUDIENCE]), "sub")


def test_what_a_stranger_wrote_is_shown_cut_and_escaped():
    message = refused(token(iss="\x1b[2J\u202e" + "x" * 3000), "iss")
    assert message.isprintable()
    assert len(message) < 400


# --- fetching keys


class Issuer:
    """A JWK Set that is served, and how often it was asked for."""

    def __init__(self, *keys: dict[str, object]) -> None:
        self.keys, self.fetched, self.now, self.failure = list(keys), 0, float(NOW), None

    def __call__(self) -> object:
        self.fetched += 1
        if self.failure:
            raise self.failure
        return {"keys": self.keys}

    def verifier(self) -> AccessTokenVerifier:
        return AccessTokenVerifier(self, issuer=ISSUER, audience=AUDIENCE, clock=lambda: self.now)


def test_keys_are_fetched_once_and_used_for_an_hour():
    issuer = Issuer(jwk(RSA))
    by = issuer.verifier()
    long_lived = token(exp=NOW + 9999)
    assert issuer.fetched == 0
    for issuer.now in (NOW, NOW + 1, NOW + 3599):
        by.verify(long_lived)
    assert issuer.fetched == 1
    issuer.now = NOW + 3600
    by.verify(long_lived)
    assert issuer.fetched == 2


def test_a_key_that_the_issuer_withdrew_is_not_used_after_an_hour():
    issuer = Issuer(jwk(RSA))
    by = issuer.verifier()
    by.verify(token())
    issuer.keys, issuer.now = [], NOW + 3600
    refused(token(exp=NOW + 9999), "kid", by)


def test_stale_keys_are_never_used_when_the_issuer_cannot_be_reached():
    issuer = Issuer(jwk(RSA))
    by = issuer.verifier()
    by.verify(token())
    issuer.failure = TransportError("no route to host")
    by.verify(token())
    issuer.now = NOW + 3600
    with pytest.raises(TransportError, match="no route"):
        by.verify(token(exp=NOW + 9999))
    issuer.failure, issuer.now = None, NOW + 3605
    assert by.verify(token(exp=NOW + 9999)).subject == AUDIENCE


def test_a_clock_that_was_set_back_does_not_keep_keys_alive():
    issuer = Issuer(jwk(RSA))
    by = issuer.verifier()
    by.verify(token())
    issuer.now = NOW - 1
    by.verify(token())
    assert issuer.fetched == 2


def test_an_unknown_kid_fetches_at_once_and_then_once_a_minute():
    issuer = Issuer(jwk(RSA))
    by = issuer.verifier()
    by.verify(token())
    new = rsa.generate_private_key(65537, 2048)
    issuer.keys.append(jwk(new, kid="new"))
    assert by.verify(token(new, header={"kid": "new"})).subject == AUDIENCE
    assert issuer.fetched == 2
    for issuer.now in range(NOW, NOW + 60):
        refused(token(header={"kid": f"forged {issuer.now}"}), "kid", by)
    assert issuer.fetched == 2
    issuer.now = NOW + 60
    refused(token(header={"kid": "forged"}), "kid", by)
    assert issuer.fetched == 3


def test_a_key_set_that_is_none_is_refused_and_the_old_one_stays():
    issuer = Issuer(jwk(RSA))
    by = issuer.verifier()
    by.verify(token())
    issuer.keys = "none"
    refused(token(header={"kid": "new"}), "jwks", by)
    assert by.verify(token()).subject == AUDIENCE


def test_threads_share_one_fetch_and_one_failure():
    issuer = Issuer(jwk(RSA))

    def fetch() -> object:
        time.sleep(0.2)  # long enough for the other threads to want it too
        return issuer()

    by = AccessTokenVerifier(fetch, issuer=ISSUER, audience=AUDIENCE, clock=lambda: issuer.now)
    good = token()

    def outcomes() -> list[object]:
        results: list[object] = []

        def check(start: Callable[[], object]) -> None:
            start()
            try:
                results.append(by.verify(good).subject)
            except HsmSignerError as exc:
                results.append(str(exc))

        barrier = threading.Barrier(8)
        threads = [threading.Thread(target=check, args=(barrier.wait,)) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return results

    issuer.failure = TransportError("no route to host")
    assert outcomes() == ["no route to host"] * 8
    assert issuer.fetched == 1
    issuer.failure, issuer.now = None, NOW + 5
    assert outcomes() == [AUDIENCE] * 8
    assert issuer.fetched == 2


def test_a_slow_refetch_for_an_unknown_kid_delays_no_good_token():
    entered, release = threading.Event(), threading.Event()
    issuer = Issuer(jwk(RSA))

    def fetch() -> object:
        if issuer.fetched:
            entered.set()
            assert release.wait(30)
        return issuer()

    by = AccessTokenVerifier(fetch, issuer=ISSUER, audience=AUDIENCE, clock=lambda: NOW)
    by.verify(token())
    forger = threading.Thread(target=refused, args=(token(header={"kid": "forged"}), "kid", by))
    forger.start()
    assert entered.wait(30)
    assert by.verify(token()).subject == AUDIENCE
    release.set()
    forger.join()


def test_a_jwks_file_is_read_anew_and_judged(tmp_path: Path):
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [jwk(RSA)]}))
    by = AccessTokenVerifier(jwks_file(path), issuer=ISSUER, audience=AUDIENCE, clock=lambda: NOW)
    assert by.verify(token()).subject == AUDIENCE
    path.write_text(json.dumps({"keys": [jwk(P256, kid="new")]}))
    assert by.verify(token(P256, "ES256", header={"kid": "new"})).subject == AUDIENCE
    path.chmod(0o666)
    with pytest.raises(UnsafeFileError):
        jwks_file(path)()
    with pytest.raises(ConfigError, match="cannot read the JWK Set"):
        jwks_file(tmp_path / "none")()
    path.chmod(0o644)
    path.write_text("keys")
    with pytest.raises(ConfigError, match="holds no JWK Set"):
        jwks_file(path)()


# --- whatever comes

whatever = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        10**30,
        1.5,
        "",
        "\ud800",
        "RS256",
        "RSA",
        "EC",
        "OKP",
        "P-256",
        KID,
        [],
        [[]],
        ["a"],
        {},
        {"a": 1},
    ]
)


@whatever
@given(st.binary(max_size=200) | st.from_regex(rb"\A[\w-]{0,40}(\.[\w-]{0,40}){0,5}\Z"))
def test_no_bytes_raise_anything_but_a_verification_error(data):
    with pytest.raises(VerificationError):
        verifier().verify(data)
    with pytest.raises(VerificationError):
        verifier().verify(data.decode("utf-8", "surrogateescape"))


@whatever
@given(
    header=st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "x5c"]), VALUES, max_size=2),
    claims=st.dictionaries(st.sampled_from(["iss", "aud", "exp", "nbf", "scope", "sub"]), VALUES, max_size=2),
)
def test_no_signed_members_raise_anything_but_a_verification_error(header, claims):
    try:
        verifier().verify(token(header=header, **claims))
    except VerificationError as exc:
        assert str(exc)


@whatever
@given(
    st.dictionaries(
        st.sampled_from(["kty", "crv", "n", "e", "x", "y", "kid", "use", "alg", "key_ops"]),
        VALUES,
        max_size=4,
    )
)
def test_no_key_raises_anything_but_a_verification_error(members):
    by = verifier(members, jwk(RSA) | members, jwk(P256) | members, jwk(ED25519) | members)
    try:
        by.verify(token())
    except VerificationError as exc:
        assert str(exc)


@pytest.mark.parametrize(
    "typ", [None, "JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "Application/At+Jwt"]
)
def test_a_typ_of_access_tokens_passes(typ):
    assert verifier().verify(token(header={"typ": typ}))


@pytest.mark.parametrize(
    "typ", ["logout+jwt", "dpop+jwt", "secevent+jwt", "JWS", "", "x/at+jwt", "at+jwt ", 5, ["JWT"]]
)
def test_what_says_that_it_is_no_access_token_is_refused(typ):
    """RFC 8725 §3.11, RFC 9068 §4."""
    assert "typ" in refused(token(header={"typ": typ}), "typ")


FORKED = """
import os, signal, sys, threading
from hsm_signer.errors import HsmSignerError
from hsm_signer.verify import AccessTokenVerifier

parent, fetching = os.getpid(), threading.Event()

def keys():
    if os.getpid() == parent:
        fetching.set()
        threading.Event().wait()  # the issuer does not answer
    return {"keys": []}

verifier = AccessTokenVerifier(keys, issuer="i", audience="a")

def verify():
    try:
        verifier.verify(sys.argv[1])
    except HsmSignerError:
        return True

threading.Thread(target=verify, daemon=True).start()
fetching.wait()
if (child := os.fork()) == 0:
    signal.alarm(20)
    os._exit(0 if verify() else 1)
os._exit(os.waitpid(child, 0)[1])
"""


def test_a_child_of_a_process_that_is_fetching_keys_verifies():
    command = [sys.executable, "-W", "ignore", "-c", FORKED, token()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
