"""``hsm-token verify`` as a process: access tokens of the rehearsal server, and what is no such thing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoint import Endpoint, Reply
from office import CLIENT_ID, Office


@pytest.fixture(scope="module")
def access_token(tls_office: Office) -> str:
    done = tls_office.run("fetch")
    assert done.status == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def office(tls_office: Office, tmp_path) -> Iterator[Office]:
    return tls_office.copy(tmp_path)


def test_claims_are_printed_when_everything_holds(office, access_token):
    done = office.run(
        "verify", "--audience", CLIENT_ID, "--scope", "das-api/das-access", stdin=f"{access_token}\n"
    )
    assert (done.status, done.stderr) == (0, "")
    claims = dict(line.split("\t") for line in done.stdout.splitlines())
    assert claims["iss"] == office.profile["issuer"]
    assert claims["scope"] == '["das-api/das-access"]'
    as_json = office.run("verify", "--audience", CLIENT_ID, "--json", "-", stdin=access_token).json
    assert as_json["aud"] == CLIENT_ID
    assert as_json["scope"] == ["das-api/das-access"]


def test_keys_come_from_discovery_a_url_or_a_file(office, access_token, tmp_path):
    url = f"{office.profile['issuer']}/connect/jwk_uri"
    assert office.run("verify", "--audience", CLIENT_ID, "--jwks", url, stdin=access_token).status == 0
    (tmp_path / "token").write_text(access_token)
    file = tmp_path / "jwks.json"
    file.write_text('{"keys": []}')
    arguments = ("verify", str(tmp_path / "token"), "--audience", CLIENT_ID, "--jwks")
    done = office.run(*arguments, str(file))
    assert done.status == 8
    assert "no signing key with the kid" in done.stderr


def test_the_keys_of_a_file_verify_without_any_network(office, ca, access_token, tmp_path):
    from hsm_signer.oauth.transport import Transport
    from hsm_signer.verify import issuer_keys

    keys = issuer_keys(office.profile["issuer"], Transport(office.profile["ca-bundle"]))()
    (tmp_path / "jwks.json").write_text(json.dumps(keys))
    office.configure(ca_bundle=None, proxy="http://127.0.0.1:9")
    done = office.run(
        "verify", "--audience", CLIENT_ID, "--jwks", str(tmp_path / "jwks.json"), stdin=access_token
    )
    assert done.status == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--audience", "somebody"], "aud: expected 'somebody', found 'das-api-auth'"),
        (["--audience", CLIENT_ID, "--issuer", "https://127.0.0.1/other"], "publishes no metadata"),
        (
            ["--audience", CLIENT_ID, "--scope", "das-api/office-exchange"],
            "'das-api/office-exchange' is missing",
        ),
    ],
)
def test_what_does_not_hold_is_told_and_the_token_is_not(office, access_token, arguments, says):
    if "--issuer" in arguments:
        arguments = [*arguments[:-1], f"{office.profile['issuer']}/other"]
    done = office.run("verify", *arguments, stdin=access_token)
    assert done.status == (6 if "--issuer" in arguments else 8)
    assert done.lines[0].startswith("error: ")
    assert says in done.stderr
    assert done.stdout == ""
    assert access_token[:20] not in done.stderr


def test_a_changed_token_is_refused(office, access_token):
    changed = access_token[:-9] + ("A" if access_token[-9] != "A" else "B") + access_token[-8:]
    done = office.run("verify", "--audience", CLIENT_ID, stdin=changed)
    assert done.status == 8
    assert "the signature is not by the issuer's key" in done.stderr


@pytest.mark.parametrize("stdin", ["", "opaque-token", "a.b.c", "x" * 20_000])
def test_what_is_no_jwt_is_refused(office, stdin):
    done = office.run("verify", "--audience", CLIENT_ID, stdin=stdin)
    assert (done.status, done.stdout) == (8, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "audience"),
        (["--audience", CLIENT_ID, "--leeway", "61"], "leeway"),
        (["--audience", CLIENT_ID, "--jwks", "http://example.com/jwks"], "https is needed"),
        (["--audience", CLIENT_ID, "--jwks", "none.json"], "cannot read the JWK Set"),
        (["--audience", CLIENT_ID, "--jwks", "pyproject.toml"], "pyproject.toml holds no JWK Set"),
        (["--audience", CLIENT_ID, "none.txt"], "cannot read none.txt"),
    ],
)
def test_wrong_usage_is_status_2(office, access_token, arguments, says, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    done = office.run("verify", *arguments, stdin=access_token)
    assert done.status == 2
    assert says in done.stderr


def test_the_audience_of_a_profile_is_no_default(office, access_token):
    office.configure(audience=CLIENT_ID)
    assert office.run("verify", stdin=access_token).status == 2


def test_without_an_issuer_nothing_is_verified(office, access_token):
    office.configure(issuer=None)
    done = office.run("verify", "--audience", CLIENT_ID, stdin=access_token)
    assert done.status == 2
    assert "no issuer given" in done.stderr


@pytest.mark.parametrize(
    ("reply", "status"), [(Reply(503, b""), 7), (Reply(200, b"[]"), 8), (Reply(302, b""), 7)]
)
def test_keys_that_do_not_come_are_told_apart_from_keys_that_do_not_fit(
    office, ca, access_token, reply, status
):
    with Endpoint(ca, reply) as endpoint:
        done = office.run("verify", "--audience", CLIENT_ID, "--jwks", endpoint.url, stdin=access_token)
    assert done.status == status, done.stderr
