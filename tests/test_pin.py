"""Every PIN source, and the guard that lets no cron job lock a token."""

import json
import logging
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import keyring
import keyring.backend
import keyring.errors
import leaks
import pytest

import hsm_signer
from hsm_signer import files
from hsm_signer.errors import ConfigError, HsmSignerError, PinError, PinRefusedError
from hsm_signer.pin import PIN_PAD, PinSource, from_source

NOBODY = 65534
PIN = leaks.pin("PIN-5551-secret")
TOKEN = "label=office;serial=1234"


def source(text: str, **more: object) -> PinSource:
    made = from_source(text, **more)
    assert isinstance(made, PinSource)
    return made


def refusal(text: str, **more: object) -> HsmSignerError:
    """What making and calling a source raises; no part of it may hold the PIN."""
    with pytest.raises(HsmSignerError) as caught:
        source(text, **more)()
    exc: BaseException | None = caught.value
    while exc:
        assert PIN not in f"{exc!r} {exc} {vars(exc)}"
        assert not isinstance(exc, UnicodeError), "it carries what it could not decode"
        exc = exc.__cause__ or exc.__context__
    return caught.value


@pytest.fixture
def pin_file(tmp_path: Path) -> Path:
    files.create(tmp_path / "pin", f"{PIN}\n".encode())
    return tmp_path / "pin"


# --- what all sources have in common


def test_the_pin_pad_is_a_value_and_not_a_source() -> None:
    assert from_source("pinpad") is PIN_PAD is hsm_signer.PIN_PAD
    assert repr(PIN_PAD) == "PIN_PAD"


@pytest.mark.parametrize(
    "text",
    ["", PIN, f"pin:{PIN}", f"prompt:{PIN}", "env:", "file:", "command:", "systemd:", "keyring:", "pinpad:1"],
)
def test_an_unknown_source_is_refused_and_not_shown(text: str) -> None:
    found = refusal(text, prompt=lambda shown: PIN)
    assert isinstance(found, ConfigError)
    assert found.hint and "env:NAME" in found.hint and "systemd:NAME" in found.hint


def test_repr_and_name_hold_no_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_PIN", PIN)
    for text in ("env:SOME_PIN", f"command:printf %s {PIN}"):
        made = source(text)
        assert made() == PIN
        assert PIN not in f"{made!r} {made} {made.name}"
    assert PIN not in caplog.text
    assert "PIN from command:printf" in caplog.text


@pytest.mark.parametrize(
    ("content", "pin"),
    [
        (b"1234", "1234"),
        (b"1234\n", "1234"),
        (b"1234\r\n", "1234"),
        (b" 12 34 ", " 12 34 "),
        ("Pässwört:用户\n".encode(), "Pässwört:用户"),
    ],
)
def test_one_trailing_newline_is_dropped_and_nothing_else(pin_file: Path, content: bytes, pin: str) -> None:
    pin_file.write_bytes(content)
    assert source(f"file:{pin_file}")() == pin


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"12\n\n", b"12\x0034", b"12\xff34", b"\n1234", b"1\t2", b"\xef\xbb\xbf1234\n", b"1\x7f"],
)
def test_what_can_be_no_pin_is_refused_before_the_token_counts_it(pin_file: Path, content: bytes) -> None:
    pin_file.write_bytes(content)
    assert isinstance(refusal(f"file:{pin_file}"), PinRefusedError)


@pytest.mark.parametrize("after", ["\n# the PIN\n", "\x01", "\xff"])
@pytest.mark.parametrize("kind", ["file", "env", "prompt"])
def test_no_frame_of_an_error_holds_what_is_no_pin(
    pin_file: Path, kind: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_file.write_bytes(PIN.encode() + after.encode("latin-1"))
    if kind == "env":
        monkeypatch.setenv("SOME_PIN", os.fsdecode(pin_file.read_bytes()))
    text = {"file": f"file:{pin_file}", "env": "env:SOME_PIN", "prompt": "prompt"}[kind]
    no_frame_holds_the_pin(text, lambda shown: os.fsdecode(pin_file.read_bytes()))


@pytest.mark.parametrize(
    "command",
    [
        *("sh -c 'cat {0}; exit 3'", "sh -c 'cat {0}; kill -9 $$'", "sh -c 'yes $(cat {0})'"),
        "sh -c 'cat {0}; sleep 9'",
    ],
)
def test_no_frame_of_an_error_holds_what_a_command_printed(
    pin_file: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsm_signer.pin.COMMAND_SECONDS", 1.0)
    no_frame_holds_the_pin(f"command:{command.format(pin_file)}")


def no_frame_holds_the_pin(text: str, prompt: Callable[[str], str] | None = None) -> None:
    """A source's error, with the local variables of all that raised it, as a reporter of crashes keeps it."""
    with pytest.raises(PinRefusedError) as caught:
        source(text, prompt=prompt)()
    report = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "status = " in report or "name = " in report, "no locals are shown"
    assert PIN not in report


# --- prompt


def test_a_prompt_is_the_function_handed_in_and_is_attended() -> None:
    shown: list[str] = []

    def ask(text: str) -> str:
        shown.append(text)
        return PIN

    made = source("prompt", prompt=ask)
    assert made() == PIN
    assert shown == ["PIN: "]
    assert not made.unattended


def test_nobody_to_ask_is_a_configuration_error() -> None:
    assert isinstance(refusal("prompt"), ConfigError)


def test_an_empty_answer_is_refused() -> None:
    assert isinstance(refusal("prompt", prompt=lambda shown: ""), PinRefusedError)


# --- env


def test_a_variable_is_removed_once_read_and_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PIN", PIN)
    made = source("env:SOME_PIN")
    assert os.environ["SOME_PIN"] == PIN
    assert made.unattended
    assert made() == PIN
    assert "SOME_PIN" not in os.environ
    assert made() == source("env:SOME_PIN")() == PIN
    monkeypatch.setenv("SOME_PIN", "another")
    assert made() == "another"


def test_a_variable_that_is_not_set_is_named() -> None:
    found = refusal("env:NOT_SET_AT_ALL")
    assert isinstance(found, ConfigError) and "NOT_SET_AT_ALL" in str(found)


def test_a_variable_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAD_PIN", os.fsdecode(b"\xff" + PIN.encode()))
    assert isinstance(refusal("env:BAD_PIN"), PinRefusedError)


# --- file


def test_a_file_of_ours_is_read_each_time(pin_file: Path) -> None:
    made = source(f"file:{pin_file}")
    assert made.unattended
    assert made() == PIN
    pin_file.write_bytes(b"another")
    assert made() == "another"


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o620, 0o660, 0o601])
def test_a_file_that_others_could_read_or_write_is_refused(pin_file: Path, mode: int) -> None:
    pin_file.chmod(mode)
    found = refusal(f"file:{pin_file}")
    assert isinstance(found, PinRefusedError) and found.hint and "chmod" in found.hint


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user can enter; giving files to another user takes root."""
    assert os.geteuid() == 0, "run the tests as root, in a container: they need a second user"
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_the_group_may_read_a_file_of_roots_and_none_of_ours(shared: Path) -> None:
    """Mode 0640 is how root hands a file to a service; our own file needs no group."""
    path = shared / "pin"
    files.create(path, PIN.encode(), mode=0o640)
    os.chown(path, 0, NOBODY)
    read = f"print(len(from_source('file:{path}')()))"
    assert as_nobody(read) == f"{len(PIN)}\n"
    os.chown(path, NOBODY, NOBODY)
    assert "0640: other users could read it" in as_nobody(read)
    path.chmod(0o400)
    assert as_nobody(read) == f"{len(PIN)}\n"


def test_a_file_of_another_user_is_refused(pin_file: Path, shared: Path) -> None:
    os.chown(pin_file, NOBODY, NOBODY)
    found = refusal(f"file:{pin_file}")
    assert isinstance(found, PinRefusedError) and f"user id {NOBODY}" in str(found)


def test_a_link_a_fifo_a_directory_and_a_device_are_refused_at_once(pin_file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pin_file)
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path / "link", tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        assert isinstance(refusal(f"file:{path}"), PinRefusedError)


def test_a_file_holds_at_most_4096_bytes(pin_file: Path) -> None:
    pin_file.write_bytes(b"1" * 4096)
    assert len(source(f"file:{pin_file}")()) == 4096
    pin_file.write_bytes(b"1" * 4097)
    assert isinstance(refusal(f"file:{pin_file}"), PinRefusedError)


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    found = refusal(f"file:{tmp_path}/missing")
    assert isinstance(found, ConfigError) and "No such file" in str(found)


# --- command


def test_a_command_is_split_like_a_shell_does_and_run_without_one(tmp_path: Path) -> None:
    made = source("command:printf '%s|%s\\n' 'a b' '$HOME;`id`'")
    assert made.unattended
    assert made() == "a b|$HOME;`id`"


def test_a_command_reads_nothing_from_us_and_sees_no_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSM_TOKEN_PIN", PIN)
    monkeypatch.setenv("OTHER_PIN", PIN)
    statements = """
    from_source('env:OTHER_PIN')()
    print(from_source("command:sh -c 'cat; env | grep -c PIN-5551; true'")())
    """
    done = subprocess.run(program(statements), input="typed\n", capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done


def test_what_a_command_says_goes_to_our_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    assert source("command:sh -c 'echo vault is sealed >&2; echo 12'")() == "12"
    out, err = capfd.readouterr()
    assert (out, err) == ("", "vault is sealed\n")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (f"sh -c 'echo {PIN}; exit 3'", "sh ended with status 3"),
        ("sh -c 'kill -9 $$'", "sh ended by signal 9"),
    ],
)
def test_a_command_that_fails_is_an_error_without_its_output(command: str, told: str) -> None:
    found = refusal(f"command:{command}")
    assert isinstance(found, PinRefusedError) and told in str(found)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/no/such/vault-tool get pin", "vault-tool cannot be started: No such file"),
        ("/etc/passwd", "passwd cannot be started: Permission denied"),
    ],
)
def test_a_command_that_is_none_is_a_configuration_error(command: str, told: str) -> None:
    found = refusal(f"command:{command}")
    assert isinstance(found, ConfigError) and told in str(found)


def test_an_unbalanced_quote_is_a_configuration_error() -> None:
    assert isinstance(refusal("command:echo 'x"), ConfigError)
    assert isinstance(refusal("command:  "), ConfigError)


@pytest.mark.timeout(20)
def test_a_command_that_prints_without_end_is_stopped() -> None:
    assert isinstance(refusal("command:sh -c \"trap '' PIPE; yes; sleep 30\""), PinRefusedError)
    assert isinstance(refusal("command:yes"), PinRefusedError)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "command", ["sleep 30", "sh -c 'echo 12; exec >&-; sleep 30'", "sh -c 'sleep 30 & echo 1'"]
)
def test_a_command_that_does_not_end_is_killed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsm_signer.pin.COMMAND_SECONDS", 0.3)
    found = refusal(f"command:{command}")
    assert isinstance(found, PinRefusedError) and "has not ended" in str(found)


# --- systemd


def test_a_systemd_credential_is_read_from_its_directory(
    pin_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(pin_file.parent))
    made = source("systemd:pin")
    assert made.unattended
    assert made() == PIN


@pytest.mark.parametrize("name", ["../pin", "a/b", ".", "..", "/etc/passwd"])
def test_a_systemd_credential_has_no_path_in_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert isinstance(refusal(f"systemd:{name}"), ConfigError)


def test_systemd_credentials_exist_under_systemd_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    found = refusal("systemd:pin")
    assert isinstance(found, ConfigError) and found.hint and "LoadCredential" in found.hint
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "relative")
    assert isinstance(refusal("systemd:pin"), ConfigError)


# --- keyring


class MemoryKeyring(keyring.backend.KeyringBackend):
    """A real backend of the keyring package that keeps its entries in memory."""

    priority = 1

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        if service == "locked":
            raise keyring.errors.KeyringLocked(PIN)
        return self.entries.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.entries[service, username] = password


@pytest.fixture
def memory_keyring() -> Iterator[None]:
    before = keyring.get_keyring()
    keyring.set_keyring(MemoryKeyring())
    yield
    keyring.set_keyring(before)


@pytest.mark.usefixtures("memory_keyring")
def test_a_keyring_entry_is_named_by_service_and_user() -> None:
    keyring.set_password("hsm/office", "alice", PIN)
    made = source("keyring:hsm/office/alice")
    assert made.unattended
    assert made() == PIN
    assert "no password of bob" in str(refusal("keyring:hsm/office/bob"))
    locked = refusal("keyring:locked/alice")
    assert isinstance(locked, PinRefusedError) and "KeyringLocked" in str(locked)
    for text in ("keyring:service", "keyring:/user", "keyring:service/"):
        assert isinstance(refusal(text), ConfigError)


# --- programs in processes of their own

PROGRAM = """
import ctypes, os, resource, sys  # all that is needed, before the user changes
from pathlib import Path
from hsm_signer import paths
from hsm_signer.errors import HsmSignerError
from hsm_signer.pin import from_source, make_undumpable
"""


def program(statements: str, *arguments: object, user: int | None = None) -> list[str]:
    body = textwrap.indent(textwrap.dedent(statements), "    ")
    become = f"os.setgroups([]); os.setgid({user}); os.setuid({user})" if user else ""
    report = "except HsmSignerError as exc:\n    print(type(exc).__name__, exc, exc.hint)\n"
    code = f"{PROGRAM}\n{become}\ntry:\n{body}\n{report}"
    return [sys.executable, "-c", code, *map(str, arguments)]


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_nobody(statements: str) -> str:
    return run(program(statements, user=NOBODY))


# --- the guard


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def unattended(pin_file: Path, state: Path) -> Callable[..., PinSource]:
    def make(**more: object) -> PinSource:
        return source(f"file:{pin_file}", state_directory=state, **more)

    return make


def markers(state: Path) -> list[Path]:
    return sorted(state.glob("*.marker"))


def succeed(with_source: PinSource, token: str = TOKEN) -> None:
    with with_source.attempt(token) as attempt:
        attempt.begin()
        attempt.succeeded()


class SaidNoError(PinError):
    """What hsm/ raises; the guard looks at ``code`` only."""


def fail(with_source: PinSource, code: str | None = "CKR_PIN_INCORRECT", token: str = TOKEN) -> None:
    with pytest.raises(SaidNoError), with_source.attempt(token) as attempt:
        attempt.begin()
        raise SaidNoError("the token said no", code=code)


def test_a_success_leaves_no_marker(unattended: Callable[..., PinSource], state: Path) -> None:
    for _ in range(2):
        succeed(unattended())
    assert markers(state) == []
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_the_marker_is_on_the_disk_during_the_login(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    with unattended().attempt(TOKEN) as attempt:
        assert markers(state) == []
        attempt.begin()
        assert len(markers(state)) == 1
        attempt.succeeded()
        assert markers(state) == []


def test_a_rejected_pin_stops_the_next_unattended_login(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    fail(unattended())
    before = markers(state)[0].read_bytes()
    for made in (unattended(), source("env:ANY", state_directory=state)):
        with pytest.raises(PinRefusedError, match="PIN from file, process") as caught, made.attempt(TOKEN):
            pytest.fail("the login was let through")
        assert caught.value.hint and "--retry-pin" in caught.value.hint
        with pytest.raises(PinRefusedError):
            made.check(TOKEN)
    assert markers(state)[0].read_bytes() == before


def test_the_marker_says_when_who_and_how_and_nothing_of_the_pin(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    fail(unattended())
    (marker,) = markers(state)
    note = json.loads(marker.read_text())
    assert set(note) == {"time", "source", "process"}
    assert (note["source"], note["process"]) == ("file", os.getpid())
    assert stat.S_IMODE(marker.stat().st_mode) == 0o600
    assert PIN not in marker.read_text() + marker.name


def test_each_token_has_a_marker_of_its_own(unattended: Callable[..., PinSource], state: Path) -> None:
    fail(unattended())
    succeed(unattended(), "another token")
    assert len(markers(state)) == 1


def test_a_refusal_before_the_login_leaves_no_marker(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    with pytest.raises(PinRefusedError, match="FINAL_TRY"), unattended().attempt(TOKEN):
        raise PinRefusedError("FINAL_TRY")
    succeed(unattended())


@pytest.mark.parametrize(
    ("code", "stays"),
    [
        ("CKR_PIN_INCORRECT", True),
        ("CKR_PIN_LOCKED", True),
        ("CKR_PIN_LEN_RANGE", True),
        ("CKR_DEVICE_ERROR", True),
        ("CKR_DEVICE_REMOVED", True),
        ("CKR_SESSION_CLOSED", True),
        ("CKR_GENERAL_ERROR", True),
        (None, True),
        ("CKR_USER_ALREADY_LOGGED_IN", False),
        ("CKR_SESSION_HANDLE_INVALID", False),
        ("CKR_TOKEN_NOT_PRESENT", False),
        ("CKR_USER_PIN_NOT_INITIALIZED", False),
        ("CKR_MECHANISM_INVALID", False),
        ("CKR_SESSION_COUNT", False),
    ],
)
def test_the_marker_stays_where_a_try_may_be_spent(
    unattended: Callable[..., PinSource], state: Path, code: str | None, stays: bool
) -> None:
    fail(unattended(), code)
    assert bool(markers(state)) is stays


def test_an_exception_without_a_code_can_be_explained(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    for code, stays in (("CKR_MECHANISM_INVALID", False), ("CKR_DEVICE_ERROR", True)):
        with pytest.raises(ZeroDivisionError), unattended().attempt(TOKEN) as attempt:
            attempt.begin()
            attempt.failed(code)
            raise ZeroDivisionError
        assert bool(markers(state)) is stays


def test_any_way_out_of_the_login_but_success_leaves_the_marker(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    with pytest.raises(KeyboardInterrupt), unattended().attempt("interrupted") as attempt:
        attempt.begin()
        raise KeyboardInterrupt
    with unattended().attempt("forgotten") as attempt:
        attempt.begin()
    assert len(markers(state)) == 2


def test_an_attempt_is_one_login(unattended: Callable[..., PinSource]) -> None:
    with unattended().attempt(TOKEN) as attempt:
        attempt.begin()
        with pytest.raises(RuntimeError):
            attempt.begin()


def test_success_without_a_login_clears_nothing(unattended: Callable[..., PinSource], state: Path) -> None:
    fail(unattended())
    with unattended(retry=True).attempt(TOKEN) as attempt:
        attempt.succeeded()
    assert markers(state)


def test_retry_tries_once_more_and_success_clears_the_marker(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    fail(unattended())
    succeed(unattended(retry=True))
    assert markers(state) == []
    succeed(unattended())


def test_retry_that_fails_leaves_a_marker_that_it_does_not_forgive_itself(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    fail(unattended())
    before = markers(state)[0].read_bytes()
    again = unattended(retry=True)
    fail(again)
    assert markers(state)[0].read_bytes() != before
    with pytest.raises(PinRefusedError), again.attempt(TOKEN):
        pass


def test_retry_that_spends_no_try_keeps_the_older_marker(
    unattended: Callable[..., PinSource], state: Path
) -> None:
    fail(unattended())
    fail(unattended(retry=True), "CKR_TOKEN_NOT_PRESENT")
    assert markers(state)


def test_a_success_at_a_prompt_clears_the_marker(unattended: Callable[..., PinSource], state: Path) -> None:
    prompt = source("prompt", prompt=lambda shown: PIN, state_directory=state)
    fail(unattended())
    fail(prompt)
    assert markers(state)
    succeed(prompt)
    assert markers(state) == []
    succeed(unattended())


def test_a_prompt_leaves_no_marker_and_makes_no_directory(state: Path) -> None:
    prompt = source("prompt", prompt=lambda shown: PIN, state_directory=state)
    succeed(prompt)
    fail(prompt)
    assert not state.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"time": 1}', b"\xff" * 5000])
def test_a_damaged_marker_stands(unattended: Callable[..., PinSource], state: Path, content: bytes) -> None:
    fail(unattended())
    markers(state)[0].write_bytes(content)
    with pytest.raises(PinRefusedError, match="earlier unattended login"), unattended().attempt(TOKEN):
        pass
    succeed(unattended(retry=True))


def test_anything_that_has_the_markers_name_stands(unattended: Callable[..., PinSource], state: Path) -> None:
    fail(unattended())
    (marker,) = markers(state)
    marker.unlink()
    marker.symlink_to("nowhere")
    with pytest.raises(PinRefusedError), unattended().attempt(TOKEN):
        pass
    marker.unlink()
    marker.mkdir()
    for retry in (False, True):
        with pytest.raises(PinRefusedError), unattended(retry=retry).attempt(TOKEN) as attempt:
            attempt.begin()


def test_the_default_state_directory_is_the_users(pin_file: Path, tmp_path: Path) -> None:
    statements = f"""
    with from_source('file:{pin_file}').attempt('t') as attempt:
        attempt.begin()
    """
    run(program(statements), XDG_STATE_HOME=str(tmp_path / "xdg"), HOME=str(tmp_path))
    assert len(list((tmp_path / "xdg" / "hsm-token").glob("*.marker"))) == 1


LOGIN = """
source = from_source(f'file:{sys.argv[1]}', state_directory=Path(sys.argv[2]), retry='retry' in sys.argv)
if 'together' in sys.argv:
    source.check('t')
    print('ready', flush=True)
    sys.stdin.readline()
pin = source()
with source.attempt('t') as attempt:
    attempt.begin()
    print('C_Login', flush=True)
    if 'slow' in sys.argv:
        sys.stdin.readline()
    if 'good' in sys.argv:
        attempt.succeeded()
    print('over')
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(program(LOGIN, *arguments), text=True, **pipes)


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate("\n", timeout=100)
    assert process.returncode == 0, err
    return out


def test_a_process_killed_inside_the_login_stops_the_next_one(pin_file: Path, state: Path) -> None:
    with start(pin_file, state, "slow") as process:
        assert hear(process) == "C_Login"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    told = finish(start(pin_file, state, "good"))
    assert "PinRefusedError" in told and f"process {process.pid}" in told and "C_Login" not in told
    assert finish(start(pin_file, state, "good", "retry")) == "C_Login\nover\n"
    assert finish(start(pin_file, state, "good")) == "C_Login\nover\n"


@pytest.mark.parametrize("retry", ["", "retry"])
def test_of_50_processes_with_a_wrong_pin_one_logs_in(pin_file: Path, state: Path, retry: str) -> None:
    """With ``--retry-pin`` in all of them, too: they forgive an older marker, not the one of the first."""
    if retry:
        finish(start(pin_file, state))
    processes = [start(pin_file, state, "together", retry) for _ in range(50)]
    assert {hear(process) for process in processes} == {"ready"}
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    told = [finish(process) for process in processes]
    assert sum("C_Login" in text for text in told) == 1
    assert sum("PinRefusedError" in text for text in told) == 49


def test_retry_forgives_what_stood_before_its_run_and_no_other(unattended: Callable[..., PinSource]) -> None:
    before = time.time()
    fail(unattended())
    with pytest.raises(PinRefusedError), unattended(retry=before).attempt(TOKEN):
        pass
    succeed(unattended(retry=time.time()))


@pytest.mark.parametrize("said", [{"time": (datetime.now(UTC) + timedelta(days=1)).isoformat()}, {}, []])
def test_a_marker_without_a_time_or_from_the_future_does_not_stop_each_retry(
    unattended: Callable[..., PinSource], state: Path, said: object
) -> None:
    fail(unattended())
    [marker] = markers(state)
    marker.write_text(json.dumps(said))
    succeed(unattended(retry=time.time() - 60))


def test_processes_with_the_right_pin_log_in_one_after_the_other(pin_file: Path, state: Path) -> None:
    processes = [start(pin_file, state, "slow", "good") for _ in range(4)]
    told = []
    while len(told) < 4:
        ready, _, _ = select.select([process.stdout for process in processes], [], [], 60)
        assert len(ready) == 1, "two of them are in C_Login"
        process = next(process for process in processes if process.stdout in ready)
        processes.remove(process)
        told.append(finish(process))
    assert told == ["C_Login\nover\n"] * 4


def test_a_login_that_hangs_holds_the_others_back_for_a_while(
    pin_file: Path, state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for wait in ("UNATTENDED_WAIT", "CHECK_WAIT", "PROMPT_WAIT"):
        monkeypatch.setattr(f"hsm_signer.pin_guard.{wait}", 0.1)
    with start(pin_file, state, "slow", "good") as process:
        assert hear(process) == "C_Login"
        for retry in (False, True):
            made = source(f"file:{pin_file}", state_directory=state, retry=retry)
            made.check("t")
            with pytest.raises(PinRefusedError, match="has not ended"), made.attempt("t"):
                pass
        succeed(source("prompt", prompt=lambda shown: PIN, state_directory=state), "t")
        assert "its marker stays" in caplog.text
        assert len(markers(state)) == 1
        assert finish(process) == "over\n"
    assert markers(state) == []


def test_retry_does_not_forgive_the_login_that_it_waited_for(
    pin_file: Path, state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hsm_signer.pin_guard.CHECK_WAIT", 0.1)
    caplog.set_level(logging.INFO, "hsm_signer")
    made = source(f"file:{pin_file}", state_directory=state, retry=True)
    with start(pin_file, state, "slow") as process:
        assert hear(process) == "C_Login"

        def fail_when_waited_for() -> None:
            while caplog.text.count("waiting for another login") < 2:  # once to look, once to log in
                time.sleep(0.01)
            finish(process)

        thread = threading.Thread(target=fail_when_waited_for)
        thread.start()
        with pytest.raises(PinRefusedError, match=f"process {process.pid}"), made.attempt("t"):
            pass
        thread.join()


def test_no_lock_is_held_while_a_pin_is_fetched(pin_file: Path, state: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    slow = source(f"command:cat {tmp_path}/gate", state_directory=state)
    fetched: list[str] = []
    thread = threading.Thread(target=lambda: (slow.check("t"), fetched.append(slow())))
    thread.start()
    with (tmp_path / "gate").open("w") as gate:  # opens when the command waits at the other end
        assert finish(start(pin_file, state, "good")) == "C_Login\nover\n"
        finish(start(pin_file, state))
        gate.write("1234")
    thread.join()
    assert fetched == ["1234"]
    with pytest.raises(PinRefusedError), slow.attempt("t"):
        pytest.fail("a marker that came meanwhile was not seen")


# --- without a state directory that we can write


LET_THROUGH = """
source = from_source('env:THE_PIN', state_directory=Path({state!r}))
if {check}:
    source.check('t')
source()
with source.attempt('t') as attempt:
    print('let through')
    attempt.begin()
    print('C_Login')
"""


@pytest.mark.parametrize("check", [False, True])
def test_no_unattended_login_without_a_state_directory_of_ours_that_we_can_write(
    shared: Path, check: bool
) -> None:
    (shared / "file").touch()
    (shared / "theirs").mkdir(mode=0o777)
    (shared / "theirs").chmod(0o777)
    (shared / "read-only").mkdir(mode=0o500)
    (shared / "wide").mkdir()
    (shared / "link").symlink_to("read-only")
    (shared / "open" / "state").mkdir(parents=True, mode=0o700)
    (shared / "open").chmod(0o777)
    for name in ("read-only", "wide", "open/state"):
        os.chown(shared / name, NOBODY, NOBODY)
    (shared / "wide").chmod(0o777)
    places = (
        "file",
        "file/below",
        "theirs",
        "read-only",
        "wide",
        "link",
        "new/below",
        "open/state",
        "open/new",
    )
    for name in places:
        statements = LET_THROUGH.format(state=str(shared / name), check=check)
        told = run(program(statements, user=NOBODY), THE_PIN=PIN)
        assert told.startswith("PinRefusedError no unattended login without a state directory"), (name, told)
        assert "state-dir" in told
    assert not (shared / "open" / "new").exists()


def test_no_unattended_login_where_the_marker_cannot_be_written(shared: Path) -> None:
    """The lock is there from better days; then the directory became read-only."""
    statements = LET_THROUGH.format(state=str(shared / "state"), check=False)
    (shared / "state").mkdir(mode=0o700)
    os.chown(shared / "state", NOBODY, NOBODY)
    ready = statements.replace("print('C_Login')", "attempt.succeeded()")
    assert run(program(ready, user=NOBODY), THE_PIN=PIN) == "let through\n"
    (shared / "state").chmod(0o500)
    told = run(program(statements, user=NOBODY), THE_PIN=PIN)
    assert told.startswith("let through\nPinRefusedError no unattended login") and "C_Login" not in told


def test_a_person_logs_in_without_a_state_directory(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shared / "file").touch()
    (shared / "wide").mkdir()
    (shared / "wide").chmod(0o777)
    for name in ("file", "file/below", "wide", "new"):
        succeed(source("prompt", prompt=lambda shown: PIN, state_directory=shared / name))
    assert not (shared / "new").exists()
    assert "a marker that stands there stays" in caplog.text


def test_a_marker_that_cannot_be_removed_is_told(
    unattended: Callable[..., PinSource], state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with unattended().attempt(TOKEN) as attempt:
        attempt.begin()
        (marker,) = markers(state)
        marker.unlink()
        marker.mkdir()
        attempt.succeeded()
    assert "stops the next unattended login" in caplog.text


# --- undumpable


def test_undumpable_means_no_core_and_no_look_from_outside() -> None:
    """prctl(2): a process that is not dumpable cannot be attached to, and its /proc/PID/environ is root's."""
    statements = """
    get_dumpable, libc = 3, ctypes.CDLL(None)
    print(libc.prctl(get_dumpable, 0, 0, 0, 0), end=' ')
    make_undumpable()
    print(libc.prctl(get_dumpable, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0])
    """
    assert run(program(statements)) == "1 0 0\n"


def test_the_module_loads_nothing_that_a_cached_fetch_would_wait_for() -> None:
    heavy = "{'filelock', 'platformdirs', 'keyring', 'ctypes'}"
    code = f"import hsm_signer.pin, sys; print({heavy} & set(sys.modules))"
    assert run([sys.executable, "-c", code]) == "set()\n"
