"""A whole installation that works, made with the command itself; tests run the command in it, and break it."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import SoftToken

CLIENT = "das-api-auth"
COMMAND = [sys.executable, "-m", "hsm_signer.cli"]


def environment(home: Path, **variables: str) -> dict[str, str]:
    """As a user's, with a home of its own and nothing of ours in it."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "CI") if name in os.environ}
    places = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "CACHE", "STATE", "DATA")}
    return kept | places | {"HOME": str(home), "TERM": "dumb", "PYTHONSAFEPATH": "1"} | variables


@dataclass
class Installation:
    """Settings of a profile, as TOML values by their names in it, and the directory that it all lies in."""

    home: Path
    token: "SoftToken"
    settings: dict[str, object]
    variables: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.home / "config.toml"

    def write(self) -> None:
        lines = [f"{name} = {_toml(value)}" for name, value in self.settings.items() if value is not None]
        self.config.write_text("\n".join(["[profiles.das]", *lines, ""]))

    def copy(self, home: Path) -> "Installation":
        """Another one on the same token, to break."""
        other = Installation(home, self.token, dict(self.settings), dict(self.variables), list(self.options))
        for name in ("pin", "es256_cert.pem"):
            (home / name).write_bytes((self.home / name).read_bytes())
            (home / name).chmod(0o600)
        other.write()
        return other

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *arguments, "--config", str(self.config), *self.options]
        return subprocess.run(
            command,
            input=stdin,
            env=environment(self.home, **self.variables),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{name}" = {_toml(each)}' for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def install(home: Path, token: "SoftToken", ca_bundle: str, key: str = "das-2026") -> Installation:
    """From an empty token to a key and its certificate; the server is not known yet."""
    (home / "pin").write_text(token.pin)
    (home / "pin").chmod(0o600)
    made = Installation(
        home,
        token,
        {
            "client-id": CLIENT,
            "module": token.module,
            "module-env": {"SOFTHSM2_CONF": token.conf},
            "token": token.uri,
            "key": key,
            "pin-source": "file:pin",
            "scope": "das-api/das-access",
            "ca-bundle": ca_bundle,
            "certificate": "es256_cert.pem",
            "timeout": 5,
            "deadline": 10,
        },
    )
    made.write()
    generated = made.run("key", "generate")
    assert generated.returncode == 0, generated.stderr
    made.settings["key-thumbprint"] = generated.stdout.strip()
    made.write()
    certified = made.run("cert", "self-signed", "--out", "es256_cert.pem")
    assert certified.returncode == 0, certified.stderr
    return made
