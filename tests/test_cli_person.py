"""What a person meets: words in any locale, tables in any width, times, and where we wait for one who types."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import office as offices
import pytest
from conftest import SoftToken
from endpoint import GRANT, Endpoint, Reply
from office import Office
from test_cli_terminal import on_a_terminal, with_terminal

ASCII = {"PYTHONIOENCODING": "ascii"}
C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # else Python makes UTF-8 of it


@pytest.fixture(scope="module")
def abroad(new_token: Callable[..., SoftToken], tmp_path_factory: pytest.TempPathFactory) -> Office:
    """An office whose token and key have names that ASCII has no letters for."""
    home = tmp_path_factory.mktemp("abroad")
    made = offices.found(home, new_token("Büro-€"), key="Schlüssel")
    made = made.configure(token="Büro-€", token_endpoint="https://as.test/token")
    assert made.run("key", "generate", "Schlüssel").status == 0
    return made


@pytest.mark.parametrize("locale", [ASCII, C], ids=["ascii", "C"])
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--help",), 0, "hsm-token config init"),
        (("fetch", "--help"), 0, "--min-validity"),
        (("slots",), 0, r"B\xfcro-\u20ac"),
        (("key", "list"), 0, r"Schl\xfcssel"),
        (("config", "show"), 0, r"Schl\xfcssel"),
        (("doctor", "--offline", "--login"), 0, "pkcs11:token=B%C3%BCro-%E2%82%AC;serial="),
        (("key", "export", "--key", "größer"), 5, r"gr\xf6\xdfer"),
        (("fetch", "--prófile", "x"), 2, r"--pr\xf3file"),
    ],
)
def test_no_locale_keeps_us_from_speaking(
    abroad: Office, locale: dict[str, str], arguments: tuple[str, ...], status: int, said: str
) -> None:
    command, environment = abroad.command(*arguments), abroad.environment
    environment |= {"HSM_TOKEN_CONFIG": str(abroad.config), "PYTHONIOENCODING": "utf-8"} | locale
    if locale is C:
        del environment["PYTHONIOENCODING"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    printed = (done.stdout + done.stderr).decode("ascii" if arguments[-1] != "--help" else "utf-8")
    if locale is C and "größer" in arguments:
        status = 2  # what the shell gave us is no text there
    assert (done.returncode, "unexpected" in printed) == (status, False), printed
    if locale is ASCII:
        assert said in printed


def test_a_table_in_ascii_is_drawn(abroad: Office) -> None:
    screen = on_a_terminal(abroad, "key", "list", **ASCII)
    assert r"Schl\xfcssel" in screen and screen.isascii()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_what_a_person_copies_is_in_one_piece_however_narrow_the_terminal(
    office: Office, columns: int
) -> None:
    [key] = office.run("key", "list", "--json").json
    screen = on_a_terminal(office, "key", "list", COLUMNS=str(columns))
    assert key["thumbprint"] in screen and key["id"] in screen
    assert office.profile["module"] in on_a_terminal(office, "config", "show", COLUMNS=str(columns))


def test_a_wish_that_no_access_token_fulfils_is_told_once(office: Office, tmp_path: Path) -> None:
    with Endpoint(None, Reply(body=GRANT | {"expires_in": 300})) as server:
        short = offices.found(tmp_path, office.token, **{"token-endpoint": server.url, "scope": None})
        done = short.run("fetch", "--min-validity", "600")
        assert (done.status, done.stdout) == (0, f"{GRANT['access_token']}\n")
        [line] = done.lines
        assert re.match(
            "warning: the access token lives (300|299) s, fewer than the 600 of --min-validity", line
        )
        assert short.run("fetch").stderr == short.run("fetch", "--min-validity", "600", "-q").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("exchange",), "a client assertion"),
        (("verify", "--issuer", "https://as.test", "--audience", "x"), "an access token"),
    ],
)
def test_who_has_to_type_is_told_so(office: Office, arguments: tuple[str, ...], what: str) -> None:
    stdout, screen, status = with_terminal(office, *arguments, answers=[("Ctrl-D", 0, "\x04\x04")])
    assert (stdout, status) in (("", 2), ("", 8)), screen
    assert f"hsm-token: reading {what} from the terminal; end with Ctrl-D" in screen
    assert "reading" not in office.run(*arguments).stderr


def test_times_are_text_for_a_person_and_numbers_for_a_program(tls_office: Office) -> None:
    access_token = tls_office.run("fetch").stdout
    verify = ("verify", "--audience", offices.CLIENT_ID)
    claims = tls_office.run(*verify, "--json", stdin=access_token).json
    printed = dict(
        line.split("\t") for line in tls_office.run(*verify, stdin=access_token).stdout.splitlines()
    )
    assert type(claims["exp"]) is int
    for name in ("exp", "iat", "nbf"):
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", printed[name])
    granted = next(line for line in tls_office.run("fetch", "-v", "--force").lines if "granted" in line)
    assert re.search(r"until 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$", granted)


def test_versions_in_json_are_text(office: Office) -> None:
    slots = office.run("slots", "--json").json
    token = next(slot["token"] for slot in slots if slot["token"])
    assert re.fullmatch(r"\d+\.\d+", token["hardware_version"])
    assert re.fullmatch(r"\d+\.\d+", token["firmware_version"])


def test_config_init_keeps_the_answers_when_a_module_does_not_load(office: Office, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no shared object")
    new = tmp_path / "new.toml"
    answers = [
        ("service", 0, "1"),
        ("client id", 0, "das-api-auth"),
        ("PKCS#11 module", 0, str(broken)),
        ("broken.so", 1.0, office.profile["module"]),
        ("token: number or label", 0, ""),
        ("label of the key", 0, ""),
        ("where the PIN comes from", 0, ""),
    ]
    _, screen, status = with_terminal(office, "config", "init", "--config", str(new), answers=answers)
    assert status == 0, screen
    assert screen.count("client id") == 1
    assert re.search(r"hsm-token: .*broken\.so", screen)
    assert json.dumps(office.profile["module"]) in new.read_text()


def test_a_module_or_a_configuration_file_that_others_could_replace_is_refused(
    office: Office, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shutil.copy(office.profile["module"], shared / "module.so")
    scratch = offices.found(tmp_path, office.token)
    config = shared / "config.toml"
    config.write_bytes(scratch.config.read_bytes())
    config.chmod(0o600)
    commands = (("slots", "--module", str(shared / "module.so")), ("config", "show", "--config", str(config)))
    for arguments in commands:
        shared.chmod(0o755)
        assert scratch.run(*arguments).status == 0
        shared.chmod(0o777)
        done = scratch.run(*arguments)
        assert (done.status, done.stdout) == (2, "")
        assert done.lines == [
            f"error: {shared} has mode 0777: other users could put another file into it",
            f"hint: chmod 0755 {shared}",
        ]
    environment = {"XDG_CONFIG_HOME": str(shared), "HSM_TOKEN_CONFIG": ""}
    assert scratch.run("config", "show", environment=environment).status == 0  # where none is, none was put
