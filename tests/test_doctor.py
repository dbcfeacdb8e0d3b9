"""The doctor in an installation that works, or nearly; ways to break one are in test_doctor_broken.py."""

import datetime
import json
import os
import re

import pytest
import trustme
from endpoint import Endpoint, Reply, connect_proxy, raw_server
from office import Done
from screen import at_a_terminal

from hsm_signer.doctor import BUNDLED, LADDER, Finding, Verdict, bundle
from hsm_signer.doctor.remote import difference

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


def test_without_permission_no_pin_is_sent_and_what_needs_it_is_not_checked(tls_office, tmp_path, faulty):
    office = tls_office.copy(tmp_path).configure(module=faulty.path)
    found = findings(office.run("doctor", "--json"))
    unchecked = [name for name, each in found.items() if each["verdict"] == "not checked"]
    assert unchecked == ["login", "key", "proof", "signature", "token request", "scope", "access token"]
    assert found["login"]["remedy"] == "hsm-token doctor --login"
    assert faulty.calls("C_Login") == 0
    office.run("doctor", "--login")
    assert faulty.calls("C_Login") == 1


def test_the_audit_log_is_looked_at_and_not_made(tls_office, tmp_path):
    office = tls_office.copy(tmp_path)

    def told() -> str:
        found = findings(office.run("doctor", "--offline", "--json"))["audit log"]
        assert found["verdict"] == "ok"
        return found["evidence"]

    assert "no audit-log is set" in told()
    office.configure(audit_log="log/audit.jsonl")
    assert "is made by the first use" in told()
    assert not (tmp_path / "log").exists()
    office.run("assertion")
    before = (tmp_path / "log/audit.jsonl").read_bytes()
    assert f"{tmp_path}/log/audit.jsonl, 2 lines" in told()
    assert (tmp_path / "log/audit.jsonl").read_bytes() == before


def test_in_a_pipe_each_check_is_one_line_of_four_cells(tls_office):
    done = tls_office.run("doctor", "--offline")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[1] for row in rows] == CHECKS
    assert {len(row) for row in rows} == {4}
    remote = {row[1]: row[0] for row in rows[CHECKS.index("proxy") :]}
    assert set(remote.values()) == {"not checked"}
    assert done.status == 0


def test_offline_no_connection_is_made(tls_office, tmp_path):
    heard: list[object] = []
    with raw_server(None, heard.append) as port:
        url = f"https://127.0.0.1:{port}"
        office = tls_office.copy(tmp_path).configure(token_endpoint=f"{url}/token", issuer=url)
        assert office.run("doctor", "--offline", "--login").status == 0
        assert heard == []
        assert office.run("doctor", "--login").status == 7
        assert heard


def test_in_a_rehearsal_the_issuers_own_server_is_left_alone(tls_office, tmp_path):
    heard: list[object] = []
    with raw_server(None, heard.append) as port, Endpoint(None, Reply()) as endpoint:
        issuer = f"https://127.0.0.1:{port}"
        office = tls_office.copy(tmp_path).configure(token_endpoint=f"{issuer}/token", issuer=issuer)
        rehearsal = {"HSM_TOKEN_TOKEN_ENDPOINT": endpoint.url, "HSM_TOKEN_AUDIENCE": endpoint.url}
        found = findings(office.run("doctor", "--json", environment=rehearsal))
        assert found["TCP"]["verdict"] == "ok"
        assert found["discovery"]["verdict"] == "not checked"
        assert "is of another server than the token endpoint" in found["discovery"]["evidence"]
        assert heard == []


def test_the_exit_status_is_of_the_first_failure_and_later_checks_are_made(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(key="none", certificate="none.pem", ca_bundle=None)
    done = office.run("doctor", "--login", "--json")
    failed = [(each["check"], each["error"]["class"]) for each in done.json if each["verdict"] == "failed"]
    assert failed == [
        ("key", "KeyNotFoundError"),
        ("certificate", "ConfigError"),
        ("TLS", "TransportError"),
    ]
    assert done.status == 5


def test_errors_are_told_with_their_codes(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(client_id="nobody", certificate=None)
    error = findings(office.run("doctor", "--login", "--json"))["token request"]["error"]
    assert error == {"class": "OAuthError", "error": "invalid_client", "status": 400}


def test_a_token_that_does_not_verify_is_none_the_worse_for_it(tls_office, tmp_path, faulty):
    faulty.set("fail C_VerifyInit 0 CKR_FUNCTION_NOT_SUPPORTED")
    office = tls_office.copy(tmp_path).configure(module=faulty.path)
    signature = findings(office.run("doctor", "--offline", "--login", "--json"))["signature"]
    assert signature["verdict"] == "ok"
    assert "the token does not verify" in signature["evidence"]


def test_before_enrolment_the_remedy_for_a_certificate_is_to_enroll(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(certificate=None, key="none", key_thumbprint=None)
    certificate = findings(office.run("doctor", "--offline", "--json"))["certificate"]
    assert certificate["verdict"] == "not checked"
    assert certificate["remedy"].startswith("hsm-token enroll makes one")


# --- warnings


def test_a_cache_that_others_can_read_is_a_warning_with_the_remedy(tls_office, tmp_path):
    shared = tmp_path / "shared"
    office = tls_office.copy(tmp_path).configure(cache=str(shared))
    assert (
        "is made by the first fetch"
        in findings(office.run("doctor", "--offline", "--json"))["cache"]["evidence"]
    )
    assert not shared.exists()
    shared.mkdir()
    shared.chmod(0o777)
    done = office.run("doctor", "--offline", "--json")
    cache = findings(done)["cache"]
    assert (done.status, cache["verdict"], cache["remedy"]) == (0, "warning", f"chmod 0700 {shared}")
    assert "mode 0777" in cache["evidence"]


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("COUNT_LOW", "check the PIN source"),
        ("FINAL_TRY", "the next wrong PIN"),
        ("TO_BE_CHANGED", "another PIN"),
    ],
)
def test_a_token_that_is_uneasy_about_its_pin_is_a_warning(tls_office, tmp_path, faulty, flag, remedy):
    faulty.set(f"token-flags CKF_USER_PIN_{flag}")
    done = tls_office.copy(tmp_path).configure(module=faulty.path).run("doctor", "--offline", "--json")
    token = findings(done)["token"]
    assert token["verdict"] == "warning"
    assert remedy in token["remedy"]
    assert f"USER_PIN_{flag}" in token["facts"]["flags"]
    assert done.status == 0


def test_what_is_not_pinned_is_advised(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(key_thumbprint=None)
    found = findings(office.run("doctor", "--login", "--json"))
    assert found["key"]["verdict"] == "ok"
    assert f'key-thumbprint = "{office.profile["key-thumbprint"]}"' in found["key"]["remedy"]
    serial = re.search(r"serial=([0-9a-f]+)", found["token"]["remedy"])
    pinned = office.configure(token=f"{office.token.uri};serial={serial[1]}")
    assert findings(pinned.run("doctor", "--offline", "--json"))["token"]["remedy"] is None


def test_a_certificate_that_ends_soon_is_a_warning(tls_office, tmp_path):
    office = tls_office.copy(tmp_path)
    (tmp_path / "es256_cert.pem").unlink()
    office.run("cert", "self-signed", "--days", "20", "--out", str(tmp_path / "es256_cert.pem"))
    certificate = findings(office.run("doctor", "--offline", "--json"))["certificate"]
    assert certificate["verdict"] == "warning"
    assert certificate["facts"] == {"certificate_days": 19}
    assert "hsm-token rollover prepare" in certificate["remedy"]


def test_without_a_file_the_certificate_on_the_token_is_checked(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(certificate=None, key_thumbprint=None)
    assert office.run("key", "generate", "stored").status == 0
    office.configure(certificate=None, key="stored", key_thumbprint=None)
    unnamed = findings(office.run("doctor", "--offline", "--login", "--json"))["certificate"]
    assert unnamed["verdict"] == "not checked"
    assert office.run("cert", "self-signed", "--store", "--days", "700").status == 0
    certificate = findings(office.run("doctor", "--offline", "--login", "--json"))["certificate"]
    assert certificate["verdict"] == "ok"
    assert certificate["evidence"].startswith("of stored on the token: ")


class OneCertificate:
    """In the place of a CA: whatever is asked for, this is issued."""

    def __init__(self, certificate: trustme.LeafCert) -> None:
        self.issue_cert = lambda *_: certificate


def test_a_certificate_of_the_server_that_ends_soon_is_a_warning(tls_office, tmp_path, ca):
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=5, hours=1)
    with raw_server(OneCertificate(ca.issue_cert("127.0.0.1", not_after=ends)), lambda _: None) as port:
        office = tls_office.copy(tmp_path).configure(
            token_endpoint=f"https://127.0.0.1:{port}/t", issuer=None
        )
        tls = findings(office.run("doctor", "--json"))["TLS"]
    assert (tls["verdict"], tls["facts"]["tls_days"]) == ("warning", 5)


def test_a_clock_that_differs_a_little_is_a_warning_with_the_offset_that_helps(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(clock_offset=30)
    clock = findings(office.run("doctor", "--json"))["clock"]
    assert clock["verdict"] == "warning"
    assert re.search(r"behind ours.*clock-offset 30 s", clock["evidence"])
    assert re.search(r"clock-offset = (0|1)$", clock["remedy"])


def test_an_audience_that_is_not_published_is_a_warning_with_the_difference(tls_office, tmp_path):
    endpoint = str(tls_office.profile["token-endpoint"])
    office = tls_office.copy(tmp_path).configure(audience=endpoint.replace("access_token", "acess_token"))
    audience = findings(office.run("doctor", "--json"))["audience"]
    assert audience["verdict"] == "warning"
    assert "'c' is missing at character" in audience["evidence"]
    assert audience["remedy"] == f'audience = "{endpoint}"'


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ("https://h/t", "https://h:443/t", "':443' is missing at character 10"),
        ("https://h/t/", "https://h/t", "'/' at character 12 is too much"),
        ("https://h/T", "https://h/t", "'T' at character 11 should be 't'"),
        ("https://\u0430/t", "https://a/t", "'\u0430' at character 9 should be 'a'"),
    ],
)
def test_differences_are_told_character_by_character(ours, theirs, told):
    assert difference(ours, theirs).endswith(told)


def test_a_narrower_scope_that_the_profile_allows_is_a_warning(tls_office, tmp_path, ca):
    grant = {
        "access_token": "access-token-opaque",
        "token_type": "Bearer",
        "expires_in": 60,
        "scope": "das-api/read",
    }
    with Endpoint(ca, Reply(body=grant)) as endpoint:
        office = tls_office.copy(tmp_path).configure(
            token_endpoint=endpoint.url,
            issuer=None,
            scope="das-api/read das-api/write",
            allow_narrower_scope=True,
        )
        done = office.run("doctor", "--login", "--json")
    scope = findings(done)["scope"]
    assert scope["verdict"] == "warning"
    assert scope["evidence"] == "granted: das-api/read; missing: das-api/write"
    assert done.status == 0


def test_without_joserfc_the_access_token_is_not_checked_and_all_else_is(tls_office, tmp_path):
    office = tls_office.copy(tmp_path)
    (tmp_path / "joserfc").mkdir()
    (tmp_path / "joserfc" / "__init__.py").write_text("raise ImportError('gone', name='joserfc')")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = office.run("doctor", "--login", "--json", environment={"PYTHONPATH": path})
    access_token = findings(done)["access token"]
    assert (access_token["verdict"], access_token["remedy"]) == (
        "not checked",
        "pip install 'hsm-signer[verify]'",
    )
    assert done.status == 0


def test_through_a_proxy_name_and_connection_are_the_proxys_business(tls_office, tmp_path, ca):
    def answer(_: object) -> Reply:
        return Reply(body={"issuer": "https://as.test", "token_endpoint": "https://as.test/token"})

    with (
        Endpoint(OneCertificate(ca.issue_cert("as.test")), answer) as endpoint,
        connect_proxy(None, endpoint.port) as (port, heard),
    ):
        office = tls_office.copy(tmp_path).configure(
            token_endpoint="https://as.test/token", issuer="https://as.test"
        )
        proxy = {"HTTPS_PROXY": f"http://user:p%40ss@127.0.0.1:{port}"}
        done = office.run("doctor", "--json", environment=proxy)
    found = findings(done)
    assert done.status == 0, done.stdout
    assert found["proxy"]["evidence"] == f"127.0.0.1:{port} (from HTTPS_PROXY) accepts connections"
    assert (found["DNS"]["verdict"], found["TCP"]["verdict"]) == ("not checked", "not checked")
    assert [found[name]["verdict"] for name in ("TLS", "clock", "discovery", "audience")] == ["ok"] * 4
    looked, *tunnels = heard  # the first is the check that the proxy accepts connections
    assert looked == b""
    assert len(tunnels) == 2
    assert all(b"Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in each for each in tunnels)
    assert "p@ss" not in done.stdout
    assert "p%40ss" not in done.stdout


# --- the bundle


def test_the_bundle_holds_verdicts_and_codes_and_nothing_that_names_the_office(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(client_id="nobody", certificate=None)
    file = tmp_path / "bundle.json"
    report = office.run("doctor", "--login", "--bundle", str(file))
    text = file.read_text()
    written = json.loads(text)
    assert [each["check"] for each in written["checks"]] == CHECKS
    assert {name for each in written["checks"] for name in each["facts"]} <= BUNDLED
    assert written["versions"]["hsm-signer"]
    assert written["checks"][CHECKS.index("token request")]["error"]["error"] == "invalid_client"
    serial = re.search(r"serial ([0-9a-f]{16})", report.stdout)
    secrets = [*map(str, office.profile.values()), serial[1], str(tmp_path), office.token.label, "nobody"]
    for secret in (*secrets, "127.0.0.1", "pkcs11:", "https://", "das", office.token.pin):
        if secret not in ("5", "10"):  # timeouts
            assert secret not in text


def test_a_fact_that_is_not_on_the_list_stays_out_of_the_bundle():
    finding = Finding(Verdict.OK, "here", facts={"threads": True, "path": "/home/office"}, check="module")
    assert bundle([finding])["checks"] == [
        {"check": "module", "verdict": "ok", "facts": {"threads": True}, "error": None}
    ]


def test_what_a_server_says_does_not_get_into_the_bundle(tls_office, tmp_path, ca):
    with Endpoint(
        ca, Reply(400, {"error": "client das of office 7", "error_description": "das"})
    ) as endpoint:
        office = tls_office.copy(tmp_path).configure(token_endpoint=endpoint.url, issuer=None)
        office.run("doctor", "--login", "--bundle", str(tmp_path / "bundle.json"))
    error = json.loads((tmp_path / "bundle.json").read_text())["checks"][CHECKS.index("token request")][
        "error"
    ]
    assert error == {"class": "OAuthError", "error": "another", "status": 400}


def test_a_bundle_overwrites_nothing(tls_office, tmp_path):
    file = tmp_path / "there"
    file.write_text("mine")
    done = tls_office.run("doctor", "--offline", "--bundle", str(file))
    assert (done.status, done.stdout) == (2, "")  # before anything is looked at
    assert file.read_text() == "mine"


# --- at a terminal


def test_at_a_terminal_the_pin_is_asked_for_once_and_all_is_checked(tls_office, tmp_path):
    office = tls_office.copy(tmp_path).configure(pin_source="prompt")
    screen = at_a_terminal(office, ["doctor"], {"PIN (Enter alone goes on without): ": office.token.pin})
    assert screen.count("Enter alone") == 1
    assert not re.search("not checked|failed|warning", screen)
    assert "access token" in screen
    assert "→ pin its serial" in screen


def test_at_a_terminal_enter_alone_leaves_out_what_needs_the_pin(tls_office, tmp_path, faulty):
    office = tls_office.copy(tmp_path).configure(pin_source="prompt", module=faulty.path)
    screen = at_a_terminal(office, ["doctor", "--offline"], {"PIN (Enter alone": ""})
    assert re.search(r"not checked.* login .*no PIN was typed", screen)
    assert re.search(r"ok.* certificate ", screen)
    assert faulty.calls("C_Login") == 0
