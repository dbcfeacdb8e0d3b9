"""The one place that parses and judges URLs.

The grammar is a small part of RFC 3986: what no two parsers read differently and no library rewrites on the
way out. So the string that was judged is what is sent, and the origin here is where requests and urllib3 connect.
"""

import re
from dataclasses import dataclass

from hsm_signer.errors import ConfigError
from hsm_signer.text import printable

_MAX_LENGTH = 2048
_MAX_HOST = 253  # characters, RFC 1035 §2.3.4
_MAX_PORT = 0xFFFF
_DEFAULT_PORTS = {"https": 443, "http": 80}
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NEEDED = r"%(?:[0189A-F][0-9A-F]|2[0-9A-CF]|3[A-F]|40|5[B-E]|60|7[B-DF])"  # all but RFC 3986 §2.3 unreserved
_PCHAR = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|{_NEEDED})"  # RFC 3986 §3.3
_NO_DOTS = r"(?!\.{1,2}(?:[/?]|$))"
_URL = (
    rf"(?P<scheme>https?)://(?P<host>{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:]+\])(?::(?P<port>[1-9][0-9]{{0,4}}))?"
    rf"(?:/(?:{_NO_DOTS}{_PCHAR}+(?:/{_NO_DOTS}{_PCHAR}*)*)?(?:\?(?:{_PCHAR}|[/?])+)?)?"
)
# Why the grammar has no room for a URL: the first that is found is named
_FAULTS = (
    (r"[^!-~]", "white space, control characters and non-ASCII characters are refused"),
    (r"\\", "a backslash is refused"),
    (r"#", "a fragment is refused"),
    (r"^(?!https?://)", "it must begin with https://"),
    (r"^https?://[^/?]*@", "user information before the host is refused"),
    (r"^https?://[^/?]*[A-Z]", "the host must be in lower case"),
    (r"^[^?]*/\.{1,2}(?:[/?]|$)", "dot segments are refused"),
    (r"%(?![0-9A-F]{2})", "percent-encoding must be in upper case"),
    (rf"(?!{_NEEDED})%", "needless percent-encoding is refused"),
    ("", "no URL of the form https://host[:port]/path[?query]"),
)
_PROXY = r"(?s)(https?://)?([A-Za-z0-9._~!$&'()*+,;=:%-]*@)?(.*)"


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
        return self.origins[0]

    @property
    def origins(self) -> tuple[str, ...]:
        """The ways to write the origin: two where the port is the default one."""
        explicit = f"{self.scheme}://{self.host}:{self.port}"
        return (
            (explicit.rpartition(":")[0], explicit)
            if self.port == _DEFAULT_PORTS[self.scheme]
            else (explicit,)
        )

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
    scheme, userinfo, address = re.findall(_PROXY, text)[0]
    url = _parse(scheme + address.removesuffix("/"), "proxy")
    if url.text not in url.origins:
        raise ConfigError(f"proxy: nothing may follow host and port; found {_shown(text)}")
    return f"{scheme}{userinfo}{url.text.removeprefix(scheme)}"


def without_password(proxy: str) -> str:
    """Give the URL of a proxy, well-formed or not, with ``…`` in the place of the password, to be shown."""
    return re.sub(r"(?s)\A((?:https?://)?+[^:/@]*+).+@", r"\1:…@", proxy)


def parse_origin(text: str, *, what: str) -> Url:
    """Judge a URL that is an origin: at most a ``/`` may follow. Raises :class:`ConfigError`."""
    url = parse(text, what=what)
    if text.removesuffix("/") not in url.origins:
        raise ConfigError(f"{what}: nothing may follow host and port; found {_shown(text)}")
    return url


def same_origin(first: Url, second: Url) -> bool:
    """Whether both have the same scheme, host and port (RFC 6454 §5); default ports may be written or not."""
    return first.origin == second.origin


def _parse(text: str, what: str) -> Url:
    if len(text) > _MAX_LENGTH:
        raise ConfigError(f"{what}: longer than {_MAX_LENGTH} characters")
    match = re.fullmatch(_URL, text)
    if not match:
        fault = next(fault for pattern, fault in _FAULTS if re.search(pattern, text))
        raise ConfigError(f"{what}: {fault}; found {_shown(text)}")
    port = int(match["port"] or _DEFAULT_PORTS[match["scheme"]])
    if not _is_host(match["host"]) or port > _MAX_PORT:
        raise ConfigError(f"{what}: no host name, IP address or port that there is; found {_shown(text)}")
    return Url(text, match["scheme"], match["host"], port)


def _shown(text: str) -> str:
    authority = text.partition("://")[2] or text
    if "@" in re.split(r"[/?#]", authority, maxsplit=1)[0]:
        return "one with user information, not shown"  # it may hold a password
    return repr(printable(text, 200))


def _is_host(host: str) -> bool:
    if not host.startswith("[") and not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):
        return len(host) <= _MAX_HOST
    from ipaddress import AddressValueError, IPv4Address, IPv6Address

    try:  # one spelling only: inet_aton(3) reads 127.1, 2130706433 and 0x7f.1 as addresses too
        if host.startswith("["):
            address = IPv6Address(host[1:-1])
            return address.compressed == host[1:-1] and address.ipv4_mapped is None
        return str(IPv4Address(host)) == host
    except AddressValueError:
        return False


def _is_loopback(host: str) -> bool:
    return host == "[::1]" or bool(re.fullmatch(r"127(?:\.[0-9]{1,3}){3}", host))
