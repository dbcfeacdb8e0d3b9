"""``hsm-token fetch``, by many processes at once and again: one asks, all have the answer."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from endpoint import Endpoint, Reply, Seen
from office import Office

HEAVY = {"pkcs11", "requests", "urllib3", "ssl", "cryptography", "asn1crypto", "filelock", "platformdirs"}


@pytest.fixture
def counting(ca: trustme.CA) -> Iterator[Endpoint]:
    """Grants another access token to each request."""
    granted = 0

    def grant(_: Seen) -> Reply:
        nonlocal granted
        granted += 1
        body = {"access_token": f"access-token-{granted}", "token_type": "Bearer", "expires_in": 3599}
        return Reply(body=body)

    with Endpoint(ca, grant) as endpoint:
        yield endpoint


@pytest.fixture
def scratch(tls_office: Office, counting: Endpoint, tmp_path: Path) -> Office:
    office = tls_office.copy(tmp_path)
    return office.configure(token_endpoint=counting.url, deadline=100, cache=str(tmp_path / "cache"))


def start(office: Office, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        office.command("fetch", "--config", str(office.config)),
        env=office.environment,
        stdin=stdin,
        start_new_session=True,  # no terminal but the one that is given
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_fifty_processes_against_an_empty_cache_post_once_and_print_the_same(
    scratch: Office, counting: Endpoint
) -> None:
    processes = [start(scratch) for _ in range(50)]
    answers = {process.communicate(timeout=110) for process in processes}
    assert answers == {("access-token-1\n", "")}
    assert len(counting.seen) == 1


def showing_imports(office: Office) -> subprocess.Popen[str]:
    command = office.command("fetch", "--config", str(office.config))
    return subprocess.Popen(
        [sys.executable, "-X", "importtime", *command[1:]],
        env=office.environment | {"XDG_RUNTIME_DIR": str(office.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def imports(stderr: str) -> set[str]:
    return set(re.findall(r"\| +([\w.]+)\n", stderr))


def test_a_hit_imports_nothing_that_it_does_not_need(scratch: Office) -> None:
    assert scratch.run("fetch").status == 0
    stdout, stderr = showing_imports(scratch).communicate(timeout=60)
    assert stdout == "access-token-1\n"
    imported = {name.partition(".")[0] for name in imports(stderr)}
    assert {"typer", "hsm_signer"} <= imported
    assert imported & HEAVY == set()


def test_who_waits_for_another_fetch_imports_no_client(scratch: Office, counting: Endpoint) -> None:
    grant = counting.answer
    waiting: list[subprocess.Popen[str]] = []

    def answer_once_somebody_waits(seen: Seen) -> Reply:
        waiting.append(showing_imports(scratch))
        assert waiting[0].stderr
        while "hsm_signer.oauth.cache" not in (line := waiting[0].stderr.readline()):
            assert line
        time.sleep(0.5)  # it is about to look for the lock
        return grant(seen)

    counting.answer = answer_once_somebody_waits
    assert scratch.run("fetch").stdout == "access-token-1\n"
    stdout, stderr = waiting[0].communicate(timeout=60)
    assert stdout == "access-token-1\n"
    assert "hsm_signer.oauth.client" not in imports(stderr)
    assert len(counting.seen) == 1


def test_who_waited_in_vain_has_the_rest_of_its_time_to_ask(scratch: Office, counting: Endpoint) -> None:
    first = scratch.configure(token_endpoint=counting.url, deadline=4, cache=str(scratch.home / "cache"))
    began: list[float] = []

    def hang(_: Seen) -> Reply:
        began.append(time.monotonic())
        time.sleep(60)
        return Reply()

    counting.answer = hang
    processes = [start(first) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert {process.returncode for process in processes} == {7}
    assert time.monotonic() - began[0] < 7  # not 4 and then 4 again


def test_another_scope_is_another_access_token(scratch: Office) -> None:
    answers = [scratch.run("fetch", "--scope", scope).stdout for scope in ("a", "b", "a")]
    assert answers == ["access-token-1\n", "access-token-2\n", "access-token-1\n"]


def test_an_access_token_of_fewer_scopes_is_no_answer_for_who_wants_them_all(
    scratch: Office, counting: Endpoint
) -> None:
    body = {"access_token": "access-token-narrow", "token_type": "Bearer", "expires_in": 3599, "scope": "a"}
    counting.answer = Reply(body=body)
    settings = {"token_endpoint": counting.url, "cache": str(scratch.home / "cache"), "scope": "a b"}
    assert (
        scratch.configure(**settings, allow_narrower_scope=True).run("fetch").stdout
        == "access-token-narrow\n"
    )
    done = scratch.configure(**settings).run("fetch")
    assert (done.status, done.stdout) == (6, "")


def test_a_prompt_that_waits_for_its_person_holds_up_nobody(
    scratch: Office, counting: Endpoint, tmp_path: Path
) -> None:
    settings = {"token_endpoint": counting.url, "cache": str(tmp_path / "cache"), "deadline": 5}
    (tmp_path / "interactive").mkdir()
    interactive = scratch.copy(tmp_path / "interactive").configure(**settings, pin_source="prompt")
    keyboard, terminal = os.openpty()
    asking = start(interactive, stdin=terminal)
    assert asking.stderr
    prompt = ""
    while not prompt.endswith("PIN: "):  # it ends no line
        more = asking.stderr.read(1)
        assert more, prompt
        prompt += more
    assert scratch.configure(**settings).run("fetch").stdout == "access-token-1\n"
    os.write(keyboard, f"{scratch.token.pin}\n".encode())
    assert asking.communicate(timeout=60)[0] == "access-token-1\n"
    assert len(counting.seen) == 1
    os.close(keyboard)
    os.close(terminal)


def test_a_killed_process_leaves_the_fetch_to_the_next(scratch: Office, counting: Endpoint) -> None:
    grant = counting.answer
    held: list[subprocess.Popen[str]] = []

    def kill_who_asks(seen: Seen) -> Reply:
        counting.answer = grant
        held[0].kill()
        return grant(seen)

    counting.answer = kill_who_asks
    held.append(start(scratch))
    assert held[0].communicate(timeout=60) == ("", "")
    assert held[0].returncode < 0
    assert [start(scratch).communicate(timeout=60) for _ in range(2)] == [("access-token-2\n", "")] * 2


def test_a_directory_that_others_can_read_is_a_warning_and_no_cache(scratch: Office) -> None:
    cache = scratch.home / "cache"
    cache.mkdir()
    cache.chmod(0o755)
    for number in (1, 2):
        done = scratch.run("fetch")
        assert (done.status, done.stdout) == (0, f"access-token-{number}\n")
        [line] = done.lines
        assert re.fullmatch("warning: the cache is not used: .* has mode 0755.*chmod 0700.*", line)
    assert list(cache.iterdir()) == []
