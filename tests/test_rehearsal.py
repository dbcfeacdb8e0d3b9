"""The rehearsal server's rules, by assertions that ``cryptography`` signs."""

import base64
import datetime
import hashlib
import hmac
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from hsm_signer.errors import ConfigError
from hsm_signer.rehearsal import SCOPES, RehearsalServer

JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decoded(part: str) -> Any:
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def certificate_of(key: Any) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "office private_key_jwt authentication")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
    certificate = builder.not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM)


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(encoding, form)


def es256(key: ec.EllipticCurvePrivateKey) -> Callable[[bytes], bytes]:
    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return sign


def compact(header: object, claims: object, sign: Callable[[bytes], bytes]) -> str:
    signing_input = f"{b64url(json.dumps(header).encode())}.{b64url(json.dumps(claims).encode())}"
    return f"{signing_input}.{b64url(sign(signing_input.encode()))}"


@dataclass(frozen=True)
class Office:
    """A client and the server that it is registered with."""

    server: RehearsalServer
    key: ec.EllipticCurvePrivateKey
    certificate: Path

    def claims(self, **changed: object) -> dict[str, object]:
        endpoint = self.server.token_endpoint
        claims = {"iss": "office", "sub": "office", "aud": endpoint, "exp": int(time.time()) + 10}
        return {name: value for name, value in (claims | changed).items() if value is not None}

    def assertion(self, key: ec.EllipticCurvePrivateKey | None = None, **changed: object) -> str:
        return compact({"alg": "ES256", "typ": "JWT"}, self.claims(**changed), es256(key or self.key))

    def post(self, assertion: str | None, **changed: str | None) -> requests.Response:
        form = {
            "grant_type": "client_credentials",
            "scope": "das-api/das-access",
            "client_assertion_type": JWT_BEARER,
            "client_assertion": assertion,
        } | changed
        return requests.post(self.server.token_endpoint, data=form, timeout=30)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = tmp_path_factory.mktemp("office") / "es256_cert.pem"
    certificate.write_bytes(certificate_of(key))
    with RehearsalServer({"office": certificate}) as server:
        yield Office(server, key, certificate)


@pytest.fixture
def refusals(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "hsm_signer.rehearsal")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_assertion_of_the_registered_key_buys_an_access_token_of_wipos_shape(office: Office) -> None:
    answer = office.post(office.assertion())
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["Cache-Control"] == "no-store"
    body = answer.json()
    assert set(body) == {"access_token", "scope", "token_type", "expires_in"}
    assert (body["scope"], body["token_type"], body["expires_in"]) == ("das-api/das-access", "Bearer", 3599)
    claims = decoded(body["access_token"].split(".")[1])
    issuer = office.server.issuer
    assert (claims["sub"], claims["aud"], claims["iss"]) == ("office", "office", issuer)
    assert claims["scope"] == ["das-api/das-access"]
    assert {"realm", "auditTrackingId", "nbf", "iat", "exp", "jti"} <= set(claims)
    assert claims["exp"] == claims["iat"] + 3599


def test_the_access_token_verifies_under_the_published_key(office: Office) -> None:
    metadata = requests.get(f"{office.server.issuer}/.well-known/openid-configuration", timeout=30).json()
    assert metadata["issuer"] == office.server.issuer
    assert metadata["token_endpoint"] == office.server.token_endpoint
    assert metadata["jwks_uri"] == f"{office.server.issuer}/connect/jwk_uri"
    [jwk] = requests.get(metadata["jwks_uri"], timeout=30).json()["keys"]
    assert (jwk["kty"], jwk["alg"], jwk["use"]) == ("RSA", "RS256", "sig")
    assert not {"d", "p", "q"} & set(jwk)

    access_token = office.post(office.assertion()).json()["access_token"]
    signing_input, signature = access_token.rsplit(".", 1)
    header = decoded(signing_input.split(".")[0])
    assert (header["alg"], header["kid"]) == ("RS256", jwk["kid"])
    assert jwk["kid"].endswith("=")
    n, e = (int.from_bytes(base64.urlsafe_b64decode(jwk[name] + "==")) for name in "ne")
    key = rsa.RSAPublicNumbers(e, n).public_key()
    signature_bytes = base64.urlsafe_b64decode(signature + "==")
    key.verify(signature_bytes, signing_input.encode(), padding.PKCS1v15(), hashes.SHA256())


def test_an_assertion_without_jti_can_be_sent_again(office: Office) -> None:
    assertion = office.assertion()
    assert [office.post(assertion).status_code for _ in range(2)] == [200, 200]


def test_both_scopes_are_granted_where_both_are_asked(office: Office) -> None:
    answer = office.post(office.assertion(), scope=" ".join(SCOPES))
    assert answer.json()["scope"] == " ".join(SCOPES)


BAD_CLAIMS = {
    "aud is the issuer": (lambda o: {"aud": o.server.issuer}, "'aud'"),
    "aud without its port": (lambda o: {"aud": re.sub(r":\d+/", "/", o.server.token_endpoint)}, "'aud'"),
    "aud with a slash more": (lambda o: {"aud": o.server.token_endpoint + "/"}, "'aud'"),
    "aud in a list": (lambda o: {"aud": [o.server.token_endpoint]}, "'aud'"),
    "aud missing": (lambda o: {"aud": None}, "aud"),
    "exp past": (lambda o: {"exp": int(time.time()) - 1}, "expired"),
    "exp missing": (lambda o: {"exp": None}, "exp"),
    "exp is text": (lambda o: {"exp": "tomorrow"}, "exp"),
    "exp 31 minutes ahead": (lambda o: {"exp": int(time.time()) + 1860}, "unreasonable: exp is 18"),
    "exp beyond all numbers": (lambda o: {"exp": 10**400}, "unreasonable"),
    "exp is a truth value": (lambda o: {"exp": True}, "exp"),
    "iss is another": (lambda o: {"iss": "other"}, "Issuer and Subject MUST match"),
    "iss missing": (lambda o: {"iss": None}, "iss"),
    "sub missing": (lambda o: {"sub": None}, "sub"),
    "unknown client": (lambda o: {"iss": "other", "sub": "other"}, "client does not exist"),
    "sub is a list": (lambda o: {"sub": ["office"]}, "sub"),
}


@pytest.mark.parametrize("case", BAD_CLAIMS)
def test_claims_that_break_a_rule_are_refused_with_the_reason(
    office: Office, case: str, refusals: Callable[[], list[str]]
) -> None:
    changed, reason = BAD_CLAIMS[case]
    answer = office.post(office.assertion(**changed(office)))
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client")
    [line] = refusals()
    assert line.startswith("refused: invalid_client: ")
    assert re.search(reason, line)


def test_a_wrong_audience_is_logged_beside_the_expected_one(
    office: Office, refusals: Callable[[], list[str]]
) -> None:
    office.post(office.assertion(aud="https://www5.wipo.int/am/oauth2/access_token"))
    [line] = refusals()
    assert f"expected '{office.server.token_endpoint}'" in line
    assert "found 'https://www5.wipo.int/am/oauth2/access_token'" in line


def test_an_assertion_of_another_key_is_refused(office: Office, refusals: Callable[[], list[str]]) -> None:
    answer = office.post(office.assertion(key=ec.generate_private_key(ec.SECP256R1())))
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client")
    [line] = refusals()
    assert "Invalid signature: not by the key of the registered certificate" in line


def _unsigned(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("alg", ["none", "HS256", "ES384", "RS256", 'x"\\', "\x1b[31m", ["ES256"], None])
def test_another_algorithm_than_es256_is_refused(
    office: Office, alg: object, refusals: Callable[[], list[str]]
) -> None:
    secret = public_pem(office.key)  # the confusion of a public key with an HMAC secret
    sign = _unsigned if alg == "none" else lambda data: hmac.digest(secret, data, hashlib.sha256)
    answer = office.post(compact({"alg": alg, "typ": "JWT"}, office.claims(), sign))
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client")
    [line] = refusals()
    assert line.isprintable()


@pytest.mark.parametrize(
    "assertion", ["", "a.b.c", "é.é.é", "..", "x" * 200_000, f"{b64url(b'[]')}.e30.AA", "e30.e30.AA"]
)
def test_what_is_no_assertion_is_refused(
    office: Office, assertion: str, refusals: Callable[[], list[str]]
) -> None:
    answer = office.post(assertion)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_client")
    assert len(refusals()) == 1


def test_a_payload_that_is_no_object_is_refused(office: Office, refusals: Callable[[], list[str]]) -> None:
    for payload in ([], "text", 7, None):
        answer = office.post(compact({"alg": "ES256"}, payload, es256(office.key)))
        assert answer.json()["error"] == "invalid_client"
    assert len(refusals()) == 4


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"scope": "das-api/other"}, "invalid_scope"),
        ({"scope": "das-api/das-access das-api/other"}, "invalid_scope"),
        ({"scope": None}, "invalid_scope"),
        ({"grant_type": "authorization_code"}, "unsupported_grant_type"),
        ({"grant_type": "\x1b[31m"}, "unsupported_grant_type"),
        ({"grant_type": None}, "unsupported_grant_type"),
        ({"client_assertion_type": "urn:other"}, "invalid_client"),
        ({"client_assertion_type": None, "client_assertion": None, "client_id": "office"}, "invalid_client"),
        ({"client_assertion": None, "client_id": "office", "client_secret": "x"}, "invalid_client"),
    ],
)
def test_a_form_that_breaks_a_rule_is_refused(
    office: Office, changed: dict[str, str | None], error: str, refusals: Callable[[], list[str]]
) -> None:
    answer = office.post(office.assertion(), **changed)
    assert (answer.status_code, answer.json()["error"]) == (400, error)
    [line] = refusals()
    assert line.startswith(f"refused: {error}")
    assert line.isprintable()


def test_an_assertion_is_never_logged(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    access_token = office.post(office.assertion()).json()["access_token"]
    refused = office.assertion(aud="x")
    office.post(refused)
    assert "POST /am/oauth2/access_token" in caplog.text
    for secret in (access_token, refused):
        assert secret.split(".")[2] not in caplog.text


def test_many_requests_are_answered_at_once(office: Office) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: office.post(office.assertion()).status_code, range(64)))
    assert answers == [200] * 64


def test_a_replaced_certificate_counts_from_the_next_request_on(
    tmp_path: Path, refusals: Callable[[], list[str]]
) -> None:
    certificate = tmp_path / "cert.pem"
    first, second = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    certificate.write_bytes(certificate_of(first))
    with RehearsalServer({"office": certificate}) as server:
        office = Office(server, first, certificate)
        assert office.post(office.assertion()).status_code == 200
        certificate.write_bytes(certificate_of(second))
        assert office.post(office.assertion()).status_code == 400
        assert office.post(office.assertion(key=second)).status_code == 200
        certificate.unlink()
        assert office.post(office.assertion(key=second)).json()["error"] == "invalid_client"
        assert "No such file" in refusals()[-1]


def test_each_client_has_its_own_certificate(tmp_path: Path) -> None:
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("office", "other")}
    for name, key in keys.items():
        (tmp_path / name).write_bytes(certificate_of(key))
    with RehearsalServer({name: tmp_path / name for name in keys}) as server:
        office = Office(server, keys["office"], tmp_path / "office")
        other = {"iss": "other", "sub": "other"}
        assert office.post(office.assertion()).status_code == 200
        assert office.post(office.assertion(key=keys["other"], **other)).status_code == 200
        assert office.post(office.assertion(**other)).status_code == 400


@pytest.mark.parametrize("kind", ["missing", "public key", "two", "private key", "rsa", "p384", "cut short"])
def test_what_is_not_one_certificate_of_a_p256_key_is_not_registered(kind: str, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    good = certificate_of(key)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    contents = {
        "public key": lambda: public_pem(key),
        "two": lambda: good * 2,
        "private key": lambda: key.private_bytes(encoding, form, serialization.NoEncryption()) + good,
        "rsa": lambda: certificate_of(rsa.generate_private_key(65537, 2048)),
        "p384": lambda: certificate_of(ec.generate_private_key(ec.SECP384R1())),
        "cut short": lambda: b"".join(good.splitlines(keepends=True)[i] for i in (0, 1, 2, -1)),
    }
    if kind in contents:
        (tmp_path / "cert.pem").write_bytes(contents[kind]())
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        RehearsalServer({"office": tmp_path / "cert.pem"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost", "example.org", ""])  # noqa: S104  # refused
def test_only_loopback_addresses_are_listened_on(office: Office, host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        RehearsalServer({"office": office.certificate}, host=host)


def test_a_port_that_is_taken_is_an_error_of_configuration(office: Office) -> None:
    port = int(office.server.issuer.split(":")[2].split("/")[0])
    with pytest.raises(
        ConfigError, match=rf"cannot listen on 127\.0\.0\.1, port {port}: Address already in use"
    ) as failed:
        RehearsalServer({"office": office.certificate}, port=port)
    assert failed.value.hint == "port 0 takes a free one"


def test_over_tls_a_silent_connection_holds_up_nobody(office: Office, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    tls = (tmp_path / "chain.pem", tmp_path / "key.pem")
    with RehearsalServer({"office": office.certificate}, tls=tls) as server:
        assert server.token_endpoint.startswith("https://127.0.0.1:")
        port = int(server.issuer.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)):
            url = f"{server.issuer}/.well-known/openid-configuration"
            answer = requests.get(url, verify=str(tmp_path / "ca.pem"), timeout=30)
        assert answer.json()["token_endpoint"] == server.token_endpoint


def test_tls_files_that_do_not_belong_together_are_an_error_of_configuration(
    office: Office, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="TLS certificate"):
        RehearsalServer({"office": office.certificate}, tls=(office.certificate, tmp_path / "none.pem"))


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_its_endpoint_says_what_it_refuses_and_ends_quietly(
    office: Office, name: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hsm_signer.cli", "rehearse"]
    command += ["--certificate", str(office.certificate), "--client-id", "office"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        endpoint = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/am/oauth2/access_token", endpoint)
        assertion = office.assertion(aud="https://www5.wipo.int/am/oauth2/access_token")
        form = {"grant_type": "client_credentials", "client_assertion_type": JWT_BEARER}
        answer = requests.post(endpoint, data=form | {"client_assertion": assertion}, timeout=30)
        assert answer.status_code == 400
        process.send_signal(name)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert re.fullmatch(rf"hsm-token: warning: refused: .*'aud'.*expected '{endpoint}'.*\n", err)
