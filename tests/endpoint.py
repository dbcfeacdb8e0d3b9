"""A loopback https server that answers as it is told, and remembers what it was asked."""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import trustme

GRANT = {"access_token": "access-token-canary", "token_type": "Bearer", "expires_in": 3599}


@dataclass
class Reply:
    """``body``: bytes, or what becomes JSON."""

    status: int = 200
    body: object = field(default_factory=lambda: dict(GRANT))
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    @property
    def payload(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    peer: tuple[str, int]

    @property
    def form(self) -> dict[str, str]:
        pairs = parse_qsl(self.body.decode(), keep_blank_values=True, strict_parsing=True)
        assert len(dict(pairs)) == len(pairs), "a form field twice"
        return dict(pairs)


class Endpoint:
    """``answer``: a Reply, a list of them (the last one stays), or a function of what was asked."""

    def __init__(self, ca: trustme.CA | None, answer: Reply | list[Reply] | Callable[[Seen], Reply]) -> None:
        self.answer = answer
        self.seen: list[Seen] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.scheme = "https" if ca else "http"
        if ca:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            ca.issue_cert("127.0.0.1", "localhost", "as.test").configure_cert(context)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._server.handle_error = lambda *_: None  # clients hang up on purpose
        self.port = self._server.server_address[1]

    @property
    def origin(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}/am/oauth2/access_token"

    def __enter__(self) -> "Endpoint":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _next(self, seen: Seen) -> Reply:
        self.seen.append(seen)
        if isinstance(self.answer, list):
            return self.answer[min(len(self.seen), len(self.answer)) - 1]
        return self.answer if isinstance(self.answer, Reply) else self.answer(seen)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen = Seen(self.command, self.path, dict(self.headers), body, self.client_address)
                reply = endpoint._next(seen)
                self.send_response(reply.status)
                if "Date" in reply.headers:  # ours instead of the one that send_response() wrote
                    self._headers_buffer[:] = [h for h in self._headers_buffer if not h.startswith(b"Date")]
                for name, value in ({"Content-Length": str(len(reply.payload))} | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.payload)

            do_GET = do_POST = do_PUT = serve  # noqa: N815  # http.server's names

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextlib.contextmanager
def raw_server(
    ca: trustme.CA | None, talk: Callable[[socket.socket], None], **context_options: object
) -> Iterator[int]:
    """The port of a server that lets ``talk`` have each connection, after TLS where ``ca`` is given."""
    context = None
    if ca:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("127.0.0.1", "localhost", "as.test").configure_cert(context)
        for name, value in context_options.items():
            setattr(context, name, value)
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=converse, args=(connection,), daemon=True).start()

    def converse(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if context:
                connection = context.wrap_socket(connection, server_side=True)
            with connection:
                talk(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextlib.contextmanager
def connect_proxy(
    ca: trustme.CA | None, target: int, answer: bytes = b"200 Go"
) -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that knows CONNECT and brings everybody to the port ``target``."""
    heard: list[bytes] = []

    def pipe(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def talk(client: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request and (more := client.recv(65536)):
            request += more
        heard.append(request)
        client.sendall(b"HTTP/1.1 " + answer + b"\r\n\r\n")
        if answer.startswith(b"200"):
            with socket.create_connection(("127.0.0.1", target)) as server:
                back = threading.Thread(target=pipe, args=(server, client))
                back.start()
                pipe(client, server)
                back.join()

    with raw_server(ca, talk) as port:
        yield port, heard
