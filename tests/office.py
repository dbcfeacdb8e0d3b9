"""A whole office for tests of whole commands: token, key, certificate, profile, and the server it logs in to."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import SoftToken

CLIENT_ID = "das-api-auth"
SCOPE = "das-api/das-access"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self):
        return json.loads(self.stdout)

    @property
    def lines(self) -> list[str]:
        """What a person was told, without the program's name before it."""
        return [line.removeprefix("hsm-token: ") for line in self.stderr.splitlines()]


@dataclass(frozen=True)
class Office:
    """``home`` holds everything; ``profile`` is written into its configuration file by :meth:`configure`."""

    home: Path
    token: "SoftToken"
    profile: dict[str, object] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.home / "config.toml"

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of ours leaks in, and nothing of the command's leaks out of ``home``."""
        kept = {
            name: os.environ[name]
            for name in ("PATH", "PYTHONPATH", "LANG", "VIRTUAL_ENV")
            if name in os.environ
        }
        homes = {
            f"XDG_{name}_HOME": str(self.home / name.lower()) for name in ("CONFIG", "CACHE", "STATE", "DATA")
        }
        return kept | homes | {"HOME": str(self.home), "SOFTHSM2_CONF": self.token.conf}

    def configure(self, **settings: object) -> "Office":
        """Write the profile, with these settings instead of the usual ones; ``None`` leaves one out."""
        wanted = self.profile | {name.replace("_", "-"): value for name, value in settings.items()}
        lines = [f"{name} = {json.dumps(value)}" for name, value in wanted.items() if value is not None]
        self.config.write_text("\n".join(["[profiles.office]", *lines, ""]))
        self.config.chmod(0o600)
        return self

    def copy(self, home: Path) -> "Office":
        """The same office at another place, to change and break; its token stays one and the same."""
        for file in ("pin", "es256_cert.pem"):
            (home / file).touch(mode=0o600)
            (home / file).write_bytes((self.home / file).read_bytes())
        return Office(home, self.token, self.profile).configure()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "hsm_signer.cli", *arguments]

    def run(
        self, *arguments: str, stdin: str = "", environment: dict[str, str] | None = None, timeout: float = 60
    ) -> Done:
        """Run ``hsm-token`` as a process of its own, with the office's configuration."""
        done = subprocess.run(
            self.command(*arguments),
            input=stdin,
            env=self.environment | {"HSM_TOKEN_CONFIG": str(self.config)} | (environment or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Done(done.returncode, done.stdout, done.stderr)


def found(home: Path, token: "SoftToken", **settings: object) -> Office:
    """Set up an office on a token: a PIN file and a profile."""
    pin = home / "pin"
    pin.touch(mode=0o600)
    pin.write_text(f"{token.pin}\n")
    profile = {
        "module": token.module,
        "token": token.uri,
        "key": "pkcs11:object=das",
        "pin-source": "file:pin",
        "client-id": CLIENT_ID,
        "scope": SCOPE,
    }
    office = Office(
        home, token, profile | {name.replace("_", "-"): value for name, value in settings.items()}
    )
    return office.configure()
