"""PKCS#11 URIs: which token, which key (RFC 7512).

Path attributes only. One place names the module and one the PIN, so query attributes are refused with the
name of the setting to use.
"""

import re
from dataclasses import dataclass, fields
from urllib.parse import quote, unquote_to_bytes

from hsm_signer.errors import ConfigError

_TEXTS = frozenset(
    {
        "token",
        "manufacturer",
        "serial",
        "model",
        "library-manufacturer",
        "library-description",
        "slot-manufacturer",
        "slot-description",
        "object",
    }
)
_KEY_ATTRIBUTES = frozenset({"object", "type", "id"})
_TYPES = frozenset({"public", "private", "cert", "secret-key", "data"})
_FORMS = {
    "type": "public, private, cert, secret-key or data",
    "slot-id": "a number",
    "library-version": "a version such as 3 or 2.40",
}
_QUERY_SETTINGS = {
    "module-path": "module",
    "module-name": "module",
    "pin-source": "pin-source",
    "pin-value": "pin-source",
}
_PCHAR = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=&]|%[0-9A-Fa-f]{2})*")
_SAFE = ":[]@!$'()*+,=&"

Value = str | bytes | int | tuple[int, int]


@dataclass(frozen=True)
class Uri:
    """The path attributes of a PKCS#11 URI (RFC 7512 §2.3); what is not asked for is ``None``."""

    token: str | None = None
    manufacturer: str | None = None
    serial: str | None = None
    model: str | None = None
    library_manufacturer: str | None = None
    library_description: str | None = None
    library_version: tuple[int, int] | None = None
    slot_manufacturer: str | None = None
    slot_description: str | None = None
    slot_id: int | None = None
    object: str | None = None
    type: str | None = None
    id: bytes | None = None

    def __str__(self) -> str:
        parts = [f"{name}={_written(value)}" for name, value in self._asked().items()]
        return "pkcs11:" + ";".join(parts)

    def token_attributes(self) -> dict[str, Value]:
        """What is asked of module, slot and token, by the attributes' names in RFC 7512."""
        return {name: value for name, value in self._asked().items() if name not in _KEY_ATTRIBUTES}

    def _asked(self) -> dict[str, Value]:
        values = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def token_uri(text: str) -> Uri:
    """Read what chooses a token: a URI, or the token's label alone."""
    return parse(text) if _is_uri(text) else Uri(token=checked_label(text, "token"))


def key_uri(text: str) -> Uri:
    """Read what chooses a key: a URI, or the key's label alone.

    ``type`` can be left out or ``private``: what signs is the private key.
    """
    uri = parse(text) if _is_uri(text) else Uri(object=checked_label(text, "key"))
    if uri.type not in (None, "private"):
        raise ConfigError(f"a signing key has type=private, but the URI says type={uri.type}")
    return uri


def parse(text: str) -> Uri:
    """Read a PKCS#11 URI with path attributes only; everything else is a :class:`ConfigError`."""
    if not _is_uri(text):
        raise ConfigError("a PKCS#11 URI starts with pkcs11:")
    path, question_mark, query = text[len("pkcs11:") :].partition("?")
    if question_mark:
        raise _refused_query(query)
    values: dict[str, Value] = {}
    for part in path.split(";") if path else []:
        name, equals, written = part.partition("=")
        if not equals or not _PCHAR.fullmatch(written):
            raise ConfigError(  # without the value: it may be a PIN in the wrong place
                f"no attribute of a PKCS#11 URI (RFC 7512): {name!r}",
                hint="attributes are name=value with ; between them; what is special in a value is written %XX",
            )
        if name in values:
            raise ConfigError(f"the PKCS#11 URI names {name} twice")
        values[name] = _read(name, written)
    return Uri(**{name.replace("-", "_"): value for name, value in values.items()})  # type: ignore[arg-type]  # attributes are fields by name, each judged above


def _is_uri(text: str) -> bool:
    return text[: len("pkcs11:")].lower() == "pkcs11:"


def checked_label(text: str, what: str) -> str:
    """A label that a module can be given: python-pkcs11 ends the process over one that it cannot write."""
    if not isinstance(text, str):
        raise ConfigError(f"the label of the {what} is text, found {type(text).__name__}")
    if not text:
        raise ConfigError(f"the label of the {what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # an argument of the command line that is no UTF-8
        raise ConfigError(f"the label of the {what} is no UTF-8 text") from None
    return text


def _read(name: str, written: str) -> Value:
    value = unquote_to_bytes(written)
    if name == "id":
        return value
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{name} of the PKCS#11 URI is no UTF-8 text") from None
    if name in _TEXTS or (name == "type" and text in _TYPES):
        return text
    if name == "slot-id" and re.fullmatch(r"[0-9]{1,20}", text):
        return int(text)
    if name == "library-version" and (version := re.fullmatch(r"([0-9]{1,3})(?:\.([0-9]{1,3}))?", text)):
        return int(version[1]), int(version[2] or 0)
    if name in _FORMS:
        raise ConfigError(f"{name} of the PKCS#11 URI must be {_FORMS[name]}")
    raise ConfigError(
        f"no attribute of a PKCS#11 URI that we know: {name!r}",
        hint="token, manufacturer, serial, model, object, id, type, slot-…, library-…: RFC 7512 §2.3",
    )


def _refused_query(query: str) -> ConfigError:
    # pin-value holds a PIN: no value is ever quoted
    names = [part.partition("=")[0] for part in query.split("&")]
    settings = [
        f"{name}: use the setting {_QUERY_SETTINGS[name]}" for name in names if name in _QUERY_SETTINGS
    ]
    return ConfigError(
        "a PKCS#11 URI here has path attributes only, no query after a question mark",
        hint="; ".join(settings) or "a question mark inside a value is written %3F",
    )


def _written(value: Value) -> str:
    if isinstance(value, tuple):
        return ".".join(map(str, value))
    if isinstance(value, bytes):
        return "".join(f"%{byte:02X}" for byte in value)
    return quote(str(value), safe=_SAFE)
