"""The end of keys and certificates as commands: what is in use stays, and what is old goes."""

from collections.abc import Callable
from pathlib import Path

import office as offices
import pytest
from conftest import SoftToken
from office import Office
from screen import at_a_terminal


@pytest.fixture
def office(tmp_path: Path, new_token: Callable[..., SoftToken]) -> Office:
    """A token with the key "das", which the profile names and does not pin."""
    made = offices.found(tmp_path, new_token())
    assert made.run("key", "generate").status == 0
    return made


def thumbprint(office: Office, label: str) -> str:
    listed = office.run("key", "list", "--json").json
    (found,) = [key["thumbprint"] for key in listed if key["label"] == label]
    return str(found)


def delete(office: Office, key: str, print_of_key: str) -> offices.Done:
    return office.run("key", "delete", "--key", key, "--thumbprint", print_of_key)


def without_pin(office: Office) -> None:
    """Whatever wants to log in fails from now on."""
    (office.home / "pin").unlink()


@pytest.mark.parametrize("role", ["key", "next-key"])
def test_a_key_that_profiles_pin_is_not_deleted_and_they_are_named_before_a_login(
    office: Office, role: str
) -> None:
    pinned = thumbprint(office, "das")
    text = office.configure(key="pkcs11:object=another", key_thumbprint="A" * 43).config.read_text()
    more = "".join(
        f'\n[profiles.{name}]\n{role} = "pkcs11:object=das"\n{role}-thumbprint = "{pinned}"\n'
        for name in ("one", "two")
    )
    office.config.write_text(text + more)
    without_pin(office)
    for command in (
        ("key", "delete", "--key", "das", "--thumbprint", pinned),
        ("rollover", "retire", "--thumbprint", pinned),
    ):
        done = office.run(*command, "--profile", "office")
        assert (done.status, done.stdout) == (5, "")
        assert f"the {role} of one and the {role} of two: a key in use is not deleted" in done.lines[0]
    assert "Private Key Object" in office.token.pkcs11_tool("--list-objects", "--type", "privkey")


def test_a_key_that_a_profile_names_without_a_pin_is_not_deleted_by_any_of_its_names(office: Office) -> None:
    wanted = thumbprint(office, "das")
    (listed,) = office.run("key", "list", "--json").json
    by_id = "pkcs11:id=" + "".join(f"%{byte:02X}" for byte in bytes.fromhex(listed["id"]))
    found_out = delete(office, by_id, wanted)  # the token tells that this is the label of the profile
    assert (found_out.status, found_out.stdout) == (5, "")
    assert "may be the key of office" in found_out.stderr
    without_pin(office)
    refused = delete(office, "das", wanted)
    assert (refused.status, refused.stdout) == (5, "")
    assert "may be the key of office" in refused.lines[0]
    assert office.token.pkcs11_tool("--list-objects", "--type", "privkey").count("Private Key Object") == 1


def test_a_key_that_no_profile_uses_goes_and_the_record_of_it_as_the_previous_one(office: Office) -> None:
    old = thumbprint(office, "das")
    new = office.run("key", "generate", "new").stdout.strip()
    office.configure(
        key="pkcs11:object=new", key_thumbprint=new, previous_key="das", previous_key_thumbprint=old
    )
    assert delete(office, "new", old).status == 5
    done = delete(office, "das", old)
    assert (done.status, done.stdout, done.lines) == (0, "", [f"destroyed the key {old}"])
    assert [key["label"] for key in office.run("key", "list", "--json").json] == ["new"]
    assert "previous-key" not in office.config.read_text()


def test_the_thumbprint_is_asked_before_the_pin(office: Office) -> None:
    old = thumbprint(office, "das")
    office.configure(key=None, pin_source="prompt")
    answers = {"type its thumbprint": old, "PIN": office.token.pin}
    screen = at_a_terminal(office, ["key", "delete", "--key", "das"], answers)
    assert screen.index("type its thumbprint") < screen.index("PIN")
    assert office.configure().run("key", "list", "--json").json == []
