"""Distinguished names as text (RFC 4514), read strictly: a typing error must not end in a certificate."""

import re
from collections.abc import Iterable, Sequence

from hsm_signer.errors import ConfigError

# RFC 4514 §3, with the most characters that RFC 5280 appendix A.1 allows
TYPES = {"CN": 64, "L": 128, "ST": 128, "O": 64, "OU": 64, "C": 2, "STREET": 128, "DC": 63, "UID": 256}
_PIECE = r'\\[0-9A-Fa-f]{2}|\\[ "#+,;<=>\\]|[^\\"+,;<>\x00]'
_ATTRIBUTE = re.compile(rf"(?P<type>[A-Za-z][A-Za-z0-9-]*|[0-9.]+)=(?P<value>(?:{_PIECE})+)")
_SHAPES = {"C": r"[A-Z]{2}", "DC": r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"}

Attribute = tuple[str, str]  # type as in TYPES, value


def parse(text: str) -> list[list[Attribute]]:
    """Read the relative distinguished names in the order of the text, the most specific one first.

    Known are the types of RFC 4514 §3; ``#hex`` values and dotted types are refused, since nobody can
    proof-read them. Raises :class:`ConfigError` with the place where reading stopped.
    """
    names: list[list[Attribute]] = [[]]
    position = 0
    while True:
        found = _ATTRIBUTE.match(text, position)
        if not found:
            raise ConfigError(
                f"subject, character {position + 1}: "
                f"expected TYPE=value, found {text[position : position + 20]!r}",
                hint='as in "CN=das-2026,O=Office,C=CH": no space after a comma, \\ before one in a value',
            )
        names[-1].append(_attribute(found["type"].upper(), found["value"], names[-1]))
        position = found.end()
        if position == len(text):
            return names
        if text[position] == ",":
            names.append([])
        elif text[position] != "+":
            raise ConfigError(
                f"subject, character {position + 1}: {text[position]!r} in a value needs a \\ before it"
            )
        position += 1


def _attribute(kind: str, raw: str, siblings: Iterable[Attribute]) -> Attribute:
    if kind not in TYPES:
        raise ConfigError(f"subject: unknown type {kind!r}", hint=f"known are {', '.join(TYPES)}")
    if kind in (known for known, _ in siblings):
        raise ConfigError(f"subject: {kind} twice in one relative distinguished name")
    pieces = re.findall(_PIECE, raw)
    if pieces[0] in (" ", "#") or pieces[-1] == " ":
        raise ConfigError(f"subject: a space or # at an end of a {kind} value needs a \\ before it")
    octets = b"".join(_octets(piece) for piece in pieces)
    try:
        value = octets.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"subject: the bytes of the {kind} value are not UTF-8") from None
    return kind, checked(kind, value)


def _octets(piece: str) -> bytes:
    if piece[0] != "\\":
        return piece.encode(errors="surrogatepass")
    return bytes.fromhex(piece[1:]) if len(piece) == 3 else piece[1:].encode()


def checked(kind: str, value: str) -> str:
    """Give the value back if a certificate may hold it (RFC 5280 appendix A.1).

    Raises :class:`ConfigError` otherwise.
    """
    if not value.strip() or not value.isprintable():
        raise ConfigError(f"{kind} must be printable text and not empty, found {value!r}")
    if len(value) > TYPES[kind]:
        raise ConfigError(f"{kind} has at most {TYPES[kind]} characters in a certificate, found {len(value)}")
    if not re.fullmatch(_SHAPES.get(kind, r".*"), value):
        what = "two capital letters (ISO 3166)" if kind == "C" else "one label of a domain name"
        raise ConfigError(f"{kind} is {what}, found {value!r}")
    return value


def text(names: Iterable[Sequence[Attribute]]) -> str:
    """Write names in the order given (RFC 4514 §2); what cannot be seen is written as ``\\XX``."""
    return ",".join("+".join(f"{kind}={_escaped(value)}" for kind, value in name) for name in names)


def _escaped(value: str) -> str:
    last = len(value) - 1
    return "".join(
        "".join(f"\\{octet:02X}" for octet in sign.encode(errors="surrogatepass"))
        if not sign.isprintable()
        else f"\\{sign}"
        if sign in '"+,;<>\\' or (sign == " " and place in (0, last)) or (sign == "#" and place == 0)
        else sign
        for place, sign in enumerate(value)
    )
