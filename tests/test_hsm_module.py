"""Modules: one per file in a process, told of threads, and errors that say what is wrong with a path."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SoftToken
from faults import FaultyModule

from hsm_signer.errors import ModuleError
from hsm_signer.hsm.module import load, module_info, slots


def test_two_spellings_of_a_path_are_one_module(soft_token: SoftToken, tmp_path: Path) -> None:
    link = tmp_path / "link.so"
    link.symlink_to(soft_token.module)
    directory, name = os.path.split(soft_token.module)
    assert load(soft_token.module) is load(str(link)) is load(f"{directory}/../{Path(directory).name}/{name}")


def test_a_module_says_who_it_is_and_that_it_was_told_of_threads(soft_token: SoftToken) -> None:
    info = module_info(soft_token.module)
    assert (info.manufacturer, info.cryptoki_version, info.threads) == ("SoftHSM", "2.40", True)


def test_what_the_module_is_told_of_threads_is_told_by_a_spy(softhsm_module: str, tmp_path: Path) -> None:
    spy = next(Path("/usr/lib").glob("*/pkcs11/pkcs11-spy.so"))
    environment = os.environ | {"PKCS11SPY": softhsm_module, "PKCS11SPY_OUTPUT": str(tmp_path / "log")}
    program = "import sys; from hsm_signer.hsm.module import load; load(sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", program, str(spy)], env=environment).returncode == 0
    calls = (tmp_path / "log").read_text().split("\n\n")
    assert ["CKF_OS_LOCKING_OK" in call for call in calls if ": C_Initialize" in call] == [True]


def test_slots_are_listed_without_a_login(new_token: Callable[..., SoftToken]) -> None:
    soft = new_token()
    found = {slot.token.label: slot for slot in _in_another_process(soft) if slot.token}
    token = found[soft.label].token
    assert token.manufacturer == "SoftHSM project"
    assert token.initialized
    assert {"LOGIN_REQUIRED", "TOKEN_INITIALIZED", "USER_PIN_INITIALIZED"} <= token.flags
    assert "USER_PIN_LOCKED" not in token.flags
    assert not token.hardware
    assert not found[soft.label].hardware
    assert "ECDSA" in found[soft.label].mechanisms
    assert f"serial={token.serial}" in token.identity
    assert not found[""].token.initialized  # SoftHSM shows one more, to be initialised


def _in_another_process(soft: SoftToken) -> list:
    """As a command sees it: SoftHSM lists the tokens that were there when it was started."""
    program = (
        "import pickle, sys; from hsm_signer.hsm.module import slots;"
        "sys.stdout.buffer.write(pickle.dumps(slots(sys.argv[1])))"
    )
    return pickle.loads(subprocess.check_output([sys.executable, "-c", program, soft.module]))  # noqa: S301  # by the program above


def test_a_slot_that_cannot_be_read_says_why_and_the_others_are_listed(faulty: FaultyModule) -> None:
    faulty.set("fail C_GetTokenInfo 1 CKR_DEVICE_ERROR")
    found = slots(faulty.path)
    assert [slot.problem for slot in found].count("CKR_DEVICE_ERROR") == 1
    assert any(slot.token for slot in found)


def test_a_module_without_locks_is_called_behind_one_lock(faulty: FaultyModule) -> None:
    faulty.set("cant-lock")
    assert not module_info(faulty.path).threads


@pytest.mark.parametrize("code", ["CKR_GENERAL_ERROR", "CKR_DEVICE_ERROR", "CKR_HOST_MEMORY"])
def test_a_module_that_does_not_start_is_named_with_its_code(faulty: FaultyModule, code: str) -> None:
    faulty.set(f"fail C_Initialize 0 {code}")
    with pytest.raises(ModuleError, match=code) as caught:
        load(faulty.path)
    assert caught.value.code == code
    faulty.set()
    assert slots(faulty.path)  # the next try is not hindered by the first


def test_a_module_that_starts_and_then_fails_is_given_up_cleanly(faulty: FaultyModule) -> None:
    faulty.set("fail C_GetInfo 1 CKR_DEVICE_ERROR")
    with pytest.raises(ModuleError, match="CKR_DEVICE_ERROR"):
        load(faulty.path)
    assert faulty.calls("C_Finalize") == 1
    assert slots(faulty.path)


@pytest.mark.parametrize("kind", ["nothing", "directory", "text", "library", "fifo"])
def test_what_is_no_module_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "module.so"
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("no module")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "library":
        import _ctypes

        shutil.copy(_ctypes.__file__, path)
    with pytest.raises(ModuleError, match=str(path)):
        load(str(path))


def test_the_module_is_finalised_at_the_end_of_the_process(faulty: FaultyModule) -> None:
    program = "import sys; from hsm_signer.hsm.module import slots; slots(sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", program, faulty.path]).returncode == 0
    assert [call.function for call in faulty.log()][-1] == "C_Finalize"


def test_a_forked_child_does_not_finalise_its_parents_module(faulty: FaultyModule) -> None:
    program = (
        "import os, sys; from hsm_signer.hsm.module import slots; slots(sys.argv[1])\n"
        "if (child := os.fork()) == 0: sys.exit()\n"
        "os.waitpid(child, 0); slots(sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program, faulty.path]).returncode == 0
    assert [call.function for call in faulty.log()].count("C_Finalize") == 1
    assert len({call.pid for call in faulty.log()}) == 1


def test_a_module_that_somebody_else_initialised_is_used_and_left_alone(faulty: FaultyModule) -> None:
    program = (
        "import sys, pkcs11; other = pkcs11.lib(sys.argv[1])\n"
        "from hsm_signer.hsm.module import load, slots; assert slots(sys.argv[1])\n"
        "assert not load(sys.argv[1]).refresh()\n"
        "assert other.get_slots()"
    )
    assert subprocess.run([sys.executable, "-c", program, faulty.path]).returncode == 0
    assert faulty.calls("C_Finalize") == 1  # python-pkcs11's own, at its end
