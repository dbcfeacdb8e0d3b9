"""The audit log: whatever was done to it shows, whatever crashed in it is told, and nobody loses a line."""

import hashlib
import json
import subprocess
import sys
from base64 import urlsafe_b64decode
from pathlib import Path

import pytest

from hsm_signer.audit import START, AuditLog
from hsm_signer.errors import UnsafeFileError
from hsm_signer.files import private_directory
from hsm_signer.locks import try_lock


@pytest.fixture
def audit_log(tmp_path: Path) -> AuditLog:
    """Five events."""
    log = AuditLog(tmp_path / "state", clock=lambda: 1_800_000_000.7)
    log.append("key generated", serial="61c5d6a9ac6d36ba", label="office", thumbprint="t" * 43)
    log.append("certificate made", serial="61c5d6a9ac6d36ba", label="office", thumbprint="t" * 43)
    for jti in ("a", "b"):
        log.append("assertion signed", client_id="das-api-auth", aud="https://op.example/token", jti=jti)
    log.append("key deleted", label="office")
    return log


def lines(log: AuditLog) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def write(log: AuditLog, *parts: bytes) -> None:
    log.path.write_bytes(b"".join(parts))


def test_each_line_holds_its_event_and_the_sha256_of_the_line_before(audit_log):
    records = [json.loads(line) for line in lines(audit_log)]
    assert records[2] == {
        "previous": hashlib.sha256(lines(audit_log)[1].rstrip(b"\n")).hexdigest(),
        "time": "2027-01-15T08:00:00Z",
        "event": "assertion signed",
        "client_id": "das-api-auth",
        "aud": "https://op.example/token",
        "jti": "a",
    }
    assert records[0]["previous"] == START
    assert (records[0]["serial"], records[0]["label"], records[0]["key"]) == (
        "61c5d6a9ac6d36ba",
        "office",
        "t" * 43,
    )
    assert "jti" not in records[0]


def test_head_is_the_count_and_the_hash_of_the_last_line(audit_log):
    head = audit_log.head()
    assert head.count == 5
    assert head.hash == hashlib.sha256(lines(audit_log)[-1].rstrip(b"\n")).hexdigest()


def test_a_log_that_was_left_alone_verifies_with_every_head_that_was_noted(audit_log):
    for line in [START, *(hashlib.sha256(each.rstrip(b"\n")).hexdigest() for each in lines(audit_log))]:
        verdict = audit_log.verify(head=line)
        assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 0, 5)


def test_no_log_is_an_empty_one_unless_a_head_was_noted(audit_log, tmp_path):
    none = AuditLog(tmp_path / "none")
    assert none.verify().findings == ()
    assert (none.head().count, none.head().hash) == (0, START)
    assert none.verify(head=START).findings == ()
    assert "not on the chain" in none.verify(head=audit_log.head().hash).findings[0]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("index", range(4))
def test_a_changed_line_shows(audit_log, index):
    changed = lines(audit_log)
    changed[index] = changed[index].replace(b"2027", b"2026")
    write(audit_log, *changed)
    assert audit_log.verify().findings == (
        f"lines before line {index + 2} were changed, removed or inserted",
    )


@pytest.mark.parametrize("index", range(4))
def test_a_removed_line_shows(audit_log, index):
    changed = lines(audit_log)
    del changed[index]
    write(audit_log, *changed)
    assert audit_log.verify().findings == (
        f"lines before line {index + 1} were changed, removed or inserted",
    )


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("line", [b"{}\n", b"\n", b"garbage\n", b'{"previous":"0","event":"x"}\n'])
def test_an_inserted_line_shows(audit_log, index, line):
    changed = lines(audit_log)
    changed.insert(index, line)
    write(audit_log, *changed)
    assert audit_log.verify().findings


def test_swapped_lines_show(audit_log):
    changed = lines(audit_log)
    changed[2], changed[3] = changed[3], changed[2]
    write(audit_log, *changed)
    assert audit_log.verify().findings


@pytest.mark.parametrize("kept", range(5))
def test_lines_cut_off_at_the_end_show_by_the_head_that_was_noted(audit_log, kept):
    head = audit_log.head().hash
    write(audit_log, *lines(audit_log)[:kept])
    assert audit_log.verify().findings == ()
    assert "not on the chain" in audit_log.verify(head=head).findings[0]


def test_a_changed_last_line_and_a_rewritten_history_show_by_the_head(audit_log, tmp_path):
    head = audit_log.head().hash
    other = AuditLog(tmp_path / "other", clock=lambda: 1_700_000_000)
    for _ in range(5):
        other.append("key generated")
    assert other.verify().findings == ()
    assert other.verify(head=head).findings
    changed = lines(audit_log)
    changed[-1] = changed[-1].replace(b"office", b"office2")
    write(audit_log, *changed)
    assert audit_log.verify(head=head).findings


def test_a_line_torn_by_a_crash_is_reported_and_the_next_line_accounts_for_it(audit_log):
    whole = audit_log.path.read_bytes()
    last = lines(audit_log)[-1]
    for length in range(1, len(last) - 1):
        write(audit_log, whole[: len(whole) - len(last) + length])
        assert audit_log.verify().findings == ("the last line is incomplete: torn by a crash, or cut",)
        audit_log.append("assertion signed", jti="after the crash")
        verdict = audit_log.verify()
        assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 1, 5)
        write(
            audit_log,
            *(line for line in lines(audit_log) if line[:length] != last[:length] or line[-1:] != b"\n"),
        )


def test_a_crash_that_took_the_newline_alone_loses_no_line(audit_log):
    write(audit_log, audit_log.path.read_bytes()[:-1])
    assert audit_log.verify().findings == ()
    audit_log.append("assertion signed")
    verdict = audit_log.verify()
    assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 0, 6)


def test_two_crashes_in_a_row_are_accounted_for(audit_log):
    write(audit_log, audit_log.path.read_bytes()[:-30])
    audit_log.append("assertion signed")
    write(audit_log, audit_log.path.read_bytes()[:-30])
    audit_log.append("assertion signed")
    verdict = audit_log.verify()
    assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 1, 5)


def test_what_a_torn_line_held_cannot_be_changed_later(audit_log):
    write(audit_log, audit_log.path.read_bytes()[:-30])
    audit_log.append("assertion signed")
    for changed in (
        [*lines(audit_log)[:4], b"{\n", lines(audit_log)[5]],
        [*lines(audit_log)[:4], lines(audit_log)[5]],
    ):
        before = audit_log.path.read_bytes()
        write(audit_log, *changed)
        assert audit_log.verify().findings
        write(audit_log, before)


def test_a_log_longer_than_what_is_read_of_it_goes_on(audit_log):
    for _ in range(40):
        audit_log.append("assertion signed", client_id="c" * 5000, aud="\u202e" * 5000, jti="j" * 5000)
    assert audit_log.path.stat().st_size > 200_000
    assert max(map(len, lines(audit_log))) < 10_000
    verdict = audit_log.verify()
    assert (verdict.findings, verdict.head.count) == ((), 45)


def test_file_and_directory_are_for_us_alone(audit_log):
    assert audit_log.path.stat().st_mode & 0o777 == 0o600
    assert audit_log.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("spoilt", ["mode", "link", "directory", "place"])
def test_a_log_that_cannot_be_written_is_a_warning(audit_log, tmp_path, caplog, spoilt):
    before = audit_log.path.read_bytes()
    match spoilt:
        case "mode":
            audit_log.path.chmod(0o666)
        case "link":
            audit_log.path.rename(tmp_path / "elsewhere").chmod(0o600)
            audit_log.path.symlink_to(tmp_path / "elsewhere")
        case "directory":
            audit_log.path.parent.chmod(0o777)
    log = AuditLog(Path("/proc/nowhere")) if spoilt == "place" else audit_log
    log.append("assertion signed", jti="x")
    assert "'assertion signed' is not in the audit log" in caplog.text
    assert audit_log.path.read_bytes() == before


def test_a_log_that_others_can_write_is_not_believed(audit_log):
    audit_log.path.chmod(0o622)
    with pytest.raises(UnsafeFileError):
        audit_log.verify()


def test_a_full_disk_is_a_warning_and_the_torn_line_is_accounted_for_later(audit_log, caplog):
    program = """
import resource, sys
from pathlib import Path
from hsm_signer.audit import AuditLog
log = AuditLog(Path(sys.argv[1]))
size = log.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))
log.append("assertion signed")
print(log.path.stat().st_size - size)
"""
    done = python(program, str(audit_log.path.parent))
    assert done.stdout == "40\n"
    assert "is not in the audit log" in done.stderr
    audit_log.append("assertion signed")
    verdict = audit_log.verify()
    assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 1, 6)


def test_somebody_who_keeps_the_lock_holds_nobody_up(audit_log, caplog, monkeypatch):
    monkeypatch.setattr("hsm_signer.audit.LOCK_WAIT", 0.1)
    with private_directory(audit_log.path.parent) as directory:
        lock = try_lock(directory, "audit.lock")
        audit_log.append("assertion signed")
        lock.release()
    assert "another process has held its lock" in caplog.text
    assert audit_log.head().count == 5


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


def test_eight_processes_at_once_lose_no_line(tmp_path):
    program = """
import sys
from base64 import urlsafe_b64decode
from pathlib import Path
from hsm_signer.audit import AuditLog
for number in range(25):
    AuditLog(Path(sys.argv[1])).append("assertion signed", jti=f"{sys.argv[2]}-{number}")
"""
    command = [sys.executable, "-c", program, str(tmp_path / "state")]
    processes = [subprocess.Popen([*command, str(each)], stderr=subprocess.PIPE) for each in range(8)]
    assert [process.communicate()[1] for process in processes] == [b""] * 8
    log = AuditLog(tmp_path / "state")
    verdict = log.verify()
    assert (verdict.findings, verdict.torn, verdict.head.count) == ((), 0, 200)
    assert len({json.loads(line)["jti"] for line in lines(log)}) == 200


def test_an_append_loads_no_heavy_module(tmp_path):
    program = """
import sys
from base64 import urlsafe_b64decode
from pathlib import Path
from hsm_signer.audit import AuditLog
AuditLog(Path(sys.argv[1])).append("assertion signed")
heavy = {"filelock", "platformdirs", "requests", "pkcs11", "cryptography", "asn1crypto"}
print(sorted(heavy & set(sys.modules)))
"""
    assert python(program, str(tmp_path)).stdout == "[]\n"


def test_no_parameter_takes_a_secret():
    names = set(AuditLog.append.__annotations__) - {"return"}
    assert names == {"event", "serial", "label", "thumbprint", "client_id", "aud", "jti"}


def test_the_command_records_keys_and_assertions_and_none_of_their_secrets(tls_office, tmp_path):
    office = tls_office.copy(tmp_path)
    assertion = office.run("assertion", "--claims", "oidc").stdout.strip()
    claims = json.loads(urlsafe_b64decode(assertion.split(".")[1] + "=="))
    made = office.run("key", "generate", "short-lived")
    office.run("key", "delete", "--key", "short-lived", "--thumbprint", made.stdout.strip())
    log = AuditLog(tmp_path / "state" / "hsm-token")
    records = [json.loads(line) for line in lines(log)]
    assert [each["event"] for each in records] == ["assertion signed", "key generated", "key deleted"]
    signed = records[0]
    assert signed["jti"] == claims["jti"]
    assert signed["aud"] == claims["aud"] == office.profile["token-endpoint"]
    assert signed["key"] == office.profile["key-thumbprint"]
    assert signed["client_id"] == claims["iss"]
    assert {each["label"] for each in records} == {office.token.label}
    assert len({each["serial"] for each in records}) == 1
    text = log.path.read_text()
    assert office.token.pin not in text
    assert assertion.rpartition(".")[2] not in text


def test_a_fetch_whose_log_cannot_be_written_warns_and_still_fetches(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(state_dir="state")
    assert office.run("fetch", "--no-cache").status == 0
    (tmp_path / "state" / "audit.jsonl").chmod(0o666)
    done = office.run("fetch", "--no-cache")
    assert done.status == 0
    assert done.stdout.count(".") == 2
    assert "warning: 'assertion signed' is not in the audit log" in done.stderr


def test_verify_and_head_on_the_command_line(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(state_dir="state")
    for _ in range(3):
        office.run("assertion")
    count, head = office.run("audit", "head").stdout.split()
    assert count == "3"
    done = office.run("audit", "verify", "--head", head)
    assert (done.status, done.stdout.split()) == (0, ["3", head])
    log = AuditLog(tmp_path / "state")
    write(log, *lines(log)[:2])
    assert office.run("audit", "verify").status == 0
    done = office.run("audit", "verify", "--head", head, "--json")
    assert done.status == 8
    assert "not on the chain" in done.json["findings"][0]
    write(log, lines(log)[1])
    done = office.run("audit", "verify")
    assert done.status == 8
    assert "error: audit log" in done.stderr
    assert "changed, removed or inserted" in done.stderr


def test_certificates_and_requests_are_recorded_too(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(state_dir="state")
    for command in (
        ("cert", "self-signed"),
        ("cert", "request"),
        ("enroll", "--out", str(tmp_path / "folder")),
    ):
        assert office.run(*command).status == 0
    records = [json.loads(line) for line in lines(AuditLog(tmp_path / "state"))]
    events = ["certificate made", "certificate request made", "certificate made"]
    assert [each["event"] for each in records] == events
    assert {each["key"] for each in records} == {office.profile["key-thumbprint"]}
