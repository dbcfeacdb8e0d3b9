"""``hsm-token fetch``, by many processes at once and again: one asks, all have the answer."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from conftest import SoftToken
from endpoint import Endpoint, Reply, Seen
from installation import COMMAND, Installation, environment, install

HEAVY = {"pkcs11", "requests", "urllib3", "ssl", "cryptography", "asn1crypto", "filelock", "platformdirs"}


@pytest.fixture(scope="module")
def installed(
    new_token: Callable[..., SoftToken], ca_bundle: str, tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    return install(tmp_path_factory.mktemp("office"), new_token(), ca_bundle)


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
def office(installed: Installation, counting: Endpoint, tmp_path: Path) -> Installation:
    office = installed.copy(tmp_path)
    office.settings |= {"token-endpoint": counting.url, "deadline": 60, "cache": str(tmp_path / "cache")}
    office.write()
    return office


def fetched(office: Installation, *arguments: str) -> str:
    done = office.run("fetch", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def start(office: Installation, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "fetch", "--config", str(office.config), *arguments],
        env=environment(office.home, **office.variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_fifty_processes_against_an_empty_cache_post_once_and_print_the_same(
    office: Installation, counting: Endpoint
) -> None:
    processes = [start(office) for _ in range(50)]
    answers = {process.communicate(timeout=110) for process in processes}
    assert answers == {("access-token-1\n", "")}
    assert len(counting.seen) == 1


def test_a_hit_needs_neither_token_nor_server_nor_ca(office: Installation, counting: Endpoint) -> None:
    assert fetched(office) == "access-token-1\n"
    office.settings |= {"module-env": {"SOFTHSM2_CONF": "/nowhere"}, "pin-source": "file:nowhere"}
    office.write()
    counting.answer = Reply(500, b"")
    assert fetched(office) == "access-token-1\n"
    assert fetched(office, "--min-validity", "3000") == "access-token-1\n"
    assert len(counting.seen) == 1


def test_a_hit_imports_nothing_that_it_does_not_need(office: Installation) -> None:
    fetched(office)
    command = [sys.executable, "-X", "importtime", *COMMAND[1:], "fetch", "--config", str(office.config)]
    variables = environment(office.home, XDG_RUNTIME_DIR=str(office.home))
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.stdout == "access-token-1\n"
    imported = {name.partition(".")[0] for name in re.findall(r"\| +([\w.]+)\n", done.stderr)}
    assert {"typer", "hsm_signer"} <= imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize("option", [["--force"], ["--no-cache"], ["--min-validity", "3600"]])
def test_who_asks_for_a_fresh_access_token_gets_one(
    office: Installation, counting: Endpoint, option: list[str]
) -> None:
    assert fetched(office) == "access-token-1\n"
    assert fetched(office, *option) == "access-token-2\n"
    assert fetched(office) == ("access-token-1\n" if option == ["--no-cache"] else "access-token-2\n")


def test_another_scope_is_another_access_token(office: Installation, counting: Endpoint) -> None:
    assert fetched(office) == "access-token-1\n"
    assert fetched(office, "--scope", "das-api/other") == "access-token-2\n"
    assert fetched(office) == "access-token-1\n"


def test_a_killed_process_leaves_the_fetch_to_the_next(office: Installation, counting: Endpoint) -> None:
    grant = counting.answer
    held: list[subprocess.Popen[str]] = []

    def kill_who_asks(seen: Seen) -> Reply:
        counting.answer = grant
        held[0].kill()
        return grant(seen)

    counting.answer = kill_who_asks
    held.append(start(office))
    assert held[0].communicate(timeout=60) == ("", "")
    assert held[0].returncode < 0
    assert [start(office).communicate(timeout=60) for _ in range(2)] == [("access-token-2\n", "")] * 2


def test_a_directory_that_others_can_read_is_a_warning_and_no_cache(
    office: Installation, counting: Endpoint
) -> None:
    (office.home / "cache").mkdir(mode=0o755)
    (office.home / "cache").chmod(0o755)
    for number in (1, 2):
        done = office.run("fetch")
        assert (done.returncode, done.stdout) == (0, f"access-token-{number}\n")
        [line] = done.stderr.splitlines()
        assert re.fullmatch("hsm-token: warning: the cache is not used: .* has mode 0755.*chmod 0700.*", line)
    assert list((office.home / "cache").iterdir()) == []


def test_the_cache_is_listed_without_access_tokens_and_cleared(
    office: Installation, counting: Endpoint
) -> None:
    fetched(office)
    listed = office.run("cache", "list")
    assert f"{counting.url}\tdas-api-auth\tdas-api/das-access" in listed.stdout
    assert "access-token" not in listed.stdout + office.run("cache", "list", "--json").stdout
    assert office.run("cache", "clear").returncode == 0
    assert office.run("cache", "list").stdout == ""
    assert fetched(office) == "access-token-2\n"
