"""What is measured on: a SoftHSM2 token with a key, a profile as softhsm-setup writes it, a server with TLS."""

import json
import os
import secrets
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
HSM_TOKEN = str(Path(sys.executable).with_name("hsm-token"))
CLIENT_ID, SCOPE, LABEL, KEY = "das-api-auth", "das-api/das-access", "office", "das"


@dataclass(frozen=True)
class Office:
    """``home`` holds all of it, caches and state too."""

    home: Path
    module: str
    endpoint: str

    @property
    def ca(self) -> str:
        return str(self.home / "ca.pem")

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the user's but the path; what is installed decides which code runs."""
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
        ours = {"HSM_TOKEN_CONFIG": str(self.home / "config.toml"), "PIN": (self.home / "pin").read_text()}
        return kept | ours | {"HOME": str(self.home), "SOFTHSM2_CONF": str(self.home / "softhsm2.conf")}

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def posts(self) -> int:
        """How many POSTs the server has seen."""
        trust = ssl.create_default_context(cafile=self.ca)
        with urllib.request.urlopen(self.endpoint, context=trust) as answer:  # noqa: S310  # ours
            return int(json.load(answer))


@contextmanager
def office(module: str) -> Iterator[Office]:
    """Set it all up, in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        home = Path(directory)
        _make_certificates(home)
        command = [
            sys.executable,
            str(HERE / "server.py"),
            str(home / "server.pem"),
            str(home / "server.key"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                office = Office(
                    home, module, f"https://localhost:{int(server.stdout.readline())}/access_token"
                )
                _make_token(office)
                yield office
            finally:
                server.kill()


def _make_certificates(home: Path) -> None:
    for name, signed_by in (("ca", []), ("server", ["-CA", "ca.pem", "-CAkey", "ca.key"])):
        new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        named = ["-subj", f"/CN={name}", "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        extension = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"] if signed_by else []
        subprocess.run([*new, *named, *extension, *signed_by], cwd=home, check=True, capture_output=True)


def _make_token(office: Office) -> None:
    home, pin = office.home, f"{secrets.randbelow(10**8):08}"
    (home / "tokens").mkdir()
    (home / "softhsm2.conf").write_text(f"directories.tokendir = {home}/tokens\nlog.level = ERROR\n")
    (home / "pin").touch(mode=0o600)
    (home / "pin").write_text(pin)
    _write_profile(office)
    environment = office.environment | {"SO_PIN": secrets.token_hex(8)}
    tool = ["pkcs11-tool", "--module", office.module, "--so-pin", "env:SO_PIN"]
    login = ["--token-label", LABEL, "--login", "--login-type", "so"]
    for step in (
        [*tool, "--init-token", "--slot-index", "0", "--label", LABEL],
        [*tool, *login, "--init-pin", "--pin", "env:PIN"],
        [HSM_TOKEN, "key", "generate", KEY],
    ):
        done = subprocess.run(step, env=environment, check=True, capture_output=True, text=True)
    thumbprint = done.stdout.strip()
    subprocess.run(
        [HSM_TOKEN, "cert", "self-signed", "--out", "es256_cert.pem"], cwd=home, env=environment, check=True
    )
    _write_profile(office, key_thumbprint=thumbprint, certificate="es256_cert.pem")


def _write_profile(office: Office, **more: str) -> None:
    settings = {
        "module": office.module,
        "token": f"pkcs11:token={LABEL}",
        "key": f"pkcs11:object={KEY}",
        "pin-source": "file:pin",
        "client-id": CLIENT_ID,
        "token-endpoint": office.endpoint,
        "scope": SCOPE,
        "ca-bundle": "ca.pem",
        "cache": "cache",
        "state-dir": "state",
    } | {name.replace("_", "-"): value for name, value in more.items()}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (office.home / "config.toml").write_text("\n".join(["[profiles.office]", *lines, ""]))
