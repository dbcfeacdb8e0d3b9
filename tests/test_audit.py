"""The audit log: what is done to it shows, what cannot be written is not signed, and nobody loses a line."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import urlsafe_b64decode
from contextlib import nullcontext
from pathlib import Path

import pytest
from canary import assert_no_trace
from endpoint import GRANT, Endpoint, Reply
from faults import FaultyModule
from manual import CHECKOUT, blocks
from office import Office
from software_signer import SoftwareSigner
from stranger import plant

from hsm_signer import ClientAssertion, TokenClient, audit, open_token, rollover, x509
from hsm_signer.audit import START, AuditLog, Head
from hsm_signer.errors import (
    AuditLogError,
    ConfigError,
    HsmSignerError,
    KeyMismatchError,
    OAuthError,
    SignatureInvalidError,
    UnsafeFileError,
)
from hsm_signer.files import private_directory
from hsm_signer.locks import try_lock

NOBODY = 65534


@pytest.fixture
def audit_log(tmp_path: Path) -> AuditLog:
    """Three uses, six lines."""
    log = AuditLog(tmp_path / "state" / "audit.jsonl", clock=lambda: 1_800_000_000.7)
    use(log, "key generation")
    with log.signing(b"data", serial="61c5d6a9ac6d36ba", key="t" * 43):
        pass
    use(log, "key deletion")
    return log


def use(log: AuditLog, intent: str = "proof") -> None:
    with log.use(intent, done="done", serial="61c5d6a9ac6d36ba"):
        pass


def lines(log: AuditLog) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def intents(path: Path) -> list[str]:
    return [each["intent"] for each in records(path) if "intent" in each]


def outcome_of(path: Path, intent: str) -> dict:
    """The outcome of the one use of this kind."""
    found = records(path)
    [number] = [each["number"] for each in found if each.get("intent") == intent]
    [outcome] = [each for each in found if each.get("of") == number]
    return outcome


def write(log: AuditLog, *parts: bytes) -> None:
    log.path.write_bytes(b"".join(parts))


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


# ---- the chain ----


def test_a_use_is_an_intent_and_an_outcome_bound_by_sha256(audit_log):
    _, first, intent, outcome, *_ = map(json.loads, lines(audit_log))
    assert intent == {
        "number": 3,
        "previous": hashlib.sha256(lines(audit_log)[1].rstrip(b"\n")).hexdigest(),
        "time": "2027-01-15T08:00:00Z",
        "intent": "other",
        "sha256": hashlib.sha256(b"data").hexdigest(),
        "serial": "61c5d6a9ac6d36ba",
        "key": "t" * 43,
    }
    assert (outcome["number"], outcome["of"], outcome["outcome"]) == (4, 3, "signed")
    assert (first["of"], first["outcome"]) == (1, "done")
    assert json.loads(lines(audit_log)[0])["previous"] == START


def test_the_intent_is_on_the_disk_before_the_block_and_the_error_in_the_outcome(audit_log, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with pytest.raises(KeyError), audit_log.use("proof", done="done"):
        assert synced[-1] == audit_log.path.stat().st_size
        assert json.loads(lines(audit_log)[-1])["intent"] == "proof"
        assert audit_log.verify().open == (7,)
        raise KeyError("secret")
    outcome = json.loads(lines(audit_log)[-1])
    assert (outcome["of"], outcome["outcome"], outcome["error"]) == (7, "failed", "KeyError")
    assert "secret" not in audit_log.path.read_text()
    assert synced[-1] == audit_log.path.stat().st_size


@pytest.mark.parametrize("function", ["C_Sign", "C_GenerateKeyPair", "C_DestroyObject"])
def test_what_ctrl_c_interrupted_is_not_said_to_have_failed(new_token, faulty, tmp_path, function):
    soft, path = new_token(), tmp_path / "audit.jsonl"
    with open_token(soft.uri, module=faulty.path, pin=soft.pin, audit=AuditLog(path)) as token:
        key = token.generate_key("das")
        signer = token.signer("das")
        before = len(records(path))
        faulty.set(f"delay {function} 400")
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            match function:
                case "C_Sign":
                    signer.sign(b"data")
                case "C_GenerateKeyPair":
                    token.generate_key("other")
                case "C_DestroyObject":
                    token.delete_key("das")
        faulty.set()
        outcome = records(path)[-1]
        assert (outcome["outcome"], outcome["error"]) == ("unknown", "KeyboardInterrupt")
        assert [each.get("outcome") for each in records(path)[before:-1]] in ([None], [None, "signed", None])
        left = token.keys()
        assert [each.id for each in left] == ([] if function == "C_DestroyObject" else [key.id])


def test_head_is_the_count_and_the_hash_of_the_last_line(audit_log):
    head = audit_log.head()
    assert head == Head(6, hashlib.sha256(lines(audit_log)[-1].rstrip(b"\n")).hexdigest())
    assert Head.parse(f" {str(head).upper()}\n") == head


@pytest.mark.parametrize(
    "text", ["", "6", "6:", f"x:{START}", f"6:{START}0", f"-1:{START}", f"6:{START[1:]}g"]
)
def test_what_is_no_head_is_refused(text):
    with pytest.raises(ConfigError, match="COUNT:HEAD"):
        Head.parse(text)


def test_a_log_that_was_left_alone_verifies_with_every_head_that_was_noted(audit_log):
    hashes = [START, *(hashlib.sha256(each.rstrip(b"\n")).hexdigest() for each in lines(audit_log))]
    for count, each in enumerate(hashes):
        verdict = audit_log.verify(Head(count, each))
        assert (verdict.findings, verdict.unanchored, verdict.torn, verdict.open) == ((), not count, 0, ())
        assert verdict.head == audit_log.head()
    assert audit_log.verify().unanchored


def test_the_hash_has_to_be_of_the_line_of_that_number(audit_log):
    hashes = [hashlib.sha256(each.rstrip(b"\n")).hexdigest() for each in lines(audit_log)]
    for wrong in (Head(5, hashes[5]), Head(7, hashes[5]), Head(6, hashes[4]), Head(0, hashes[0])):
        assert audit_log.verify(wrong).findings == (
            f"no line is {wrong}: lines were cut off, or this is another history",
        )


@pytest.mark.parametrize("index", range(5))
def test_a_changed_line_shows(audit_log, index):
    changed = lines(audit_log)
    changed[index] = changed[index].replace(b"2027", b"2026")
    write(audit_log, *changed)
    assert audit_log.verify().findings == (
        f"lines before line {index + 2} were changed, removed, inserted or moved",
    )


@pytest.mark.parametrize("index", range(5))
def test_a_removed_line_shows(audit_log, index):
    changed = lines(audit_log)
    del changed[index]
    write(audit_log, *changed)
    assert audit_log.verify().findings[0] == (
        f"lines before line {index + 1} were changed, removed, inserted or moved"
    )


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize(
    "line",
    [
        b"{}\n",
        b"\n",
        b"garbage\n",
        b'{"number":1,"previous":"0","intent":"x"}\n',
        b'{"number":1,"previous":"0","of":[]}\n',
        b'{"number":true,"previous":"0"}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda line: line[:20].decode(),
)
def test_an_inserted_line_shows(audit_log, index, line):
    changed = lines(audit_log)
    changed.insert(index, line)
    write(audit_log, *changed)
    assert audit_log.verify().findings


def test_moved_lines_show(audit_log):
    changed = lines(audit_log)
    changed[2], changed[4] = changed[4], changed[2]
    write(audit_log, *changed)
    assert audit_log.verify().findings


def forge(log: AuditLog, number: int, **facts: object) -> None:
    """Add a line whose hash fits."""
    previous = log.head().hash
    with log.path.open("a") as file:
        file.write(json.dumps({"number": number, "previous": previous} | facts) + "\n")


def test_an_outcome_of_nothing_shows_in_a_chain_that_fits(audit_log):
    for number, begun in ((7, 1), (8, 99), (9, None)):
        forge(audit_log, number, of=begun, outcome="signed")
    assert audit_log.verify().findings == tuple(
        f"line {at} is the outcome of nothing that was begun" for at in (7, 8, 9)
    )


@pytest.mark.parametrize("number", [1, 6, 8])
def test_a_number_that_does_not_go_on_shows_in_a_chain_that_fits(audit_log, number):
    forge(audit_log, number, intent="proof")
    assert audit_log.verify().findings == ("lines before line 7 were changed, removed, inserted or moved",)


@pytest.mark.parametrize("kept", range(6))
def test_lines_cut_off_at_the_end_show_by_the_head_that_was_noted(audit_log, kept):
    head = audit_log.head()
    write(audit_log, *lines(audit_log)[:kept])
    assert audit_log.verify().findings == ()
    assert "lines were cut off" in audit_log.verify(head).findings[0]


def test_a_changed_last_line_and_a_rewritten_history_show_by_the_head(audit_log, tmp_path):
    head = audit_log.head()
    other = AuditLog(tmp_path / "other", clock=lambda: 1_700_000_000)
    for _ in range(5):
        use(other)
    assert other.verify().findings == ()
    assert other.verify(head).findings
    changed = lines(audit_log)
    changed[-1] = changed[-1].replace(b"done", b"gone")
    write(audit_log, *changed)
    assert audit_log.verify().findings == ()
    assert audit_log.verify(head).findings


# ---- crashes ----


def test_a_line_torn_by_a_crash_is_told_and_the_next_line_accounts_for_it(audit_log):
    whole = audit_log.path.read_bytes()
    last = lines(audit_log)[-1]
    for length in range(1, len(last) - 1):
        write(audit_log, whole[: len(whole) - len(last) + length])
        verdict = audit_log.verify()
        assert (verdict.findings, verdict.torn, verdict.head.count, verdict.open) == ((), 1, 5, (5,))
        use(audit_log)
        verdict = audit_log.verify()
        assert (verdict.findings, verdict.torn, verdict.head.count, verdict.open) == ((), 1, 7, (5,))


def test_a_log_whose_first_line_was_torn_goes_on(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    use(log)
    first = lines(log)[0]
    for length in range(1, len(first) - 1):
        write(log, first[:length])
        use(log)
        verdict = log.verify()
        assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 1, 2)


def test_a_crash_that_took_the_newline_alone_loses_no_line(audit_log):
    write(audit_log, audit_log.path.read_bytes()[:-1])
    assert audit_log.verify().findings == ()
    use(audit_log)
    verdict = audit_log.verify()
    assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 0, 8)


@pytest.mark.parametrize(
    "line", [b'{"number":1}', b'{"number":7,"previous":"0', b"garbage", b"", b"\0"], ids=repr
)
def test_a_whole_line_at_the_end_that_is_none_of_ours_shows(audit_log, line):
    head, whole = audit_log.head(), audit_log.path.read_bytes()
    write(audit_log, whole, line, b"\n")
    verdict = audit_log.verify(head)
    assert (verdict.findings, verdict.torn) == (("line 7 is none of ours",), 0)
    write(audit_log, whole, line, b'\n{"numb')
    verdict = audit_log.verify(head)
    assert (verdict.findings, verdict.torn) == (("line 7 is none of ours",), 1)
    use(audit_log)  # its line tells of both
    verdict = audit_log.verify(head)
    assert (verdict.findings, verdict.torn) == ((), 1)


def test_lines_of_ours_torn_one_after_the_other_are_no_finding(audit_log):
    whole, last = audit_log.path.read_bytes(), lines(audit_log)[-1]
    for length in (1, 11, 12, 90, 91, len(last) - 2):
        for after in (b"\n", b"\n{", b"\n" + last[:100]):
            write(audit_log, whole[: len(whole) - len(last) + length], after)
            verdict = audit_log.verify()
            assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 1, 5)


def test_what_a_torn_line_held_cannot_be_changed_later(audit_log):
    write(audit_log, audit_log.path.read_bytes()[:-30])
    use(audit_log)
    before = lines(audit_log)
    for changed in ([*before[:5], b"{\n", *before[6:]], [*before[:5], *before[6:]]):
        write(audit_log, *changed)
        assert "does not tell of the same torn line" in audit_log.verify().findings[0]


def test_a_log_longer_than_what_is_read_of_it_goes_on(audit_log):
    for _ in range(40):
        use(audit_log, "\u202e" * 5000)
    assert audit_log.path.stat().st_size > 200_000
    assert max(map(len, lines(audit_log))) < 10_000
    verdict = audit_log.verify()
    assert (verdict.findings, verdict.head.count) == ((), 86)


def test_a_process_killed_between_the_lines_leaves_an_intent_that_is_told_and_no_finding(
    tls_office: Office, faulty: FaultyModule, tmp_path: Path
) -> None:
    office = audited(tls_office, tmp_path, module=faulty.path)
    log = tmp_path / "audit.jsonl"
    faulty.set("hang C_Sign")
    environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
    with subprocess.Popen(office.command("assertion"), env=environment) as running:
        until(lambda: faulty.calls("C_Sign"))
        assert intents(log) == ["assertion"]  # the token is at work, and the line is there
        running.kill()
    faulty.set()
    told = office.run("audit", "verify")
    assert (told.status, told.stdout[:2]) == (0, "1:")
    assert "uses without an outcome, of a process that ended in between or is at work: 1" in told.lines
    assert office.run("assertion").status == 0
    with (tmp_path / "audit.jsonl").open("a") as torn:
        torn.write('{"number":')
    assert "pieces that are no whole lines, as crashes leave them: 1" in office.run("audit", "verify").lines
    told = office.run("audit", "verify", "--json")
    assert (told.json["open"], told.json["torn"], told.json["anchored"]) == ([1], 1, False)
    assert told.stderr == ""  # so a job gets mail for findings alone


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_line_that_is_being_written_while_the_log_is_verified_is_no_finding(audit_log, monkeypatch):
    whole, read = audit_log.path.read_bytes(), audit._record

    def overtaken(line: bytes) -> dict | None:
        if (found := read(line)) is None:
            audit_log.path.write_bytes(whole)  # its second half comes once its first half was read
        return found

    write(audit_log, whole[:-30])
    with monkeypatch.context() as patched:
        patched.setattr(audit, "_record", overtaken)
        verdict = audit_log.verify()
    assert (verdict.findings, verdict.head.count, verdict.open) == ((), 5, (5,))
    assert audit_log.verify().head.count == 6


# ---- who may write it ----


def test_file_lock_and_directory_are_for_us_alone(audit_log):
    assert audit_log.path.stat().st_mode & 0o777 == 0o600
    assert audit_log.path.with_name("audit.jsonl.lock").stat().st_mode & 0o777 == 0o600
    assert audit_log.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "spoilt",
    [
        *(
            "mode",
            "owner",
            "link",
            "dangling",
            "fifo",
            "directory",
            "its owner",
            "above",
            "place",
            "foreign file",
        )
    ],
)
def test_without_a_log_that_can_be_written_nothing_is_done(audit_log, tmp_path, spoilt):
    path = audit_log.path
    before = path.read_bytes()
    match spoilt:
        case "mode":
            path.chmod(0o620)
        case "owner":
            path.chmod(0o600)
            os.chown(path, NOBODY, NOBODY)
        case "link" | "dangling":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / ("elsewhere" if spoilt == "link" else "nowhere"))
        case "fifo":
            path.rename(tmp_path / "elsewhere")
            os.mkfifo(path, 0o600)
        case "directory":
            path.parent.chmod(0o777)
        case "above":  # whoever can move the directory away begins a new log
            path.parent.parent.chmod(0o777)
        case "its owner":
            os.chown(path.parent, NOBODY, NOBODY)
        case "foreign file":
            before = b"notes of mine\n"
            path.write_bytes(before)
    log = AuditLog("/proc/nowhere/log") if spoilt == "place" else audit_log
    listed = sorted(tmp_path.rglob("*"))
    if spoilt != "place":
        with pytest.raises(AuditLogError) as looked:
            log.look()
        assert sorted(tmp_path.rglob("*")) == listed
    with pytest.raises(AuditLogError, match="the key is not used, since the audit log") as checked:
        log.check()
    if spoilt != "place":
        assert (str(looked.value), looked.value.hint) == (str(checked.value), checked.value.hint)
    with pytest.raises(AuditLogError, match="the key is not used"), log.signing(b"data"):
        pytest.fail("the key was used")
    if spoilt not in ("dangling", "fifo"):
        assert path.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()


def test_a_look_at_a_log_makes_nothing_and_tells_its_head(audit_log, tmp_path):
    assert audit_log.look() == audit_log.head()
    for fresh in (audit_log.path.with_name("other"), tmp_path / "none" / "below" / "log"):
        listed = sorted(tmp_path.rglob("*"))
        assert AuditLog(fresh).look() is None
        assert sorted(tmp_path.rglob("*")) == listed
    audit_log.path.with_name("audit.jsonl.lock").chmod(0o666)
    for refused in (audit_log.look, audit_log.check):
        with pytest.raises(AuditLogError, match=r"audit\.jsonl\.lock has mode 0666"):
            refused()


def test_without_leave_to_write_into_its_directory_nothing_is_done(tmp_path):
    program = """
import os, sys
from pathlib import Path
from hsm_signer.audit import AuditLog
os.setgroups([]), os.setgid(65534), os.setuid(65534)
log = AuditLog(Path(sys.argv[1], "audit.jsonl"))
for use in (log.look, log.check, lambda: log.signing(b"data").__enter__()):
    try:
        print("used", use())
    except Exception as exc:
        print(type(exc).__name__, exc)
"""
    tmp_path.chmod(0o711)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o711)
    directory = tmp_path / "read-only"
    directory.mkdir(mode=0o500)
    os.chown(directory, NOBODY, NOBODY)
    told = python(program, str(directory)).stdout
    assert re.fullmatch("(AuditLogError the key is not used, .*: Permission denied\n){3}", told)


def test_a_log_that_others_can_write_is_not_believed(audit_log):
    audit_log.path.chmod(0o622)
    with pytest.raises(UnsafeFileError):
        audit_log.verify()
    with pytest.raises(UnsafeFileError):
        audit_log.head()


def test_somebody_who_keeps_the_lock_stops_the_use(audit_log, monkeypatch):
    monkeypatch.setattr("hsm_signer.audit.LOCK_WAIT", 0.1)
    with private_directory(audit_log.path.parent) as directory:
        lock = try_lock(directory, "audit.jsonl.lock")
        assert lock
        with pytest.raises(AuditLogError, match="another process has held its lock"):
            use(audit_log)
        lock.release()
    assert audit_log.head().count == 6


def test_an_error_of_the_use_matters_more_than_a_log_that_cannot_be_written_any_more(audit_log, caplog):
    with pytest.raises(KeyError), audit_log.use("proof", done="done"):
        audit_log.path.chmod(0o666)
        raise KeyError
    assert "has the intent, and the outcome cannot be written" in caplog.text


def test_the_file_is_opened_for_appending_alone(audit_log, monkeypatch):
    """So an administrator may allow no more (chattr +a)."""
    modes, write_through = [], os.write

    def watched(descriptor: int, line: bytes) -> int:
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND)
        return write_through(descriptor, line)

    monkeypatch.setattr(os, "write", watched)
    use(audit_log)
    assert modes == [os.O_APPEND, os.O_APPEND]


# ---- many at once ----


def test_eight_processes_and_their_threads_make_one_chain(soft_token, tmp_path):
    program = """
import sys
from concurrent.futures import ThreadPoolExecutor
from hsm_signer import ClientAssertion, open_token
from hsm_signer.audit import AuditLog
module, uri, label, path, process = sys.argv[1:]
with open_token(uri, module=module, pin=sys.stdin.read(), audit=AuditLog(path)) as token:
    signer = token.signer(label)
    assertion = ClientAssertion("das-api-auth", "https://as.test/token", claims="oidc")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: assertion.issue(signer, jti=f"{process}-{number}"), range(25)))
"""
    with open_token(soft_token.uri, module=soft_token.module, pin=soft_token.pin) as token:
        key = token.generate_key(f"audit-{tmp_path.name}")
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, "-c", program, soft_token.module, soft_token.uri, key.label, str(path)]
    environment = os.environ | {"SOFTHSM2_CONF": soft_token.conf}
    processes = [
        subprocess.Popen(
            [*command, str(each)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for each in range(8)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write(soft_token.pin.encode())
        process.stdin.close()
    for process in processes:
        assert process.stdout
        with process.stdout:
            assert process.stdout.read() == b""
        assert process.wait() == 0
    verdict = AuditLog(path).verify()
    assert (verdict.findings, verdict.torn, verdict.open, verdict.head.count) == ((), 0, (), 400)
    signed = [each for each in records(path) if "intent" in each]
    assert {each["jti"] for each in signed} == {f"{one}-{two}" for one in range(8) for two in range(25)}
    assert {each["key"] for each in records(path) if "of" in each} == {key.thumbprint}


# ---- syslog ----


@pytest.fixture
def daemon(tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(10)
        listening.bind(str(tmp_path / "syslog"))
        yield listening


def test_syslog_gets_each_head(tls_office: Office, daemon: socket.socket, tmp_path: Path) -> None:
    office = audited(tls_office, tmp_path, audit_syslog="syslog")
    done = office.run("assertion")
    assert (done.status, done.stderr) == (0, "")
    log = AuditLog(tmp_path / "audit.jsonl")
    heads = [
        str(Head(at, hashlib.sha256(line.rstrip(b"\n")).hexdigest())) for at, line in enumerate(lines(log), 1)
    ]
    for head in heads:
        pattern = rf"<86>hsm-token\[\d+\]: audit log {re.escape(str(log.path))}: {head}"
        assert re.fullmatch(pattern, daemon.recv(4096).decode())
    assert len(heads) == 2


def test_a_syslog_that_is_not_there_is_a_warning(tls_office: Office, tmp_path: Path) -> None:
    office = audited(tls_office, tmp_path, audit_syslog="syslog")
    done = office.run("assertion")
    assert done.status == 0
    assert (
        done.lines
        == [
            f"warning: the head of the audit log did not reach syslog at {tmp_path}/syslog: "
            "[Errno 2] No such file or directory"
        ]
        * 2
    )
    assert office.run("audit", "head").stdout.startswith("2:")


def test_a_syslog_that_takes_nothing_is_not_waited_for(audit_log, daemon, caplog, monkeypatch):
    monkeypatch.setattr("hsm_signer.audit._SYSLOG_WAIT", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full, pytest.raises(BlockingIOError):
        full.setblocking(False)
        while True:
            full.sendto(b"x", daemon.getsockname())
    use(AuditLog(audit_log.path, syslog=daemon.getsockname()))
    assert caplog.text.count("did not reach syslog") == 2
    assert audit_log.head().count == 8


def test_true_means_the_socket_of_the_machine_and_false_none(tls_office: Office, tmp_path: Path) -> None:
    office = audited(tls_office, tmp_path, audit_syslog=True)
    assert office.run("config", "show", "--json").json["settings"]["audit-syslog"]["value"] == "/dev/log"
    office.configure(audit_log="audit.jsonl", audit_syslog=False)
    assert office.run("config", "show", "--json").json["settings"]["audit-syslog"]["value"] is None


# ---- the commands ----


def audited(office: Office, home: Path, **settings: object) -> Office:
    return office.copy(home).configure(audit_log="audit.jsonl", **settings)


COMMANDS = {
    ("assertion",): ["assertion"],
    ("fetch", "--no-cache"): ["assertion"],
    ("cert", "self-signed"): ["challenge", "certificate"],
    ("cert", "request"): ["challenge", "certificate request"],
    ("key", "prove"): ["challenge", "proof"],
    ("key", "export"): ["challenge"],
    ("enroll", "--out", "folder", "--replace"): ["challenge", "proof", "challenge", "certificate"],
    ("doctor", "--login"): ["challenge", "challenge", "proof", "test signature", "assertion"],
    ("audit", "head"): [],
    ("config", "show"): [],
}


def test_every_command_writes_two_lines_for_each_use_of_the_key(
    tls_office: Office, faulty: FaultyModule, tmp_path: Path
) -> None:
    office = audited(tls_office, tmp_path, module=faulty.path)
    log = tmp_path / "audit.jsonl"
    log.touch(mode=0o600)
    before = 0
    for command, expected in COMMANDS.items():
        faulty.forget()
        words = [str(tmp_path / word) if word == "folder" else word for word in command]
        assert office.run(*words).status == 0, command
        found = records(log)[before:]
        before += len(found)
        told = [each["intent"] for each in found if "intent" in each]
        assert told == expected, command
        assert len(found) == 2 * len(told), command
        assert faulty.calls("C_Sign") == len([each for each in told if each != "proof"]), command
    uses = [each for each in records(log) if "intent" in each]
    outcomes = {each["of"]: each for each in records(log) if "of" in each}
    named = [(each | outcomes[each["number"]])["key"] for each in uses]
    assert set(named) == {office.profile["key-thumbprint"]}
    assert {each["outcome"] for each in records(log) if "of" in each} == {"signed", "done"}
    assert len({each["serial"] for each in uses}) == 1
    verdict = AuditLog(log).verify()
    assert (verdict.findings, verdict.open) == ((), ())


@pytest.mark.parametrize("verify", [True, False])
def test_a_planted_public_half_is_not_named_as_the_key_that_signed(new_token, tmp_path, verify):
    soft, path = new_token(), tmp_path / "audit.jsonl"
    generate = ["--keypairgen", "--key-type", "EC:prime256v1", "--usage-sign", "--label", "das", "--id", "01"]
    soft.pkcs11_tool(*generate)  # with a public half that whoever has no PIN can remove
    options = {"module": soft.module, "pin": soft.pin, "verify": verify, "audit": AuditLog(path)}
    with open_token(soft.uri, **options) as token:
        genuine = token.signer("das")
        genuine.sign(b"cold")
        kid = genuine.kid
        genuine.sign(b"proved")
    named = [("sha256" in each, each.get("key")) for each in records(path)]
    cold = [(True, None), (False, kid if verify else None)]
    assert named == [*cold, (True, None), (False, kid), (True, kid), (False, None)]
    soft.pkcs11_tool("--delete-object", "--type", "pubkey", "--label", "das", login=False)
    plant(soft, "das", b"\x01", tmp_path)
    path.unlink()
    with open_token(soft.uri, **options) as token:
        signer = token.signer("das")
        with pytest.raises(KeyMismatchError):
            signer.kid  # noqa: B018  # it asks for a challenge
        with pytest.raises(SignatureInvalidError) if verify else nullcontext():
            signer.sign(b"data")
    assert intents(path) == ["challenge", "other"]
    assert not [each for each in records(path) if "key" in each]
    assert all(each["object"] == "pkcs11:object=das;id=%01" for each in records(path) if "intent" in each)


def test_keys_are_made_listed_and_deleted_with_two_lines_for_each_step(new_token, faulty, tmp_path):
    import office as offices

    office = offices.found(tmp_path, new_token(), module=faulty.path, audit_log="audit.jsonl")
    log = tmp_path / "audit.jsonl"
    made = office.run("key", "generate", "old").stdout.strip()
    assert intents(log) == ["key generation", "challenge"]
    assert outcome_of(log, "key generation")["key"] == made
    assert office.run("key", "list").status == 0
    assert office.run("key", "delete", "--key", "old", "--thumbprint", made).status == 0
    assert intents(log)[2:] == [*["challenge"] * 3, "key deletion"]
    deletion = next(each for each in records(log) if each.get("intent") == "key deletion")
    assert deletion["key"] == made
    assert deletion["object"].startswith("pkcs11:object=old;id=")
    assert outcome_of(log, "key deletion")["outcome"] == "done"
    assert faulty.calls("C_Sign") == 4


def test_a_rollover_is_in_the_log_from_the_next_key_to_the_end_of_the_last(new_token, tmp_path):
    import office as offices

    office = offices.found(
        tmp_path, new_token(), token_endpoint="https://localhost:1/token", audit_log="audit.jsonl"
    )
    assert office.run("enroll", "--out", str(tmp_path / "first")).status == 0
    made = office.run("rollover", "prepare", "das-2", "--out", str(tmp_path / "second"), "--json")
    assert made.status == 0, made.stderr
    assert office.run("rollover", "switch", "--force").status == 0
    old = next(
        each["key"] for each in records(tmp_path / "audit.jsonl") if each.get("intent") == "certificate"
    )
    assert office.run("rollover", "retire", "--force", "--thumbprint", old).status == 0
    found = records(tmp_path / "audit.jsonl")
    kinds = [each["intent"] for each in found if each.get("intent") != "challenge" and "intent" in each]
    assert kinds == [*["key generation", "proof", "certificate"] * 2, "key deletion"]
    assert AuditLog(tmp_path / "audit.jsonl").verify().open == ()


def test_a_fetch_tells_what_was_signed_for_whom_and_what_the_server_called_it(
    tls_office: Office, tmp_path: Path
) -> None:
    office = audited(tls_office, tmp_path)
    access_token = office.run("fetch", "--claims", "oidc").stdout.strip()
    said = json.loads(urlsafe_b64decode(access_token.split(".")[1] + "=="))
    intent, outcome = records(tmp_path / "audit.jsonl")
    endpoint = office.profile["token-endpoint"]
    assert (intent["intent"], intent["iss"]) == ("assertion", "das-api-auth")
    assert (intent["endpoint"], intent["aud"]) == (endpoint, endpoint)
    assert re.fullmatch(r"[\w-]{22}", intent["jti"])
    assert "sha256" not in intent
    assert intent["time"].endswith("Z")
    assert outcome == outcome | {
        "of": 1,
        "outcome": "signed",
        "answer": "accepted",
        "unverified": {"auditTrackingId": said["auditTrackingId"], "jti": said["jti"]},
    }
    assert office.run("fetch", "--claims", "oidc").stdout.strip() == access_token
    assert len(records(tmp_path / "audit.jsonl")) == 2  # cached: no key was used


def test_an_assertion_without_jti_is_told_by_the_hash_of_what_was_signed(
    tls_office: Office, tmp_path: Path
) -> None:
    office = audited(tls_office, tmp_path)
    assertion = office.run("assertion").stdout.strip()
    intent, outcome = records(tmp_path / "audit.jsonl")
    signing_input, _, _ = assertion.rpartition(".")
    assert intent["sha256"] == hashlib.sha256(signing_input.encode()).hexdigest()
    assert "jti" not in intent
    assert "endpoint" not in intent
    assert outcome["outcome"] == "signed"
    assert office.run("exchange", stdin=assertion).status == 0
    assert len(records(tmp_path / "audit.jsonl")) == 2  # exchange uses no key


def test_the_hash_of_a_certificate_is_that_of_its_signed_part(tls_office: Office, tmp_path: Path) -> None:
    from cryptography import x509 as independent

    office = audited(tls_office, tmp_path)
    for command, intent, read, part in (
        ("self-signed", "certificate", independent.load_pem_x509_certificate, "tbs_certificate_bytes"),
        ("request", "certificate request", independent.load_pem_x509_csr, "tbs_certrequest_bytes"),
    ):
        made = read(office.run("cert", command).stdout.encode())
        [told] = [each for each in records(tmp_path / "audit.jsonl") if each.get("intent") == intent]
        assert told["sha256"] == hashlib.sha256(getattr(made, part)).hexdigest()


def test_no_secret_is_in_the_log(tls_office: Office, tmp_path: Path) -> None:
    office = audited(tls_office, tmp_path)
    access_token = office.run("fetch").stdout.strip()
    assertion = office.run("assertion", "--claims", "oidc").stdout.strip()
    text = (tmp_path / "audit.jsonl").read_text()
    for secret in (office.token.pin, access_token, access_token.split(".")[2], *assertion.split(".")[1:]):
        assert secret not in text


def test_without_a_log_named_nothing_is_written(tls_office: Office, tmp_path: Path) -> None:
    office = tls_office.copy(tmp_path)
    assert office.run("assertion").status == 0
    assert not [each for each in tmp_path.rglob("*") if "audit" in each.name]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_log_is_named_by_option_or_variable_too(tls_office: Office, tmp_path: Path, how: str) -> None:
    office, log = tls_office.copy(tmp_path), str(tmp_path / "named" / "log")
    options = [f"--audit-log={log}"] if how == "option" else []
    environment = {"HSM_TOKEN_AUDIT_LOG": log} if how == "environment" else {}
    assert office.run("assertion", *options, environment=environment).status == 0
    assert intents(Path(log)) == ["assertion"]
    head = office.run("audit", "head", *options, environment=environment).stdout.strip()
    assert head == str(AuditLog(log).head())


# ---- no line, no signature ----


@pytest.mark.parametrize(
    "command", [["fetch", "--no-cache"], ["assertion"], ["key", "prove"], ["key", "list"]]
)
def test_a_log_that_cannot_be_opened_stops_a_command_before_the_token_is(
    tls_office: Office, faulty: FaultyModule, tmp_path: Path, command: list[str]
) -> None:
    office = audited(tls_office, tmp_path, module=faulty.path)
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    done = office.run(*command)
    assert (done.status, done.stdout) == (2, "")
    assert [line for line in done.lines if line.startswith("error: ")] == [
        f"error: the key is not used, since the audit log {tmp_path}/audit.jsonl cannot be written: "
        f"{tmp_path}/audit.jsonl is a link, not a regular file"
    ]
    assert (faulty.calls("C_Login"), faulty.calls("C_Sign")) == (0, 0)
    assert not (tmp_path / "elsewhere").exists()


WITH_ROOM = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execv(sys.argv[2], sys.argv[2:])
"""


def run_with_room(office: Office, size: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command that can make no file longer than this."""
    command = [sys.executable, "-c", WITH_ROOM, str(size), *office.command(*words)]
    environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_full_disk_stops_the_signature_and_then_what_it_was_for(
    tls_office: Office, faulty: FaultyModule, tmp_path: Path
) -> None:
    office = audited(tls_office, tmp_path, module=faulty.path)
    log = AuditLog(tmp_path / "audit.jsonl")
    for _ in range(500):
        use(log)  # no file of others gets as long
    assert office.run("fetch", "--no-cache").status == 0
    intent = len(lines(log)[-2])
    faulty.forget()
    done = run_with_room(office, log.path.stat().st_size + 40, "fetch", "--no-cache")
    assert (done.returncode, done.stdout, faulty.calls("C_Sign")) == (2, "", 0)
    assert done.stderr.count("hsm-token: error:") == 1
    assert "error: the key is not used, since the audit log" in done.stderr
    verdict = log.verify()
    assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 1, 1002)

    torn = len('"torn":"",') + 64
    done = run_with_room(office, log.path.stat().st_size + intent + torn + 40, "fetch", "--no-cache")
    assert (done.returncode, done.stdout, faulty.calls("C_Sign")) == (2, "", 1)
    assert done.stderr.count("hsm-token: error:") == 1
    assert "has the intent, and the outcome cannot be written" in done.stderr
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert log.verify().open == (1003,)

    assert office.run("fetch", "--no-cache").status == 0
    verdict = log.verify()
    assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 2, 1005)
    assert not list(tmp_path.rglob("*.marker"))


def spoilt_at(path: Path, line: int) -> AuditLog:
    """A log that others can write from this line on, so we do not; it asks for the time before each line."""
    times = iter(range(1, line + 1))

    def clock() -> float:
        if next(times) == line:
            path.chmod(0o622)
        return 0.0

    return AuditLog(path, clock=clock)


@pytest.mark.parametrize("key_id", [None, b"given"])
def test_a_new_key_whose_outcome_cannot_be_written_does_not_stay(new_token, tmp_path, key_id):
    soft, path = new_token(), tmp_path / "audit.jsonl"
    log = spoilt_at(path, 4)  # after the intent, and the two lines of a challenge
    with open_token(soft.uri, module=soft.module, pin=soft.pin, audit=log) as token:
        with pytest.raises(AuditLogError, match="has the intent, and the outcome cannot be") as caught:
            token.generate_key("das", id=key_id)
        assert (caught.value.done, "does not stay" in str(caught.value.hint)) == ("key generation", True)
    assert intents(path) == ["key generation", "challenge"]
    assert soft.pkcs11_tool("--list-objects") == ""


def test_a_deletion_whose_outcome_cannot_be_written_is_finished_before_it_is_told(new_token, tmp_path):
    soft, path, profile = new_token(), tmp_path / "audit.jsonl", tmp_path / "config.toml"
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        made = token.generate_key("das").thumbprint
    settings = f'[profiles.das]\nprevious-key = "das"\nprevious-key-thumbprint = "{made}"\n'
    profile.write_text(settings)
    for line, done in ((4, "challenge"), (5, None), (6, "key deletion")):
        path.unlink(missing_ok=True)
        with open_token(soft.uri, module=soft.module, pin=soft.pin, audit=spoilt_at(path, line)) as token:
            assert profile.read_text() == settings
            assert "Private Key" in soft.pkcs11_tool("--list-objects")
            with pytest.raises(AuditLogError) as caught:
                rollover.destroy(token, made, profile, "das", state_directory=tmp_path / "state")
        assert caught.value.done == done
    assert caught.value.hint == "the key is deleted all the same"
    assert intents(path) == ["challenge", "challenge", "key deletion"]
    assert soft.pkcs11_tool("--list-objects") == ""
    assert profile.read_text() == "[profiles.das]\n"


# ---- the library ----


@pytest.fixture
def audited_client(tls_office: Office, endpoint: Endpoint, ca_bundle: str, tmp_path: Path):
    """A client of a server that answers as it is told, over a token with a log."""
    log = AuditLog(tmp_path / "audit.jsonl")
    soft = tls_office.token
    with open_token(soft.uri, module=soft.module, pin=soft.pin, audit=log) as token:
        yield TokenClient(
            endpoint.url,
            assertion=ClientAssertion("das-api-auth", endpoint.url),
            signer=token.signer("das"),
            scope="",
            ca_bundle=ca_bundle,
            deadline=30,
        )


def answers(path: Path) -> list[dict]:
    kept = ("answer", "error", "unverified", "outcome")
    return [{n: each[n] for n in kept if n in each} for each in records(path) if "of" in each]


JWT = "eyJhbGciOiJub25lIn0.{}.c2ln"
REFUSED = Reply(401, {"error": "invalid_client"})


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (Reply(), {"answer": "accepted"}),
        (REFUSED, {"answer": "invalid_client", "error": "OAuthError"}),
        (Reply(403, b""), {"answer": "403", "error": "OAuthError"}),
        (Reply(200, {"token_type": "Bearer"}), {"answer": "200", "error": "TokenResponseError"}),
        (Reply(200, GRANT | {"access_token": JWT.format("eyJqdGkiOiJhIn0")}), {"unverified": {"jti": "a"}}),
        (Reply(200, GRANT | {"access_token": JWT.format("eyJqdGkiOlsxXX0")}), {"answer": "accepted"}),
        (
            Reply(200, GRANT | {"access_token": JWT.format("eyJqdGkiOiJcdTAwMWJbMzFtIn0")}),
            {"unverified": {"jti": "\\x1b[31m"}},
        ),
    ],
    ids=["granted", "refused", "no words", "no token", "jti", "odd jti", "hostile jti"],
)
def test_the_answer_of_the_server_is_in_the_outcome(audited_client, endpoint, tmp_path, reply, told):
    endpoint.answer = reply
    try:
        audited_client.fetch()
    except HsmSignerError as refused:
        assert isinstance(refused, OAuthError)
    found = outcome_of(tmp_path / "audit.jsonl", "assertion")  # a hint may have cost a challenge
    assert found == found | {"answer": "accepted", "outcome": "signed"} | told
    assert {"unverified", "error"} & found.keys() == {"unverified", "error"} & told.keys()


def test_each_attempt_is_a_use_of_the_key(audited_client, endpoint, tmp_path):
    endpoint.answer = [Reply(503, b""), Reply()]
    audited_client.fetch()
    assert answers(tmp_path / "audit.jsonl") == [
        {"outcome": "signed", "error": "TransportError"},
        {"outcome": "signed", "answer": "accepted"},
    ]
    assert len(endpoint.seen) == 2


def test_an_assertion_for_another_server_at_the_same_time_has_lines_of_its_own(
    audited_client, endpoint, tmp_path
):
    arrived, go_on = threading.Event(), threading.Event()

    def wait(_):
        arrived.set()
        assert go_on.wait(30)
        return Reply()

    endpoint.answer = wait
    asking = threading.Thread(target=audited_client.fetch)
    asking.start()
    assert arrived.wait(30)
    other = SoftwareSigner()
    with AuditLog(tmp_path / "audit.jsonl").signing(b"e30.eyJpc3MiOiJhIiwiYXVkIjoiYiJ9", key=other.kid):
        other.sign(b"e30.eyJpc3MiOiJhIiwiYXVkIjoiYiJ9")
    go_on.set()
    asking.join()
    path = tmp_path / "audit.jsonl"
    assert [each.get("endpoint") for each in records(path) if "intent" in each] == [endpoint.url, None]
    assert [each["of"] for each in records(path) if "of" in each] == [2, 1]


def test_an_access_token_whose_outcome_cannot_be_written_is_not_handed_out_nor_kept_in_the_error(
    audited_client, endpoint, tmp_path
):
    def spoil(_):
        (tmp_path / "audit.jsonl").chmod(0o666)
        return Reply()

    endpoint.answer = spoil
    with pytest.raises(AuditLogError, match="has the intent, and the outcome cannot be written") as caught:
        audited_client.fetch()
    [seen] = endpoint.seen
    assert_no_trace(caught.value, ["access-token-canary", seen.form["client_assertion"]])
    with pytest.raises(AuditLogError, match="the key is not used"):
        audited_client.fetch()
    assert len(endpoint.seen) == 1


def test_a_signature_that_fails_is_told_by_the_error(
    tls_office: Office, faulty: FaultyModule, tmp_path: Path
):
    soft = tls_office.token
    log = AuditLog(tmp_path / "audit.jsonl")
    with open_token(soft.uri, module=faulty.path, pin=soft.pin, audit=log) as token:
        signer = token.signer("das")
        faulty.set("signature wrong")
        with pytest.raises(HsmSignerError):
            signer.sign(b"data")
        faulty.set("fail C_Sign 0 CKR_DEVICE_ERROR")
        with pytest.raises(HsmSignerError):
            signer.sign(b"data")
        faulty.set("fail C_Sign 1 CKR_DEVICE_ERROR")  # recovery mends it: one use
        x509.request(signer, common_name="das")
    found = [each for each in records(log.path) if "of" in each]
    assert [(each["outcome"], each.get("error"), each.get("code")) for each in found] == [
        ("failed", "SignatureInvalidError", None),
        ("failed", "TokenError", "CKR_DEVICE_ERROR"),
        ("failed", "PKCS11Error", None),
        ("signed", None, None),
        ("signed", None, None),
    ]
    assert intents(log.path) == ["other", "other", "challenge", "challenge", "certificate request"]


def test_each_opening_of_a_token_has_its_own_log_and_one_without_has_none(soft_token, tmp_path):
    def opened(**options):
        return open_token(soft_token.uri, module=soft_token.module, pin=soft_token.pin, **options)

    with opened(audit=AuditLog(tmp_path / "a")) as first, opened(audit=AuditLog(tmp_path / "b")) as second:
        key = first.generate_key(f"audit-{tmp_path.name}")
        second.signer(key.label).sign(b"data")
        with opened() as third:
            third.signer(key.label).sign(b"data")
    assert intents(tmp_path / "a") == ["key generation", "challenge"]
    assert intents(tmp_path / "b") == ["other"]


def test_what_looks_like_another_thing_only_in_part_is_called_what_it_is(audit_log):
    for data, intent in {
        b"hsm-signer: challenge": "other",
        b"hsm-signer: challenge\0...": "challenge",
        b"\x30\x03\x02\x01\x00": "certificate request",
        b"\x30\x82\n\n\xa0\x03\x02\x01\x02": "certificate",
        b"\x30\x03\x02\x01\x01": "other",
        b"e30.e30": "JWS",
        b"e30.W10": "other",
        b"e30.eyJpc3MiOiJhIiwiYXVkIjoiYiJ9": "assertion",
        b"": "other",
    }.items():
        with audit_log.signing(data):
            pass
        assert json.loads(lines(audit_log)[-2])["intent"] == intent, data


# ---- verify and head ----


def test_verify_with_the_head_that_was_noted_finds_what_is_cut_off(
    tls_office: Office, tmp_path: Path
) -> None:
    office = audited(tls_office, tmp_path)
    log = AuditLog(tmp_path / "audit.jsonl")
    for _ in range(2):
        assert office.run("assertion").status == 0
    noted = office.run("audit", "head").stdout.strip()
    assert noted == str(log.head())
    assert office.run("audit", "head", "--json").json == {"count": 4, "hash": log.head().hash}
    done = office.run("audit", "verify", "--expect", noted)
    assert (done.status, done.stdout.strip(), done.stderr) == (0, noted, "")
    assert office.run("assertion").status == 0
    assert office.run("audit", "verify", "--expect", noted).status == 0
    write(log, *lines(log)[:2])
    done = office.run("audit", "verify")
    assert done.status == 0
    assert done.lines == [
        "the end is not anchored: lines cut off there, or another history, show by --expect alone"
    ]
    assert office.run("audit", "verify", "-q").stderr == ""
    done = office.run("audit", "verify", "--expect", noted)
    assert (done.status, done.stdout) == (8, "")  # no head that somebody could note
    done = office.run("audit", "verify", "--expect", noted, "--json")
    assert (done.status, done.json["anchored"], len(done.json["findings"])) == (8, True, 1)
    assert f"no line is {noted}" in done.stderr
    write(log, lines(log)[1], lines(log)[0])
    done = office.run("audit", "verify")
    assert (done.status, len(done.lines)) == (8, 3)
    found = office.run("audit", "verify", "--json").json["findings"]
    assert done.stderr.endswith(f": {found[0]}; and 2 more, which --json tells\n")
    assert len(found) == 3
    write(log)
    for _ in range(11):
        forge(log, log.head().count + 1, intent="proof")
    assert office.run("audit", "verify").lines[0].endswith(": 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …")
    write(log)
    done = office.run("audit", "head")
    assert (done.status, done.stdout) == (0, f"0:{START}\n")
    assert "is empty: its head holds of every log" in done.lines[0]
    assert "not anchored" in office.run("audit", "verify", "--expect", f"0:{START}").lines[0]


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_job_of_the_manual_notes_the_head_of_no_log_without_the_last_anchor(
    tls_office: Office, tmp_path: Path
) -> None:
    office = audited(tls_office, tmp_path)
    log, anchors = AuditLog(tmp_path / "audit.jsonl"), tmp_path / "anchors"
    anchors.touch()
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/hsm-token", f'exec {shlex.join(office.command())} "$@"')
    program(tmp_path / "bin/ssh", '[ "$1" = das-host ] && shift && exec sh -c "$*"')  # as ssh joins its words
    page = blocks(CHECKOUT / "docs/operating.md")
    [job] = [
        each.text.split(maxsplit=5)[5] for each in page if "audit" in each.text and each.language == "cron"
    ]
    [first] = [command for each in page for command, _ in each.steps if command.startswith("ssh das-host")]

    def run(command: str) -> tuple[int, str]:
        here = command.replace("/var/lib/anchors/das", str(anchors)).replace("profile das", "profile office")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config), "PATH": path}
        done = subprocess.run(["sh", "-c", here], env=environment, capture_output=True, text=True)
        assert done.stdout == ""
        return done.returncode, done.stderr

    use(log)
    status, told = run(job)
    assert (status, anchors.read_text()) == (2, "")
    assert run(first)[0] == 0
    noted = [f"{log.head()}\n"]
    for _ in range(2):
        use(log)
        noted.append(f"{log.head()}\n")
        assert run(job) == (0, "")
        assert anchors.read_text() == "".join(noted)

    kept = lines(log)
    for left in (None, [], kept[:2], [*kept[:-1], kept[-1].replace(b"done", b"gone")]):
        log.path.unlink()
        if left is None:
            told = "there is no audit log"
        else:
            log.path.touch(mode=0o600)
            write(log, *left)
            told = f"no line is {noted[-1].strip()}"
        for _ in range(2):  # nothing is noted, so it shows again
            status, printed = run(job)
            assert (status, told in printed, anchors.read_text()) == (8, True, "".join(noted))
            for _ in range(3):
                use(log, "another history")
            told = "no line is"


def test_a_log_that_is_not_there_is_not_passed_over(tls_office: Office, tmp_path: Path) -> None:
    office = audited(tls_office, tmp_path)
    for options in ([], ["--expect", f"4:{START}"], ["--json"]):
        done = office.run("audit", "verify", *options)
        assert (done.status, done.stdout) == (8, "")
        assert "there is no audit log" in done.lines[0]
    done = office.run("audit", "head")
    assert (done.status, done.stdout) == (2, "")
    assert office.run("audit", "verify", "--expect", "4").status == 2
    office.configure(audit_log=None)
    for command in (["head"], ["verify"], ["verify", "--expect", f"4:{START}"]):
        done = office.run("audit", *command)
        assert (done.status, done.stdout) == (2, "")
        assert "no audit-log given" in done.lines[0]


def test_a_signer_of_another_kind_keeps_a_log_by_the_same_two_names(endpoint, ca_bundle, tmp_path):
    class Audited(SoftwareSigner):
        audit = AuditLog(tmp_path / "audit.jsonl")

        def sign(self, data: bytes) -> bytes:
            with self.audit.signing(data, key=self.kid):
                return super().sign(data)

    assertion = ClientAssertion("das-api-auth", endpoint.url, claims="oidc")
    TokenClient(endpoint.url, assertion=assertion, signer=Audited(), scope="", ca_bundle=ca_bundle).fetch()
    intent, outcome = records(tmp_path / "audit.jsonl")
    assert (intent["intent"], intent["endpoint"]) == ("assertion", endpoint.url)
    assert (outcome["outcome"], outcome["answer"]) == ("signed", "accepted")


def test_an_errand_without_a_signature_writes_nothing(audit_log):
    with audit_log.errand("https://as.test/") as line:
        line["answer"] = "accepted"
    assert audit_log.head().count == 6
