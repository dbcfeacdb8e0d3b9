"""idpyoidc as a test authorization server over https: python idpyoidc_server.py CONFIG

CONFIG is JSON: {"tls": {"key", "cert"}, "certificates": {"k1", "k2"}}, each the path of a PEM file. Prints one
line of JSON {"issuer": …} when it is up, then {"refused": why} for each refusal.
"""

import json
import logging
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from cryptography.x509 import load_pem_x509_certificate
from cryptojwt.jwk.ec import ECKey
from idpyoidc.server import Server
from idpyoidc.server.configure import ASConfiguration
from idpyoidc.server.exception import OidcEndpointError
from idpyoidc.server.oauth2.token_helper.client_credentials import ClientCredentials

SCOPE = "das-api/das-access"
EC_KEY = {"type": "EC", "crv": "P-256", "use": ["sig"]}


class Granting(ClientCredentials):
    """The grant of idpyoidc 5.0.0 with two repairs; how it authenticates the client is untouched."""

    def process_request(self, req: Any, **kwargs: Any) -> Any:
        self.endpoint.upstream_get("context").session_manager.flush()  # it fails at a client's second grant
        answer = super().process_request(req, **kwargs)
        answer["token_type"] = "Bearer"  # it says "access_token", which RFC 6749 §7.1 does not know
        return answer


def configuration(issuer: str) -> dict[str, Any]:
    grants = {"client_credentials": {"class": Granting}}
    return {
        "issuer": issuer,
        "keys": {"key_defs": [EC_KEY], "uri_path": "jwks.json"},
        "token_handler_args": {
            "jwks_defs": {"key_defs": [EC_KEY]},
            "token": {
                "class": "idpyoidc.server.token.jwt_token.JWTToken",
                "kwargs": {"lifetime": 600, "aud": ["https://das.example"]},
            },
        },
        "endpoint": {
            "server_metadata": {
                "path": ".well-known/oauth-authorization-server",
                "class": "idpyoidc.server.oauth2.server_metadata.ServerMetadata",
                "kwargs": {},
            },
            "token": {
                "path": "token",
                "class": "idpyoidc.server.oauth2.token.Token",
                "kwargs": {"client_authn_method": ["private_key_jwt"], "grant_types_helpers": grants},
            },
        },
        "session_params": {
            "encrypter": {
                "kwargs": {
                    "keys": {
                        "key_defs": [
                            {"type": "OCT", "use": ["enc"], "kid": "password"},
                            {"type": "OCT", "use": ["enc"], "kid": "salt"},
                        ]
                    },
                    "iterations": 1,
                }
            }
        },
    }


def register(server: Server, client_id: str, certificates: dict[str, Path]) -> None:
    server.context.cdb[client_id] = {
        "client_id": client_id,
        "token_endpoint_auth_method": "private_key_jwt",
        "grant_types_supported": ["client_credentials"],
        "allowed_scopes": [SCOPE],
    }
    keys = []
    for kid, path in certificates.items():
        public = load_pem_x509_certificate(path.read_bytes()).public_key()
        keys.append(ECKey(kid=kid, use="sig", alg="ES256").load_key(public).serialize())
    server.keyjar.import_jwks({"keys": keys}, client_id)


class Handler(BaseHTTPRequestHandler):
    """Hands requests to idpyoidc's endpoints, as its example applications do."""

    server_: Server

    def do_GET(self) -> None:
        if self.path == "/jwks.json":
            self.answer(200, self.server_.keyjar.export_jwks_as_json(""))
        elif self.path == "/.well-known/oauth-authorization-server":
            endpoint = self.server_.get_endpoint("server_metadata")
            self.answer(200, json.dumps(endpoint.process_request()["response_args"]))
        else:
            self.answer(404, "{}")

    def do_POST(self) -> None:
        form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
        endpoint = self.server_.get_endpoint("token")
        try:
            request = endpoint.parse_request(form, http_info={"headers": dict(self.headers)})
            answer = endpoint.process_request(request)
            self.answer(200, endpoint.do_response(request=request, **answer)["response"])
        except OidcEndpointError as refusal:
            self.answer(401, json.dumps({"error": "invalid_client", "error_description": str(refusal)}))

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


class Refusals(logging.Handler):
    """idpyoidc logs why a client authentication failed, and sends less."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "failed:" in message:
            print(json.dumps({"refused": message}), flush=True)


def main() -> None:
    config = json.loads(sys.argv[1])
    certificates = {kid: Path(path) for kid, path in config["certificates"].items()}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config["tls"]["cert"], config["tls"]["key"])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        issuer = f"https://localhost:{http.server_port}"
        Handler.server_ = Server(ASConfiguration(conf=configuration(issuer)))
        register(Handler.server_, "one-key", {"k1": certificates["k1"]})
        register(Handler.server_, "two-keys", certificates)
        logging.getLogger("idpyoidc.server.client_authn").addHandler(Refusals())
        logging.getLogger("idpyoidc.server.client_authn").setLevel(logging.INFO)
        http.socket = context.wrap_socket(http.socket, server_side=True)
        print(json.dumps({"issuer": issuer}), flush=True)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        sys.stdin.read()  # a killed test run leaves no server behind


if __name__ == "__main__":
    main()
