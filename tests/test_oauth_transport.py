"""One bounded request over real TLS: where it goes, whom it trusts, and when it is back."""

import contextlib
import itertools
import logging
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from canary import assert_no_trace
from endpoint import Endpoint, Reply, connect_proxy, raw_server

from hsm_signer import __version__
from hsm_signer.errors import ConfigError, TransportError
from hsm_signer.oauth.transport import Answer, Transport
from hsm_signer.url import Url, parse

CANARY = "eyJhbGciOiJFUzI1NiJ9.eyJjYW5hcnkiOiJjYW5hcnkifQ.Y2FuYXJ5LWNhbmFyeS1jYW5hcnk"
FORM = {"grant_type": "client_credentials", "client_assertion": CANARY}
WITHIN = 30  # seconds: far above what is asserted, far below waiting for ever


def url_of(port: int, host: str = "127.0.0.1", scheme: str = "https", path: str = "/token") -> Url:
    return parse(f"{scheme}://{host}:{port}{path}", what="test")


def post(transport: Transport, url: Url, seconds: float = WITHIN) -> Answer:
    return transport.request("POST", url, form=FORM, deadline=time.monotonic() + seconds)


def failure(transport: Transport, url: Url, seconds: float = WITHIN) -> TransportError:
    """The error of a request, which holds nothing of what was sent."""
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        post(transport, url, seconds)
    assert time.monotonic() - began < WITHIN
    assert_no_trace(caught.value, [CANARY, CANARY[-20:]])
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert str(caught.value).startswith(url.origin)
    return caught.value


@pytest.fixture
def transport(ca_bundle: str) -> Transport:
    return Transport(ca_bundle)


def test_a_post_sends_the_form_and_nothing_of_a_session(endpoint: Endpoint, transport: Transport) -> None:
    endpoint.answer = Reply(403, b"no", {"Retry-After": "7", "Set-Cookie": "a=b", "Content-Type": "text/x"})
    url = url_of(endpoint.port, path="/a;b/c%20d?x=1&y=%5B")
    answer = post(transport, url)
    assert (answer.status, answer.content_type, answer.body) == (403, "text/x", b"no")
    assert answer.retry_after == "7"
    assert answer.date.endswith("GMT")
    assert "no" not in repr(answer)
    post(transport, url)
    for seen in endpoint.seen:
        assert (seen.method, seen.path) == ("POST", "/a;b/c%20d?x=1&y=%5B")
        assert seen.form == FORM
        assert seen.headers == {
            "Host": f"127.0.0.1:{endpoint.port}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"hsm-token/{__version__}",
            "Content-Type": "application/x-www-form-urlencoded",
            "Content-Length": str(len(seen.body)),
        }


def test_a_get_asks_for_the_media_type_that_is_wanted(endpoint: Endpoint, transport: Transport) -> None:
    transport.request(
        "GET", url_of(endpoint.port), accept="application/jwk-set+json", deadline=time.monotonic() + WITHIN
    )
    assert endpoint.seen[0].method == "GET"
    assert endpoint.seen[0].headers["Accept"] == "application/jwk-set+json"
    assert endpoint.seen[0].body == b""


def test_the_connection_is_kept_alive(endpoint: Endpoint, transport: Transport) -> None:
    for _ in range(3):
        post(transport, url_of(endpoint.port))
    assert len({seen.peer for seen in endpoint.seen}) == 1


def test_a_connection_that_the_server_has_closed_is_not_used_again(
    endpoint: Endpoint, transport: Transport
) -> None:
    endpoint.answer = Reply(headers={"Connection": "close"})
    for _ in range(2):
        assert post(transport, url_of(endpoint.port)).status == 200
    assert len({seen.peer for seen in endpoint.seen}) == 2


def test_http_to_loopback_works(transport: Transport) -> None:
    with Endpoint(None, Reply()) as endpoint:
        assert post(transport, url_of(endpoint.port, scheme="http")).status == 200
        assert endpoint.seen[0].form == FORM


# --- the environment -------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port, and all that anybody says to it."""
    heard: list[bytes] = []

    def listen(connection: socket.socket) -> None:
        heard.append(b"connected")
        connection.settimeout(1)
        with contextlib.suppress(OSError):
            heard.append(connection.recv(65536))

    with raw_server(None, listen) as port:
        yield port, heard


_PROXY_VARIABLES = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"]


@pytest.mark.parametrize("variable", _PROXY_VARIABLES)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_proxy_variable_takes_a_request_to_loopback(
    variable: str,
    scheme: str,
    ca: trustme.CA,
    transport: Transport,
    listener: tuple[int, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, heard = listener
    monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    with Endpoint(ca if scheme == "https" else None, Reply()) as endpoint:
        assert post(transport, url_of(endpoint.port, scheme=scheme)).status == 200
    assert heard == []


@pytest.mark.parametrize("variable", _PROXY_VARIABLES)
def test_no_proxy_variable_takes_a_request_to_another_host(
    variable: str, transport: Transport, listener: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, heard = listener
    monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    assert not failure(transport, url_of(443, "as.invalid")).sent
    assert heard == []


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[trustme.CA, str]:
    """Another authority, and its certificate in a file."""
    authority = trustme.CA(organization_name="Foreign")
    authority.cert_pem.write_to_path(tmp_path / "foreign.pem")
    return authority, str(tmp_path / "foreign.pem")


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
@pytest.mark.parametrize("ours", [True, False])
def test_no_ca_variable_makes_us_trust_a_foreign_root(
    variable: str,
    ours: bool,
    foreign: tuple[trustme.CA, str],
    ca_bundle: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority, path = foreign
    monkeypatch.setenv(variable, path)
    with Endpoint(authority, Reply()) as endpoint:
        error = failure(Transport(ca_bundle if ours else None), url_of(endpoint.port))
        assert endpoint.seen == []
    assert "certificate is not accepted" in str(error)
    assert "ca-bundle" in error.hint
    assert (error.sent, error.transient) == (False, False)


def test_a_ca_bundle_replaces_the_roots_of_certifi(
    foreign: tuple[trustme.CA, str], ca_bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, path = foreign
    monkeypatch.setattr("certifi.where", lambda: path)
    with Endpoint(authority, Reply()) as endpoint:
        assert post(Transport(), url_of(endpoint.port)).status == 200
        assert "not accepted" in str(failure(Transport(ca_bundle), url_of(endpoint.port)))
        assert len(endpoint.seen) == 1


def test_no_key_log_is_written(
    endpoint: Endpoint, ca_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    post(Transport(ca_bundle), url_of(endpoint.port))
    assert not (tmp_path / "keys").exists()


def test_a_netrc_adds_no_credentials(
    endpoint: Endpoint, ca_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login mallory password mallory\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    post(Transport(ca_bundle), url_of(endpoint.port))
    assert "Authorization" not in endpoint.seen[0].headers


# --- the proxy -------------------------------------------------------------------------------------


def test_a_proxy_sees_the_name_and_its_own_password_only(endpoint: Endpoint, ca_bundle: str) -> None:
    with connect_proxy(None, endpoint.port) as (port, heard):
        transport = Transport(ca_bundle, proxy=f"http://us%40er:p%3Aw@127.0.0.1:{port}")
        for _ in range(2):
            assert post(transport, url_of(8443, "as.test")).status == 200
    (request,) = heard
    assert request.startswith(b"CONNECT as.test:8443 HTTP/1.")
    assert b"Proxy-Authorization: Basic dXNAZXI6cDp3\r\n" in request  # us@er:p:w
    assert endpoint.seen[0].headers["Host"] == "as.test:8443"
    assert "Proxy-Authorization" not in endpoint.seen[0].headers


def test_an_https_proxy_must_have_a_certificate_that_we_trust(
    ca: trustme.CA, endpoint: Endpoint, ca_bundle: str
) -> None:
    for authority, trusted in ((ca, True), (trustme.CA(), False)):
        with connect_proxy(authority, endpoint.port) as (port, heard):
            transport = Transport(ca_bundle, proxy=f"https://localhost:{port}")
            if trusted:
                assert post(transport, url_of(8443, "as.test")).status == 200
                assert len(heard) == 1
            else:
                assert "certificate is not accepted" in str(failure(transport, url_of(8443, "as.test")))
                assert heard == []


def test_what_a_proxy_refuses_was_not_sent(ca_bundle: str) -> None:
    with connect_proxy(None, 9, b"407 Pay me \x1b[31m") as (port, _):
        error = failure(Transport(ca_bundle, proxy=f"http://127.0.0.1:{port}"), url_of(443, "as.test"))
    assert "through the proxy" in str(error)
    assert "407" in str(error)
    assert str(error).isprintable()
    assert not error.sent


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_never_gets_a_request_to_loopback(
    host: str, endpoint: Endpoint, ca_bundle: str, listener: tuple[int, list[bytes]]
) -> None:
    port, heard = listener
    transport = Transport(ca_bundle, proxy=f"http://127.0.0.1:{port}")
    assert post(transport, url_of(endpoint.port, host)).status == 200
    assert heard == []


# --- TLS -------------------------------------------------------------------------------------------


def test_a_certificate_for_another_name_is_refused(ca: trustme.CA, transport: Transport) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("as.test", "127.0.0.2").configure_cert(context)
    heard = []
    with raw_server(None, lambda c: heard.append(context.wrap_socket(c, server_side=True).recv(1))) as port:
        error = failure(transport, url_of(port))
    assert "127.0.0.1" in str(error)
    assert (error.sent, error.transient) == (False, False)
    assert heard == []


def test_an_expired_certificate_is_refused(ca: trustme.CA, transport: Transport) -> None:
    certificate = ca.issue_cert("127.0.0.1", not_after=datetime.now(UTC) - timedelta(days=1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    with raw_server(None, lambda c: context.wrap_socket(c, server_side=True).close()) as port:
        error = failure(transport, url_of(port))
    assert "expired" in str(error)
    assert (error.sent, error.transient) == (False, False)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_1_is_refused(ca: trustme.CA, transport: Transport) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with raw_server(None, lambda c: context.wrap_socket(c, server_side=True).close()) as port:
        error = failure(transport, url_of(port))
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the server does speak TLS 1.1
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.minimum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with socket.create_connection(("127.0.0.1", port)) as plain, old.wrap_socket(plain) as spoken:
            assert spoken.version() == "TLSv1.1"
    assert "TLS failed" in str(error)
    assert (error.sent, error.transient) == (False, False)


def test_plain_http_on_the_tls_port_is_named(transport: Transport) -> None:
    with Endpoint(None, Reply()) as endpoint:
        error = failure(transport, url_of(endpoint.port))
        assert endpoint.seen == []
    assert "TLS failed" in str(error)
    assert (error.sent, error.transient) == (False, False)


# --- servers that misbehave ------------------------------------------------------------------------


def _request(connection: socket.socket) -> None:
    data = b""
    while CANARY.encode() not in data:
        data += connection.recv(65536)


def _says(answer: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        _request(connection)
        connection.sendall(answer)

    return talk


def _resets(connection: socket.socket) -> None:
    _request(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _hangs_up_in_tls(connection: socket.socket) -> None:
    connection.recv(100)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
FAULTS = {
    "reset": _resets,
    "no answer at all": _says(b""),
    "half a status line": _says(b"HTTP/1.1 2"),
    "half a header": _says(HEAD + b"Content-Le"),
    "no HTTP": _says(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a truncated body": _says(HEAD + b'Content-Length: 100\r\n\r\n{"access_token":"abc"}'),
    "bad chunks": _says(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "chunks without an end": _says(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"),
    "a header of 200 kB": _says(HEAD + b"X: " + b"x" * 200_000 + b"\r\n\r\n{}"),
    "a thousand header fields": _says(HEAD + b"X: x\r\n" * 1000 + b"\r\n{}"),
    "a body of 20 MB": _says(HEAD + b"\r\n" + b" " * 20_000_000),
    "a body of 20 MB that says so": _says(HEAD + b"Content-Length: 20000000\r\n\r\n" + b" " * 20_000_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_answer_is_an_error_that_says_it_may_have_been_sent(
    fault: str, ca: trustme.CA, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with raw_server(ca, FAULTS[fault]) as port:
        error = failure(transport, url_of(port))
    assert error.sent
    assert error.transient is ("20 MB" not in fault)
    assert CANARY not in caplog.text


def test_a_header_line_that_is_none_is_quoted_in_no_log(
    ca: trustme.CA, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = b"you sent " + CANARY.encode() + b"\r\n"
    with raw_server(ca, _says(HEAD + echo + b"Content-Length: 2\r\n\r\n{}")) as port:
        post(transport, url_of(port))
    assert "answered 200" in caplog.text
    assert CANARY not in caplog.text


def test_a_server_that_hangs_up_during_tls_got_nothing(transport: Transport) -> None:
    with raw_server(None, _hangs_up_in_tls) as port:
        error = failure(transport, url_of(port))
    assert (error.sent, error.transient) == (False, True)


def test_nobody_there_is_an_error_that_may_pass(transport: Transport) -> None:
    with socket.socket() as deaf:  # bound, so that nobody else gets the port, and not listening
        deaf.bind(("127.0.0.1", 0))
        for scheme in ("http", "https"):
            error = failure(transport, url_of(deaf.getsockname()[1], scheme=scheme))
            assert "refused" in str(error)
            assert (error.sent, error.transient) == (False, True)


def test_a_name_that_does_not_exist_is_said_at_once(transport: Transport) -> None:
    error = failure(transport, url_of(443, "as.invalid"))
    assert "the name is not resolved" in str(error)
    assert not error.sent


def test_a_compressed_body_stays_compressed(endpoint: Endpoint, transport: Transport) -> None:
    import gzip

    bomb = gzip.compress(b"[" + b" " * 50_000_000 + b"]")
    endpoint.answer = Reply(200, bomb, {"Content-Type": "application/json", "Content-Encoding": "gzip"})
    assert post(transport, url_of(endpoint.port)).body == bomb


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_is_not_followed(
    status: int, ca: trustme.CA, endpoint: Endpoint, transport: Transport
) -> None:
    with Endpoint(ca, Reply()) as other:
        endpoint.answer = Reply(status, b"", {"Location": other.url})
        assert post(transport, url_of(endpoint.port)).status == status
        assert other.seen == []


# --- time ------------------------------------------------------------------------------------------


def _drips(data: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        _request(connection)
        for byte in itertools.cycle(data):
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    return talk


def _is_silent(connection: socket.socket) -> None:
    _request(connection)
    with contextlib.suppress(OSError):
        connection.recv(1)


def _drips_body(connection: socket.socket) -> None:
    _request(connection)
    connection.sendall(HEAD + b"\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "talk", [_is_silent, _drips(HEAD), _drips(b"X"), _drips_body], ids=["silence", "header", "line", "body"]
)
@pytest.mark.parametrize("tls", [True, False])
def test_the_deadline_holds_and_ends_the_connection(
    talk: Callable[[socket.socket], None], tls: bool, ca: trustme.CA, transport: Transport
) -> None:
    ended = threading.Event()

    def watched(connection: socket.socket) -> None:
        try:
            talk(connection)
        finally:
            ended.set()

    with raw_server(ca if tls else None, watched) as port:
        began = time.monotonic()
        error = failure(transport, url_of(port, scheme="https" if tls else "http"), seconds=0.5)
        assert time.monotonic() - began >= 0.4
        assert ended.wait(20), "the connection was left open"
    assert error.sent


def test_the_read_timeout_ends_a_silence_before_the_deadline(ca: trustme.CA, ca_bundle: str) -> None:
    with raw_server(ca, _is_silent) as port:
        error = failure(Transport(ca_bundle, timeout=(5, 0.2)), url_of(port))
    assert "no answer in time" in str(error)
    assert error.sent


def test_a_server_that_is_silent_in_tls_ends_at_the_connect_timeout(ca_bundle: str) -> None:
    with raw_server(None, lambda c: c.recv(1) and time.sleep(3)) as port:
        error = failure(Transport(ca_bundle, timeout=(0.2, 20)), url_of(port))
    assert not error.sent


def test_the_deadline_holds_for_name_resolution_and_nothing_is_sent_afterwards(
    endpoint: Endpoint, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, resolved = threading.Event(), threading.Event()
    resolve = socket.getaddrinfo

    def slow(*_: object, **__: object) -> object:
        go_on.wait(WITHIN)
        resolved.set()
        return resolve("127.0.0.1", endpoint.port, type=socket.SOCK_STREAM)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    error = failure(transport, url_of(endpoint.port, "localhost"), seconds=0.2)
    assert not resolved.is_set()
    assert not error.sent
    go_on.set()
    assert resolved.wait(WITHIN)
    time.sleep(0.3)
    assert endpoint.seen == []


def test_a_deadline_that_has_passed_sends_nothing(endpoint: Endpoint, transport: Transport) -> None:
    assert not failure(transport, url_of(endpoint.port), seconds=-1).sent
    assert endpoint.seen == []


def test_ctrl_c_ends_the_wait_and_the_connection(ca: trustme.CA, transport: Transport) -> None:
    asked, ended = threading.Event(), threading.Event()

    def talk(connection: socket.socket) -> None:
        _request(connection)
        asked.set()
        with contextlib.suppress(OSError):
            connection.recv(1)
        ended.set()

    def interrupt() -> None:
        asked.wait(WITHIN)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with raw_server(ca, talk) as port:
            with pytest.raises(KeyboardInterrupt):
                post(transport, url_of(port))
            assert ended.wait(20)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


# --- threads and processes -------------------------------------------------------------------------


def test_threads_share_a_transport(endpoint: Endpoint, transport: Transport) -> None:
    answers: list[int] = []

    def work() -> None:
        for _ in range(5):
            answers.append(post(transport, url_of(endpoint.port)).status)  # noqa: PERF401  # one by one

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 40


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=WITHIN)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_child_opens_a_connection_of_its_own_and_leaves_its_parents_alone(
    endpoint: Endpoint, ca_bundle: str
) -> None:
    program = """
import os, sys, time
from hsm_signer.oauth.transport import Transport
from hsm_signer.url import parse
transport, url = Transport(sys.argv[1]), parse(sys.argv[2], what="x")
def ask():
    return transport.request("POST", url, form={"a": "b"}, deadline=time.monotonic() + 20).status
assert ask() == 200
child = os.fork()
if child == 0:
    os._exit(0 if ask() == 200 == ask() else 1)
assert os.waitpid(child, 0)[1] == 0
assert ask() == 200
"""
    run(program, ca_bundle, endpoint.url)
    peers = [seen.peer for seen in endpoint.seen]
    assert peers[0] == peers[3] != peers[1] == peers[2]


def test_urllib3_and_openssl_are_loaded_with_the_first_request_only(ca_bundle: str) -> None:
    program = """
import sys
from hsm_signer.oauth.transport import Transport
Transport(sys.argv[1], proxy="http://proxy.example:3128")
print(*({"requests", "urllib3", "ssl", "certifi", "cryptography", "http.client", "email"} & set(sys.modules)))
"""
    assert run(program, ca_bundle).strip() == ""


# --- what is wrong from the start ------------------------------------------------------------------


def test_a_ca_bundle_that_is_none_is_a_configuration_error(ca: trustme.CA, tmp_path: Path) -> None:
    pem = ca.cert_pem.bytes().decode()
    lines = pem.splitlines(keepends=True)
    bad = {
        "empty": "",
        "text": "not a certificate\n",
        "key": ca.issue_cert("x.example").private_key_pem.bytes().decode(),
        "cut": pem[: len(pem) // 2],
        "second one cut": pem + pem[: len(pem) // 2],
        "a line missing": "".join(lines[:3] + lines[4:]),
        "no base64": pem.replace(lines[2], "%%%%\n"),
        "no DER": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "a key beside it": pem + ca.issue_cert("x.example").private_key_pem.bytes().decode(),
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=r"^ca-bundle: "):
            Transport(tmp_path / name)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match=r"^ca-bundle: "):
            Transport(path)


def test_a_certificate_that_only_openssl_finds_fault_with_is_one_too(ca: trustme.CA, tmp_path: Path) -> None:
    import base64

    der = bytearray(ssl.PEM_cert_to_DER_cert(ca.cert_pem.bytes().decode()))
    der[4] = 0x31
    text = base64.encodebytes(der).decode()
    (tmp_path / "bad.pem").write_text(f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n")
    with pytest.raises(ConfigError, match=r"^ca-bundle: ") as caught:
        Transport(tmp_path / "bad.pem").prepare()
    assert caught.value.__context__ is None


@pytest.mark.parametrize("timeout", [(0, 5), (5, -1), (5,), (1, 2, 3), (float("nan"), 5)])
def test_a_timeout_that_cannot_work_is_a_configuration_error(timeout: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        Transport(timeout=timeout)
