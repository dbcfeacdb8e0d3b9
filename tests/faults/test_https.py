"""Whatever a server does over TLS: an error in time, and no assertion anywhere else."""

import datetime
import email.utils
import logging
import re
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs

import pytest
import trustme
from canary import assert_no_trace
from software_signer import SoftwareSigner

from faults import servers
from faults.servers import Behaviour, Server, respond
from hsm_signer import ClientAssertion, HsmSignerError, TokenClient, TokenResponse
from hsm_signer.errors import TokenResponseError, TransportError
from hsm_signer.jose import b64url

ACCESS_TOKEN = "access-token-canary"
GRANT = {"access_token": ACCESS_TOKEN, "token_type": "Bearer", "expires_in": 300}
SHORT, LONG = 4, 60  # seconds: to wait for nothing, and for what comes sooner or later on a busy machine
LATEST = 30  # seconds: this machine has other things to do


class RecordingSigner(SoftwareSigner):
    """Keeps what it signed, as the canaries to look for: also what never reached a server."""

    def __init__(self) -> None:
        super().__init__()
        self.canaries: list[str] = []

    def sign(self, data: bytes) -> bytes:
        signature = super().sign(data)
        self.canaries += [data.decode().split(".")[1], b64url(signature)]
        return signature


@dataclass
class Outcome:
    """What one ``fetch`` came to."""

    response: TokenResponse | None
    error: HsmSignerError | None
    seconds: float
    signer: RecordingSigner


@pytest.fixture
def elsewhere(server_tls: ssl.SSLContext) -> Iterator[Server]:
    """Where nothing must arrive; it would take what it is sent with thanks."""
    with Server(server_tls, respond(body=GRANT)) as elsewhere:
        yield elsewhere
        assert elsewhere.connections == 0


@pytest.fixture
def fetch(
    ca_bundle: str,
    elsewhere: Server,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Outcome]:
    """Fetch from a server with everything logged that anybody logs, and look for leaks."""

    def fetch(server: Server, deadline: float = LONG, timeout: float = 30) -> Outcome:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, elsewhere.url)
        caplog.set_level(1)
        signer = RecordingSigner()
        endpoint = f"{server.url}/token"
        client = TokenClient(
            endpoint,
            assertion=ClientAssertion("office", endpoint, claims="oidc"),
            signer=signer,
            scope="das-api/das-access",
            ca_bundle=ca_bundle,
            timeout=(timeout, timeout),
            deadline=deadline,
        )
        response = error = None
        began = time.monotonic()
        try:
            response = client.fetch()
        except HsmSignerError as caught:
            error = caught
        outcome = Outcome(response, error, time.monotonic() - began, signer)
        canaries = [*signer.canaries, ACCESS_TOKEN]
        if error:
            assert_no_trace(error, canaries)
            assert outcome.seconds < deadline + LATEST
        printed = capfd.readouterr()
        for text in (
            caplog.text,
            *(str(vars(record)) for record in caplog.records),
            printed.out,
            printed.err,
        ):
            assert not [canary for canary in canaries if canary in text]
        heads = [request.partition(b"\r\n\r\n")[0].decode("latin-1") for request in server.requests]
        assert not [canary for canary in canaries if canary in "".join(heads)]
        return outcome

    return fetch


def assertions(server: Server) -> list[str]:
    forms = [parse_qs(request.decode().partition("\r\n\r\n")[2]) for request in server.requests]
    return [form["client_assertion"][0] for form in forms]


# What arrived is no access token: is it tried again, and what is said


@pytest.mark.parametrize(
    ("fault", "error", "said", "is_tried_again"),
    [
        (servers.reset, TransportError, "no complete answer|reset", True),
        (servers.silence, TransportError, "no answer", True),
        (servers.half_a_header_and_silence, TransportError, "no answer", True),
        (servers.half_a_header, TransportError, "no complete answer", True),
        (servers.truncated_body, TransportError, "no complete answer", True),
        (servers.bad_chunks, TransportError, "no complete answer", True),
        (servers.drip, TransportError, "no answer before the deadline", False),
        (servers.drip_header, TransportError, "no answer before the deadline", False),
        (servers.huge_header, TransportError, "no complete answer", True),
        (servers.large_body, TransportError, "larger than 1048576 bytes", False),
        (servers.endless_chunks, TransportError, "larger than 1048576 bytes", False),
        (servers.gzip_bomb, TokenResponseError, "is no UTF-8", False),
        (servers.duplicate_keys, TokenResponseError, "has a member twice", False),
        (respond(body=GRANT, media_type="text/html"), TokenResponseError, "media type text/html", False),
        (respond(body=GRANT, media_type=None), TokenResponseError, "media type none", False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_of_the_server_is_an_error_in_time(
    server_tls: ssl.SSLContext,
    fetch: Callable[..., Outcome],
    fault: Behaviour,
    error: type[HsmSignerError],
    said: str,
    is_tried_again: bool,
) -> None:
    with Server(server_tls, fault) as server:
        outcome = fetch(server, SHORT, timeout=1) if is_tried_again or "deadline" in said else fetch(server)
        assert type(outcome.error) is error
        assert re.search(said, str(outcome.error))
        assert (len(server.requests) > 1) == is_tried_again
        if isinstance(outcome.error, TransportError):
            assert len(outcome.error.attempts) == len(server.requests)
        assert len(set(assertions(server))) == len(server.requests)


@pytest.mark.parametrize(
    "fault", [servers.reset, servers.silence, servers.truncated_body, servers.bad_chunks]
)
def test_after_a_fault_the_next_attempt_counts(
    server_tls: ssl.SSLContext, fetch: Callable[..., Outcome], fault: Behaviour
) -> None:
    with Server(server_tls, fault, respond(body=GRANT)) as server:
        outcome = fetch(server, timeout=2)
        assert outcome.response and outcome.response.access_token == ACCESS_TOKEN
        assert len(set(assertions(server))) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_and_is_not_followed(
    server_tls: ssl.SSLContext, fetch: Callable[..., Outcome], elsewhere: Server, status: int
) -> None:
    with Server(server_tls, respond(status, b"", None, Location=f"{elsewhere.url}/token")) as server:
        outcome = fetch(server)
        assert type(outcome.error) is TokenResponseError
        assert str(status) in str(outcome.error)
        assert len(server.requests) == 1


# Whom we talk to


def untrusted(ca: trustme.CA, context: ssl.SSLContext) -> None:
    trustme.CA().issue_cert("localhost").configure_cert(context)


def expired(ca: trustme.CA, context: ssl.SSLContext) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    ca.issue_cert("localhost", not_after=yesterday).configure_cert(context)


def not_yet_valid(ca: trustme.CA, context: ssl.SSLContext) -> None:
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    ca.issue_cert("localhost", not_before=tomorrow).configure_cert(context)


def wrong_host(ca: trustme.CA, context: ssl.SSLContext) -> None:
    ca.issue_cert("other.example", "127.0.0.1").configure_cert(context)


def common_name_only(ca: trustme.CA, context: ssl.SSLContext) -> None:
    ca.issue_cert("other.example", common_name="localhost").configure_cert(context)


def tls_1_1_only(ca: trustme.CA, context: ssl.SSLContext) -> None:
    ca.issue_cert("localhost").configure_cert(context)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")


@pytest.mark.parametrize(
    ("configure", "said"),
    [
        (untrusted, "certificate is not accepted: .*issuer"),
        (expired, "certificate is not accepted: .*expired"),
        (not_yet_valid, "certificate is not accepted: .*not yet valid"),
        (wrong_host, "certificate is not accepted: .*mismatch"),
        (common_name_only, "certificate is not accepted: .*mismatch"),
        (tls_1_1_only, "TLS failed: .*VERSION"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_server_that_cannot_prove_itself_is_sent_nothing(
    ca: trustme.CA,
    fetch: Callable[..., Outcome],
    configure: Callable[[trustme.CA, ssl.SSLContext], None],
    said: str,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    configure(ca, context)
    with Server(context, respond(body=GRANT)) as server:
        outcome = fetch(server)
        assert type(outcome.error) is TransportError
        assert re.search(said, str(outcome.error))
        assert not outcome.error.sent
        assert (server.requests, server.connections) == ([], 1)


def test_a_server_that_speaks_plain_http_is_sent_nothing(fetch: Callable[..., Outcome]) -> None:
    with Server(None, respond(400, b"plain http here", "text/plain")) as server:
        outcome = fetch(server)
        assert type(outcome.error) is TransportError
        assert re.search("TLS failed: WRONG_VERSION_NUMBER", str(outcome.error))
        assert not outcome.error.sent
        assert not [request for request in server.requests if b"assertion" in request]


# Retry-After


def http_date(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("wait", ["2", lambda: http_date(3)], ids=["seconds", "date"])
def test_a_server_that_asks_to_wait_is_waited_for(
    server_tls: ssl.SSLContext,
    fetch: Callable[..., Outcome],
    status: int,
    wait: str | Callable[[], str],
) -> None:
    wait = wait if isinstance(wait, str) else wait()
    with Server(server_tls, respond(status, b"", None, Retry_After=wait), respond(body=GRANT)) as server:
        outcome = fetch(server)
        assert outcome.response
        assert outcome.seconds > 1.9  # a date has whole seconds
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    "nonsense", ["soon", "-5", "", "1e9", "9" * 40, "Fri, 31 Feb 2026 00:00:00 GMT", "\xff"]
)
def test_nonsense_in_retry_after_is_as_if_it_was_not_there(
    server_tls: ssl.SSLContext, fetch: Callable[..., Outcome], nonsense: str
) -> None:
    with Server(server_tls, respond(503, b"", None, Retry_After=nonsense), respond(body=GRANT)) as server:
        assert fetch(server).response
        assert len(server.requests) == 2


@pytest.mark.parametrize("wait", ["3600", lambda: http_date(3600)], ids=["seconds", "date"])
def test_a_wait_past_the_deadline_is_an_error_at_once(
    server_tls: ssl.SSLContext, fetch: Callable[..., Outcome], wait: str | Callable[[], str]
) -> None:
    wait = wait if isinstance(wait, str) else wait()
    with Server(server_tls, respond(503, b"", None, Retry_After=wait)) as server:
        outcome = fetch(server, SHORT)
        assert type(outcome.error) is TransportError
        assert re.search("left alone for 3[56]", outcome.error.hint or "")
        assert len(server.requests) == 1


def test_the_log_that_was_searched_has_urllib3s_lines_in_it(
    server_tls: ssl.SSLContext, fetch: Callable[..., Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    with Server(server_tls, respond(body=GRANT)) as server:
        assert fetch(server).response
        assert assertions(server)
    assert {"hsm_signer.oauth.grant", "urllib3.connectionpool"} <= {record.name for record in caplog.records}
    assert logging.DEBUG in {record.levelno for record in caplog.records}
