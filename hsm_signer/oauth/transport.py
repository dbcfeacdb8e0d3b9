"""One bounded HTTP request: for the token endpoint, for discovery and for keys alike.

Nothing in the environment changes where a request goes or whom it trusts: no proxy or CA variables, no
``~/.netrc``, no key log. Redirects are not followed. However a server behaves, :meth:`Transport.request` is
back at its deadline, name resolution included.
"""

import binascii
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from hsm_signer import __version__
from hsm_signer.errors import ConfigError, TransportError
from hsm_signer.url import Url, parse_proxy

if TYPE_CHECKING:
    import ssl

    from hsm_signer.oauth.connections import Connections, Exchange

_log = logging.getLogger(__name__)

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")
_MAX_BUNDLE = 8 * 1024 * 1024  # bytes


@dataclass(frozen=True)
class Answer:
    """What came back, whatever the status. ``date`` and ``retry_after`` are header fields as received."""

    status: int
    content_type: str | None
    body: bytes = field(repr=False)
    date: str | None = None
    retry_after: str | None = None


class Transport:
    """Requests to authorization servers; connections are kept alive within the process.

    ``ca_bundle``: a PEM file whose roots are trusted instead of certifi's. ``proxy``: an HTTP proxy for all
    but loopback. ``timeout``: seconds to connect, and seconds between two bytes of an answer. Safe from any
    thread, and after a fork. Raises :class:`ConfigError` for values that cannot work.
    """

    def __init__(
        self,
        ca_bundle: str | os.PathLike[str] | None = None,
        proxy: str | None = None,
        timeout: tuple[float, float] = (5, 15),
    ) -> None:
        self._ca_bundle = None if ca_bundle is None else _checked_bundle(Path(ca_bundle))
        self._proxy = None if proxy is None else parse_proxy(proxy)
        if len(timeout) != 2 or not all(seconds > 0 for seconds in timeout):
            raise ConfigError(f"timeout is two numbers of seconds above 0, found {timeout!r}")
        self._timeout = timeout
        self._owned: tuple[int, Connections] | None = None

    def prepare(self) -> None:
        """Load urllib3 and the trusted roots now, so that whatever is wrong with them shows early.

        Raises :class:`ConfigError`.
        """
        self._connections()

    def request(
        self,
        method: str,
        url: Url,
        *,
        form: Mapping[str, str] | None = None,
        accept: str = "application/json",
        deadline: float,
    ) -> Answer:
        """Send one request; be back at ``deadline`` (of ``time.monotonic``).

        Raises :class:`TransportError` where there is no complete answer of at most 1 MiB.
        """
        began = time.monotonic()
        header = {"Accept": accept, "Accept-Encoding": "identity", "User-Agent": f"hsm-token/{__version__}"}
        request: dict[str, Any] = {"method": method, "url": url.text, "headers": header}
        if form is not None:
            header["Content-Type"] = "application/x-www-form-urlencoded"
            request["body"] = urlencode(form)
        exchange = self._start(url, request, deadline)
        del form, request  # the frames of an error must not hold an assertion
        try:
            exchange.done.wait(deadline - time.monotonic())
        finally:  # Ctrl-C too
            in_time = exchange.done.is_set()
            sent = in_time or exchange.give_up()
        if not in_time:
            raise TransportError(f"{url.origin}: no answer before the deadline", sent=sent)
        if exchange.answer is None:
            raise exchange.failure or TransportError(url.origin)
        _log.debug(
            "%s %s answered %d after %.3f s", method, url, exchange.answer[0], time.monotonic() - began
        )
        status, received, body = exchange.answer
        content_type, date, retry_after = map(received.get, ("Content-Type", "Date", "Retry-After"))
        return Answer(status, content_type, body, date, retry_after)

    def _start(self, url: Url, request: Mapping[str, Any], deadline: float) -> "Exchange":
        """Begin in a thread: name resolution and the reads of http.client know no deadline for all of it."""
        from hsm_signer.oauth.connections import Exchange

        exchange = Exchange(url.origin)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            exchange.fail("the deadline passed before the request")
            return exchange
        here = url.is_loopback or url.host == "localhost"
        pools = self._connections().direct if here else self._connections().proxied
        timeout = tuple(min(seconds, remaining) for seconds in self._timeout)
        work = threading.Thread(target=exchange.run, args=(pools, request, timeout), daemon=True)
        try:
            work.start()
        except RuntimeError:
            exchange.fail("this process cannot start a thread")
        return exchange

    def _connections(self) -> "Connections":
        owner, connections = self._owned or (0, None)
        if connections is None or owner != os.getpid():  # a child must not write into those of its parent
            from hsm_signer.oauth.connections import Connections

            connections = Connections(self.tls_context(), self._proxy)
            self._owned = os.getpid(), connections
        return connections

    def tls_context(self) -> "ssl.SSLContext":
        """What is trusted, and nothing from the environment: TLS 1.2 or newer, our roots."""
        import ssl

        import certifi

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a bare one: create_default_context() logs keys
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(cafile=self._ca_bundle or certifi.where())
        except (OSError, ssl.SSLError):
            unusable = True
        else:
            unusable = False
        if unusable:
            raise ConfigError(f"ca-bundle: {self._ca_bundle} holds a certificate that OpenSSL does not read")
        return context


def _checked_bundle(path: Path) -> Path:
    """Look through a PEM file without loading OpenSSL, which a cached access token does not need."""
    try:
        with path.open("rb") as file:
            pem = file.read(_MAX_BUNDLE)
    except OSError as exc:
        raise ConfigError(f"ca-bundle: {path}: {exc.strerror}") from None
    certificates = _CERTIFICATE.findall(pem)
    if (
        not certificates
        or len(certificates) != pem.count(b"-----BEGIN")
        or not all(map(_is_der, certificates))
    ):
        raise ConfigError(f"ca-bundle: {path} is no PEM file of certificates")
    return path


def _is_der(text: bytes) -> bool:
    try:
        der = binascii.a2b_base64(text)
    except binascii.Error:
        return False
    octets = der[1] - 0x80 if len(der) > 1 else 0  # of the length; a certificate has more than 127 bytes
    return (
        der[:1] == b"\x30"
        and octets in (1, 2)
        and len(der) == 2 + octets + int.from_bytes(der[2 : 2 + octets])
    )
