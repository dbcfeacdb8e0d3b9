"""The doctor in a real installation, whole and broken."""

from office import Done

from hsm_signer.doctor import LADDER

CHECKS = [name for name, _ in LADDER]


def findings(done: Done) -> dict[str, dict[str, str]]:
    return {each["check"]: each for each in done.json}


def test_where_nothing_is_wrong_every_check_says_ok_and_why(tls_office):
    done = tls_office.run("doctor", "--login", "--json")
    found = findings(done)
    assert list(found) == CHECKS
    assert {each["verdict"] for each in found.values()} == {"ok"}, done.stdout
    assert all(each["evidence"] for each in found.values())
    assert (done.status, done.stderr) == (0, "")
    assert found["signature"]["facts"]["verified_by_token"] is True


def test_without_permission_no_pin_is_sent_and_what_needs_it_is_not_checked(tls_office):
    found = findings(tls_office.run("doctor", "--json"))
    unchecked = [name for name, each in found.items() if each["verdict"] == "not checked"]
    assert unchecked == ["login", "key", "proof", "signature", "token request", "scope", "access token"]
    assert found["login"]["remedy"] == "hsm-token doctor --login"


def test_in_a_pipe_each_check_is_one_line_of_four_cells(tls_office):
    done = tls_office.run("doctor", "--offline")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[1] for row in rows] == CHECKS
    assert {len(row) for row in rows} == {4}
    remote = {row[1]: row[0] for row in rows[CHECKS.index("proxy") :]}
    assert set(remote.values()) == {"not checked"}
    assert done.status == 0
