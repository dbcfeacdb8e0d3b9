"""urllib3, tied down: our TLS context and nobody else's, and connections that tell what they have done.

Not requests, which stands on it: what that adds are ``~/.netrc``, proxy and CA variables, redirects and cookies,
for half as much time again to import. Imported on the first request only: that is long enough.
"""

import logging
import re
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote_to_bytes

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.response import BaseHTTPResponse

from hsm_signer.errors import TransportError

MAX_BODY = 1024 * 1024  # bytes

_thread = threading.local()
# urllib3 warns of header lines without a colon and quotes them: a server may have put an assertion there
logging.getLogger("urllib3.connection").addFilter(lambda _: not hasattr(_thread, "exchange"))


class Exchange:
    """One request and its answer, shared by the thread that carries it out and the one that waits for it."""

    def __init__(self, where: str) -> None:
        self.done = threading.Event()
        self.answer: tuple[int, Mapping[str, str], bytes] | None = None  # status, header, body
        self.failure: TransportError | None = None
        self._where = where
        self._connection: Any = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._given_up = self._sent = False

    def run(
        self, pools: urllib3.PoolManager, request: Mapping[str, Any], timeout: tuple[float, float]
    ) -> None:
        """Carry it out. What fails becomes ``failure``: foreign exceptions hold the request.

        ``timeout``: seconds to connect, and seconds between two bytes of an answer.
        """
        _thread.exchange = self
        try:
            limits = urllib3.Timeout(connect=timeout[0], read=timeout[1])
            response = pools.urlopen(
                **request, timeout=limits, redirect=False, retries=False, preload_content=False
            )
            self.answer = response.status, response.headers, _body(response)
        except Exception as exc:  # noqa: BLE001  # whatever it is, it ends here
            self.failure = _failure(exc, self._where, sent=self._sent)
        finally:
            self.done.set()

    def fail(self, reason: str) -> None:
        """End it before it began."""
        self.failure = TransportError(f"{self._where}: {reason}", sent=False)
        self.done.set()

    def connect(self, connection: Any) -> None:  # noqa: ANN401  # http.client's or urllib3's, plain or TLS
        """Note the connection that is about to be made, unless nobody waits any more."""
        self._connection = connection
        if self._given_up:
            raise _GivenUpError

    def send(self, connection: Any) -> None:  # noqa: ANN401  # as above
        """Note that bytes of the request leave us from now on, unless nobody waits any more."""
        with self._lock:
            if self._given_up:
                raise _GivenUpError
            self._socket = connection.sock  # http.client forgets it when the answer has no length
            self._sent = True

    def give_up(self) -> bool:
        """Stop it, in the middle of a read too; whether a part of the request may have been sent."""
        with self._lock:
            self._given_up = True
        sock = self._socket or getattr(self._connection, "sock", None)
        if sock is not None:
            with suppress(OSError):  # the thread may be closing it at this moment
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        return self._sent


class _GivenUpError(Exception):
    pass


class _Telling:
    """A connection that tells the exchange of its thread what it does."""

    def connect(self) -> None:
        _thread.exchange.connect(self)
        super().connect()  # type: ignore[misc]  # a mixin: urllib3's class comes beside it

    def request(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # urllib3's own
        if self.sock is None:  # type: ignore[attr-defined]  # else http.client connects while it sends
            self.connect()
        _thread.exchange.send(self)
        super().request(*args, **kwargs)  # type: ignore[misc]  # as above


class _Connection(_Telling, HTTPConnection):
    pass


class _TlsConnection(_Telling, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS = {"http": _Pool, "https": _TlsPool}


class Connections:
    """Connections that trust what the TLS context trusts, to the server and to an https proxy.

    ``direct`` never goes through the proxy, ``proxied`` always does.
    """

    def __init__(self, context: ssl.SSLContext, proxy: str | None) -> None:
        self.direct = urllib3.PoolManager(ssl_context=context)
        self.proxied = self.direct if proxy is None else _proxied(context, proxy)
        for pools in (self.direct, self.proxied):
            pools.pool_classes_by_scheme = _POOLS


def _proxied(context: ssl.SSLContext, proxy: str) -> urllib3.ProxyManager:
    """Pools of connections through a proxy, which gets the user information in its URL (RFC 7617 §2)."""
    headers = {}
    if auth := urllib3.util.parse_url(proxy).auth:
        user, _, password = auth.partition(":")
        credentials = b":".join(map(unquote_to_bytes, (user, password)))
        headers["Proxy-Authorization"] = f"Basic {b64encode(credentials).decode('ascii')}"
    return urllib3.ProxyManager(proxy, proxy_headers=headers, ssl_context=context, proxy_ssl_context=context)


def _body(response: BaseHTTPResponse) -> bytes:
    body = bytearray()
    while chunk := response.read(64 * 1024, decode_content=False):
        body += chunk
        if len(body) > MAX_BODY:
            response.close()
            raise _TooLargeError
    lengths = ("Content-Length", "Transfer-Encoding")
    if not body and response.status == 200 and not any(name in response.headers for name in lengths):
        raise _CutShortError  # http.client takes the end of the connection for the end of the header
    return bytes(body)


class _TooLargeError(Exception):
    pass


class _CutShortError(Exception):
    pass


def _failure(exc: Exception, where: str, *, sent: bool) -> TransportError:
    """Say in our words what a foreign exception, which is dropped, was about."""
    causes = list(_causes(exc))
    if any(isinstance(cause, urllib3.exceptions.ProxyError) for cause in causes):
        where += " through the proxy"
    message, transient, hint = _explained(causes)
    return TransportError(f"{where}: {message}", sent=sent, transient=transient, hint=hint)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """The exception and those that it wraps, in any of the ways of urllib3."""
    waiting, seen = [exc], set()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        wrapped = (*cause.args, getattr(cause, "reason", None), cause.__cause__, cause.__context__)
        waiting += [other for other in wrapped if isinstance(other, BaseException)]


def _explained(causes: list[BaseException]) -> tuple[str, bool, str | None]:
    """Message, whether trying again can help, and a hint; only texts that OpenSSL or the system chose."""
    for cause in causes:
        match cause:
            case _TooLargeError():
                return f"the answer is larger than {MAX_BODY} bytes", False, None
            case OSError() if found := re.match("Tunnel connection failed: ([0-9]{3})", str(cause)):
                hint = "are user name and password in the proxy setting right?" if found[1] == "407" else None
                return f"it answers {found[1]}", found[1] >= "500", hint
            case ssl.SSLCertVerificationError():
                hint = "is it the right server, and does ca-bundle name the root of its certificate?"
                return f"the server's certificate is not accepted: {cause.verify_message}", False, hint
            case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
                return "the connection was closed during TLS", True, None
            case ssl.SSLError():
                return f"TLS failed: {cause.reason or type(cause).__name__}", False, None
            case socket.gaierror():
                return f"the name is not resolved: {cause.strerror}", cause.errno == socket.EAI_AGAIN, None
            case urllib3.exceptions.ReadTimeoutError():
                return "no answer in time", True, None
            case urllib3.exceptions.ConnectTimeoutError() if not isinstance(
                cause, urllib3.exceptions.NewConnectionError
            ):
                return "no connection in time", True, None
            case OSError(strerror=str(reason)):
                return f"{reason} ({type(cause).__name__})", True, None
    return f"no complete answer ({type(causes[-1]).__name__})", True, None
