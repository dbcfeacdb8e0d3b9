"""What strangers wrote, made safe for a terminal, a log and an error message."""

import re

_RUN = r"[A-Za-z0-9_.-]{18,}+"  # the longest words in the alphabet of a compact JWS
# Within such a word: base64url of a JSON object's start, three long parts, or what is as long as a signature
_JWS = r"(?a)(?:^|[._-])ey[ABIJ][\w-]{8}|[\w-]{16}\.[\w-]{16,}\.[\w-]{32}|[\w-]{80}"
_TAG = r"\[(?=[a-z#/@][^[]*\])"  # what rich takes for markup
_LOOK = 16  # characters looked at for each one shown: escapes lengthen, but a megabyte is not worth escaping


def printable(text: str, limit: int = 500) -> str:
    """Make a stranger's text safe to show, in at most ``limit`` characters.

    Control, format (bidirectional and invisible) and surrogate characters become escapes, and so does the
    bracket that opens a tag of rich; anything shaped like a JWS, whole or cut, is left out.
    """
    return shown(re.sub(_TAG, r"\\x5b", text), limit)


def shown(text: str, limit: int = 2000) -> str:
    """Do the same for our own sentences, whose brackets are meant: ``pip install 'hsm-signer[verify]'``."""
    text = re.sub(_RUN, lambda run: "(JWS left out)" if re.search(_JWS, run[0]) else run[0], text)
    text = "".join(c if c.isprintable() else _escape(c) for c in text[: _LOOK * limit])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
