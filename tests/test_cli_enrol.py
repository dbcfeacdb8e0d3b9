"""``hsm-token enroll`` as a process: the folder, the profile, and what is asked of a person."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import office as offices
import pytest
from conftest import SoftToken
from cryptography import x509
from office import CLIENT_ID, Office
from screen import at_a_terminal

from hsm_signer.rehearsal import RehearsalServer


@pytest.fixture(scope="module")
def token(new_token: Callable[..., SoftToken]) -> SoftToken:
    return new_token()


@pytest.fixture
def office(tmp_path: Path, token: SoftToken) -> Office:
    """A profile with a token and without a key."""
    return offices.found(tmp_path, token, key=None)


def profile(office: Office) -> dict[str, str]:
    settings: dict[str, str] = tomllib.loads(office.config.read_text())["profiles"]["office"]
    return settings


def test_from_an_empty_token_to_a_certificate_that_the_server_takes(office: Office) -> None:
    out = office.home / "das-2026"
    done = office.run("enroll", "--key", "first", "--out", str(out))
    assert (done.status, done.stdout) == (0, f"{out / 'es256_cert.pem'}\n")
    with RehearsalServer({CLIENT_ID: out / "es256_cert.pem"}) as server:
        fetched = office.run("fetch", "--token-endpoint", server.token_endpoint)
    assert (fetched.status, fetched.stderr) == (0, "")


def test_the_profile_pins_key_and_token_and_names_the_certificate(office: Office) -> None:
    out = office.home / "pinned"
    assert office.run("enroll", "--key", "pinned", "--out", str(out)).status == 0
    receipt = json.loads((out / "receipt.json").read_text())
    found = profile(office)
    assert found["key-thumbprint"] == receipt["public_key"]["thumbprint"]
    assert found["token"] == f"pkcs11:token={office.token.label};serial={receipt['proof']['token']['serial']}"
    assert found["certificate"] == "pinned/es256_cert.pem"
    assert found["key"].startswith("pkcs11:object=pinned;id=%")


def test_a_person_hears_what_to_send_and_the_fingerprints(office: Office) -> None:
    out = office.home / "heard"
    told = office.run("enroll", "--key", "heard", "--out", str(out)).stderr
    receipt = json.loads((out / "receipt.json").read_text())
    assert "send es256_cert.pem" in told
    assert "nothing else" in told
    assert "as reported by the module, not an attestation; no hardware" in told
    for name in ("certificate", "public_key"):
        assert receipt[name]["sha256_in_groups"] in told


def test_a_key_that_is_there_is_taken_and_its_certificate_renewed(office: Office) -> None:
    first, second = office.home / "one", office.home / "two"
    for folder in (first, second):
        done = office.run("enroll", "--key", "taken", "--out", str(folder), "--days", "99", "--replace")
        assert done.status == 0
    assert (
        done.lines.count("  certificate = two/es256_cert.pem, was one/es256_cert.pem") == 2
    )  # before and after
    assert "was pkcs11" not in done.stderr
    assert profile(office)["certificate"] == "two/es256_cert.pem"
    public = [(folder / "es256_public.pem").read_bytes() for folder in (first, second)]
    assert public[0] == public[1]
    certificates = [
        x509.load_pem_x509_certificate((f / "es256_cert.pem").read_bytes()) for f in (first, second)
    ]
    assert certificates[0].serial_number != certificates[1].serial_number
    assert (certificates[1].not_valid_after_utc - certificates[1].not_valid_before_utc).days == 99


def test_a_certificate_that_the_server_has_until_the_new_one_is_registered_is_told_with_its_end(
    office: Office,
) -> None:
    first = office.run("enroll", "--key", "ending", "--out", str(office.home / "old"), "--days", "2")
    assert (first.status, "warning" in first.stderr) == (0, False)
    assert office.run("cert", "check", "--within", "60d").status == 8
    done = office.run("enroll", "--out", str(office.home / "new"), "--replace")
    (warning,) = [line for line in done.lines if "warning" in line]
    assert "until that is registered the server has the one before: " in warning
    assert re.search(rf"{office.home}/old/es256_cert.pem ends on \d{{4}}-\d\d-\d\d, in \d days$", warning)
    (office.home / "new" / "es256_cert.pem").unlink()
    again = office.run("enroll", "--out", str(office.home / "third"), "--replace")
    (warning,) = [line for line in again.lines if "warning" in line]
    assert warning.endswith("has the one before")


def test_a_key_that_another_profile_pins_is_taken_with_a_warning_that_names_the_profile(
    office: Office,
) -> None:
    alone = office.run("enroll", "--key", "shared", "--out", str(office.home / "one"))
    assert "warning" not in alone.stderr
    again = office.run("enroll", "--out", str(office.home / "again"), "--replace")
    assert "is pinned by profile" not in again.stderr
    text = office.config.read_text()
    kept = [line for line in text.splitlines()[1:] if not line.startswith(("key", "certificate"))]
    office.config.write_text("\n".join([text, "[profiles.second]", *kept, ""]))
    second = ("--profile", "second", "--key", "shared", "--out", str(office.home / "two"))
    done = office.run("enroll", *second)
    assert done.status == 0
    assert (
        "warning: the key is pinned by profile office too: each server wants a key of its own" in done.lines
    )


def test_another_certificate_of_a_key_is_told_also_where_the_profile_cannot_be_written(
    office: Office,
) -> None:
    assert office.run("enroll", "--key", "kept", "--out", str(office.home / "kept")).status == 0
    office.config.chmod(0o400)
    for folder, said in (("first", False), ("second", True)):
        done = office.run("rollover", "prepare", "new", "--out", str(office.home / folder))
        assert (done.status, "read-only" in done.stderr) == (0, True)
        assert ("key new was there, and is taken: this is another certificate" in done.stderr) is said


def test_json_is_the_receipt_and_the_certificate_is_stored_where_asked(office: Office) -> None:
    out = office.home / "stored"
    done = office.run(
        "enroll", "--key", "stored", "--out", str(out), "--store", "--json", "--common-name", "x"
    )
    assert done.json == json.loads((out / "receipt.json").read_text())
    assert done.json["certificate"]["subject"] == "CN=x"
    (listed,) = [key for key in office.run("key", "list", "--json").json if key["label"] == "stored"]
    der = x509.load_der_x509_certificate(bytes.fromhex(listed["certificate"]))
    assert der == x509.load_pem_x509_certificate((out / "es256_cert.pem").read_bytes())


def test_nothing_is_overwritten_and_no_key_is_made_for_nothing(office: Office) -> None:
    out = office.home / "taken"
    out.mkdir(mode=0o700)
    (out / "README.txt").write_text("mine")
    before = office.config.read_text()
    done = office.run("enroll", "--key", "not-made", "--out", str(out))
    assert (done.status, done.stdout) == (2, "")
    assert "README.txt exists; nothing is overwritten" in done.stderr
    assert [file.name for file in out.iterdir()] == ["README.txt"]
    assert "not-made" not in office.token.pkcs11_tool("--list-objects")
    assert office.config.read_text() == before


def test_a_name_that_no_certificate_can_hold_is_refused_before_a_key_is_made(office: Office) -> None:
    for name in (
        ["--subject", "CN=a, O=b"],
        ["--common-name", "a" * 65],
        ["--subject", "CN=a", "--common-name", "b"],
    ):
        done = office.run("enroll", "--key", "not-made", "--out", str(office.home / "out"), *name)
        assert (done.status, done.stdout) == (2, "")
    assert "not-made" not in office.token.pkcs11_tool("--list-objects")


def test_a_profile_that_cannot_be_written_gets_its_lines_shown(office: Office) -> None:
    office.config.chmod(0o400)
    before = office.config.read_text()
    done = office.run("enroll", "--key", "shown", "--out", str(office.home / "out"))
    assert done.status == 0
    assert office.config.read_text() == before
    lines = done.stderr[done.stderr.index("[profiles.office]") :].partition("hsm-token:")[0]
    receipt = json.loads((office.home / "out" / "receipt.json").read_text())
    shown = tomllib.loads(lines)["profiles"]["office"]
    assert shown["key-thumbprint"] == receipt["public_key"]["thumbprint"]
    assert set(shown) == {"token", "key", "key-thumbprint", "certificate"}


def test_a_profile_that_is_enrolled_is_not_changed_unasked_and_what_would_be_is_told_before_a_login(
    office: Office,
) -> None:
    assert office.run("enroll", "--key", "enrolled", "--out", str(office.home / "old")).status == 0
    before = office.config.read_text()
    (office.home / "pin").rename(office.home / "away")
    for key, more in (("enrolled", set()), ("a-second", {"key"})):
        done = office.run("enroll", "--key", key, "--out", str(office.home / "new"))
        assert (done.status, done.stdout) == (2, "")
        assert "another key: hsm-token rollover prepare" in done.stderr
        told = {line.partition(" = ")[0].strip() for line in done.lines if ", was " in line}
        assert told == {"certificate"} | more
        assert "certificate = new/es256_cert.pem, was old/es256_cert.pem" in done.stderr
    assert office.config.read_text() == before
    assert not (office.home / "new").exists()


def test_at_a_terminal_a_yes_replaces_what_an_enrolment_wrote(office: Office) -> None:
    assert office.run("enroll", "--key", "at-terminal", "--out", str(office.home / "old")).status == 0
    at_a_terminal(office, ["enroll", "--out", str(office.home / "new")], {"replace it? yes or no": "yes"})
    assert profile(office)["certificate"] == "new/es256_cert.pem"


def test_a_key_that_the_profile_names_and_nobody_enrolled_is_replaced_and_told(office: Office) -> None:
    office.configure(key="from-init")
    done = office.run("enroll", "--key", "by-option", "--out", str(office.home / "out"))
    assert done.status == 0
    assert f"  key = {profile(office)['key']}, was from-init" in done.lines
    assert f"  key-thumbprint = {profile(office)['key-thumbprint']}, new" in done.lines


def test_a_pinned_key_is_not_replaced_by_another(office: Office) -> None:
    assert office.run("enroll", "--key", "in-use", "--out", str(office.home / "out")).status == 0
    done = office.run("enroll", "--key", "another", "--out", str(office.home / "another"), "--replace")
    assert (done.status, done.stdout) == (5, "")
    assert "rollover prepare" in done.stderr
    assert "another" not in office.token.pkcs11_tool("--list-objects")
    assert not (office.home / "another").exists()


def test_without_a_terminal_nothing_is_asked(office: Office) -> None:
    for arguments in (["--out", "x"], ["--key", "k"]):
        done = office.run("enroll", *arguments)
        assert (done.status, done.stdout) == (2, "")
        assert "hint: use --" in done.stderr


def test_on_a_terminal_what_is_missing_is_asked(office: Office) -> None:
    office.configure(client_id=None, key=None)
    answers = {
        "label of the key": "asked",
        "client id": "das-asked",
        "folder to write": str(office.home / "asked"),
    }
    screen = at_a_terminal(office, ["enroll"], answers)
    assert list(answers.values()) == [answer for question, answer in answers.items() if question in screen]
    receipt = json.loads((office.home / "asked" / "receipt.json").read_text())
    assert receipt["client_id"] == "das-asked"
    assert receipt["proof"]["key"]["label"] == "asked"
