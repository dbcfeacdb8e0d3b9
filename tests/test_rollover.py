"""Rollover: what happens to profile and token, on SoftHSM2; the commands are tested with the command line."""

import logging
import threading
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import SoftToken
from stranger import plant

from hsm_signer import open_token, rollover
from hsm_signer.config import Settings
from hsm_signer.errors import (
    ConfigError,
    HsmSignerError,
    KeyMismatchError,
    KeyNotFoundError,
    OAuthError,
    ProfileNotChangedError,
    TokenResponseError,
    TransportError,
)
from hsm_signer.hsm.keys import KeyInfo
from hsm_signer.hsm.token import Token


@pytest.fixture
def own_token(new_token: Callable[..., SoftToken]) -> SoftToken:
    return new_token()


@pytest.fixture
def token(own_token: SoftToken) -> Iterator[Token]:
    with open_token(own_token.uri, module=own_token.module, pin=own_token.pin) as opened:
        yield opened


class Office:
    """A profile with a key, and where its state is."""

    def __init__(self, token: Token, home: Path) -> None:
        self.token = token
        self.file = home / "config.toml"
        self.state = home / "state"
        self.first = token.generate_key("das-2026")
        self.second: KeyInfo | None = None
        self.file.write_text(
            f'[profiles.das]\nkey = "das-2026"  # the old one\nkey-thumbprint = "{self.first.thumbprint}"\n'
            'certificate = "das-2026/es256_cert.pem"\n'
        )

    @property
    def profile(self) -> dict[str, str]:
        settings: dict[str, str] = tomllib.loads(self.file.read_text())["profiles"]["das"]
        return settings

    def prepare(self) -> str:
        self.second = self.token.generate_key("das-2028")
        thumbprint = str(self.second.thumbprint)
        rollover.prepare(
            self.token, thumbprint, "das-2028/cert", self.file, "das", state_directory=self.state
        )
        return thumbprint

    def switch(self, thumbprint: str) -> None:
        rollover.switch(self.file, "das", thumbprint, state_directory=self.state)

    def retire(self, thumbprint: str | None) -> None:
        rollover.destroy(self.token, str(thumbprint), self.file, "das", state_directory=self.state)

    def labels(self) -> list[str]:
        infos = self.token.keys()
        return sorted(info.label for info in infos)


@pytest.fixture
def office(token: Token, tmp_path: Path) -> Office:
    return Office(token, tmp_path)


def test_the_life_of_a_rollover_is_in_the_profile(office: Office) -> None:
    first = office.profile
    second = office.prepare()
    prepared = office.profile
    office.switch(second)
    switched = office.profile
    assert {name: prepared[name] for name in first} == first
    assert prepared["next-key-thumbprint"] == switched["key-thumbprint"] == second
    assert prepared["next-key"] == switched["key"] == office.second.uri
    assert prepared["next-certificate"] == switched["certificate"] == "das-2028/cert"
    assert switched["previous-key"] == first["key"]
    assert switched["previous-key-thumbprint"] == first["key-thumbprint"]
    assert "# the old one" in office.file.read_text()
    assert office.labels() == ["das-2026", "das-2028"]
    office.retire(office.first.thumbprint)
    assert set(office.profile) == {"key", "key-thumbprint", "certificate"}
    assert office.labels() == ["das-2028"]


def test_one_rollover_at_a_time(office: Office) -> None:
    office.prepare()
    with pytest.raises(ConfigError, match="das-2028"):
        rollover.prepare(
            office.token, str(office.first.thumbprint), "x", office.file, "das", state_directory=office.state
        )


def test_only_a_key_that_is_on_the_token_is_prepared(office: Office) -> None:
    with pytest.raises(KeyNotFoundError):
        rollover.prepare(office.token, "A" * 43, "x", office.file, "das", state_directory=office.state)
    assert "next-key" not in office.profile


def test_only_the_key_that_was_tried_becomes_the_one_in_use(office: Office) -> None:
    office.prepare()
    before = office.profile
    with pytest.raises(KeyMismatchError):
        office.switch("A" * 43)
    assert office.profile == before


def test_a_key_in_use_or_next_is_not_retired(office: Office) -> None:
    second = office.prepare()
    for thumbprint in (office.first.thumbprint, second):
        with pytest.raises(KeyMismatchError, match="pinned"):
            office.retire(thumbprint)
    assert office.labels() == ["das-2026", "das-2028"]


@pytest.mark.parametrize("line", ['key = "das-2026"', 'next-key = "pkcs11:object=das-2026"'])
@pytest.mark.parametrize("pinned", [True, False])
def test_a_key_that_another_profile_uses_is_not_retired(office: Office, line: str, pinned: bool) -> None:
    office.switch(office.prepare())
    pin = f'{line.partition(" = ")[0]}-thumbprint = "{office.first.thumbprint}"\n' if pinned else ""
    office.file.write_text(f"{office.file.read_text()}\n[profiles.other]\n{line}\n{pin}")
    with pytest.raises(KeyMismatchError, match="of other"):
        office.retire(office.first.thumbprint)
    assert office.labels() == ["das-2026", "das-2028"]


def test_a_profile_that_pins_another_key_under_the_same_label_does_not_matter(office: Office) -> None:
    office.switch(office.prepare())
    other = f'[profiles.other]\nkey = "das-2026"\nkey-thumbprint = "{"A" * 43}"\n'
    office.file.write_text(office.file.read_text() + other)
    office.retire(office.first.thumbprint)
    assert office.labels() == ["das-2028"]


def test_what_strangers_planted_under_the_same_label_survives_and_the_right_key_goes(
    office: Office, own_token: SoftToken, tmp_path: Path
) -> None:
    office.switch(office.prepare())
    plant(own_token, "das-2026", office.first.id, tmp_path)
    own_token.pkcs11_tool("--keypairgen", "--key-type", "EC:prime256v1", "--label", "das-2026", "--id", "07")
    office.retire(office.first.thumbprint)
    infos = office.token.keys()
    assert [info.id for info in infos if info.label == "das-2026"] == [b"\x07"]
    left = own_token.pkcs11_tool("--list-objects")
    assert (
        left.count("das-2026") == 4
    )  # private and public half of the other key, planted key and certificate
    assert left.count("Certificate Object") == 1


def test_a_thumbprint_that_no_key_has_retires_nothing(office: Office) -> None:
    with pytest.raises(KeyNotFoundError) as failed:
        office.retire("A" * 43)
    assert office.first.label in failed.value.candidates[0]
    assert office.labels() == ["das-2026"]


def test_a_profile_that_is_read_only_is_left_and_its_lines_are_named(office: Office) -> None:
    second = office.prepare()
    before = office.file.read_text()
    office.file.chmod(0o444)
    with pytest.raises(ProfileNotChangedError) as failed:
        office.switch(second)
    assert f'key-thumbprint = "{second}"' in failed.value.lines
    assert office.file.read_text() == before


def at_once(*actions: Callable[[], None]) -> list[HsmSignerError]:
    """Run in as many threads; what they raised."""
    start = threading.Barrier(len(actions))
    failures: list[HsmSignerError] = []

    def run(action: Callable[[], None]) -> None:
        start.wait()
        try:
            action()
        except HsmSignerError as failed:
            failures.append(failed)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.parametrize("_round", range(4))
def test_retiring_and_switching_at_once_keep_the_key_in_use(office: Office, _round: int) -> None:
    second = office.prepare()
    failures = at_once(
        partial(office.switch, second),
        partial(office.retire, office.first.thumbprint),
        partial(office.retire, second),
    )
    assert all(isinstance(failed, KeyMismatchError) for failed in failures)
    assert office.profile["key-thumbprint"] == second
    assert "das-2028" in office.labels()
    assert ("das-2026" in office.labels()) is ("previous-key" in office.profile)


@pytest.mark.parametrize("_round", range(4))
def test_retiring_a_key_and_preparing_it_at_once_leave_no_profile_without_its_key(
    office: Office, _round: int
) -> None:
    office.switch(office.prepare())
    first = str(office.first.thumbprint)
    again = partial(
        rollover.prepare, office.token, first, "x", office.file, "das", state_directory=office.state
    )
    failures = at_once(partial(office.retire, first), again)
    assert len(failures) == 1
    assert ("das-2026" in office.labels()) is (office.profile.get("next-key-thumbprint") == first)
    assert ("das-2026" in office.labels()) is ("previous-key" in office.profile)


def test_the_settings_of_the_next_key_replace_those_of_the_key_in_use() -> None:
    settings = Settings(
        key="old",
        key_thumbprint="o",
        certificate="o.pem",
        next_key="new",
        next_key_thumbprint="n",
        next_certificate="n.pem",
        scope="s",
    )
    found = rollover.following(settings)
    assert (found.key, found.key_thumbprint, found.certificate, found.scope) == ("new", "n", "n.pem", "s")
    assert (found.next_key, found.next_key_thumbprint, found.next_certificate) == (None, None, None)
    with pytest.raises(ConfigError):
        rollover.following(found)


REFUSED = [
    OAuthError("refused", error="invalid_client", status=400),
    OAuthError("refused", error="invalid_client", status=401),
    OAuthError("refused", status=401),
    OAuthError("refused", status=403),
]
NOT_ABOUT_THE_KEY = [
    OAuthError("refused", error="invalid_scope", status=400),
    OAuthError("refused", error="access_denied", status=403),
    OAuthError("refused", status=400),
    TokenResponseError("odd", status=200),
    TransportError("down"),
    KeyNotFoundError("none"),
]


def raising(error: Exception) -> Callable[[], str]:
    def fetch() -> str:
        raise error

    return fetch


@pytest.mark.parametrize("error", REFUSED)
def test_a_refused_key_is_followed_by_the_next_once(
    error: OAuthError, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hsm_signer"):
        assert rollover.fetch_or_next(raising(error), lambda: "access token") == "access token"
    assert any("switch" in message for message in caplog.messages)


@pytest.mark.parametrize("error", NOT_ABOUT_THE_KEY)
def test_other_failures_do_not_ask_with_the_next_key(error: HsmSignerError) -> None:
    with pytest.raises(type(error)):
        rollover.fetch_or_next(raising(error), lambda: pytest.fail("asked"))


def test_a_key_in_use_that_works_is_all_that_is_used() -> None:
    assert rollover.fetch_or_next(lambda: "first", lambda: pytest.fail("asked")) == "first"


def test_if_both_are_refused_the_first_refusal_is_shown_with_the_second_as_hint() -> None:
    first = OAuthError("first said no", error="invalid_client", status=401)
    with pytest.raises(OAuthError, match="first") as failed:
        rollover.fetch_or_next(raising(first), raising(OAuthError("second said no", status=403)))
    assert failed.value.hint == "the next key is refused too: second said no"


def test_trouble_with_the_next_key_is_that_trouble() -> None:
    with pytest.raises(TransportError):
        rollover.fetch_or_next(raising(REFUSED[0]), raising(TransportError("down")))
