"""The end of keys and certificates as commands: what is in use stays, and what is old goes."""

import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import office as offices
import pytest
from conftest import SoftToken
from office import Office
from screen import at_a_terminal
from stranger import plant

from hsm_signer import open_token
from hsm_signer.x509 import read_certificate, self_signed


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


DAY = 86400


def certificate(office: Office, name: str, *, ends_in: int) -> Path:
    """A file with a certificate of the key "das" that lives 30 days, and ends in so many from now."""
    with open_token(office.token.uri, module=office.token.module, pin=office.token.pin) as token:
        began = int(time.time()) + (ends_in - 30) * DAY
        der = self_signed(token.signer("das"), common_name=name, not_before=began, days=30)
    path = office.home / f"{name}.pem"
    path.write_text(read_certificate(der).pem)
    return path


def stored(office: Office) -> int:
    return office.token.pkcs11_tool("--list-objects", "--type", "cert").count("Certificate Object")


def test_an_ended_certificate_on_the_token_alarms_until_a_newer_one_of_the_key_is_there(
    office: Office,
) -> None:
    old, new = certificate(office, "old", ends_in=-2), certificate(office, "new", ends_in=20)
    assert office.run("cert", "import", str(old)).stderr.count("\n") == 1
    assert office.run("cert", "check", "--within", "9d").status == 8
    told = office.run("cert", "import", str(new))
    assert told.status == 0
    assert "other certificates of pkcs11:object=das on the token: 1" in told.stderr

    check = office.run("cert", "check", "--within", "9d", "--json")
    assert (check.status, len(check.stderr.splitlines())) == (0, 1)
    assert "warning: the certificate of pkcs11:object=das on the token ended on" in check.stderr
    assert [row["subject"] for row in check.json] == ["CN=new", "CN=old"]
    assert office.run("cert", "check", "--within", "60d").status == 8  # the newer one ends then

    fetch = office.run("assertion", "--token-endpoint", "http://127.0.0.1:9/token")
    assert "ended on" not in fetch.stderr
    assert fetch.stderr.count("ends on") == 1
    doctor = office.run("doctor", "--offline", "--login", "--json")
    (found,) = [each for each in doctor.json if each["check"] == "certificate"]
    assert (found["verdict"], "CN=new" in found["evidence"]) == ("warning", True)
    der = read_certificate(new.read_bytes()).der
    assert [key["certificate"] for key in office.run("key", "list", "--json").json] == [der.hex()]
    (exported,) = office.run("key", "export", "--format", "jwks").json["keys"]
    assert exported["x5c"] == [b64encode(der).decode()]


def test_replacing_takes_the_other_certificates_of_the_key_and_nobody_elses(
    office: Office, tmp_path: Path
) -> None:
    old, new = certificate(office, "old", ends_in=-2), certificate(office, "new", ends_in=90)
    (listed,) = office.run("key", "list", "--json").json
    plant(office.token, "das", bytes.fromhex(listed["id"]), tmp_path)
    for file in (old, new):
        assert office.run("cert", "import", str(file)).status == 0
    assert stored(office) == 3
    done = office.run("cert", "import", str(new), "--replace")
    assert (done.status, done.lines[0]) == (
        0,
        "other certificates of pkcs11:object=das removed from the token: 1",
    )
    assert stored(office) == 2
    check = office.run("cert", "check", "--json")
    assert (check.status, check.stderr, [row["subject"] for row in check.json]) == (0, "", ["CN=new"])


def test_a_renewed_certificate_that_is_stored_tells_of_the_one_before(office: Office) -> None:
    for told in (False, True):
        done = office.run("cert", "self-signed", "--store")
        assert (done.status, "das on the token: 1" in done.stderr) == (0, told)


def test_the_certificates_of_a_key_go_with_it(office: Office) -> None:
    wanted = thumbprint(office, "das")
    for name, ends in (("old", -2), ("new", 90)):
        assert office.run("cert", "import", str(certificate(office, name, ends_in=ends))).status == 0
    office.configure(key=None)
    assert delete(office, "das", wanted).status == 0
    assert stored(office) == 0
    assert "Object" not in office.token.pkcs11_tool("--list-objects")
