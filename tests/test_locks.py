"""One holder at a time, among processes and threads, and none left over by the dead."""

import subprocess
import sys
from pathlib import Path

import pytest

from hsm_signer.errors import UnsafeFileError
from hsm_signer.files import private_directory
from hsm_signer.locks import try_lock

HOLD = """
import sys, time
from pathlib import Path
from hsm_signer.files import private_directory
from hsm_signer.locks import try_lock
with private_directory(Path(sys.argv[1])) as directory:
    held = try_lock(directory, "lock")
print("held" if held else "taken", flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_has_one_holder_and_is_free_again_after_release(tmp_path: Path) -> None:
    with private_directory(tmp_path / "d") as directory:
        held = try_lock(directory, "lock")
        assert held
        assert try_lock(directory, "lock") is None
        other = try_lock(directory, "another")
        assert other
        held.release()
        again = try_lock(directory, "lock")
        assert again
        again.release()
        other.release()


def test_a_killed_holder_leaves_the_lock_free(tmp_path: Path) -> None:
    with holder(tmp_path / "d") as process, private_directory(tmp_path / "d") as directory:
        assert try_lock(directory, "lock") is None
        process.kill()
        process.wait()
        held = try_lock(directory, "lock")
        assert held
        held.release()


def test_a_lock_file_that_was_removed_under_its_holder_locks_out_nobody_else(tmp_path: Path) -> None:
    with private_directory(tmp_path / "d") as directory:
        held = try_lock(directory, "lock")
        directory.remove("lock")
        fresh = try_lock(directory, "lock")
        assert held and fresh
        assert try_lock(directory, "lock") is None
        held.release()
        fresh.release()


def test_a_link_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    with private_directory(tmp_path / "d") as directory:
        (tmp_path / "d" / "lock").symlink_to("elsewhere")
        with pytest.raises(UnsafeFileError, match="is a link"):
            try_lock(directory, "lock")


def test_locking_loads_no_third_party_module() -> None:
    code = "import hsm_signer.locks, sys; print({'filelock', 'platformdirs'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_where_there_is_no_flock_filelock_takes_its_place(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["fcntl"] = None  # as on Windows
from pathlib import Path
from hsm_signer.files import private_directory
from hsm_signer.locks import try_lock
with private_directory(Path(sys.argv[1])) as directory:
    held = try_lock(directory, "lock")
    print(bool(held), try_lock(directory, "lock"))
    held.release()
    again = try_lock(directory, "lock")
    print(bool(again), "filelock" in sys.modules)
    again.release()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "d")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["True None", "True True"], done.stderr
