"""The configuration file as text: how long it may be, and what is written into it.

The standard library reads TOML and does not write it.
"""

import json
import re

from hsm_signer.errors import ConfigError

MAX_SIZE = 256 * 1024  # bytes of the file


def text(value: str) -> str:
    """Write a basic string; JSON's escapes are a part of TOML's. :class:`ConfigError` for what is no Unicode."""
    if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"a setting must be Unicode text, found {value!r}")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def key(name: str) -> str:
    """Write a key, quoted where it must be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else text(name)
