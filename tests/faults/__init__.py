"""The faulty module: SoftHSM2 behind ``faulty.c``, which counts every call and misbehaves as told."""

import itertools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HEADERS = Path("/usr/include/p11-kit-1")  # Debian: libp11-kit-dev
_DEFINITION = re.compile(r"#define (CK[RF]_\w+)\s+\(?(0x[0-9a-fA-F]+|\d+)UL(?:\s*<<\s*(\d+))?\)?")


def codes() -> dict[str, int]:
    """``CKR_`` and ``CKF_`` names and their numbers, from the header that the module is compiled with."""
    header = (HEADERS / "p11-kit/pkcs11.h").read_text()
    return {name: int(number, 0) << int(shift or 0) for name, number, shift in _DEFINITION.findall(header)}


@dataclass(frozen=True)
class Call:
    """One call as the module wrote it down; ``result`` is ``None`` while (or because) it never returned."""

    pid: int
    function: str
    result: str | None


class FaultyModule:
    """A copy of the module for one test, with a SoftHSM2 instance of its own behind it."""

    def __init__(self, shared_object: Path, real: Path, directory: Path) -> None:
        self.path = str(shutil.copy(shared_object, directory / "faulty.so"))
        self._real = shutil.copy(real, directory / "real.so")  # C_Finalize here is nobody else's
        self._control, self._log = Path(f"{self.path}.control"), Path(f"{self.path}.log")
        self._numbers = codes()
        self._results = {number: name for name, number in self._numbers.items() if name.startswith("CKR_")}
        self._versions = itertools.count()
        self._start = 0
        self._log.touch()
        self.set()

    def set(self, *rules: str) -> None:
        """Replace the rules; their language is in ``faulty.c``, with ``CKR_`` and ``CKF_`` names for numbers.

        ``set("fail C_Sign 2 CKR_DEVICE_ERROR", "delay C_SignInit 5")``; ``set()`` behaves.
        """
        lines = [f"module {self._real}", *rules]
        text = "".join(self._number(line) + "\n" for line in lines)
        new = self._control.with_suffix(f".{os.getpid()}.{next(self._versions)}")
        new.write_text(text)
        new.replace(self._control)

    def _number(self, rule: str) -> str:
        return re.sub(r"\bCK[RF]_\w+", lambda found: hex(self._numbers[found[0]]), rule)

    def log(self) -> list[Call]:
        """Every call since :meth:`forget`, of all processes, in the order in which they began."""
        calls: list[Call] = []
        running: dict[tuple[str, str], list[int]] = {}
        for line in self._log.read_bytes()[self._start :].decode().splitlines():
            pid, function, *outcome = line.split()
            waiting = running.setdefault((pid, function), [])
            if not outcome:
                waiting.append(len(calls))
                calls.append(Call(int(pid), function, None))
            elif waiting:
                calls[waiting.pop(0)] = Call(int(pid), function, self._results[int(outcome[1], 16)])
        return calls

    def calls(self, function: str) -> int:
        """How often the function was called since :meth:`forget`, in all processes."""
        return sum(call.function == function for call in self.log())

    def overlaps(self, function: str) -> bool:
        """Whether two calls of the function were ever under way at once."""
        running = 0
        for line in self._log.read_bytes()[self._start :].decode().splitlines():
            _, name, *outcome = line.split()
            if name == function:
                running += -1 if outcome else 1
                if running > 1:
                    return True
        return False

    def sessions(self) -> int:
        """Sessions that are open now, in all processes that are alive."""
        found = re.findall(r"^(\d+) \w+ = \w+ sessions=(\d+)$", self._log.read_text(), re.MULTILINE)
        return sum(int(count) for pid, count in dict(found).items() if Path(f"/proc/{pid}").exists())

    def forget(self) -> None:
        """Count calls from zero again."""
        self._start = self._log.stat().st_size


def compile_module(directory: Path) -> Path:
    """Compile ``faulty.c``; needs cc and the PKCS#11 header of p11-kit."""
    shared_object = directory / "faulty.so"
    flags = [
        "-std=c11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fvisibility=hidden",
        "-shared",
        "-fPIC",
    ]
    source = Path(__file__).with_name("faulty.c")
    command = ["cc", *flags, "-pthread", f"-I{HEADERS}", str(source), "-o", str(shared_object), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shared_object
