"""``hsm-token fetch`` against servers that misbehave: the exit status, and nothing of an assertion in sight."""

import base64
import re
import ssl
import time
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import trustme
from office import Office

from faults import servers
from faults.servers import Behaviour, Server, respond

REFUSED = {"error": "invalid_client", "error_description": "no such client"}


def echo(connection: servers.Connection) -> bool | None:
    """Refuse with the assertion in the description, as a careless server does."""
    assertion = parse_qs(connection.request.decode().partition("\r\n\r\n")[2])["client_assertion"][0]
    description = f"cannot use {assertion} \x1b[31m[red]"
    return respond(401, {"error": "invalid_client", "error_description": description})(connection)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (servers.reset, 7),
        (servers.silence, 7),
        (servers.drip, 7),
        (servers.truncated_body, 7),
        (servers.bad_chunks, 7),
        (servers.huge_header, 7),
        (servers.large_body, 7),
        (respond(503, b"", None), 7),
        (respond(503, b"", None, Retry_After="3600"), 7),
        (servers.half_a_header, 7),
        (servers.gzip_bomb, 6),
        (servers.duplicate_keys, 6),
        (respond(media_type="text/html"), 6),
        (respond(307, b"", None, Location="https://localhost:1/"), 6),
        (respond(401, REFUSED), 6),
        (respond(403, b"", None), 6),
        (respond(200, REFUSED), 6),
        (echo, 6),
    ],
)
def test_a_fault_ends_the_command_with_its_status(
    tls_office: Office, server_tls: ssl.SSLContext, tmp_path: Path, fault: Behaviour, status: int
) -> None:
    with Server(server_tls, fault) as server:
        fails(tls_office, server, status, tmp_path)
        assert server.requests or status == 7  # a busy machine may be late


@pytest.mark.parametrize("kind", ["untrusted", "plain"])
def test_a_server_that_cannot_prove_itself_ends_it_with_7(
    tls_office: Office, tmp_path: Path, kind: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    with Server(None if kind == "plain" else context, respond()) as server:
        fails(tls_office, server, 7, tmp_path)
        assert not [request for request in server.requests if b"assertion" in request]


def fails(tls_office: Office, server: Server, status: int, home: Path) -> None:
    """Run it so that it says all that it can, and look through what it said."""
    office = tls_office.copy(home)
    seconds = {"timeout": 1, "deadline": 2} if status == 7 else {"timeout": 30, "deadline": 50}
    office.configure(token_endpoint=f"{server.url}/token", **seconds)
    began = time.monotonic()
    done = office.run("fetch", "-vv")
    assert time.monotonic() - began < 55
    assert (done.status, done.stdout) == (status, ""), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("hsm-token: error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert not re.search(r"[^\n\x20-\x7e‖–…§]", done.stderr)
    assert "eyJ" not in done.stderr  # of any JOSE header
    for part in (b'{"iss":"das-api-auth"', b'"iss":"das-api-auth"', b'ss":"das-api-auth"'):
        assert base64.urlsafe_b64encode(part)[:24].decode() not in done.stderr
    for request in server.requests:
        form = parse_qs(request.decode("latin-1").partition("\r\n\r\n")[2])
        for assertion in form.get("client_assertion", []):
            assert not [part for part in assertion.split(".") if part in done.stderr]
