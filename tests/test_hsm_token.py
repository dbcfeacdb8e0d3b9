"""Opening a token: exactly one, one login shared, no PIN sent that could do harm, threads and forks."""

import os
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from canary import assert_no_trace
from conftest import SoftToken
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from faults import FaultyModule

from hsm_signer import PIN_PAD, open_token
from hsm_signer.errors import (
    ConfigError,
    KeyNotFoundError,
    PinError,
    PinLockedError,
    PinRefusedError,
    PinRejectedError,
    TokenAmbiguousError,
    TokenError,
    TokenNotFoundError,
)
from hsm_signer.hsm.signer import HsmSigner
from hsm_signer.pin import from_source

KEY = "signs"
DATA = b"what is signed"


def verify(signer: HsmSigner, signature: bytes, data: bytes = DATA) -> None:
    """By another library, r‖s of 64 bytes."""
    assert len(signature) == 64
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    key = load_pem_public_key(signer.public_key_pem.encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(SHA256()))


@pytest.fixture(scope="module")
def soft(new_token: Callable[..., SoftToken]) -> SoftToken:
    """A token with a key."""
    token = new_token()
    with open_token(token.uri, module=token.module, pin=token.pin) as opened:
        opened.generate_key(KEY)
    return token


@pytest.fixture
def behind(soft: SoftToken, faulty: FaultyModule) -> SoftToken:
    """The same token behind the faulty module, where calls are counted."""
    return SoftToken(faulty.path, soft.conf, soft.label, soft.pin, soft.so_pin)


def opened(token: SoftToken, **arguments: object):
    return open_token(token.uri, **({"module": token.module, "pin": token.pin} | arguments))


# ---- choosing ----


def test_the_token_is_described(soft: SoftToken) -> None:
    with opened(soft) as token:
        assert token.info.label == soft.label
        assert token.info.manufacturer == "SoftHSM project"
        assert not token.info.hardware
        assert soft.pin not in repr(token) + repr(token.signer(KEY))


@pytest.mark.parametrize(
    "attribute", ["serial", "model", "manufacturer", "slot-id", "slot-description", "library-version"]
)
def test_another_value_of_any_attribute_is_another_token_and_sees_no_login(
    behind: SoftToken, faulty: FaultyModule, attribute: str
) -> None:
    wrong = {"slot-id": "1", "library-version": "9.9"}.get(attribute, "other")
    asked: list[str] = []
    with (
        pytest.raises(TokenNotFoundError) as caught,
        opened(
            SoftToken(behind.module, behind.conf, f"{behind.label};{attribute}={wrong}", behind.pin, ""),
            pin=lambda: asked.append("asked") or behind.pin,
        ),
    ):
        pass
    assert any(f"token={behind.label}" in line for line in caught.value.candidates)
    assert not asked
    assert faulty.calls("C_Login") == 0


def test_two_tokens_of_one_label_are_told_apart_by_their_serial(new_token: Callable[..., SoftToken]) -> None:
    label = f"twin-{secrets.token_hex(4)}"
    first, second = new_token(label), new_token(f"{label}-2")
    # pkcs11-tool will not make two of one label, but C_InitToken does
    program = (
        "import sys, pkcs11; lib = pkcs11.lib(sys.argv[1])\n"
        "print(lib.get_token(token_label=sys.argv[2]).serial.decode())"
    )
    serials = [
        subprocess.check_output([sys.executable, "-c", program, first.module, name], text=True).strip()
        for name in (label, f"{label}-2")
    ]
    _relabel(second, label)
    with pytest.raises(TokenAmbiguousError) as caught, open_token(label, module=first.module, pin=first.pin):
        pass
    assert all(any(serial in line for line in caught.value.candidates) for serial in serials)
    for token, serial in zip((first, second), serials, strict=True):
        uri = f"pkcs11:token={label};serial={serial}"
        with open_token(uri, module=token.module, pin=token.pin) as chosen:
            assert chosen.info.serial == serial
    with (
        pytest.raises(TokenNotFoundError),
        open_token(f"pkcs11:token={label};serial=0000", module=first.module, pin=first.pin),
    ):
        pass


def _relabel(token: SoftToken, label: str) -> None:
    """Give a token the label of another, in SoftHSM's file; its length stays in 8 bytes before it."""
    for file in Path(token.conf).parent.glob("tokens/*/token.object"):
        content = file.read_bytes()
        old, new = token.label.ljust(32).encode(), label.ljust(32).encode()
        if old in content:
            file.write_bytes(content.replace(old, new))


def test_a_label_alone_is_enough(soft: SoftToken) -> None:
    with open_token(soft.label, module=soft.module, pin=soft.pin) as token:
        assert token.info.label == soft.label


def test_a_key_uri_of_another_token_is_refused(soft: SoftToken) -> None:
    with opened(soft) as token:
        assert token.signer(f"pkcs11:token={soft.label};object={KEY}")
        with pytest.raises(ConfigError, match="token='other'"):
            token.signer(f"pkcs11:token=other;object={KEY}")


# ---- the login ----


def test_one_login_is_shared_and_the_last_user_logs_out(behind: SoftToken, faulty: FaultyModule) -> None:
    asked: list[int] = []
    with opened(behind) as first:
        signer = first.signer(KEY)
        with opened(behind, pin=lambda: asked.append(1) or "") as second:
            verify(second.signer(KEY), second.signer(KEY).sign(DATA))
        verify(signer, signer.sign(DATA))  # the inner block logged nobody out
        assert faulty.calls("C_Logout") == 0
    assert not asked
    assert (faulty.calls("C_Login"), faulty.calls("C_Logout")) == (1, 1)
    assert faulty.sessions() == 0


def test_the_first_user_may_leave_before_the_second(behind: SoftToken, faulty: FaultyModule) -> None:
    first, second = opened(behind), opened(behind)
    first.__enter__()
    token = second.__enter__()
    signer = token.signer(KEY)
    first.__exit__(None, None, None)
    verify(signer, signer.sign(DATA))
    second.__exit__(None, None, None)
    assert faulty.sessions() == 0


def test_a_closed_token_signs_no_more_and_is_not_logged_in_again(
    behind: SoftToken, faulty: FaultyModule
) -> None:
    with opened(behind) as token:
        signer = token.signer(KEY)
        signer.sign(DATA)
    for use in (lambda: signer.sign(DATA), token.keys, lambda: token.signer(KEY)):
        with pytest.raises(TokenError, match="closed"):
            use()
    assert faulty.calls("C_Login") == 1
    assert faulty.sessions() == 0


def test_without_a_pin_private_keys_are_not_there_and_the_hint_says_why(soft: SoftToken) -> None:
    with opened(soft, pin=None) as token:
        assert token.keys() == []
        with pytest.raises(KeyNotFoundError) as caught:
            token.signer(KEY)
    assert "login" in str(caught.value.hint)


def test_a_wrong_pin_is_rejected_once_and_never_sent_again(behind: SoftToken, faulty: FaultyModule) -> None:
    wrong = f"wrong-{secrets.token_hex(4)}"
    for expected in (PinRejectedError, PinRefusedError, PinRefusedError):
        with pytest.raises(expected) as caught, opened(behind, pin=wrong):
            pass
        assert wrong not in "".join(traceback.format_exception(caught.value))
    assert faulty.calls("C_Login") == 1
    with opened(behind) as token:  # the right one is another
        assert token.keys()


@pytest.mark.parametrize("source", [str, lambda pin: lambda: pin, lambda _: from_source("env:WRONG_PIN")])
def test_no_frame_of_ours_holds_a_rejected_pin(
    soft: SoftToken, source: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Error reporters show the variables of every frame that an exception passed."""
    wrong = f"wrong-{secrets.token_hex(4)}"
    monkeypatch.setenv("WRONG_PIN", wrong)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for expected in (PinRejectedError, PinRefusedError):
        with pytest.raises(expected) as caught, opened(soft, pin=source(wrong)):
            pass
        assert_no_trace(caught.value, [wrong])


@pytest.mark.parametrize("pin", ["12\ud80034", lambda: "12\ud80034", b"1234", lambda: b"1234"])
def test_what_is_no_utf8_text_is_no_pin_and_in_no_traceback(
    behind: SoftToken, faulty: FaultyModule, pin: object
) -> None:
    with pytest.raises((PinRefusedError, ConfigError)) as caught, opened(behind, pin=pin):
        pass
    assert_no_trace(caught.value, ["12\ud80034", "\\ud800", "1234"])
    assert faulty.calls("C_Login") == 0


def test_threads_through_two_modules_send_a_wrong_pin_once(
    soft: SoftToken, faulty: FaultyModule, faulty_shared_object: Path, tmp_path: Path
) -> None:
    second = FaultyModule(faulty_shared_object, Path(soft.module), tmp_path)
    wrong = f"wrong-{secrets.token_hex(4)}"

    def answer(module: FaultyModule) -> type[Exception] | None:
        try:
            with opened(soft, module=module.path, pin=wrong):
                return None
        except PinError as exc:
            return type(exc)

    faulty.set("delay C_Login 1000")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(answer, faulty)
        while faulty.calls("C_Login") == 0:
            time.sleep(0.01)
        assert pool.submit(answer, second).result() is PinRefusedError
        assert first.result() is PinRejectedError
    assert second.calls("C_Login") == 0


@pytest.mark.parametrize("source", ["", lambda: ""])
def test_an_empty_pin_is_not_sent(behind: SoftToken, faulty: FaultyModule, source: object) -> None:
    with pytest.raises(PinRefusedError), opened(behind, pin=source):
        pass
    assert faulty.calls("C_Login") == 0


def test_a_source_that_gives_no_text_is_a_configuration_error(soft: SoftToken) -> None:
    with pytest.raises(ConfigError, match="int"), opened(soft, pin=lambda: 1234):
        pass


def test_a_locked_pin_is_told_before_a_person_is_asked(behind: SoftToken, faulty: FaultyModule) -> None:
    faulty.set("token-flags CKF_USER_PIN_LOCKED")
    with pytest.raises(PinLockedError), opened(behind, pin=lambda: pytest.fail("asked")):
        pass
    assert faulty.calls("C_Login") == 0


def test_the_final_try_is_for_who_asks_for_it(behind: SoftToken, faulty: FaultyModule) -> None:
    faulty.set("token-flags CKF_USER_PIN_FINAL_TRY")
    with pytest.raises(PinRefusedError), opened(behind, pin=lambda: pytest.fail("asked")):
        pass
    assert faulty.calls("C_Login") == 0
    with opened(behind, allow_final_try=True) as token:
        assert token.keys()


def test_flags_are_read_again_right_before_the_login(behind: SoftToken, faulty: FaultyModule) -> None:
    def ask() -> str:
        faulty.set("token-flags CKF_USER_PIN_LOCKED")  # somebody else locks it while a person types
        return behind.pin

    with pytest.raises(PinLockedError), opened(behind, pin=ask):
        pass
    assert faulty.calls("C_Login") == 0


def test_no_lock_is_held_while_a_person_is_asked(behind: SoftToken) -> None:
    def ask() -> str:
        with ThreadPoolExecutor(1) as pool:  # another thread opens the token meanwhile
            pool.submit(lambda: opened(behind).__enter__()).result(timeout=30)
        return "not the PIN, and not needed any more"

    with opened(behind, pin=ask) as token:
        assert token.keys()


def test_the_pin_pad_of_a_token_without_one_is_refused(soft: SoftToken) -> None:
    with pytest.raises(PinRefusedError, match="no PIN pad"), opened(soft, pin=PIN_PAD):
        pass


def test_a_pin_typed_on_the_pad_is_never_seen(behind: SoftToken, faulty: FaultyModule) -> None:
    faulty.set("pin-pad", f"pin {behind.pin}")
    with opened(behind, pin=PIN_PAD) as token:
        verify(token.signer(KEY), token.signer(KEY).sign(DATA))


def test_while_a_person_types_at_the_pad_of_a_token_others_open_use_and_close_another(
    behind: SoftToken, faulty: FaultyModule, new_token: Callable[..., SoftToken]
) -> None:
    another = replace(new_token(), module=faulty.path)

    def use(which: SoftToken, pin: object) -> None:
        with opened(which, pin=pin) as token:
            signer = token.signer(KEY)
            verify(signer, signer.sign(DATA))

    with ThreadPoolExecutor(2) as pool, opened(another) as logged_in:
        logged_in.generate_key(KEY)
        before = faulty.calls("C_Login")
        faulty.set("pin-pad", f"pin {behind.pin}", "hang C_Login")
        typing = pool.submit(use, behind, PIN_PAD)
        try:
            while faulty.calls("C_Login") == before:
                time.sleep(0.01)
            pool.submit(use, another, another.pin).result(timeout=30)
            assert not typing.done()
        finally:
            faulty.set("pin-pad", f"pin {behind.pin}")
        typing.result(timeout=30)


def test_a_pin_source_leaves_no_marker_after_a_device_that_never_saw_the_pin(
    behind: SoftToken, faulty: FaultyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOKEN_PIN", behind.pin)
    source = from_source("env:TEST_TOKEN_PIN", state_directory=tmp_path / "state")
    faulty.set("fail C_OpenSession 0 CKR_DEVICE_ERROR")
    with pytest.raises(TokenError, match="CKR_DEVICE_ERROR"), opened(behind, pin=source):
        pass
    assert faulty.calls("C_Login") == 0
    faulty.set()
    with opened(behind, pin=source) as token:
        assert token.keys()


SHARED = """
import os, sys
import pkcs11
from pkcs11 import Attribute, ObjectClass
from hsm_signer import open_token

uri, label, module, key = sys.argv[1:]
other = pkcs11.lib(os.path.realpath(module))
theirs = other.get_token(token_label=label).open(user_pin=os.environ["TEST_PIN"])
for _ in range(3):
    with open_token(uri, module=module, pin=lambda: sys.exit("asked")) as token:
        assert len(token.signer(key).sign(b"data")) == 64
assert len(list(theirs.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY}))) == 1
"""


def test_a_login_of_another_part_of_the_process_is_used_and_left_alone(
    behind: SoftToken, faulty: FaultyModule
) -> None:
    command = [sys.executable, "-c", SHARED, behind.uri, behind.label, behind.module, KEY]
    done = subprocess.run(command, env=os.environ | {"TEST_PIN": behind.pin}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (faulty.calls("C_Login"), faulty.calls("C_Logout")) == (1, 0)


# ---- sessions and threads ----


@pytest.mark.parametrize("sessions", [1, 4])
def test_threads_share_a_signer(soft: SoftToken, sessions: int) -> None:
    with opened(soft, sessions=sessions) as token, ThreadPoolExecutor(8) as pool:
        signer = token.signer(KEY)
        messages = [str(number).encode() for number in range(400)]
        for message, signature in zip(messages, pool.map(signer.sign, messages), strict=True):
            verify(signer, signature, message)


def test_sessions_sign_in_parallel(behind: SoftToken, faulty: FaultyModule) -> None:
    with opened(behind, sessions=4) as token, ThreadPoolExecutor(4) as pool:
        signer = token.signer(KEY)
        faulty.set("delay C_SignInit 30")
        list(pool.map(signer.sign, [DATA] * 8))
    assert faulty.sessions() == 0


def test_several_sessions_need_a_module_that_locks(behind: SoftToken, faulty: FaultyModule) -> None:
    faulty.set("cant-lock")
    with pytest.raises(ConfigError, match="sessions=2"), opened(behind, sessions=2):
        pass
    assert faulty.calls("C_Login") == 0
    with opened(behind) as token, ThreadPoolExecutor(8) as pool:
        signer = token.signer(KEY)
        for signature in pool.map(signer.sign, [DATA] * 64):
            verify(signer, signature)


@pytest.mark.parametrize("sessions", [0, -1])
def test_there_is_at_least_one_session(soft: SoftToken, sessions: int) -> None:
    with pytest.raises(ConfigError, match="sessions"), opened(soft, sessions=sessions):
        pass


def test_threads_that_open_and_close_do_not_log_each_other_out(soft: SoftToken) -> None:
    def work(number: int) -> None:
        for _ in range(10):
            with opened(soft) as token:
                signer = token.signer(KEY)
                verify(signer, signer.sign(DATA))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


# ---- forks ----

FORKED = """
import os, signal, sys, threading
from hsm_signer import open_token
from hsm_signer.errors import ForkedError

module, uri, key, threads = sys.argv[1:]
opened = lambda: open_token(uri, module=module, pin=os.environ["TEST_PIN"])

with opened() as token:
    signer = token.signer(key)
    signer.sign(b"parent")
    stop = threading.Event()

    def work():
        while not stop.is_set():
            signer.sign(b"thread")

    workers = [threading.Thread(target=work) for _ in range(int(threads))]
    for worker in workers:
        worker.start()
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            signal.alarm(60)
            for use in (lambda: signer.sign(b"x"), lambda: token.signer(key), token.keys, lambda: signer.kid):
                try:
                    use()
                except ForkedError as exc:
                    assert "worker" in exc.hint
                else:
                    raise AssertionError("an inherited handle was used")
            with opened() as own:
                assert len(own.signer(key).sign(b"child")) == 64
            sys.exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    stop.set()
    for worker in workers:
        worker.join()
    assert statuses == [0] * 8, statuses
    signer.sign(b"parent")
"""


@pytest.mark.parametrize("threads", [0, 3])
def test_forked_children_open_their_own_and_leave_their_parents_alone(soft: SoftToken, threads: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, soft.module, soft.uri, KEY, str(threads)]
    done = subprocess.run(
        command, env=os.environ | {"TEST_PIN": soft.pin}, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr


def test_a_child_of_a_parent_that_is_logged_in_is_asked_for_no_pin_and_logs_nobody_out(
    soft: SoftToken,
) -> None:
    with opened(soft) as token:
        signer = token.signer(KEY)
        if (child := os.fork()) == 0:
            os._exit(_child(soft))
        assert os.waitpid(child, 0)[1] == 0
        verify(signer, signer.sign(DATA))


def _child(soft: SoftToken) -> int:
    signal.alarm(60)
    try:
        for _ in range(2):
            with opened(soft, pin=lambda: os._exit(3)) as token:
                token.signer(KEY).sign(DATA)
    except Exception:  # noqa: BLE001  # whatever it is, the parent's test fails
        traceback.print_exc()
        return 1
    return 0


# ---- a process ends ----


def test_a_token_that_nobody_closed_does_not_hinder_the_end_of_the_process(soft: SoftToken) -> None:
    program = (
        "import os, sys; from hsm_signer import open_token\n"
        "opened = open_token(sys.argv[1], module=sys.argv[2], pin=os.environ['TEST_PIN'])\n"
        "signer = opened.__enter__().signer(sys.argv[3]); signer.sign(b'x')"
    )
    command = [sys.executable, "-c", program, soft.uri, soft.module, KEY]
    done = subprocess.run(
        command, env=os.environ | {"TEST_PIN": soft.pin}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
