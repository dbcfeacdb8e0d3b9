"""A server that misbehaves as told, below HTTP too. It keeps what it is sent."""

import contextlib
import gzip
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from typing import Self

Behaviour = Callable[["Connection"], bool | None]
"""Answers one request; whether the connection may serve another."""

OK = {"access_token": "access-token-granted", "token_type": "Bearer", "expires_in": 300}


class Connection:
    """The server's side of a connection, after ``request`` was read."""

    def __init__(self, sock: socket.socket, closing: threading.Event) -> None:
        self.sock, self.closing = sock, closing
        self.request = b""

    @property
    def path(self) -> str:
        return self.request.split(b" ", 2)[1].decode()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait(self, seconds: float | None = None) -> bool:
        """Do nothing for a while; whether the test is over."""
        return self.closing.wait(seconds)


class Server:
    """Listens on a free loopback port; ``context=None`` speaks plain HTTP.

    Each request is answered by the next behaviour; the last one answers all that follow.
    """

    def __init__(self, context: ssl.SSLContext | None, *behaviours: Behaviour) -> None:
        self.behaviours = list(behaviours)
        self.requests: list[bytes] = []
        self.connections = 0
        self._context = context
        self._closing = threading.Event()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def port(self) -> int:
        return self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closing.is_set():
                sock, _ = self._listener.accept()
                self.connections += 1
                self._open.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError), raw:
            sock = raw
            if self._context:
                sock = self._context.wrap_socket(raw, server_side=True)
                self._open.append(sock)
            with sock:
                connection = Connection(sock, self._closing)
                while (request := _request(sock)) and not self._closing.is_set():
                    self.requests.append(request)
                    connection.request = request
                    behave = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
                    if not behave(connection):
                        break


def _request(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more or more.startswith(b"\x16"):  # TLS on a plain port: answered as by any web server
            return data + more
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        ),
        0,
    )
    while len(body) < length and (more := sock.recv(65536)):
        body += more
    return head + b"\r\n\r\n" + body


def respond(
    status: int = 200,
    body: bytes | dict[str, object] = OK,
    media_type: str | None = "application/json",
    **header: str,
) -> Behaviour:
    """A whole answer; ``Retry_After="3"`` for further header fields."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def behave(connection: Connection) -> bool:
        fields = {name.replace("_", "-"): value for name, value in header.items()}
        if media_type is not None:
            fields["Content-Type"] = media_type
        connection.send(head(status, {**fields, "Content-Length": str(len(content))}) + content)
        return True

    return behave


def head(status: int, fields: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


JSON = {"Content-Type": "application/json"}


def reset(connection: Connection) -> None:
    """RST, as from a machine that was restarted."""
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.close(connection.sock)


def silence(connection: Connection) -> None:
    connection.wait()


def half_a_header(connection: Connection) -> None:
    connection.send(head(200, JSON)[:30])


def half_a_header_and_silence(connection: Connection) -> None:
    half_a_header(connection)
    connection.wait()


def truncated_body(connection: Connection) -> None:
    body = json.dumps(OK).encode()
    connection.send(head(200, JSON | {"Content-Length": str(len(body) + 1)}) + body)


def bad_chunks(connection: Connection) -> None:
    connection.send(
        head(200, JSON | {"Transfer-Encoding": "chunked"}) + b'5\r\n{"acc\r\nno-size\r\nxxxxx\r\n'
    )


def drip(connection: Connection) -> None:
    """A byte at a time, each well before a read times out."""
    connection.send(head(200, JSON | {"Content-Length": "100000"}))
    while not connection.wait(0.1):
        connection.send(b" ")


def drip_header(connection: Connection) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not connection.wait(0.1):
        connection.send(b"x")


def huge_header(connection: Connection) -> None:
    connection.send(head(200, JSON | {"X-Huge": "h" * 200_000, "Content-Length": "2"}) + b"{}")


def gzip_bomb(connection: Connection) -> None:
    """40 kB that inflate to 40 MB, whether anybody asked for gzip or not."""
    body = gzip.compress(b" " * 1_000_000) * 40
    fields = JSON | {"Content-Encoding": "gzip", "Content-Length": str(len(body))}
    connection.send(head(200, fields) + body)


def large_body(connection: Connection) -> None:
    connection.send(head(200, JSON | {"Content-Length": "20000000"}))
    for _ in range(200):
        connection.send(b" " * 100_000)


def endless_chunks(connection: Connection) -> None:
    connection.send(head(200, JSON | {"Transfer-Encoding": "chunked"}))
    while not connection.closing.is_set():
        connection.send(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


duplicate_keys = respond(
    body=b'{"access_token":"access-token-1","access_token":"access-token-2","token_type":"Bearer","expires_in":300}'
)
