"""Authorization servers that others wrote, each a process of its own on free loopback ports."""

import json
import subprocess
import threading
from pathlib import Path
from typing import Any, Self


class ServerProcess:
    """A server that prints a line of JSON when it is up, and further ones for what it wants to tell.

    It ends when its stdin does, so that a killed test run leaves none behind.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.said: list[dict[str, Any]] = []
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
        self.up = self._next()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, self._log.read_text()
        return json.loads(line)

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.said.append(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()
