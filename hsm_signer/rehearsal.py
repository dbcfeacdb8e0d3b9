"""A loopback authorization server with WIPO's rules, to rehearse on (extra ``rehearsal``).

::

    from hsm_signer.rehearsal import RehearsalServer

    with RehearsalServer({"das-api-auth": Path("es256_cert.pem")}) as server:
        ...  # post an assertion to server.token_endpoint

It stands for ForgeRock AM as WIPO runs it. A client is registered by one X.509 certificate. ``iss`` and
``sub`` are the client id; ``aud`` is the token endpoint to the letter; ``exp`` lies ahead, by 30 minutes at
most; no ``jti`` is needed, so an assertion can be sent again until it expires. Authlib and joserfc check it,
none of our own code does. Refusals are logged as warnings with their reason, of which the client hears less.
"""

import contextlib
import ipaddress
import logging
import re
import secrets
import signal
import socket
import ssl
import threading
import time
import uuid
from base64 import b64encode, urlsafe_b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2.rfc6749 import (
    ClientMixin,
    InvalidClientError,
    InvalidScopeError,
    OAuth2Error,
    OAuth2Request,
)
from authlib.oauth2.rfc6749.grants import ClientCredentialsGrant
from authlib.oauth2.rfc7523 import JWTBearerClientAssertion
from flask import Flask, Response
from joserfc import jwt
from joserfc.errors import BadSignatureError, JoseError
from joserfc.jwk import ECKey, RSAKey
from werkzeug.serving import WSGIRequestHandler, make_server

from hsm_signer.errors import ConfigError
from hsm_signer.text import printable

SCOPES = ("das-api/das-access", "das-api/office-exchange")
ACCESS_TOKEN_LIFETIME = 3599  # seconds, what WIPO answers
MAX_AHEAD = 1800  # seconds; AM: "JWT expiration time is unreasonable"
_ISSUER_PATH = "/am/oauth2"
_GRANT_TYPE: str = ClientCredentialsGrant.GRANT_TYPE
_AUTH_METHOD: str = JWTBearerClientAssertion.CLIENT_AUTH_METHOD
_CERTIFICATE = re.compile(rb"\s*-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----\s*")

_log = logging.getLogger(__name__)
logging.getLogger(ClientCredentialsGrant.__module__).setLevel(
    logging.INFO
)  # at DEBUG it logs the access token


def registered_key(certificate: Path) -> ECKey:
    """Read the key that a certificate file registers: one X.509 certificate in PEM, of a key on P-256.

    Raises :class:`ConfigError`.
    """
    try:
        pem = certificate.read_bytes()
    except OSError as exc:
        raise ConfigError(f"certificate {certificate}: {exc.strerror}") from exc
    if not _CERTIFICATE.fullmatch(pem):
        raise ConfigError(
            f"{certificate} is not one certificate in PEM",
            hint="register es256_cert.pem, which 'hsm-token cert self-signed' makes, not the public key",
        )
    try:
        key = ECKey.import_key(pem)
    except (JoseError, ValueError) as exc:
        raise ConfigError(f"{certificate} holds no certificate of an EC key") from exc
    if key.curve_name != "P-256":
        raise ConfigError(f"{certificate}: ES256 needs a key on P-256, found {key.curve_name}")
    return key


class _Client(ClientMixin):  # type: ignore[misc]  # Authlib ships no types
    def __init__(self, client_id: str, certificate: Path) -> None:
        self.client_id, self.certificate = client_id, certificate

    def get_allowed_scope(self, scope: str | None) -> str | None:
        return scope or None

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method == _AUTH_METHOD

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == _GRANT_TYPE


class _RefusedError(InvalidClientError):  # type: ignore[misc]  # as above
    """``found``: what the log says and the client does not hear."""

    def __init__(self, description: str, found: str) -> None:
        super().__init__(description=description)
        self.found = found


class _Assertion(JWTBearerClientAssertion):  # type: ignore[misc]  # as above
    def __init__(self, token_endpoint: str) -> None:
        super().__init__(validate_jti=False, leeway=0)
        self.token_endpoint = token_endpoint

    def __call__(self, query_client: object, request: object) -> object:
        try:
            return super().__call__(query_client, request)
        except ValueError as exc:  # what Authlib lets through of malformed input
            raise InvalidClientError(description="Invalid JWT assertion.") from exc

    def get_audiences(self) -> list[str]:
        return [self.token_endpoint]

    def resolve_client_public_key(self, client: _Client) -> ECKey:
        # Read for each request: an operator replaces the certificate while the server runs.
        try:
            return registered_key(client.certificate)
        except ConfigError as exc:
            raise _RefusedError("The registered certificate cannot be used.", str(exc)) from exc

    def process_assertion_claims(self, assertion: str, resolve_key: ECKey) -> object:
        try:
            return super().process_assertion_claims(assertion, resolve_key)
        except InvalidClientError as exc:
            if isinstance(exc.__cause__, BadSignatureError):
                raise _RefusedError(
                    "Invalid signature.", "not by the key of the registered certificate"
                ) from exc
            raise

    def verify_claims(self, claims: dict[str, Any]) -> None:
        found = claims.get("aud")
        if found is not None and found != self.token_endpoint:  # no list either, of which ours is one
            raise _RefusedError(
                "Invalid claim: 'aud'", f"expected {self.token_endpoint!r}, found {found!r:.200}"
            )
        super().verify_claims(claims)
        ahead = claims["exp"] - int(time.time())
        if ahead > MAX_AHEAD:
            raise _RefusedError("JWT expiration time is unreasonable", f"exp is {ahead} s ahead")


class _Grant(ClientCredentialsGrant):  # type: ignore[misc]  # as above
    TOKEN_ENDPOINT_AUTH_METHODS = (_AUTH_METHOD,)


class _AuthorizationServer(AuthorizationServer):  # type: ignore[misc]  # as above
    def handle_error_response(self, request: OAuth2Request, error: OAuth2Error) -> Response:
        parts = [error.error, error.get_error_description(), getattr(error, "found", "")]
        reason = ": ".join(part.removesuffix(".") for part in parts if part)
        _log.warning("refused: %s", printable(reason))
        response: Response = super().handle_error_response(request, error)
        return response

    def validate_requested_scope(self, scope: str | None) -> None:
        try:
            super().validate_requested_scope(scope)
        except InvalidScopeError as error:
            error.found = f"expected {' '.join(self.scopes_supported)!r} or part of it, found {scope!r:.200}"
            raise

    def save_token(self, token: Mapping[str, object], request: OAuth2Request) -> None:
        _log.info("issued an access token to %s, scope %s", request.client.client_id, token["scope"])


class _AccessTokens:
    """RS256 JWTs with the claims of WIPO's."""

    def __init__(self, issuer: str) -> None:
        self.issuer = issuer
        self.key = RSAKey.generate_key(2048)
        # Standard base64, as AM has it: a kid with + / = in it is what clients trip over.
        self.kid = b64encode(urlsafe_b64decode(self.key.thumbprint() + "=")).decode("ascii")

    def jwks(self) -> dict[str, object]:
        public = self.key.as_dict(private=False)
        return {"keys": [{**public, "kid": self.kid, "use": "sig", "alg": "RS256"}]}

    def __call__(self, *, client: _Client, scope: str, **_: object) -> str:
        now = int(time.time())
        claims: dict[str, object] = {
            "sub": client.client_id,
            "auditTrackingId": f"{uuid.uuid4()}-{secrets.randbelow(10**5)}",
            "iss": self.issuer,
            "nbf": now,
            "iat": now,
            "exp": now + ACCESS_TOKEN_LIFETIME,
            "aud": client.client_id,
            "scope": scope.split(),
            "realm": "/",
            "jti": secrets.token_urlsafe(20),
        }
        return jwt.encode({"kid": self.kid, "alg": "RS256"}, claims, self.key)


def _application(issuer: str, clients: Mapping[str, Path], scopes: Sequence[str]) -> Flask:
    token_endpoint, jwks_uri = f"{issuer}/access_token", f"{issuer}/connect/jwk_uri"
    registered = {client_id: _Client(client_id, certificate) for client_id, certificate in clients.items()}
    access_tokens = _AccessTokens(issuer)
    app = Flask(__name__, static_folder=None)
    app.config |= {
        "OAUTH2_SCOPES_SUPPORTED": list(scopes),
        "OAUTH2_ACCESS_TOKEN_GENERATOR": access_tokens,
        "OAUTH2_TOKEN_EXPIRES_IN": {_GRANT_TYPE: ACCESS_TOKEN_LIFETIME},
    }
    server = _AuthorizationServer(app, query_client=registered.get)
    server.register_client_auth_method(_AUTH_METHOD, _Assertion(token_endpoint))
    server.register_grant(_Grant)
    metadata = {
        "issuer": issuer,
        "token_endpoint": token_endpoint,
        "jwks_uri": jwks_uri,
        "scopes_supported": list(scopes),
        "grant_types_supported": [_GRANT_TYPE],
        "response_types_supported": [],
        "token_endpoint_auth_methods_supported": ["private_key_jwt"],
        "token_endpoint_auth_signing_alg_values_supported": ["ES256"],
    }
    app.post(f"{_ISSUER_PATH}/access_token", endpoint="token")(server.create_token_response)
    app.get(f"{_ISSUER_PATH}/connect/jwk_uri", endpoint="jwks")(access_tokens.jwks)
    app.get(f"{_ISSUER_PATH}/.well-known/openid-configuration", endpoint="metadata")(lambda: metadata)
    return app


class _Handler(WSGIRequestHandler):
    timeout = 60  # seconds that an idle connection keeps its thread

    def log(self, type: str, message: str, *args: object) -> None:  # noqa: A002  # werkzeug's name
        _log.debug(message.rstrip(), *args)


def _listen(host: str, port: int) -> socket.socket:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"the host must be a loopback address, found {host!r}") from None
    if not address.is_loopback:
        raise ConfigError(f"the host must be a loopback address, found {host}")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {exc.strerror}", hint="port 0 takes a free one"
        ) from exc


class RehearsalServer:
    """The server, listening from construction on, answering inside ``with``.

    ``clients``: the certificate file of each client id, read anew for each request. ``tls``: files of a
    certificate chain and its key in PEM; plain http without. ``port`` 0 picks a free one.

    Raises :class:`ConfigError`.
    """

    def __init__(
        self,
        clients: Mapping[str, Path],
        *,
        scopes: Sequence[str] = SCOPES,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        for certificate in clients.values():
            registered_key(certificate)
        context = _tls_context(*tls) if tls else None
        with _listen(host, port) as listener:
            port = listener.getsockname()[1]
            origin = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
            self.issuer = origin + _ISSUER_PATH
            app = _application(self.issuer, clients, scopes)
            self._server = make_server(
                host,
                port,
                app,
                threaded=True,
                request_handler=_Handler,
                ssl_context=context,
                fd=listener.fileno(),
            )
        if isinstance(self._server.socket, ssl.SSLSocket):
            # In the thread of its connection: a client that says nothing must not hold up the others.
            self._server.socket.do_handshake_on_connect = False  # type: ignore[attr-defined]  # missing in typeshed
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def token_endpoint(self) -> str:
        return f"{self.issuer}/access_token"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()


def _tls_context(chain: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(chain, key)
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(f"TLS certificate {chain} with key {key}: {exc.strerror or exc}") from exc
    return context


def serve(
    clients: Mapping[str, Path],
    *,
    scopes: Sequence[str] = SCOPES,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: tuple[Path, Path] | None = None,
    on_ready: Callable[[str], None],
) -> None:
    """Answer until SIGINT or SIGTERM; ``on_ready`` gets the token endpoint. For the main thread only."""
    with (
        _until_signal() as stopped,
        RehearsalServer(clients, scopes=scopes, host=host, port=port, tls=tls) as server,
    ):
        on_ready(server.token_endpoint)
        stopped.wait()


@contextlib.contextmanager
def _until_signal() -> Iterator[threading.Event]:
    stopped = threading.Event()
    watchdog = signal.set_wakeup_fd(-1)  # a caller may take Ctrl-C for a hang to end; here it is the way out
    before = {name: signal.signal(name, lambda *_: stopped.set()) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(watchdog)
