"""From a key in the token to a folder that is ready to send: what an office registers at the server.

The folder holds nothing secret, and nothing that the private key has not just signed for: the certificate is
the challenge, and all that is written comes from the public half under which it verified.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from hsm_signer import __version__, ecdsa, files, validity, x509
from hsm_signer.errors import ConfigError, KeyExportableError, KeyMismatchError, KeyNotFoundError
from hsm_signer.hsm.uri import key_uri
from hsm_signer.jose import jwk_set
from hsm_signer.text import printable

if TYPE_CHECKING:
    from hsm_signer.hsm.proof import Proof
    from hsm_signer.hsm.token import Token

CERTIFICATE = "es256_cert.pem"
PUBLIC_KEY = "es256_public.pem"
JWKS = "jwks.json"
RECEIPT = "receipt.json"
README = "README.txt"
FILES = (CERTIFICATE, PUBLIC_KEY, JWKS, RECEIPT, README)


@dataclass(frozen=True)
class Enrolment:
    """One key of one client, as it is told to whoever registers it; all of it is public."""

    client_id: str
    made_at: int  # Unix seconds
    certificate: x509.Certificate
    jwks: Mapping[str, object]
    proof: "Proof"

    @property
    def public_key_pem(self) -> str:
        """SubjectPublicKeyInfo in PEM (RFC 7468 §13)."""
        return ecdsa.pem("PUBLIC KEY", self.certificate.spki)

    @property
    def key_fingerprint(self) -> str:
        """SHA-256 of the SubjectPublicKeyInfo, 64 hexadecimal digits."""
        return hashlib.sha256(self.certificate.spki).hexdigest()

    def receipt(self) -> dict[str, object]:
        """All of it in one JSON value, for programs and for the records."""
        certificate = self.certificate
        return {
            "made_at": _iso(datetime.fromtimestamp(self.made_at, UTC)),
            "client_id": self.client_id,
            "send": CERTIFICATE,
            "certificate": {
                "subject": certificate.subject,
                "serial_number": f"{certificate.serial_number:040x}",
                "not_before": _iso(certificate.not_before),
                "not_after": _iso(certificate.not_after),
                "sha256": certificate.fingerprint,
                "sha256_in_groups": in_groups(certificate.fingerprint),
            },
            "public_key": {
                "thumbprint": certificate.thumbprint,
                "sha256": self.key_fingerprint,
                "sha256_in_groups": in_groups(self.key_fingerprint),
            },
            "proof": self.proof.as_dict(),
            "versions": _versions(),
        }

    def readme(self) -> str:
        """The text for the people at both ends of the telephone."""
        certificate, key, token = self.certificate, self.proof.key, self.proof.token
        facts = {
            "Client id": self.client_id,
            "Subject": certificate.subject,
            "Serial number": f"{certificate.serial_number:040x}",
            "Valid from": _iso(certificate.not_before),
            "Valid until": _iso(certificate.not_after),
            "Key thumbprint": f"{certificate.thumbprint} (RFC 7638)",
            "Key in the token": printable(f"{key.label}, CKA_ID {key.id.hex()}"),
            "Token": printable(f"{token.label}, serial {token.serial}"),
            "Model": printable(f"{token.manufacturer} {token.model}"),
            "Made": _iso(datetime.fromtimestamp(self.made_at, UTC)),
            "By": ", ".join(f"{name} {number}" for name, number in _versions().items()),
        }
        return _README.format(
            client_id=self.client_id,
            certificate=_in_lines(certificate.fingerprint),
            public_key=_in_lines(self.key_fingerprint),
            facts="\n".join(f"{name:<18}{fact}" for name, fact in facts.items()),
            statement=fill(self.proof.statement, 79),
            probes="\n".join(f"  {probe.name}: {probe.answer}" for probe in self.proof.probed),
            claims="\n".join(f"  {name}: {value}" for name, value in self.proof.claimed.items()),
        )


_README = f"""\
Registration of a key for the client {{client_id}}

Send {CERTIFICATE} to the operator of the authorization server. For WIPO DAS
that is WIPO. It is the file that is registered, and no other file has to be
sent; {README} and {RECEIPT} may go along, so that the receiver has
something to compare with. Nothing in this folder is secret. The private key is
in the token, and in none of these files.

Compare before the certificate is registered, on the telephone for example:

  SHA-256 of the certificate
  (openssl x509 -in {CERTIFICATE} -noout -fingerprint -sha256)

{{certificate}}

  SHA-256 of the public key
  (openssl pkey -pubin -in {PUBLIC_KEY} -outform DER | openssl sha256)

{{public_key}}

{{facts}}

{{statement}}

Tried, in order to get at the private key, with the answers of the module:

{{probes}}

Attributes that the module claims:

{{claims}}

Files

  {CERTIFICATE:<17} the certificate: the file to send
  {PUBLIC_KEY:<17} the public key alone, for the records
  {JWKS:<17} the public key as a JWK Set, for servers that take no certificate
  {RECEIPT:<17} what stands here, for programs
"""


def ensure_key(token: "Token", key: str, *, thumbprint: str | None) -> bool:
    """Generate the key unless it is there; whether it was generated. A key that is pinned is not replaced."""
    try:
        token.signer(key, thumbprint=thumbprint)
    except KeyNotFoundError as missing:
        uri = key_uri(key)
        if thumbprint is not None:
            missing.hint = "a pinned key is not made anew; another key: hsm-token rollover prepare"
        if thumbprint is not None or uri.object is None:
            raise
        token.generate_key(uri.object, id=uri.id)
        return True
    return False


def enrol(
    token: "Token",
    key: str,
    *,
    client_id: str,
    common_name: str | None = None,
    subject: str | None = None,
    days: int,
    now: int,
    thumbprint: str | None = None,
) -> Enrolment:
    """Prove a key and have it sign its certificate; :class:`KeyExportableError` if the proof fails.

    ``now`` in Unix seconds; the rest as in :func:`hsm_signer.x509.self_signed`.
    """
    signer = token.signer(key, thumbprint=thumbprint)
    proof = token.prove(key)
    if not proof.ok:
        raise KeyExportableError(proof.statement, hint="hsm-token key prove shows what was tried")
    der = x509.self_signed(
        signer, common_name=common_name, subject=subject, not_before=now - validity.BACKDATED, days=days
    )
    certificate = x509.read_certificate(der)
    if certificate.thumbprint != proof.key.thumbprint:
        raise KeyMismatchError(f"the key {key} was replaced while it was enrolled")
    return Enrolment(client_id, now, certificate, jwk_set(signer, der), proof)


def check_free(directory: Path) -> None:
    """Raise :class:`ConfigError` where a file of ours would be in the way; called before a key is made."""
    try:
        with files.private_directory(directory, forbidden=files.UNTOUCHED, create=False) as folder:
            there = next((name for name in FILES if folder.exists(name)), None)
    except FileNotFoundError:
        return
    except OSError as failed:
        raise ConfigError(f"cannot look into {directory}: {failed.strerror}") from None
    if there:
        raise ConfigError(
            f"{directory / there} exists; nothing is overwritten", hint="name another directory"
        )


def write(enrolment: Enrolment, directory: Path) -> None:
    """Make the folder. Every file is new; where one cannot be written, none stays."""
    contents = {
        CERTIFICATE: enrolment.certificate.pem,
        PUBLIC_KEY: enrolment.public_key_pem,
        JWKS: _json(enrolment.jwks),
        RECEIPT: _json(enrolment.receipt()),
        README: enrolment.readme(),
    }
    check_free(directory)
    try:
        with files.private_directory(directory, forbidden=files.UNTOUCHED) as folder, _undone(folder) as made:
            for name, content in contents.items():
                folder.create(name, content.encode(), mode=0o644)
                made.append(name)
    except FileExistsError:
        raise ConfigError(f"somebody else writes to {directory}; nothing is overwritten") from None
    except OSError as failed:
        raise ConfigError(f"cannot write to {directory}: {failed.strerror}") from None


@contextmanager
def _undone(folder: files.PrivateDirectory) -> Iterator[list[str]]:
    made: list[str] = []
    try:
        yield made
    except BaseException:
        for name in made:
            with suppress(OSError):
                folder.remove(name)
        raise


def in_groups(digits: str) -> str:
    """Hexadecimal digits in groups of four, as they are read out on the telephone."""
    return " ".join(digits[at : at + 4].upper() for at in range(0, len(digits), 4))


def _in_lines(digits: str) -> str:
    return "\n".join(f"    {in_groups(digits[at : at + 32])}" for at in range(0, len(digits), 32))


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _versions() -> dict[str, str]:
    found = {"hsm-signer": __version__}
    for name in ("python-pkcs11", "asn1crypto", "cryptography"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
