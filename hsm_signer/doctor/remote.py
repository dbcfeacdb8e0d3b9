"""The checks on the way to the authorization server, and what it answers."""

import difflib
import http.client
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from hsm_signer import assembly, rollover
from hsm_signer.assertion import MAX_CLOCK_OFFSET, MAX_LIFETIME
from hsm_signer.doctor.examination import Examination, known
from hsm_signer.doctor.finding import NotCheckedError, Outcome, ok, warning
from hsm_signer.errors import ConfigError, OAuthError, TransportError, VerificationError

MIN_DAYS = 14  # that the server's certificate should have left; ACME clients renew earlier
NOTABLE = 10  # seconds between two clocks that some servers mind
RELEASED = datetime(2026, 11, 1, tzinfo=UTC)  # no clock is right that shows less
_TLS_REMEDIES = {  # X509_V_ERR_… of OpenSSL
    10: "the server's operator has to renew it, or the clock here is wrong",
    9: "the clock here is wrong, or the certificate is not in use yet",
    18: "name its root in ca-bundle, after comparing it with what the operator says",
    19: "name its root in ca-bundle, after comparing it with what the operator says",
    20: "name its root in ca-bundle, or ask the operator to send the intermediate certificates",
    21: "name its root in ca-bundle, or ask the operator to send the intermediate certificates",
    62: "the name in token-endpoint is not the server's, or another server answers there",
    64: "the address in token-endpoint is not the server's, or another server answers there",
}


def proxy(x: Examination) -> Outcome:
    """Which proxy is used, and whether it answers."""
    if not x.proxy:
        return ok("none is used", {"proxy": False})
    where = urlsplit(x.proxy)
    host, port = str(where.hostname), where.port or 80
    origin = x.settings.origin("proxy") if x.settings.proxy else "HTTPS_PROXY"
    _connect(host, port, x.settings.timeout[0], f"the proxy {host}:{port} (from {origin})").close()
    x.connected = True
    return ok(f"{host}:{port} (from {origin}) accepts connections", {"proxy": True})


def name_resolution(x: Examination) -> Outcome:
    """The server's name has addresses."""
    host = x.server.host.strip("[]")
    if x.proxy:
        raise NotCheckedError("the proxy resolves it")
    found = _addresses(host, x.server.port, host)
    x.resolved = True
    return ok(f"{host}: {', '.join(found[:4])}", {"addresses": len(found)})


def connection(x: Examination) -> Outcome:
    """The server's port accepts connections."""
    server = x.server
    if x.proxy:
        raise NotCheckedError("the proxy connects: see TLS")
    known(x.resolved, "DNS")
    began = time.perf_counter()
    with _connect(server.host.strip("[]"), server.port, x.settings.timeout[0], server.origin) as sock:
        peer = sock.getpeername()[0]
    x.connected, x.reached = True, server.scheme == "http"
    milliseconds = round((time.perf_counter() - began) * 1000)
    return ok(
        f"{peer} port {server.port} accepts connections after {milliseconds} ms",
        {"milliseconds": milliseconds},
    )


def tls(x: Examination) -> Outcome:
    """The server's certificate leads to a root that we trust, names the server, and lives some days more."""
    server = x.server
    if server.scheme == "http":
        raise NotCheckedError("http to loopback has no TLS")
    known(x.connected, "proxy" if x.proxy else "TCP")
    context = x.transport.tls_context()
    if x.proxy and x.proxy.startswith("https:"):
        x.reached = True  # as far as we can tell; the requests that follow show it
        raise NotCheckedError("through a proxy that itself speaks TLS only the requests below tell")
    link = _https(x, context)
    try:
        link.connect()
        certificate, version = link.sock.getpeercert() or {}, link.sock.version()
    except ssl.SSLCertVerificationError as exc:
        raise TransportError(
            f"the server's certificate is not accepted: {exc.verify_message}",
            hint=_TLS_REMEDIES.get(
                exc.verify_code, "is ca-bundle the right one, and is it the right server?"
            ),
        ) from None
    except ssl.SSLError as exc:
        raise TransportError(
            f"TLS fails: {exc.reason}", hint="is this a TLS port, with TLS 1.2 or newer?"
        ) from None
    except OSError as exc:
        raise TransportError(f"no TLS with {server.origin}: {exc.strerror or exc}") from None
    finally:
        link.close()
    x.reached = True
    return _judge_certificate(certificate, str(version), x)


def _judge_certificate(certificate: Mapping[str, Any], version: str, x: Examination) -> Outcome:
    """``certificate``: as ``SSLSocket.getpeercert`` has it."""
    days = int((ssl.cert_time_to_seconds(certificate["notAfter"]) - x.clock()) // 86400)
    issuer = dict(pair for name in certificate.get("issuer", ()) for pair in name)
    by = issuer.get("organizationName") or issuer.get("commonName") or "nameless"
    evidence = f"{version}, certificate by {by}, {days} days left"
    facts = {"tls": version, "tls_days": days, "ca_bundle": bool(x.settings.ca_bundle)}
    if days < MIN_DAYS:
        return warning(evidence, "tell the server's operator: when it ends, nobody gets a token", facts)
    return ok(evidence, facts)


def clock(x: Examination) -> Outcome:
    """Our clock and the server's agree, as far as assertions need that."""
    from hsm_signer.oauth.retry import timestamp

    now = x.clock()
    if now < RELEASED.timestamp():
        shown = datetime.fromtimestamp(now, UTC)
        raise VerificationError(
            f"this machine's clock shows {shown:%Y-%m-%d %H:%M} UTC", hint="set the clock"
        )
    if x.offline:
        raise NotCheckedError("there is no other clock to compare with")
    known(x.reached, "TLS" if x.server.scheme == "https" else "TCP")
    answer = x.transport.request("GET", x.server, deadline=x.deadline)
    theirs = timestamp(answer.date)
    if theirs is None:
        raise NotCheckedError("the server does not tell the time")
    return _judge_lead(int(theirs) - int(x.clock()) - x.settings.clock_offset, x)


def _judge_lead(lead: int, x: Examination) -> Outcome:
    """``lead``: seconds that the server's clock is ahead of the one that assertions are stamped with."""
    offset, lifetime = x.settings.clock_offset, min(x.settings.lifetime, MAX_LIFETIME)
    evidence = f"the server's clock agrees with ours, clock-offset {offset} s included"
    if lead:
        side = "ahead of" if lead > 0 else "behind"
        evidence = f"the server's clock is {abs(lead)} s {side} ours, clock-offset {offset} s included"
    remedy = "set the clock of this machine"
    if abs(offset + lead) <= MAX_CLOCK_OFFSET:
        remedy += f", or clock-offset = {offset + lead}"
    facts = {"server_clock_lead": lead}
    if lead >= lifetime or lifetime - lead > MAX_LIFETIME + NOTABLE:
        raise VerificationError(f"{evidence}, but an assertion lives {lifetime} s", hint=remedy, clause="exp")
    if abs(lead) > NOTABLE:
        return warning(evidence, remedy, facts)
    return ok(evidence, facts)


def discovery(x: Examination) -> Outcome:
    """What the issuer publishes is what is pinned."""
    from hsm_signer.oauth.metadata import discover

    settings = x.settings
    if not settings.issuer:
        raise NotCheckedError("no issuer is set", 'issuer = "https://…" lets aud and keys be compared')
    if settings.strays("issuer", x.server.text):  # a rehearsal: the issuer's own server is not to hear of it
        raise NotCheckedError(
            f"issuer {settings.issuer!r} (from {settings.origin('issuer')}) is of another server than"
            f" the token endpoint (from {settings.origin('token_endpoint')})"
        )
    known(x.reached, "TLS" if x.server.scheme == "https" else "TCP")
    named = filter(None, [settings.token_endpoint])
    x.metadata = discover(settings.issuer, x.transport, deadline=x.deadline, allowed=[*named])
    published = x.metadata.token_endpoint
    if settings.token_endpoint and published != settings.token_endpoint:
        return warning(
            f"token-endpoint is not the published one: {difference(settings.token_endpoint, published)}",
            "if the operator did not say so, take the published one",
            {"endpoint_as_published": False},
        )
    return ok(f"issuer {settings.issuer}, token endpoint as published", {"endpoint_as_published": True})


def audience(x: Examination) -> Outcome:
    """``aud`` is a name that the server publishes for itself (RFC 7523 §3)."""
    metadata = known(x.metadata, "discovery")
    try:
        ours = x.settings.audience_for(x.settings.token_endpoint or metadata.token_endpoint)
    except ConfigError:
        raise NotCheckedError("aud is not one that we use: see configuration") from None
    names = {"token endpoint": metadata.token_endpoint, "issuer": metadata.issuer}
    for what, name in names.items():
        if ours == name:
            return ok(f"{ours}, the published {what}", {"audience": what})
    nearest = max(names.values(), key=lambda name: difflib.SequenceMatcher(None, ours, name).ratio())
    x.differing_audience = difference(ours, nearest)
    return warning(x.differing_audience, f'audience = "{nearest}"', {"audience": "neither"})


def difference(ours: str, theirs: str) -> str:
    """Show character by character where two texts differ; positions count from 1."""
    steps = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
    told = []
    for kind, start, end, their_start, their_end in steps:
        here, there = ours[start:end], theirs[their_start:their_end]
        if kind == "insert":
            told.append(f"{there!r} is missing at character {start + 1}")
        elif kind == "delete":
            told.append(f"{here!r} at character {start + 1} is too much")
        elif kind == "replace":
            told.append(f"{here!r} at character {start + 1} should be {there!r}")
    return f"ours is {ours!r}, published is {theirs!r}: {'; '.join(told)}"


def token_request(x: Examination) -> Outcome:
    """The server gives us an access token."""
    known(x.signer, "key")
    known(x.reached, "TLS" if x.server.scheme == "https" else "TCP")
    settings = replace(x.settings, allow_narrower_scope=True)  # the next check judges it
    try:
        x.response = assembly.token_client(settings, x.login, cached=False).fetch(force=True)
    except OAuthError as refused:
        rollover.name_the_next(settings, refused)
        if x.differing_audience:
            differs = f"aud differs from what the server publishes: {x.differing_audience}"
            refused.hint = "\n".join([differs, *(refused.hint or "").splitlines()])
        raise
    lives = None if x.response.expires_at is None else round(x.response.expires_at - x.clock())
    return ok("granted" if lives is None else f"granted for {lives} s", {"expires_in": lives})


def scope(x: Examination) -> Outcome:
    """What was granted is what was asked for."""
    granted = known(x.response, "token request").scope
    missing = set((x.settings.scope or "").split()) - set(granted.split())
    evidence = f"granted: {granted or 'none'}"
    if not missing:
        return ok(evidence)
    evidence += f"; missing: {' '.join(sorted(missing))}"
    remedy = "ask the operator of the server to allow it to this client, or ask for less"
    if x.settings.allow_narrower_scope:
        return warning(evidence, remedy)
    raise OAuthError(evidence, error="invalid_scope", hint=remedy)


def access_token(x: Examination) -> Outcome:
    """The access token is the issuer's, for us, and in date."""
    response = known(x.response, "token request")
    jwks_uri = known(x.metadata, "discovery").jwks_uri
    if response.access_token.count(".") != 2:
        return ok("opaque: only the API can read it", {"jwt": False})
    if not jwks_uri:
        raise NotCheckedError("the issuer publishes no keys")
    try:
        from hsm_signer.verify import AccessTokenVerifier, jwks_url
    except ImportError as missing:
        raise NotCheckedError(
            f"{missing.name} is not installed", "pip install 'hsm-signer[verify]'"
        ) from None
    fetch = jwks_url(jwks_uri, x.transport)
    issuer, client_id = str(x.settings.issuer), str(x.settings.client_id)
    verifier = AccessTokenVerifier(fetch, issuer=issuer, audience=client_id, leeway=60, clock=x.clock)
    checked = verifier.verify(response.access_token)
    lives = round(checked.expires_at - x.clock())
    return ok(f"signed by {issuer} for {client_id}, sub {checked.subject}, {lives} s left", {"jwt": True})


def _addresses(host: str, port: int, what: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:  # socket.gaierror is one
        raise TransportError(
            f"{what} is not resolved: {exc.strerror or exc}",
            hint="see /etc/resolv.conf and the firewall, or set proxy where a proxy has to be used",
        ) from None
    except UnicodeError:
        raise TransportError(f"{what} is no host name") from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def _connect(host: str, port: int, timeout: float, what: str) -> socket.socket:
    _addresses(host, port, what)
    try:
        return socket.create_connection((host, port), timeout)
    except OSError as exc:
        raise TransportError(
            f"{what}: no connection: {exc.strerror or exc}",
            hint="does a firewall stand in between, or is a proxy needed? Is the port right?",
        ) from None


def _https(x: Examination, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    """A connection as the requests make it, through the proxy too; nothing is sent but TLS and CONNECT."""
    server = x.server
    host, timeout = server.host.strip("[]"), x.settings.timeout[0]
    if not x.proxy:
        return http.client.HTTPSConnection(host, server.port, timeout=timeout, context=context)
    where = urlsplit(x.proxy)
    link = http.client.HTTPSConnection(
        str(where.hostname), where.port or 80, timeout=timeout, context=context
    )
    user = f"{unquote(where.username or '')}:{unquote(where.password or '')}"
    headers = {"Proxy-Authorization": f"Basic {b64encode(user.encode()).decode()}"} if where.username else {}
    link.set_tunnel(host, server.port, headers)
    return link
