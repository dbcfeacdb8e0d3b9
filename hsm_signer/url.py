"""The one place that parses and judges URLs.

The grammar is a small part of RFC 3986: what no two parsers read differently and no library rewrites on the
way out. So the string that was judged is what is sent, and the origin here is where requests connects.
"""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from hsm_signer.errors import ConfigError
from hsm_signer.text import printable

_MAX_LENGTH = 2048
_MAX_PORT = 0xFFFF
_DEFAULT_PORTS = {"https": 443, "http": 80}
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PCHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-F]{2})"  # RFC 3986 §3.3
_URL = re.compile(
    rf"""
    (?P<scheme> https? ) ://
    (?P<host> {_LABEL} (?: \. {_LABEL} )* | \[ [0-9a-f:]+ \] )
    (?: : (?P<port> [1-9][0-9]{{0,4}} ) )?
    (?: / (?: {_PCHAR}+ (?: / {_PCHAR}* )* )?
        (?: \? (?: {_PCHAR} | [/?] )+ )?
    )?
    """,
    re.VERBOSE,
)
_PROXY = re.compile(r"(https?://)?([A-Za-z0-9._~!$&'()*+,;=:%-]*@)?(.*)", re.DOTALL)
# What is looked for first is named first; the last line is for whatever else the grammar has no room for
_FAULTS = (
    (re.compile(r"[^!-~]"), "white space, control characters and non-ASCII characters are refused"),
    (re.compile(r"\\"), "a backslash is refused"),
    (re.compile(r"#"), "a fragment is refused"),
    (re.compile(r"^(?!https?://)"), "it must begin with https://"),
    (re.compile(r"^https?://[^/?]*@"), "user information before the host is refused"),
    (re.compile(r"^https?://[^/?]*[A-Z]"), "the host must be in lower case"),
    (re.compile(r"^[^?]*/\.{1,2}(?:[/?]|$)"), "dot segments are refused"),
    (re.compile(r"%(?![0-9A-F]{2})"), "percent-encoding must be in upper case"),
    (
        re.compile(r"%(?:2[DE]|3[0-9]|4[1-9A-F]|5[0-9AF]|6[1-9A-F]|7[0-9AE])"),
        "needless percent-encoding is refused",
    ),
)


@dataclass(frozen=True)
class Url:
    """A URL that was judged. ``text`` is exactly what was given; ``host`` has the brackets of IPv6."""

    text: str
    scheme: str
    host: str
    port: int

    @property
    def origin(self) -> str:
        """Scheme, host and port, a default port left out (RFC 6454 §6.2)."""
        shown = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{shown}"

    @property
    def is_loopback(self) -> bool:
        """Whether the host is an address in ``127.0.0.0/8``, or ``[::1]``."""
        return _is_loopback(self.host)

    def __str__(self) -> str:
        return self.text


def parse(text: str, *, what: str, http_loopback: bool = True) -> Url:
    """Judge a URL; ``what`` names it in the error, such as ``"token endpoint"``.

    https only; with ``http_loopback`` also http to a loopback address. Raises :class:`ConfigError`.
    """
    url = _parse(text, what)
    if url.scheme == "http" and not (http_loopback and url.is_loopback):
        but = ", only a loopback address (127.0.0.1, [::1]) may do without" if http_loopback else ""
        raise ConfigError(f"{what}: https is needed{but}; found {_shown(text)}")
    return url


def parse_proxy(text: str) -> str:
    """Judge the URL of an HTTP proxy, and add ``http://`` where the scheme was left out, as is usual.

    Unlike other URLs it may be http and hold a user name and password. Raises :class:`ConfigError`.
    """
    text = text if "://" in text else f"http://{text}"
    scheme, userinfo, address = _PROXY.fullmatch(text).groups("")  # type: ignore[union-attr]  # matches any text
    url = _parse(scheme + address.removesuffix("/"), "proxy")
    if url.text != url.origin and url.text != f"{url.scheme}://{url.host}:{url.port}":
        raise ConfigError(f"proxy: nothing may follow host and port; found {_shown(text)}")
    return f"{scheme}{userinfo}{url.text.removeprefix(scheme)}"


def same_origin(first: Url, second: Url) -> bool:
    """Whether both have the same scheme, host and port (RFC 6454 §5); default ports may be written or not."""
    return first.origin == second.origin


def _parse(text: str, what: str) -> Url:
    match = None if len(text) > _MAX_LENGTH else _URL.fullmatch(text)
    if fault := _fault(text):
        raise ConfigError(f"{what}: {fault}; found {_shown(text)}")
    if not match:
        raise ConfigError(
            f"{what}: no URL of the form https://host[:port]/path[?query]; found {_shown(text)}"
        )
    port = int(match["port"] or _DEFAULT_PORTS[match["scheme"]])
    if not _is_host(match["host"]) or port > _MAX_PORT:
        raise ConfigError(f"{what}: no host name, IP address or port that there is; found {_shown(text)}")
    return Url(text, match["scheme"], match["host"], port)


def _fault(text: str) -> str | None:
    if len(text) > _MAX_LENGTH:
        return f"longer than {_MAX_LENGTH} characters"
    return next((fault for pattern, fault in _FAULTS if pattern.search(text)), None)


def _shown(text: str) -> str:
    authority = text.partition("://")[2] or text
    if "@" in re.split(r"[/?#]", authority, maxsplit=1)[0]:
        return "one with user information, not shown"  # it may hold a password
    return repr(printable(text, 200))


def _is_host(host: str) -> bool:
    if len(host) > 253:
        return False
    try:
        if host.startswith("["):
            address = IPv6Address(host[1:-1])
            return address.compressed == host[1:-1] and address.ipv4_mapped is None
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):
            return (
                str(IPv4Address(host)) == host
            )  # inet_aton(3) reads 127.1, 2130706433 and 0x7f.1 as addresses
    except AddressValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "[::1]" or bool(re.fullmatch(r"127(?:\.[0-9]{1,3}){3}", host))
