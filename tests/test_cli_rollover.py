"""``hsm-token rollover`` as processes: the whole life of two keys at a server that knows one certificate."""

import re
import subprocess
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import office as offices
import pytest
from conftest import SoftToken
from office import CLIENT_ID, Done, Office
from screen import at_a_terminal

from hsm_signer.rehearsal import RehearsalServer


@dataclass
class Rollover:
    """An office whose key is registered; ``registered`` is the operator's certificate file."""

    office: Office
    registered: Path

    def run(self, *arguments: str) -> Done:
        return self.office.run(*arguments)

    def register(self, folder: str) -> None:
        """The operator replaces the certificate; the key before it is refused from now on."""
        new = self.registered.with_suffix(".new")
        new.write_bytes((self.office.home / folder / "es256_cert.pem").read_bytes())
        new.replace(self.registered)

    @property
    def profile(self) -> dict[str, str]:
        settings: dict[str, str] = tomllib.loads(self.office.config.read_text())["profiles"]["office"]
        return settings

    def labels(self) -> set[str]:
        listed = self.run("key", "list", "--json").json
        return {key["label"] for key in listed}

    def prepared(self) -> str:
        done = self.run("rollover", "prepare", "next", "--out", str(self.office.home / "next"))
        assert done.status == 0, done.stderr
        return self.profile["next-key-thumbprint"]


@pytest.fixture
def rollover(tmp_path: Path, new_token: Callable[..., SoftToken]) -> Iterator[Rollover]:
    office = offices.found(tmp_path, new_token(), key=None)
    made = Rollover(office, tmp_path / "registered.pem")
    enrolled = office.run("enroll", "--key", "first", "--out", str(tmp_path / "first"))
    assert enrolled.status == 0, enrolled.stderr
    made.register("first")
    with RehearsalServer({CLIENT_ID: made.registered}) as server:
        text = office.config.read_text()
        office.config.write_text(f'{text}token-endpoint = "{server.token_endpoint}"  # rehearsal\n')
        yield made


def test_from_one_key_to_the_next_and_the_end_of_the_old_one(rollover: Rollover) -> None:
    first = rollover.profile
    second = rollover.prepared()
    refused = rollover.run("rollover", "try")
    assert (refused.status, refused.stdout) == (6, "")
    assert rollover.run("rollover", "switch").status == 6
    assert rollover.profile["key-thumbprint"] == first["key-thumbprint"]

    rollover.register("next")
    tried = rollover.run("rollover", "try", "--json")
    assert (tried.status, tried.json["accepted"], tried.stderr) == (0, True, "")
    assert rollover.profile["key-thumbprint"] == first["key-thumbprint"]
    assert rollover.run("fetch", "--no-cache").status == 6

    switched = rollover.run("rollover", "switch")
    assert (switched.status, switched.stdout) == (0, "")
    assert rollover.profile["key-thumbprint"] == second
    assert "# rehearsal\n" in rollover.office.config.read_text()
    assert rollover.run("fetch", "--no-cache").status == 0

    states = rollover.run("rollover", "status", "--json").json
    assert [(state["role"], state["on_token"]) for state in states] == [("in use", True), ("previous", True)]
    old = rollover.run("rollover", "retire", "--thumbprint", first["key-thumbprint"])
    assert (old.status, old.stdout) == (0, "")
    assert rollover.labels() == {"next"}
    assert {name for name in rollover.profile if name.startswith(("next-", "previous-"))} == set()
    assert rollover.run("fetch", "--no-cache").status == 0


def test_status_shows_both_keys_their_certificates_and_the_days_left(rollover: Rollover) -> None:
    second = rollover.prepared()
    in_use, upcoming = rollover.run("rollover", "status", "--json").json
    assert (in_use["role"], upcoming["role"]) == ("in use", "next")
    assert in_use["thumbprint"] == rollover.profile["key-thumbprint"]
    assert upcoming["thumbprint"] == second
    for state in (in_use, upcoming):
        assert (state["on_token"], state["certificate_fits"], state["days_left"]) == (True, True, 729)
    shown = at_a_terminal(rollover.office, ["rollover", "status"], {})
    for state in (in_use, upcoming):
        label = state["key"].removeprefix("pkcs11:object=").partition(";")[0]
        block = rf"(?s)role +{state['role']}\s+key +{label}\s.*?until +{state['not_after'][:10]}\s"
        assert re.search(block, shown), shown
    (rollover.office.home / "next" / "es256_cert.pem").write_bytes(rollover.registered.read_bytes())
    plain = rollover.run("rollover", "status").stdout.splitlines()
    assert [line.split("\t")[4] for line in plain] == ["yes", "NO"]


def test_a_switch_without_a_try_needs_force(rollover: Rollover) -> None:
    second = rollover.prepared()
    assert rollover.run("rollover", "switch", "--force").status == 0
    assert rollover.profile["key-thumbprint"] == second


def test_a_profile_that_is_read_only_gets_the_lines_to_change_printed(rollover: Rollover) -> None:
    second = rollover.prepared()
    rollover.register("next")
    config = rollover.office.config
    config.chmod(0o400)
    before = config.read_text()
    done = rollover.run("rollover", "switch")
    assert done.status == 2
    assert "read-only" in done.stderr
    assert config.read_text() == before
    lines = tomllib.loads(done.stdout)["profiles"]["office"]
    assert (lines["key"], lines["key-thumbprint"]) == (rollover.profile["next-key"], second)
    assert "# next-key: remove this setting" in done.stdout


def test_one_rollover_at_a_time_and_not_to_the_key_in_use(rollover: Rollover) -> None:
    same = rollover.run("rollover", "prepare", "first", "--out", str(rollover.office.home / "same"))
    assert (same.status, same.stdout) == (2, "")
    assert not (rollover.office.home / "same").exists()
    for odd in ("pkcs11:id=%07", "../next"):
        assert rollover.run("rollover", "prepare", odd).status == 2
    rollover.prepared()
    done = rollover.run("rollover", "prepare", "third", "--out", str(rollover.office.home / "third"))
    assert (done.status, done.stdout) == (2, "")
    assert rollover.labels() == {"first", "next"}
    assert not (rollover.office.home / "third").exists()


def test_the_key_in_use_is_not_the_next_one_where_the_profile_pins_none(rollover: Rollover) -> None:
    config = rollover.office.config
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("key-thumbprint")))
    same = rollover.run("rollover", "prepare", "first", "--out", str(rollover.office.home / "same"))
    assert (same.status, same.stdout) == (2, "")
    assert "is the key in use" in same.lines[0]
    assert "next-key" not in rollover.profile


def test_status_without_a_key_names_what_there_is_to_do(rollover: Rollover) -> None:
    done = rollover.office.configure(key=None).run("rollover", "status")
    assert done.status == 2
    assert "--key" not in done.stderr
    assert "hsm-token enroll" in done.stderr


def test_without_a_next_key_or_a_profile_there_is_nothing_to_try_or_switch(rollover: Rollover) -> None:
    for command in ("try", "switch"):
        done = rollover.run("rollover", command)
        assert done.status == 2
        assert "rollover prepare" in done.stderr
    rollover.office.config.unlink()
    assert rollover.office.run("rollover", "switch", "--force").status == 2


def lines_of(told: str) -> dict[str, str]:
    """What stands in a text for a person to copy."""
    return tomllib.loads("\n".join(line for line in told.splitlines() if " = " in line))


def test_a_next_key_that_is_lost_is_told_and_abandoned_without_a_token_and_another_prepared(
    rollover: Rollover,
) -> None:
    lost = rollover.prepared()
    before = rollover.profile
    rollover.office.token.pkcs11_tool("--delete-object", "--type", "privkey", "--label", "next")
    for command, status in (("status", 0), ("try", 5), ("switch", 5), ("prepare third --out third", 2)):
        done = rollover.run("rollover", *command.split())
        assert done.status == status
        assert "rollover abandon" in done.stderr, command
    assert rollover.profile == before

    pin = rollover.office.home / "pin"
    pin.rename(pin.with_name("away"))
    done = rollover.run("rollover", "abandon", "--force")
    pin.with_name("away").rename(pin)
    assert (done.status, done.stdout) == (0, "")
    said = lines_of(done.stderr)
    assert (said["next-key-thumbprint"], len(said)) == (lost, 3)
    assert rollover.profile | said == before
    assert "# rehearsal\n" in rollover.office.config.read_text()
    again = rollover.run("rollover", "prepare", "next", "--out", str(rollover.office.home / "again"))
    assert again.status == 0
    assert rollover.profile["next-key-thumbprint"] != lost


def test_abandoning_deletes_no_key_and_needs_a_next_one_and_a_profile_that_can_be_written(
    rollover: Rollover,
) -> None:
    nothing = rollover.run("rollover", "abandon")
    assert (nothing.status, "has no next key" in nothing.lines[0]) == (2, True)
    rollover.prepared()
    before = rollover.office.config.read_text()
    rollover.office.config.chmod(0o400)
    refused = rollover.run("rollover", "abandon", "--force")
    assert (refused.status, refused.stdout.count(": remove this setting")) == (2, 3)
    assert rollover.office.config.read_text() == before
    rollover.office.config.chmod(0o600)
    assert rollover.run("rollover", "abandon", "--force").status == 0
    assert rollover.labels() == {"first", "next"}


def test_a_next_key_that_the_server_may_know_is_abandoned_only_by_force_or_a_typed_yes(
    rollover: Rollover,
) -> None:
    rollover.prepared()
    rollover.register("next")
    before = rollover.profile
    silent = rollover.run("rollover", "abandon")
    assert (silent.status, silent.stdout, rollover.profile) == (2, "", before)
    assert "rollover try" in silent.lines[-1]
    screen = at_a_terminal(rollover.office, ["rollover", "abandon"], {"abandon it?": "no"}, status=2)
    assert f"the next key is {before['next-key']}: {before['next-key-thumbprint']}" in screen
    assert rollover.profile == before
    screen = at_a_terminal(rollover.office, ["rollover", "abandon"], {"abandon it?": "yes"})
    assert "if its certificate is not registered: hsm-token key delete" in screen
    assert "next-key" not in rollover.profile


def test_the_key_in_use_and_the_next_one_are_not_retired(rollover: Rollover) -> None:
    second = rollover.prepared()
    for thumbprint in (rollover.profile["key-thumbprint"], second):
        done = rollover.run("rollover", "retire", "--thumbprint", thumbprint)
        assert done.status == 5
        assert "a key in use is not deleted" in done.stderr
    assert rollover.labels() == {"first", "next"}


def test_the_old_key_stays_where_the_server_does_not_take_the_one_in_use(rollover: Rollover) -> None:
    first = rollover.profile["key-thumbprint"]
    rollover.prepared()
    assert rollover.run("fetch").status == 0
    switched = rollover.run("rollover", "switch", "--force")
    assert "rollover retire" not in switched.stderr
    assert "fetch --force" in switched.lines[-1]
    refused = rollover.run("rollover", "retire", "--thumbprint", first)
    assert (refused.status, refused.stdout, rollover.labels()) == (6, "", {"first", "next"})
    assert "nothing is destroyed before the server takes the key in use" in refused.lines[-1]
    away = ("--token-endpoint", "http://127.0.0.1:9/token")
    assert rollover.run("rollover", "retire", "--thumbprint", first, *away).status == 7
    assert rollover.labels() == {"first", "next"}
    assert rollover.run("rollover", "retire", "--thumbprint", first, *away, "--force").status == 0
    assert rollover.labels() == {"next"}


def test_an_access_token_in_the_cache_is_no_sign_that_the_server_takes_the_key_in_use(
    rollover: Rollover,
) -> None:
    first = rollover.profile["key-thumbprint"]
    rollover.prepared()
    rollover.register("next")
    assert rollover.run("rollover", "switch").status == 0
    assert rollover.run("fetch").status == 0
    rollover.register("first")
    assert rollover.run("fetch").status == 0
    assert rollover.run("rollover", "retire", "--thumbprint", first).status == 6
    assert rollover.labels() == {"first", "next"}


def test_at_a_terminal_the_thumbprint_of_the_old_key_is_typed(rollover: Rollover) -> None:
    first = rollover.profile["key-thumbprint"]
    rollover.prepared()
    rollover.register("next")
    assert rollover.run("rollover", "switch", "--force").status == 0
    screen = at_a_terminal(rollover.office, ["rollover", "retire"], {"type the thumbprint": first})
    assert f"previous key is {rollover.profile.get('previous-key', 'pkcs11:object=first')}" in screen
    assert rollover.labels() == {"next"}


def test_without_a_previous_key_there_is_nothing_to_retire_but_by_its_thumbprint(rollover: Rollover) -> None:
    spare = rollover.run("key", "generate", "spare").stdout.strip()
    silent = rollover.run("rollover", "retire")
    assert (silent.status, "profile office has no previous key" in silent.lines[0]) == (2, True)
    screen = at_a_terminal(rollover.office, ["rollover", "retire"], {}, status=2)
    assert "profile office has no previous key" in screen
    assert rollover.labels() == {"first", "spare"}
    assert rollover.run("rollover", "retire", "--thumbprint", spare).status == 0
    assert rollover.labels() == {"first"}


def test_a_previous_key_that_was_never_pinned_is_shown_with_the_thumbprint_that_is_proved(
    rollover: Rollover,
) -> None:
    first = rollover.profile["key-thumbprint"]
    rollover.prepared()
    rollover.register("next")
    assert rollover.run("rollover", "switch").status == 0
    config = rollover.office.config
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("previous-key-thumbprint")))
    assert rollover.run("rollover", "retire").status == 2
    screen = at_a_terminal(rollover.office, ["rollover", "retire"], {"type the thumbprint": first})
    assert f": {first}" in screen
    assert rollover.labels() == {"next"}


def test_a_key_goes_where_the_profile_cannot_be_written_and_the_lines_to_change_are_printed(
    rollover: Rollover,
) -> None:
    first = rollover.profile["key-thumbprint"]
    rollover.prepared()
    assert rollover.run("rollover", "switch", "--force").status == 0
    rollover.office.config.chmod(0o444)
    done = rollover.run("rollover", "retire", "--thumbprint", first, "--force")
    assert (done.status, rollover.labels()) == (0, {"next"})
    assert "previous-key-thumbprint: remove this setting" in done.stdout + done.stderr


def test_no_run_fails_when_the_operator_replaces_the_certificate_in_the_middle(rollover: Rollover) -> None:
    rollover.prepared()
    done: list[Done] = []
    halfway = threading.Event()

    def fetch_twice() -> None:
        for _ in range(2):
            done.append(rollover.run("fetch", "--or-next", "--no-cache"))
            if len(done) >= 5:
                halfway.set()

    threads = [threading.Thread(target=fetch_twice) for _ in range(10)]
    for thread in threads:
        thread.start()
    assert halfway.wait(100)
    rollover.register("next")
    for thread in threads:
        thread.join()
    assert [run.stderr for run in done if run.status] == []
    by_the_next = ["the server takes the next key" in run.stderr for run in done]
    assert len(done) == 20
    assert 5 <= sum(by_the_next) <= 15  # those that began afterwards, and what was under way
    assert all(run.stdout.count(".") == 2 for run in done)


def test_after_the_cut_over_the_cached_token_of_the_next_key_is_used(rollover: Rollover) -> None:
    rollover.prepared()
    rollover.register("next")
    first = rollover.run("fetch", "--or-next")
    (rollover.office.home / "pin").unlink()
    again = rollover.run("fetch", "--or-next")
    assert (first.status, again.status) == (0, 0)
    assert again.stdout == first.stdout
    assert again.stderr == ""


def test_or_next_without_a_next_key_is_a_fetch(rollover: Rollover) -> None:
    assert rollover.run("fetch", "--or-next", "--no-cache").stderr == ""
    rollover.registered.write_bytes(b"")
    refused = rollover.run("fetch", "--or-next", "--no-cache")
    assert (refused.status, refused.stdout) == (6, "")


@pytest.mark.parametrize("command", ["fetch --no-cache", "doctor --login"])
def test_where_the_key_in_use_is_refused_the_next_one_is_the_first_hint(
    rollover: Rollover, command: str
) -> None:
    rollover.prepared()
    rollover.register("next")
    refused = rollover.run(*command.split())
    assert refused.status == 6
    said = refused.stdout + refused.stderr
    assert said.index("this profile has a next key") < said.index("1. the certificate of the key")


def test_a_next_key_that_is_refused_too_leaves_the_first_refusal_with_both_told(rollover: Rollover) -> None:
    rollover.prepared()
    rollover.registered.write_bytes(b"")
    refused = rollover.run("fetch", "--or-next", "--no-cache")
    assert (refused.status, refused.stdout) == (6, "")
    assert "the next key is refused too" in refused.stderr


def test_switching_and_retiring_as_processes_at_once_keep_every_key_in_use(rollover: Rollover) -> None:
    first = rollover.profile["key-thumbprint"]
    second = rollover.prepared()
    office = rollover.office
    commands = [
        ("switch", "--force"),
        ("retire", "--force", "--thumbprint", first),
        ("retire", "--force", "--thumbprint", second),
        ("retire", "--force", "--thumbprint", first),
    ]
    environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
    running = [
        subprocess.Popen(office.command("rollover", *command), env=environment) for command in commands
    ]
    statuses = [process.wait(100) for process in running]
    assert statuses[0] == 0
    assert statuses[2] == 5
    assert rollover.profile["key-thumbprint"] == second
    assert ("first" in rollover.labels()) is ("previous-key" in rollover.profile)
    assert "next" in rollover.labels()
