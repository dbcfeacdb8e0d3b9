"""A token endpoint that grants whatever comes, over TLS: CERTIFICATE KEY. Prints its port; GET tells the POSTs.

It checks nothing: what an assertion must be is for the tests. So it costs little, and the same for everybody.
"""

import itertools
import json
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GRANT = {
    "access_token": "an-access-token-of-a-usual-length." * 25,
    "scope": "das-api/das-access",
    "token_type": "Bearer",
    "expires_in": 3599,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet
    posts = itertools.count()
    posted = 0

    def do_POST(self) -> None:
        form = self.rfile.read(int(self.headers["Content-Length"]))
        Handler.posted = next(Handler.posts) + 1
        self.answer(200 if b"client_assertion=eyJ" in form else 400, GRANT)

    def do_GET(self) -> None:
        self.answer(200, Handler.posted)

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def main(certificate: str, key: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    print(server.server_port, flush=True)
    server.serve_forever()


main(*sys.argv[1:])
