"""README and docs as a reader meets them: code blocks taken out of a page, and run for real.

A block that is run has ``<!-- run -->`` on the line before its fence. What the text says stands for what this
machine has: the module's path, a PIN file and a port are replaced before the run and after it.
"""

import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import leaks
from screen import shown_at_last

CHECKOUT = Path(__file__).parents[1]
PAGES = [
    *sorted(CHECKOUT.glob("*.md")),
    *sorted(CHECKOUT.glob("docs/*.md")),
    *CHECKOUT.glob("benchmarks/*.md"),
]
MODULE, PORT, PIN_FILE = "/usr/lib/softhsm/libsofthsm2.so", "8765", "/etc/hsm/pin"  # as the pages have them

_FENCE = re.compile(r"^(?P<mark><!-- run[^\n]*-->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_SEPARATOR = "\x1e"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is its first one."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(CHECKOUT)}:{self.line}"

    @property
    def steps(self) -> list[tuple[str, str]]:
        """Each command of a console, and what it prints."""
        found: list[tuple[str, str]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif line.startswith("> ") and found and not found[-1][1]:
                found[-1] = (f"{found[-1][0]}\n{line[2:]}", "")
            elif found:
                found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        return found


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")),
            found["language"],
            found["text"],
            bool(found["mark"]),
        )
        for found in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def printed_as(expected: str, printed: str) -> bool:
    """Whether that was printed; ``…`` stands for any text in a line, alone in a line for any lines."""
    lines = [
        r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line.rstrip()).replace("…", ".*") + r"[ ]*\n"
        for line in expected.splitlines()
    ]
    return re.fullmatch("".join(lines), printed) is not None


@dataclass(frozen=True)
class Desk:
    """Where a reader sits: a home, a SoftHSM2 with the empty token ``office``, ``hsm-token`` on the path."""

    home: Path
    module: str
    pin: str = field(repr=False)
    port: int

    @property
    def _stands_for(self) -> dict[str, str]:
        return {MODULE: self.module, PIN_FILE: str(self.home / "pin"), PORT: str(self.port)}

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: os.environ[name] for name in ("PYTHONPATH", "LANG", "VIRTUAL_ENV") if name in os.environ
        }
        return kept | {
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "SOFTHSM2_CONF": str(self.home / "softhsm2.conf"),
            "TERM": "dumb",  # no spinner, 80 columns
        }

    def _here(self, text: str) -> str:
        for said, here in self._stands_for.items():
            text = text.replace(said, here)
        return text

    def _as_said(self, text: str) -> str:
        text = text.replace(os.path.realpath(self.module), MODULE)
        for said, here in self._stands_for.items():
            text = text.replace(here, said)
        return text.replace(str(self.home), "/home/office")

    def type(self, commands: Sequence[str]) -> list[str]:
        """Type commands at a terminal, in one shell; what each of them printed."""
        script = ["trap 'kill $(jobs -p) 2>/dev/null' EXIT"]
        for command in commands:
            script.append(f"printf '{_SEPARATOR}'; (exit ${{status-0}})")
            if command.endswith(
                "&"
            ):  # a server: the next command wants it up, and that it says by its first line
                script += [
                    f"{self._here(command[:-1])} >.started &",
                    "until [ -s .started ]; do sleep 0.02; done",
                ]
                script += ["cat .started", "status=0"]
            else:
                script += [self._here(command), "status=$?"]
        file = self.home / ".typed"
        file.write_text("\n".join(script) + "\n")
        # script(1) gives the shell a terminal. What waits for an answer there gets none, and is ended
        terminal = subprocess.Popen(
            ["timeout", "100", "script", "-qec", f"bash {file}", "/dev/null"],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        with terminal:
            assert terminal.stdout
            printed = terminal.stdout.read().decode()
        parts = [self._as_said(shown_at_last(part)) for part in printed.split(_SEPARATOR)[1:]]
        assert terminal.returncode != 124, f"{commands[len(parts) - 1]} does not end: {parts[-1:]}"
        return parts

    def run_python(self, program: str, **names: str) -> subprocess.CompletedProcess[str]:
        """Run a program that finds these names defined."""
        defined = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", defined + self._here(program)],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


def _free_port() -> int:
    """A port for a server of the page, below those that the kernel gives to whoever asks for any."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


def sit_down(home: Path, module: str) -> Desk:
    """Make a desk."""
    pin = leaks.pin()
    desk = Desk(home, module, pin, _free_port())
    (home / "bin").mkdir()
    (home / "tokens").mkdir()
    (home / "softhsm2.conf").write_text(
        f"directories.tokendir = {home}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    program = home / "bin/hsm-token"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m hsm_signer.cli "$@"\n')
    program.chmod(0o755)
    (home / "pin").touch(mode=0o600)
    (home / "pin").write_text(f"{pin}\n")
    tool = ["pkcs11-tool", "--module", module, "--so-pin", "env:SO_PIN"]
    for step in (
        ["--init-token", "--slot-index", "0", "--label", "office"],
        ["--token-label", "office", "--login", "--login-type", "so", "--init-pin", "--pin", "env:PIN"],
    ):
        secrets = {"SO_PIN": pin[::-1] + "0", "PIN": pin}
        subprocess.run([*tool, *step], env=desk.environment | secrets, check=True, capture_output=True)
    return desk


@contextmanager
def protected_api() -> Iterator[tuple[str, list[str | None]]]:
    """An API on loopback that notes each ``Authorization`` it gets: its origin, and the notes."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()
        thread.join()
