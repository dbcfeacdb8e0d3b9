"""How long certificates live: a server that knows one per client lets nobody in on the day after.

Watched are the files that a profile names (``certificate``, ``next-certificate``); where it names none, the
certificates of the key on the token. Of these one that has ended is of the past where another is valid: nobody
is let in by it, and nobody has to be.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hsm_signer.errors import ConfigError, HsmSignerError

if TYPE_CHECKING:
    from hsm_signer.config import Settings
    from hsm_signer.hsm.signer import HsmSigner
    from hsm_signer.x509 import Certificate

DAYS = 730  # WIPO replaces the certificate of an office every two years
BACKDATED = 300  # seconds that notBefore lies in the past: the server's clock may be behind ours
WARN_DAYS = 60

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """A certificate and where it was found. ``replaced``: it has ended, and another of the same key is valid."""

    where: str
    certificate: "Certificate"
    replaced: bool = False

    def days_left(self, now: int) -> int:
        """Whole days until it ends; negative when it has ended. ``now`` in Unix seconds."""
        return self.certificate.days_left(now)

    def verdict(self, now: int) -> str:
        """One sentence for a person."""
        left, end = self.days_left(now), f"{self.certificate.not_after:%Y-%m-%d}"
        if left < 0:
            return f"the certificate {self.where} ended on {end}"
        return f"the certificate {self.where} ends on {end}, in {left} days"


def read_chain(path: Path) -> "list[Certificate]":
    """Read the certificates in a file, PEM or DER; :class:`ConfigError` names the file."""
    from hsm_signer import x509

    try:
        with path.open("rb") as file:
            return x509.read_certificates(file.read(x509.MAX_BYTES + 1))
    except OSError as missing:
        raise ConfigError(f"certificate {path} cannot be read: {missing.strerror}") from None
    except ConfigError as odd:
        raise ConfigError(f"{path}: {odd}") from None


def read_file(path: Path) -> "Certificate":
    """Read the one certificate in a file."""
    found = read_chain(path)
    if len(found) != 1:
        raise ConfigError(f"{path} holds {len(found)} certificates; one is expected")
    return found[0]


def in_files(settings: "Settings") -> list[Watched]:
    """The certificates that the profile names."""
    named = (settings.certificate, settings.next_certificate)
    return [Watched(path, read_file(Path(path))) for path in named if path is not None]


def on_token(signer: "HsmSigner", key: str, now: int) -> list[Watched]:
    """The certificates of the key on the token, which no challenge has proved; what ends last comes first.

    ``key`` is its name, ``now`` in Unix seconds.
    """
    from hsm_signer import x509

    found = [x509.read_certificate(der) for der in signer.certificates(proved=False)]
    one_is_valid = any(each.not_before.timestamp() <= now < each.not_after.timestamp() for each in found)
    return [
        Watched(f"of {key} on the token", each, one_is_valid and each.not_after.timestamp() <= now)
        for each in found
    ]


def watched(settings: "Settings", signer: "HsmSigner", now: int) -> list[Watched]:
    """The certificates that the profile names, else those of the key on the token. ``now`` in Unix seconds."""
    return in_files(settings) or on_token(signer, str(settings.key), now)


def ending(found: Iterable[Watched], now: int, days: int) -> list[Watched]:
    """Those that end within so many days, or have ended and are not replaced. ``now`` in Unix seconds."""
    return [each for each in found if each.days_left(now) < days and not each.replaced]


def warn(settings: "Settings", signer: "HsmSigner") -> None:
    """Log a warning for what ends soon. It never fails: whoever wants an access token gets one."""
    now = int(time.time())
    try:
        found = watched(settings, signer, now)
    except HsmSignerError as odd:
        _log.warning("certificates are not watched: %s", odd)
        return
    for each in ending(found, now, WARN_DAYS):
        _log.warning("%s; the next one: hsm-token rollover prepare", each.verdict(now))
