"""TokenClient over real TLS: one asks for all, assertions are fresh and stay secret, errors name causes."""

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trustme
from canary import assert_no_trace
from conftest import SoftToken
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from endpoint import GRANT, Endpoint, Reply, Seen, raw_server
from software_signer import SoftwareSigner

from hsm_signer import ClientAssertion, TokenClient, open_token
from hsm_signer.errors import (
    ConfigError,
    HsmSignerError,
    OAuthError,
    TokenError,
    TokenResponseError,
    TransportError,
)
from hsm_signer.oauth.cache import TokenCache
from hsm_signer.oauth.response import TokenResponse

CLIENT_ID = "das-api-auth"
SCOPE = "das-api/das-access"
WITHIN = 30  # seconds, far above what a test takes


@pytest.fixture
def signer() -> SoftwareSigner:
    return SoftwareSigner()


@pytest.fixture
def client(endpoint: Endpoint, ca_bundle: str, signer: SoftwareSigner) -> Callable[..., TokenClient]:
    """Make a client of the endpoint."""

    def make(*, assertion: ClientAssertion | None = None, **changes: Any) -> TokenClient:
        assertion = assertion or ClientAssertion(CLIENT_ID, endpoint.url, claims="oidc")
        options = {"signer": signer, "scope": SCOPE, "ca_bundle": ca_bundle, "deadline": WITHIN} | changes
        return TokenClient(endpoint.url, assertion=assertion, **options)

    return make


def part(assertion: str, index: int) -> dict[str, Any]:
    return json.loads(urlsafe_b64decode(assertion.split(".")[index] + "=="))


def in_threads(count: int, work: Callable[[], object]) -> list[object]:
    """What ``work`` returned or raised in each of the threads, which start together."""
    results: list[object] = []
    together = threading.Barrier(count)

    def run() -> None:
        together.wait()
        try:
            results.append(work())
        except HsmSignerError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- what is sent ----------------------------------------------------------------------------------


def test_the_form_has_the_fields_of_the_service_and_no_other(
    endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner
) -> None:
    response = client(assertion=ClientAssertion(CLIENT_ID, "https://as.example:443/token")).fetch()
    assert response.access_token == GRANT["access_token"]
    (seen,) = endpoint.seen
    assert (seen.method, seen.path) == ("POST", "/am/oauth2/access_token")
    form = seen.form
    assertion = form.pop("client_assertion")
    assert form == {
        "grant_type": "client_credentials",
        "scope": SCOPE,
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    }
    assert part(assertion, 0) == {"alg": "ES256", "typ": "JWT"}
    claims = part(assertion, 1)
    assert list(claims) == ["iss", "sub", "aud", "exp"]
    assert claims["aud"] == "https://as.example:443/token"
    signing_input, _, signature = assertion.rpartition(".")
    raw = urlsafe_b64decode(signature + "==")
    der = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    signer.key.public_key().verify(der, signing_input.encode(), ec.ECDSA(SHA256()))


def test_no_scope_is_left_out_of_the_form(endpoint: Endpoint, client: Callable[..., TokenClient]) -> None:
    assert client(scope="").fetch().scope == ""
    assert set(endpoint.seen[0].form) == {"grant_type", "client_assertion_type", "client_assertion"}


def test_a_key_in_a_token_buys_an_access_token(
    endpoint: Endpoint, client: Callable[..., TokenClient], soft_token: SoftToken
) -> None:
    with open_token(soft_token.uri, module=soft_token.module, pin=soft_token.pin) as token:
        key = f"oauth-{os.getpid()}"
        token.generate_key(key)
        assert client(signer=token.signer(key)).fetch().access_token == GRANT["access_token"]
        token.delete_key(key)


def test_the_assertion_is_stamped_after_the_signer_is_open(
    endpoint: Endpoint,
    client: Callable[..., TokenClient],
    signer: SoftwareSigner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks = {name: getattr(time, name) for name in ("time", "monotonic")}
    began = int(time.time())

    @contextmanager
    def slow() -> Iterator[SoftwareSigner]:
        for name, clock in clocks.items():  # a person takes a minute and a half to type a PIN
            monkeypatch.setattr(time, name, lambda clock=clock: clock() + 90)
        yield signer

    client(signer=slow, deadline=30).fetch()  # and that time does not count
    claims = part(endpoint.seen[0].form["client_assertion"], 1)
    assert claims["iat"] >= began + 90
    assert claims["exp"] == claims["iat"] + 60


# --- memory, cache, threads, processes -------------------------------------------------------------


class Opener:
    """Counts how often a signer was opened and closed."""

    def __init__(self, signer: SoftwareSigner) -> None:
        self.signer, self.opened, self.closed = signer, 0, 0

    @contextmanager
    def __call__(self) -> Iterator[SoftwareSigner]:
        self.opened += 1
        try:
            yield self.signer
        finally:
            self.closed += 1


def test_a_live_access_token_is_used_again_and_no_signer_opened(
    endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner
) -> None:
    opener = Opener(signer)
    tokens = client(signer=opener)
    first = tokens.fetch()
    assert tokens.fetch(min_validity=3500) is first
    assert (opener.opened, opener.closed) == (1, 1)
    assert tokens.fetch(min_validity=3600) is not first
    assert tokens.fetch(force=True) is not first
    assert len(endpoint.seen) == opener.opened == opener.closed == 3


def test_a_short_lived_access_token_is_returned_but_not_used_again(
    endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = Reply(body=GRANT | {"expires_in": 30})
    tokens = client()
    tokens.fetch()
    tokens.fetch()
    assert len(endpoint.seen) == 2
    tokens.fetch(min_validity=5)
    assert len(endpoint.seen) == 2


def test_an_access_token_of_unknown_life_is_used_for_a_minute(
    endpoint: Endpoint, client: Callable[..., TokenClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.answer = Reply(body={"access_token": "abc", "token_type": "bearer"})
    tokens = client()
    assert tokens.fetch().expires_at is None
    tokens.fetch()
    assert len(endpoint.seen) == 1
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 61)
    tokens.fetch()
    assert len(endpoint.seen) == 2


@pytest.mark.parametrize("jump", [-7200, 7200])
def test_a_clock_that_jumps_does_not_make_an_access_token_live_longer(
    jump: int, endpoint: Endpoint, client: Callable[..., TokenClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.answer = Reply(body=GRANT | {"expires_in": 2})
    tokens = client()
    tokens.fetch()
    now = time.time
    time.sleep(1.5)
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    tokens.fetch(min_validity=1)
    assert len(endpoint.seen) == 2


def test_one_of_many_threads_asks(endpoint: Endpoint, client: Callable[..., TokenClient]) -> None:
    def slow(_: Seen) -> Reply:
        time.sleep(0.2)
        return Reply(body=GRANT | {"expires_in": 50})  # shorter than what the threads want

    endpoint.answer = slow
    tokens = client()
    responses = in_threads(8, tokens.fetch)
    assert len(endpoint.seen) == 1
    assert len({id(response) for response in responses}) == 1


def test_one_of_many_threads_replaces_an_access_token_that_was_refused(
    endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = lambda _: Reply(body=GRANT | {"access_token": f"access-token-{len(endpoint.seen)}"})
    tokens = client()
    refused = tokens.fetch().access_token
    responses = in_threads(8, lambda: tokens.replace(refused).access_token)
    assert responses == ["access-token-2"] * 8
    assert tokens.fetch().access_token == "access-token-2"
    assert len(endpoint.seen) == 2


def test_a_thread_waits_for_another_no_longer_than_its_deadline(
    endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    asked = threading.Event()

    def slow(_: Seen) -> Reply:
        asked.set()
        time.sleep(1.5)
        return Reply()

    endpoint.answer = slow
    tokens = client(deadline=0.5)
    thread = threading.Thread(target=lambda: in_threads(1, tokens.fetch))
    thread.start()
    began = time.monotonic()
    assert all(isinstance(result, TransportError) for result in in_threads(3, tokens.fetch))
    assert time.monotonic() - began < WITHIN
    thread.join()


def cache_in(directory: Path) -> TokenCache:
    return TokenCache(directory, {"endpoint": "e", "client_id": CLIENT_ID, "scope": SCOPE})


def test_a_cached_access_token_needs_no_signer(
    endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner, tmp_path: Path
) -> None:
    opener = Opener(signer)
    first = client(cache=cache_in(tmp_path / "c"), signer=opener).fetch()
    again = client(cache=cache_in(tmp_path / "c"), signer=opener)
    assert again.fetch() == first
    assert again.fetch(min_validity=3000) == first
    assert opener.opened == len(endpoint.seen) == 1
    assert client(cache=cache_in(tmp_path / "c"), signer=opener).fetch(force=True).access_token
    assert opener.opened == len(endpoint.seen) == 2


def test_an_access_token_that_was_refused_is_not_taken_from_the_cache(
    endpoint: Endpoint, client: Callable[..., TokenClient], tmp_path: Path
) -> None:
    endpoint.answer = lambda _: Reply(body=GRANT | {"access_token": f"access-token-{len(endpoint.seen)}"})
    first, second = (client(cache=cache_in(tmp_path / "c")) for _ in range(2))
    assert first.fetch().access_token == second.fetch().access_token == "access-token-1"
    assert first.replace("access-token-1").access_token == "access-token-2"
    assert (
        second.replace("access-token-1").access_token == "access-token-2"
    )  # which the first one has fetched
    assert len(endpoint.seen) == 2


def test_one_of_many_clients_asks_where_they_share_a_cache(
    endpoint: Endpoint, client: Callable[..., TokenClient], tmp_path: Path
) -> None:
    def slow(_: Seen) -> Reply:
        time.sleep(0.2)
        return Reply()

    endpoint.answer = slow
    responses = in_threads(8, lambda: client(cache=cache_in(tmp_path / "c")).fetch())
    assert len(endpoint.seen) == 1
    assert {type(response) for response in responses} == {TokenResponse}


def test_while_a_person_is_asked_for_the_pin_the_others_fetch(
    endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner, tmp_path: Path
) -> None:
    asked, typed = threading.Event(), threading.Event()
    got: list[TokenResponse] = []

    @contextmanager
    def slow_person() -> Iterator[SoftwareSigner]:
        asked.set()
        assert typed.wait(WITHIN)
        yield signer

    def interactive() -> None:
        options = {"signer": slow_person, "cache": cache_in(tmp_path / "c"), "attended": True}
        got.append(client(**options).fetch())

    person = threading.Thread(target=interactive)
    person.start()
    assert asked.wait(WITHIN)
    unattended = client(cache=cache_in(tmp_path / "c"), deadline=5).fetch()
    typed.set()
    person.join()
    assert got == [unattended]
    assert len(endpoint.seen) == 1


def test_the_time_that_a_person_takes_does_not_count(
    client: Callable[..., TokenClient], signer: SoftwareSigner, tmp_path: Path
) -> None:
    @contextmanager
    def slow_person() -> Iterator[SoftwareSigner]:
        time.sleep(4)
        yield signer

    asking = client(signer=slow_person, cache=cache_in(tmp_path / "c"), deadline=3, attended=True)
    assert asking.fetch().access_token == GRANT["access_token"]


def test_a_person_is_not_asked_where_the_cache_has_it(
    endpoint: Endpoint, client: Callable[..., TokenClient], tmp_path: Path
) -> None:
    kept = client(cache=cache_in(tmp_path / "c")).fetch()
    assert client(signer=None, cache=cache_in(tmp_path / "c"), attended=True).fetch() == kept


def test_a_hit_in_the_cache_loads_nothing_heavy(
    endpoint: Endpoint, client: Callable[..., TokenClient], ca_bundle: str, tmp_path: Path
) -> None:
    client(cache=cache_in(tmp_path / "c")).fetch()
    program = """
import sys
before = set(sys.modules)
from pathlib import Path
from hsm_signer import ClientAssertion, TokenClient
from hsm_signer.oauth.cache import TokenCache
url, bundle, directory = sys.argv[1:]
scope = "das-api/das-access"
cache = TokenCache(Path(directory), {"endpoint": "e", "client_id": "das-api-auth", "scope": scope})
assertion = ClientAssertion("das-api-auth", url)
client = TokenClient(url, assertion=assertion, signer=None, scope=scope, cache=cache, ca_bundle=bundle)
print(client.fetch().access_token == sys.stdin.read())
heavy = "requests urllib3 ssl socket pkcs11 cryptography asn1crypto filelock email http platformdirs"
print(*(set(heavy.split()) & set(sys.modules) - before))
"""
    answer = run(program, endpoint.url, ca_bundle, str(tmp_path / "c"), typed=str(GRANT["access_token"]))
    assert answer == ["True", ""]
    assert len(endpoint.seen) == 1


def run(program: str, *arguments: str, typed: str = "") -> list[str]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=WITHIN)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_child_that_was_forked_while_a_thread_was_asking_can_ask_itself(
    endpoint: Endpoint, ca_bundle: str
) -> None:
    def slow(_: Seen) -> Reply:
        time.sleep(0.5)
        return Reply()

    endpoint.answer = slow
    program = """
import os, sys, threading, time
url, bundle, tests = sys.argv[1:]
sys.path.insert(0, tests)
from software_signer import SoftwareSigner
from hsm_signer import ClientAssertion, TokenClient
signer, assertion = SoftwareSigner(), ClientAssertion("c", url)
client = TokenClient(url, assertion=assertion, signer=signer, scope="a", ca_bundle=bundle)
client.fetch()  # a fork in the middle of an import would leave the child with Python's import lock held
thread = threading.Thread(target=lambda: client.fetch(force=True))
thread.start()
while signer.signed < 2:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    os._exit(0 if client.fetch(force=True).access_token else 1)
assert os.waitpid(child, 0)[1] == 0
thread.join()
print(client.fetch().token_type)
"""
    assert run(program, endpoint.url, ca_bundle, str(Path(__file__).parent)) == ["Bearer"]
    assert len(endpoint.seen) == 3


# --- trying again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_trouble_is_tried_again_with_a_fresh_assertion_and_one_open_signer(
    status: int, endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner
) -> None:
    endpoint.answer = [Reply(status, b"later"), Reply(status, b"later"), Reply()]
    opener = Opener(signer)
    assert client(signer=opener).fetch().access_token
    assertions = [seen.form["client_assertion"] for seen in endpoint.seen]
    assert len({part(assertion, 1)["jti"] for assertion in assertions}) == 3
    assert opener.opened == 1
    assert signer.signed == 3


def test_a_connection_that_breaks_is_tried_again(
    ca: trustme.CA, ca_bundle: str, signer: SoftwareSigner
) -> None:
    asked = []

    def talk(connection: socket.socket) -> None:
        request = b""
        while b"client_assertion=" not in request:
            request += connection.recv(65536)
        asked.append(request)
        if len(asked) == 1:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        body = json.dumps(GRANT).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    with raw_server(ca, talk) as port:
        url = f"https://127.0.0.1:{port}/"
        tokens = TokenClient(
            url, assertion=ClientAssertion(CLIENT_ID, url), signer=signer, scope=SCOPE, ca_bundle=ca_bundle
        )
        assert tokens.fetch().access_token == GRANT["access_token"]
    assert signer.signed == 2


@pytest.mark.parametrize(
    "wish", ["1", lambda: formatdate(time.time() + 2, usegmt=True)], ids=["seconds", "date"]
)
def test_retry_after_is_honoured(
    wish: str | Callable[[], str], endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    value = wish if isinstance(wish, str) else wish()
    endpoint.answer = [Reply(503, b"", {"Retry-After": value}), Reply()]
    began = time.monotonic()
    client().fetch()
    assert time.monotonic() - began >= 0.9


@pytest.mark.parametrize(
    "nonsense", ["soon", "-5", "1.5", "", "\xff", "Mon, 99 Foo 2026 00:00:00 GMT", "9" * 400]
)
def test_a_retry_after_that_is_nonsense_is_passed_over(
    nonsense: str, endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = [Reply(503, b"", {"Retry-After": nonsense}), Reply()]
    client().fetch()
    assert len(endpoint.seen) == 2


@pytest.mark.parametrize(
    "wish", [lambda: "3600", lambda: formatdate(time.time() + 3600, usegmt=True)], ids=["seconds", "date"]
)
def test_a_server_that_wants_more_time_than_we_have_is_left_alone(
    wish: Callable[[], str], endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = Reply(429, b"", {"Retry-After": wish()})
    with pytest.raises(TransportError, match="429") as caught:
        client().fetch()
    assert len(endpoint.seen) == 1
    assert 3000 < caught.value.retry_after <= 3600
    assert "left alone for" in caught.value.hint


def test_what_was_tried_is_in_the_error_and_the_deadline_holds(
    endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = Reply(503, {"error": "server_error", "error_description": "come \x1b back"})
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        client(deadline=3).fetch()
    assert time.monotonic() - began < WITHIN
    assert len(caught.value.attempts) == len(endpoint.seen) >= 2
    assert all("503: server_error: come \\x1b back" in attempt for attempt in caught.value.attempts)
    said = str(caught.value)
    assert said.startswith(f"tried {len(endpoint.seen)} times in ") and said.count("come") == 1
    assert caught.value.__context__ is None


def test_there_is_an_end_to_trying(
    endpoint: Endpoint, client: Callable[..., TokenClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.answer = Reply(503, b"", {"Retry-After": "0"})
    with pytest.raises(TransportError, match=r"^tried 6 times in [0-9] s: "):
        client().fetch()
    assert len(endpoint.seen) == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_verdict_is_not_argued_with(
    status: int, endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = Reply(status, b"")
    with pytest.raises(OAuthError) as caught:
        client().fetch()
    assert caught.value.status == status
    assert len(endpoint.seen) == 1


def test_a_server_that_is_not_trusted_is_tried_once(
    endpoint: Endpoint, client: Callable[..., TokenClient], tmp_path: Path, signer: SoftwareSigner
) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(TransportError, match="certificate is not accepted") as caught:
        client(ca_bundle=tmp_path / "other.pem").fetch()
    assert len(caught.value.attempts) == signer.signed == 1
    assert endpoint.seen == []


def test_a_redirect_is_no_access_token(
    ca: trustme.CA, endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    with Endpoint(ca, Reply()) as other:
        endpoint.answer = Reply(307, b"", {"Location": other.url})
        with pytest.raises(TokenResponseError, match="307"):
            client().fetch()
        assert other.seen == []


# --- causes ----------------------------------------------------------------------------------------


def hint_of(client: TokenClient) -> str:
    with pytest.raises(OAuthError) as caught:
        client.fetch()
    assert all(line.isprintable() for line in caught.value.hint.splitlines())
    return caught.value.hint


def test_a_refusal_names_likely_causes_in_order_with_our_values(
    endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner
) -> None:
    for reply in (
        Reply(403, b""),
        Reply(401, {"error": "invalid_client"}),
        Reply(400, {"error": "invalid_grant"}),
    ):
        endpoint.answer = reply
        hint = hint_of(client())
        causes = [
            f"thumbprint {signer.kid}",
            f"aud than '{endpoint.url}'",
            f"client id '{CLIENT_ID}'",
            f"scope '{SCOPE}'",
            "ruled out: the clock, ",
        ]
        lines = hint.splitlines()
        assert len(lines) == len(causes)
        assert all(cause in line for cause, line in zip(causes, lines, strict=True))
        assert [line[:3] for line in lines] == ["1. ", "2. ", "3. ", "4. ", "rul"]
    endpoint.answer = Reply(401, b"")
    keyed = ClientAssertion(CLIENT_ID, endpoint.url, kid="key-7")
    assert "kid 'key-7'" in hint_of(client(assertion=keyed))
    own = ClientAssertion(CLIENT_ID, endpoint.url, kid=True)
    assert f"kid '{signer.kid}'" in hint_of(client(assertion=own))


@pytest.mark.parametrize("status", [404, 405])
def test_where_nothing_is_the_url_is_named_first(
    status: int, endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = Reply(status, b"")
    assert hint_of(client()).startswith(f"1. {endpoint.url} is not the token endpoint: the doctor's check")


class PulledAfterSigning:
    """A card that is gone when the server's answer comes."""

    alg = "ES256"

    def __init__(self) -> None:
        self._signer = SoftwareSigner()

    def sign(self, data: bytes) -> bytes:
        return self._signer.sign(data)

    @property
    def kid(self) -> str:
        raise TokenError("the token is gone", code="CKR_DEVICE_REMOVED")

    jwk = kid


def test_a_refusal_comes_through_though_the_card_is_pulled_meanwhile(
    endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = Reply(401, {"error": "invalid_client"})
    assert f"aud than '{endpoint.url}'" in hint_of(client(signer=PulledAfterSigning()))


@pytest.mark.parametrize(
    ("error", "first"),
    [
        ("invalid_scope", f"scope '{SCOPE}' was asked for"),
        ("unauthorized_client", f"may client id '{CLIENT_ID}' use the grant"),
        ("unsupported_grant_type", "does https://"),
    ],
)
def test_an_error_that_says_its_cause_gets_that_one(
    error: str, first: str, endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = Reply(400, {"error": error})
    hint = hint_of(client())
    assert hint.startswith(first)
    assert "thumbprint" not in hint


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ("Invalid claim: 'aud'", "1. the server expects another aud"),
        ("The client does not exist on this server.", "1. client id"),
        ("JWT has expired: exp", "1. the clocks differ"),
        ("Client authentication failed", "1. the certificate"),
        ("Invalid signature.", "1. the certificate"),
    ],
)
def test_a_server_that_tells_what_it_minds_is_believed(
    said: str, first: str, endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    body = {"error": "invalid_client", "error_description": said}
    endpoint.answer = Reply(401, body, {"Date": "", "Content-Type": "application/json"})
    assert hint_of(client()).startswith(first)


@pytest.mark.parametrize(
    ("lead", "offset", "said"),
    [
        (300, 0, ["1. our clock is 300 s behind", "lives 60 s", "clock-offset = 300"]),
        (-300, 0, ["1. our clock is 300 s ahead of", "clock-offset = -300"]),
        (300, 200, ["1. our clock is 100 s behind", "clock-offset = 300"]),
        (30, 0, ["3. our clock is 30 s behind"]),
        (2000, 0, ["1. our clock is 2000 s behind", "set the clock"]),
        (0, 0, ["\nruled out: the clock, "]),
    ],
)
def test_a_clock_that_is_off_is_measured(
    lead: int, offset: int, said: list[str], endpoint: Endpoint, client: Callable[..., TokenClient]
) -> None:
    endpoint.answer = lambda _: Reply(401, b"", {"Date": formatdate(time.time() + lead + 0.5, usegmt=True)})
    hint = hint_of(client(assertion=ClientAssertion(CLIENT_ID, endpoint.url, clock_offset=offset)))
    numbers = {str(abs(n) + d): str(abs(n)) for n in (lead, lead - offset) for d in (-1, 1)}
    for near, exact in numbers.items():  # the Date header knows whole seconds only
        hint = hint.replace(f" {near} s ", f" {exact} s ").replace(f"= {near}", f"= {exact}")
        hint = hint.replace(f"= -{near}", f"= -{exact}")
    for text in said:
        assert text in hint
    if abs(lead) > 600:
        assert "clock-offset" not in hint


def test_a_date_that_is_none_is_passed_over(endpoint: Endpoint, client: Callable[..., TokenClient]) -> None:
    for date in ("yesterday", "", "Tue, 99 Nov 2026 99:99:99 GMT"):
        endpoint.answer = Reply(401, b"", {"Date": date})
        assert "the clocks differ by more than the 60 s" in hint_of(client())


# --- secrets ---------------------------------------------------------------------------------------


def test_a_server_that_echoes_the_assertion_gets_it_into_no_error_and_no_log(
    endpoint: Endpoint, client: Callable[..., TokenClient], caplog: pytest.LogCaptureFixture
) -> None:
    def echo(seen: Seen) -> Reply:
        sent = seen.form["client_assertion"]
        body = {"error": sent, "error_description": f"\x1b[31m [red]{sent}[/red] \u202e", "error_uri": sent}
        return Reply(
            (401, 503, 200)[(len(endpoint.seen) - 1) % 3],
            body,
            {"Content-Type": "application/json", "X": sent, "Retry-After": "999"},
        )

    caplog.set_level(logging.DEBUG)
    endpoint.answer = echo
    for _ in range(3):
        with pytest.raises(HsmSignerError) as caught:
            client(deadline=WITHIN).fetch()
        canaries = [seen.form["client_assertion"] for seen in endpoint.seen]
        canaries += [piece for canary in canaries for piece in canary.split(".")[1:]]
        assert_no_trace(caught.value, canaries)
        assert not any(canary in caplog.text for canary in canaries)
        assert "\x1b" not in f"{caught.value} {caught.value.hint} {caplog.text}"


def test_no_access_token_is_in_an_error_a_log_or_a_repr(
    endpoint: Endpoint, client: Callable[..., TokenClient], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    canary = "opaque-access-token-canary"
    bad = [{"scope": "smaller"}, {"token_type": "mac"}, {"expires_in": "never"}, {"error": "invalid_client"}]
    for change in bad:
        endpoint.answer = Reply(body=GRANT | {"access_token": canary} | change)
        with pytest.raises(OAuthError) as caught:
            client().fetch()
        assert_no_trace(caught.value, [canary])
    endpoint.answer = Reply(body=GRANT | {"access_token": canary})
    tokens = client()
    assert canary not in repr(tokens.fetch())
    assert canary not in f"{tokens!r} {tokens._held!r}"
    assert canary not in caplog.text


# --- exchange --------------------------------------------------------------------------------------


def test_an_assertion_made_elsewhere_is_exchanged_without_a_signer(
    endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner
) -> None:
    tokens = client(signer=None)
    assertion = ClientAssertion(CLIENT_ID, endpoint.url).issue(signer)
    assert tokens.exchange(assertion).access_token == GRANT["access_token"]
    assert endpoint.seen[0].form["client_assertion"] == assertion
    with pytest.raises(ConfigError, match="no signer"):
        tokens.fetch()


def test_an_assertion_that_is_not_for_this_server_or_client_is_not_sent(
    endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner
) -> None:
    url = endpoint.url
    good = ClientAssertion(CLIENT_ID, url).issue(signer)

    def with_claims(**changes: object) -> str:
        from hsm_signer.jose import sign_compact

        claims = {"iss": CLIENT_ID, "sub": CLIENT_ID, "aud": url, "exp": int(time.time()) + 60} | changes
        return sign_compact({"alg": "ES256"}, {k: v for k, v in claims.items() if v is not ...}, signer)

    bad = {
        ClientAssertion(CLIENT_ID, url + "/").issue(signer): "made with aud",
        ClientAssertion(CLIENT_ID, url.upper()).issue(signer): "made with aud",
        ClientAssertion("other", url).issue(signer): "made with iss 'other'",
        ClientAssertion(CLIENT_ID, url).issue(
            signer, now=int(time.time()) - 61
        ): "expired 1 s ago|expired 2 s ago",
        with_claims(sub="other"): "made with sub",
        with_claims(aud=[url]): "made with aud",
        with_claims(aud=...): "made with aud None",
        with_claims(exp=...): "no exp",
        with_claims(exp=str(int(time.time()) + 60)): "no exp",
        with_claims(exp=True): "no exp",
        with_claims(exp=10**400): "no exp",
        "": "no compact JWS",
        "a.b.c": "no compact JWS",
        "W10.W10.W10": "no compact JWS",
        good + "\n": "no compact JWS",
        good + ".x": "no compact JWS",
        good.rpartition(".")[0] + ".": "no compact JWS",
        good.replace(".", " ."): "no compact JWS",
    }
    for assertion, fault in bad.items():
        with pytest.raises(ConfigError, match=f"^assertion: .*({fault})") as caught:
            client(signer=None).exchange(assertion)
        assert_no_trace(caught.value, [assertion] if len(assertion) > 20 else [])
    assert endpoint.seen == []


def test_a_clock_offset_counts_for_an_assertion_made_elsewhere(
    endpoint: Endpoint, client: Callable[..., TokenClient], signer: SoftwareSigner
) -> None:
    ours = ClientAssertion(CLIENT_ID, endpoint.url, clock_offset=-300)
    assert client(signer=None, assertion=ours).exchange(ours.issue(signer))
    with pytest.raises(ConfigError, match="expired"):
        client(signer=None).exchange(ours.issue(signer))


def test_an_exchange_is_tried_again_only_where_nothing_was_sent(
    ca: trustme.CA,
    endpoint: Endpoint,
    client: Callable[..., TokenClient],
    signer: SoftwareSigner,
    ca_bundle: str,
) -> None:
    assertion = ClientAssertion(CLIENT_ID, endpoint.url).issue(signer)
    endpoint.answer = [Reply(503, b""), Reply()]
    with pytest.raises(TransportError, match="503") as caught:
        client(signer=None).exchange(assertion)
    assert len(endpoint.seen) == 1
    assert_no_trace(caught.value, [assertion])

    with socket.socket() as deaf:  # bound, so that nobody else gets the port, and not listening
        deaf.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{deaf.getsockname()[1]}/"
        nobody = TokenClient(
            url,
            assertion=ClientAssertion(CLIENT_ID, url),
            signer=None,
            scope=SCOPE,
            ca_bundle=ca_bundle,
            deadline=3,
        )
        with pytest.raises(TransportError, match="refused") as caught:
            nobody.exchange(ClientAssertion(CLIENT_ID, url).issue(signer))
    assert len(caught.value.attempts) >= 2
    assert not caught.value.sent


# --- what is wrong from the start ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"scope": "a  b"}, "scope"),
        ({"scope": " a"}, "scope"),
        ({"scope": 'a"b'}, "scope"),
        ({"scope": "ä"}, "scope"),
        ({"scope": "a\n"}, "scope"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": -1}, "deadline"),
        ({"deadline": float("inf")}, "deadline"),
        ({"deadline": float("nan")}, "deadline"),
        ({"timeout": (0, 1)}, "timeout"),
        ({"ca_bundle": "/nonexistent/ca.pem"}, "ca-bundle"),
        ({"proxy": "socks5://127.0.0.1:9"}, "proxy"),
    ],
)
def test_what_is_wrong_is_said_when_the_client_is_made(
    changes: dict[str, Any], fault: str, client: Callable[..., TokenClient]
) -> None:
    def never() -> Any:
        raise AssertionError("a signer was opened")

    with pytest.raises(ConfigError, match=fault):
        client(signer=never, **changes)


@pytest.mark.parametrize("url", ["http://as.example/token", "https://user:pw@as.example/", "as.example", ""])
def test_a_token_endpoint_is_an_https_url(url: str, signer: SoftwareSigner) -> None:
    with pytest.raises(ConfigError, match=r"^token endpoint: "):
        TokenClient(url, assertion=ClientAssertion(CLIENT_ID, "x"), signer=signer, scope="")


def test_roots_that_openssl_does_not_read_are_found_before_a_signer_is_opened(
    ca: trustme.CA, client: Callable[..., TokenClient], signer: SoftwareSigner, tmp_path: Path
) -> None:
    import base64
    import ssl

    der = bytearray(ssl.PEM_cert_to_DER_cert(ca.cert_pem.bytes().decode()))
    der[4] = 0x31
    pem = f"-----BEGIN CERTIFICATE-----\n{base64.encodebytes(der).decode()}-----END CERTIFICATE-----\n"
    (tmp_path / "bad.pem").write_text(pem)
    opener = Opener(signer)
    with pytest.raises(ConfigError, match="ca-bundle"):
        client(signer=opener, ca_bundle=tmp_path / "bad.pem").fetch()
    assert opener.opened == 0
