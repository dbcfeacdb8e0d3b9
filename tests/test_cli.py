"""Whole commands, as processes: the main job, its streams and exit statuses, and what bad input gets."""

import json
import os
import signal
import subprocess
import time
import tomllib
from base64 import urlsafe_b64decode
from pathlib import Path

import leaks
import office as offices
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from office import CLIENT_ID, SCOPE
from screen import at_a_terminal

import hsm_signer
from hsm_signer.cli import exits


def unpack(part: str):
    return json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)))


@pytest.fixture
def scratch(office, tmp_path):
    """The office's token and server, with a configuration, cache and state of the test's own."""
    return offices.found(tmp_path, office.token, **{"token-endpoint": office.profile["token-endpoint"]})


def test_fetch_prints_an_access_token_and_nothing_else(office):
    done = office.run("fetch", "--no-cache")
    header, claims, _ = done.stdout.rstrip("\n").split(".")
    assert (done.status, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert unpack(header)["alg"] == "RS256"
    assert unpack(claims)["aud"] == CLIENT_ID


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("token", "{token}\n"),
        ("header", "Authorization: Bearer {token}\n"),
        ("env", "export ACCESS_TOKEN={token}\n"),
        ("curl", 'header = "Authorization: Bearer {token}"\n'),
    ],
)
def test_fetch_prints_the_cached_token_in_each_format(scratch, form, expected):
    token = scratch.run("fetch").stdout.rstrip("\n")
    assert scratch.run("fetch", "--format", form).stdout == expected.format(token=token)


def test_fetch_as_json_tells_when_the_token_expires(scratch):
    answer = scratch.run("fetch", "--format", "json").json
    claims = unpack(answer["access_token"].split(".")[1])
    assert answer == {
        "access_token": answer["access_token"],
        "token_type": "Bearer",
        "expires_at": pytest.approx(claims["exp"], abs=5),
        "scope": SCOPE,
    }


def test_a_proxys_password_is_neither_shown_nor_kept(scratch):
    scratch.configure(proxy="http://user:canarypw@127.0.0.1:9")  # never used for loopback
    shown = [scratch.run("config", "show", *form).stdout for form in ((), ("--json",))]
    assert all("127.0.0.1:9" in text and "canarypw" not in text for text in shown)
    token = scratch.run("fetch").stdout
    kept = [path for path in (scratch.home / "cache").rglob("*") if path.is_file()]
    assert any(path.suffix == ".token" for path in kept)
    assert not [path for path in kept if b"canarypw" in path.read_bytes()]
    assert scratch.run("fetch").stdout == token
    scratch.configure(proxy="http://user:canarypw2@127.0.0.1:9")
    assert scratch.run("fetch").stdout != token


def test_fetch_takes_the_cached_token_unless_told_otherwise(scratch):
    first = scratch.run("fetch").stdout
    assert scratch.run("fetch").stdout == first
    assert scratch.run("fetch", "--no-cache").stdout != first
    forced = scratch.run("fetch", "--force").stdout
    assert forced != first
    assert scratch.run("fetch").stdout == forced
    assert scratch.run("fetch", "--min-validity", "3700").stdout != forced


def test_a_cached_token_needs_neither_pin_nor_module_nor_server(scratch):
    token = scratch.run("fetch").stdout
    (scratch.home / "pin").unlink()
    assert scratch.run("fetch", environment={"SOFTHSM2_CONF": "/nonexistent"}).stdout == token


def test_assertion_is_signed_by_the_key_and_names_the_endpoint(office):
    text = office.run("assertion", "--lifetime", "120").stdout.rstrip("\n")
    header, claims, signature = text.split(".")
    assert unpack(header) == {"alg": "ES256", "typ": "JWT"}
    found = unpack(claims)
    assert list(found) == ["iss", "sub", "aud", "exp"]
    assert (found["iss"], found["sub"], found["aud"]) == (
        CLIENT_ID,
        CLIENT_ID,
        office.profile["token-endpoint"],
    )
    assert found["exp"] == pytest.approx(time.time() + 120, abs=30)
    raw = urlsafe_b64decode(signature + "==")
    certificate = x509.load_pem_x509_certificate((office.home / "es256_cert.pem").read_bytes())
    der = utils.encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    certificate.public_key().verify(der, f"{header}.{claims}".encode(), ec.ECDSA(hashes.SHA256()))


def test_assertion_and_exchange_together_do_what_fetch_does(office):
    assertion = office.run("assertion").stdout
    done = office.run(
        "exchange", "--format", "header", stdin=assertion, environment={"SOFTHSM2_CONF": "/nonexistent"}
    )
    assert (done.status, done.stdout[:22]) == (0, "Authorization: Bearer ")


def test_exchange_refuses_an_assertion_for_somebody_else(office):
    assertion = office.run("assertion", "--client-id", "somebody").stdout
    done = office.run("exchange", stdin=assertion)
    assert (done.status, done.stdout) == (2, "")
    assert "somebody" in done.stderr


def test_keys_are_made_listed_proved_exported_and_deleted(scratch):
    thumbprint = scratch.run("key", "generate", "second").stdout.rstrip("\n")
    assert len(thumbprint) == 43
    listed = scratch.run("key", "list", "--json").json
    assert thumbprint in [each["thumbprint"] for each in listed if each["label"] == "second"]
    proof = scratch.run("key", "prove", "--key", "second", "--json").json
    assert proof["ok"] is True
    exported = {
        form: scratch.run("key", "export", "--key", "second", "--format", form).stdout
        for form in ("pem", "jwk", "jwks", "thumbprint")
    }
    assert exported["thumbprint"] == f"{thumbprint}\n"
    assert json.loads(exported["jwks"])["keys"][0]["kid"] == thumbprint
    assert exported["pem"].startswith("-----BEGIN PUBLIC KEY-----\n")
    assert scratch.run("key", "delete", "--key", "second").status == 2
    assert scratch.run("key", "delete", "--key", "second", "--thumbprint", "A" * 43).status == 5
    assert scratch.run("key", "delete", "--key", "second", "--thumbprint", thumbprint).status == 0
    assert scratch.run("key", "prove", "--key", "second").status == 5


def test_slots_lists_tokens_without_a_pin(office):
    found = office.run("slots", "--json", environment={"HSM_TOKEN_PIN_SOURCE": "file:/nonexistent"})
    labels = [each["token"]["label"] for each in found.json if each["token"]]
    assert (found.status, office.token.label in labels) == (0, True)


def test_config_show_tells_values_and_where_they_came_from(office):
    shown = office.run(
        "config", "show", "--json", "--lifetime", "9", environment={"HSM_TOKEN_SCOPE": "x"}
    ).json
    found = {name: (each["value"], each["from"]) for name, each in shown["settings"].items()}
    assert found["lifetime"] == (9, "option")
    assert found["scope"] == ("x", "environment")
    assert found["client-id"] == (CLIENT_ID, "profile")
    assert found["deadline"] == (60.0, "default")


def test_config_init_writes_a_private_file_that_works(office, tmp_path):
    target = tmp_path / "new" / "config.toml"
    options = [
        f"--{name}={office.profile[name]}"
        for name in ("client-id", "token-endpoint", "scope", "module", "token", "key")
    ]
    done = office.run("config", "init", "--config", str(target), "--profile", "new", *options)
    assert (done.status, target.stat().st_mode & 0o777) == (0, 0o600)
    source = {"HSM_TOKEN_PIN_SOURCE": f"file:{office.home}/pin"}
    done = office.run("fetch", "--no-cache", "--config", str(target), environment=source)
    assert (done.status, done.stderr) == (0, "")
    count, _, _ = office.run("audit", "head", "--config", str(target)).stdout.partition(":")
    assert int(count) >= 2
    before = target.read_text()
    again = office.run("config", "init", "--config", str(target), *options)
    assert (again.status, again.lines[0].endswith("nothing is overwritten")) == (2, True)
    assert again.lines[1] == "hint: --profile NAME adds another profile to it"
    again = office.run("config", "init", "--config", str(target), "--profile", "new", *options)
    assert (again.status, again.lines[0]) == (
        2,
        f"error: {target} has a profile 'new' already; nothing is overwritten",
    )
    assert target.read_text() == before


def test_config_init_adds_a_profile_below_those_that_are_there(office, tmp_path):
    target = tmp_path / "config.toml"
    init = ("config", "init", "--config", str(target), "--preset", "wipo-das-test")
    assert office.run(*init, "--profile", "das-test", "--key", "das-test-2026").status == 0
    before = target.read_text().replace("[profiles", "# a remark\n[profiles")
    target.write_text(before)
    added = office.run(*init, "--profile", "das", "--key", "das-2026")
    assert (added.status, added.lines[0]) == (0, f"added profile das to {target}")
    assert added.lines[1] == f"next: hsm-token doctor --offline --profile das --config {target}"
    after = target.read_text()
    assert after.startswith(before)
    keys = {name: each["key"] for name, each in tomllib.loads(after)["profiles"].items()}
    assert keys == {"das-test": "das-test-2026", "das": "das-2026"}
    assert target.stat().st_mode & 0o777 == 0o600


def test_config_init_writes_paths_that_mean_the_same_in_the_file(office, tmp_path, monkeypatch):
    here, module = tmp_path / "here", office.profile["module"]
    here.mkdir()
    monkeypatch.chdir(here)
    options = ("--pin-source", "file:pin", "--module", os.path.relpath(module, here), "--audit-log", "log")
    assert office.run("config", "init", "--config", "../there/config.toml", *options).status == 0
    written = tomllib.loads((tmp_path / "there/config.toml").read_text())["profiles"]["default"]
    assert written["pin-source"] == f"file:{here}/pin"
    assert written["audit-log"] == f"{here}/log"
    assert Path(written["module"]).is_absolute()
    assert Path(written["module"]).samefile(module)


def test_config_init_says_what_it_takes_from_the_environment(office, tmp_path):
    environment = {"HSM_TOKEN_SCOPE": "x", "HSM_TOKEN_KEY": "unused"}
    done = office.run(
        "config", "init", "--config", str(tmp_path / "new.toml"), "--key", "das", environment=environment
    )
    assert (done.status, done.lines[0]) == (
        0,
        "taken from the environment, into the file: HSM_TOKEN_SCOPE",
    )


def test_config_init_asks_at_a_terminal_until_each_answer_is_one(office, tmp_path):
    target = tmp_path / "config.toml"
    options = ["--config", str(target)]
    answers = {
        "PKCS#11 module: number or path [1]: ": "/nonexistent.so",
        "/nonexistent.so: No such file or directory": office.token.module,
        "service: number [1]: ": "5",
        "token endpoint (URL): ": "http://login.example/token",
        "login.example/token'\r\ntoken endpoint (URL): ": office.profile["token-endpoint"],
        "scope, if any: ": SCOPE,
        "client id: ": CLIENT_ID,
        "label of the key": "das",
        "where the PIN comes from": f"file:{office.home}/pin",
    }
    answers["token: number or label [1]: "] = office.token.label
    screen = at_a_terminal(office, ["config", "init", *options], answers)
    assert "https is needed" in screen
    assert "no PKCS#11 module /nonexistent.so" in screen
    done = office.run("fetch", "--no-cache", "--config", str(target))
    assert (done.status, done.stderr) == (0, "")


def test_config_init_asks_for_the_issuer_where_it_is_the_audience(office, tmp_path):
    target = tmp_path / "config.toml"
    given = office.profile | {"preset": "fapi2", "key": "das", "pin-source": "prompt"}
    names = ("preset", "client-id", "token-endpoint", "scope", "module", "token", "key", "pin-source")
    options = [f"--{name}={given[name]}" for name in names]
    issuer = "https://login.example"
    at_a_terminal(office, ["config", "init", "--config", str(target), *options], {"issuer (URL)": issuer})
    assert tomllib.loads(target.read_text())["profiles"]["default"]["issuer"] == issuer


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("key generate --key pkcs11:id=%01", "a new key needs a label"),
        ("key generate new --id 0x01", "--id '0x01' is not hexadecimal"),
        ("cert self-signed --out {home}/pin/cert.pem", "cannot write {home}/pin/cert.pem: Not a directory"),
        ("config init --config {home}/pin/config.toml", "cannot write {home}/pin/config.toml: "),
    ],
)
def test_what_cannot_be_named_or_written_is_said_with_status_2(office, command, said):
    done = office.run(*command.format(home=office.home).split())
    assert (done.status, done.stdout) == (2, "")
    assert done.lines[0].startswith("error: " + said.format(home=office.home))


@pytest.mark.parametrize("command", ["slots", "doctor --offline"])
def test_an_error_that_nobody_foresaw_is_told_without_its_text(office, tmp_path, command):
    broken = "import os\nraise RuntimeError(os.environ['TOLD'])\n"
    (tmp_path / "pkcs11.py").write_text(broken)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = office.run(*command.split(), environment={"PYTHONPATH": path, "TOLD": "19283746"})
    assert done.status == exits.UNEXPECTED
    assert "unexpected RuntimeError" in done.stdout + done.stderr
    assert "this is a bug: please report" in done.stdout + done.stderr
    assert "19283746" not in done.stdout + done.stderr


def test_the_version_is_that_of_the_package(office):
    done = office.run("--version")
    assert (done.status, done.stdout, done.stderr) == (0, f"hsm-token {hsm_signer.__version__}\n", "")


def test_cache_is_listed_without_tokens_and_cleared(scratch):
    token = scratch.run("fetch").stdout.strip()
    listed = scratch.run("cache", "list", "--json")
    assert [each["client_id"] for each in listed.json] == [CLIENT_ID]
    assert token not in listed.stdout
    assert scratch.run("cache", "clear").status == 0
    assert scratch.run("cache", "list", "--json").json == []


def a_text(path):
    path.write_text("no shared object")
    return str(path)


BAD_INPUT = {
    "no module": ({"module": "/nonexistent/module.so"}, 3, "/nonexistent/module.so"),
    "a file that is no module": ({"module": a_text}, 3, "module"),
    "no such token": ({"token": "pkcs11:token=nobody"}, 3, "nobody"),
    "several tokens": ({"token": "pkcs11:manufacturer=SoftHSM%20project"}, 3, "tokens"),
    "no such key": ({"key": "nothing"}, 5, "nothing"),
    "another key than the pinned one": ({"key-thumbprint": "A" * 43}, 5, "A" * 43),
    "an endpoint that is not https": ({"token-endpoint": "http://login.example/token"}, 2, "https"),
    "a server that is not there": (
        {"token-endpoint": "http://127.0.0.1:1/token", "deadline": 1},
        7,
        "127.0.0.1:1",
    ),
    "a server that refuses": ({"client-id": "nobody"}, 6, "invalid_client"),
    "a scope that is not granted": ({"scope": "everything"}, 6, "invalid_scope"),
    "a PIN source that is none": ({"pin-source": "magic:"}, 2, "pin-source"),
    "a PIN file that is missing": ({"pin-source": "file:/nonexistent"}, 2, "/nonexistent"),
    "no terminal to ask at": ({"pin-source": "prompt"}, 2, "terminal"),
    "an unknown claims set": ({"claims": "all"}, 2, "claims"),
    "a lifetime that no server takes": ({"lifetime": 5000}, 2, "lifetime"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_error_line_and_its_exit_status(scratch, new_token, tmp_path, name):
    settings, status, named = BAD_INPUT[name]
    settings = {
        key: value(tmp_path / "module.so") if callable(value) else value for key, value in settings.items()
    }
    if name == "several tokens":
        new_token()
    done = scratch.configure(**settings).run("fetch")
    assert (done.status, done.stdout) == (status, ""), done.stderr
    errors = [line for line in done.lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert "Traceback" not in done.stderr


def test_a_wrong_pin_is_one_try_and_then_none(new_token, tmp_path):
    wrong = offices.found(tmp_path, new_token(), **{"token-endpoint": "http://127.0.0.1:1/token"})
    (tmp_path / "pin").write_text(leaks.pin())
    first, second = wrong.run("key", "list"), wrong.run("key", "list")
    assert (first.status, second.status) == (4, 4)
    assert "CKR_PIN_INCORRECT" in first.stderr
    assert "--retry-pin" in second.stderr
    (tmp_path / "pin").write_text(wrong.token.pin)
    assert wrong.run("key", "list", "--retry-pin").status == 0
    assert wrong.run("key", "list").status == 0


def test_two_keys_with_one_label_are_listed_and_none_is_taken(new_token, tmp_path):
    two = offices.found(tmp_path, new_token(), **{"token-endpoint": "http://127.0.0.1:1/token"})
    for identifier in ("01", "02"):
        two.token.pkcs11_tool(
            "--keypairgen", "--key-type", "EC:prime256v1", "--label", "das", "--id", identifier
        )
    done = two.run("assertion")
    assert (done.status, done.stdout) == (5, "")
    assert "id=%01" in done.stderr
    assert "id=%02" in done.stderr


def test_audience_of_another_server_from_another_layer_is_refused_before_anything_is_asked(scratch):
    (scratch.home / "pin").unlink()
    for environment, options in (
        ({"HSM_TOKEN_AUDIENCE": "https://elsewhere.example/token"}, ()),
        ({}, ("--audience", "https://elsewhere.example/token")),
    ):
        for command in ("fetch", "assertion"):
            done = scratch.run(command, *options, environment=environment)
            assert (done.status, done.stdout) == (2, "")
            assert "elsewhere.example" in done.lines[0]


def test_wrong_usage_is_one_error_line_and_a_hint(office):
    done = office.run("fetch", "--pin", "1234")
    assert (done.status, done.stdout) == (2, "")
    assert [line[:27] for line in done.lines] == [
        "error: No such option: --pin"[:27],
        "hint: hsm-token fetch --help"[:27],
    ]
    assert "1234" not in done.stderr


def test_a_group_or_the_program_alone_shows_its_help_as_it_is(office):
    for words in ((), ("config",)):
        done = office.run(*words)
        assert (done.status, done.stdout) == (2, "")
        assert done.stderr == office.run(*words, "--help").stdout


def test_what_was_tried_is_listed_only_if_it_is_more_than_the_error_says(scratch):
    hopeless = {"token-endpoint": "http://127.0.0.1:1/token", "deadline": 0.2}  # less than the first pause
    done = scratch.configure(**hopeless).run("fetch")
    assert done.status == 7
    assert done.stderr.count("127.0.0.1:1") == 1


def test_a_hostile_file_in_the_working_directory_does_nothing(office, tmp_path):
    canary = tmp_path / "canary"
    settings = office.profile | {"pin-source": f"command:touch {canary}"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    for name in ("hsm-token.toml", "config.toml", "pyproject.toml"):
        (tmp_path / name).write_text("\n".join(["[profiles.default]", *lines, ""]))
        (tmp_path / name).chmod(0o600)
    environment = {name: value for name, value in office.environment.items() if name != "HSM_TOKEN_CONFIG"}

    def run(*arguments):
        command = office.command("fetch", "--no-cache", *arguments)
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    done = run()
    assert done.returncode == 2
    assert "no token-endpoint given" in done.stderr
    assert not canary.exists()
    run("--config", "config.toml")
    assert canary.exists()  # so it is a file that would have done something


UNUSABLE = {
    "a key's URI": ({}, ("--key", "pkcs11:objct=x"), "objct"),
    "no key": ({"key": None}, (), "no key given"),
    "no token": ({"token": None}, (), "no token given"),
    "a scope": ({"scope": "two  spaces"}, (), "scope"),
    "a lifetime": ({}, ("--lifetime", "99999"), "lifetime"),
    "an audience": ({}, ("--audience", "https://elsewhere.example/"), "elsewhere.example"),
    "a client id": ({"client-id": "Bücher"}, (), "client_id"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_setting_that_cannot_work_is_told_before_a_pin_or_a_connection(scratch, name):
    settings, options, named = UNUSABLE[name]
    (scratch.home / "pin").unlink()
    issuer = {"token-endpoint": None, "issuer": "https://127.0.0.1:1/nobody"}
    done = scratch.configure(**issuer, **settings).run("fetch", "--no-cache", *options)
    assert (done.status, done.stdout) == (2, "")
    assert named in done.lines[0]


def test_a_cached_access_token_does_not_hide_a_wrong_setting(scratch):
    assert scratch.run("fetch").status == 0
    done = scratch.run("fetch", "--lifetime", "99999")
    assert (done.status, done.stdout) == (2, "")
    assert "lifetime" in done.lines[0]


def test_a_new_key_is_not_made_on_another_token_than_its_uri_names(scratch):
    done = scratch.run("key", "generate", "pkcs11:token=other;object=elsewhere")
    assert (done.status, done.stdout) == (2, "")
    assert "token='other'" in done.lines[0]
    assert scratch.run("key", "prove", "--key", "elsewhere").status == 5


def test_config_init_reads_the_environment_and_names_no_variable_that_is_not_read(office, tmp_path):
    target = tmp_path / "config.toml"
    environment = {"HSM_TOKEN_CLIENT_ID": "from-variable", "HSM_TOKEN_PROFILE": "das", "HSM_TOKEN_SCOPE": "a"}
    done = office.run(
        "config",
        "init",
        "--config",
        str(target),
        "--scope",
        "b",
        environment=environment | {"HSM_TOKEN_KEY": ""},
    )
    assert done.status == 0
    profile = tomllib.loads(target.read_text())["profiles"]["das"]
    log = str(office.home / "state/hsm-token/audit.jsonl")
    assert profile == {"client-id": "from-variable", "scope": "b", "audit-log": log}
    shown = office.run("config", "init", "--help").stdout
    assert "HSM_TOKEN_CLIENT_ID" in shown
    assert "HSM_TOKEN_PRESET" not in shown


def test_slots_show_the_mechanisms_that_matter_and_all_of_them_as_json(office):
    line = next(line for line in office.run("slots").stdout.splitlines() if office.token.label in line)
    assert {"ECDSA", "EC_KEY_PAIR_GEN"} <= set(line.split("\t")[-1].split())
    slots = office.run("slots", "--json").json
    assert "SHA256" in next(slot for slot in slots if slot["token"])["mechanisms"]


def test_every_command_can_be_verbose_and_quiet():
    from typer.main import get_command

    from hsm_signer.cli.program import application

    def leaves(command):
        below = getattr(command, "commands", None)
        return [command] if below is None else [leaf for each in below.values() for leaf in leaves(each)]

    for command in leaves(get_command(application())):
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"-v", "-q"} <= options, command.name


def test_ctrl_c_ends_with_130_and_no_words(office, tmp_path):
    fifo = tmp_path / "started"
    waiting = office.command(
        "fetch", "--no-cache", "--pin-source", f"command:sh -c 'touch {fifo}; exec sleep 60'"
    )
    environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
    process = subprocess.Popen(
        waiting,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not fifo.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr


def test_a_closed_pipe_is_quiet(office):
    reading, writing = os.pipe()
    os.close(reading)
    environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
    command = office.command("config", "show")
    done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 141
    assert "Broken" not in done.stderr
    assert "Traceback" not in done.stderr


def test_verbose_tells_that_an_access_token_was_kept(scratch):
    scratch.run("fetch")
    (line,) = scratch.run("fetch", "-v").lines
    assert "an access token is kept in" in line


def test_verbose_shows_steps_and_no_secret(scratch):
    done = scratch.run("fetch", "-vv")
    token = done.stdout.strip()
    assert "logged in" in done.stderr
    assert token not in done.stderr
    assert token.split(".")[2] not in done.stderr


@pytest.mark.parametrize(
    "command", ["", "fetch", "key", "key generate", "cert self-signed", "config init", "rehearse"]
)
def test_help_is_there_and_shows_no_default_secret(office, command):
    done = office.run(*command.split(), "--help")
    assert done.status == 0
    assert done.stdout.startswith(f"Usage: hsm-token {command}".rstrip())


def test_every_command_has_an_example_in_its_help():
    from typer.main import get_command

    from hsm_signer.cli.program import application

    def leaves(command, name=""):
        below = getattr(command, "commands", None)
        if below is None:
            yield name, command
        else:
            for word, each in below.items():
                yield from leaves(each, f"{name} {word}")

    found = dict(leaves(get_command(application()), "hsm-token"))
    assert len(found) > 10
    assert [name for name, each in found.items() if f"Example: {name}" not in (each.help or "")] == []
