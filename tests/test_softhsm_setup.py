"""``softhsm-setup`` in a copy of the checkout; installing aside, everything is real."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

CHECKOUT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose packages are installed: its .venv hands on to the Python of the tests."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("hsm_signer", "scripts", "requirements"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("softhsm-setup", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(CHECKOUT / name, copy / name)
    programs = {"python": '"$@"', "hsm-token": '-m hsm_signer.cli "$@"'}
    (copy / ".venv/bin").mkdir(parents=True)
    for name, rest in programs.items():
        program = copy / ".venv/bin" / name
        program.write_text(f"#!/bin/sh\nPYTHONPATH={copy} exec {sys.executable} {rest}\n")
        program.chmod(0o755)
    (copy / ".venv/bin/pip").write_text(f"#!{copy}/.venv/bin/python\n")
    stamps = "of_lock requirements/demo.txt >.venv/demo.txt.stamp; of_wheel >.venv/wheel.stamp"
    subprocess.run(["bash", "-euc", f". scripts/install.sh; {stamps}"], cwd=copy, check=True)
    return copy


@pytest.fixture
def run(checkout: Path, tmp_path: Path) -> Run:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)

    def run(*words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
        command = [str(checkout / "softhsm-setup"), *words]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert not list(home.iterdir())
        return done

    return run


def profile(checkout: Path) -> dict[str, str]:
    return tomllib.loads((checkout / "hsm-token.toml").read_text())["profiles"]["demo"]


def access_tokens(output: str) -> list[str]:
    return re.findall(r"^ey[\w-]+\.ey[\w-]+\.[\w-]+$", output, re.MULTILINE)


def test_demo_ends_with_an_access_token_also_on_a_taken_port_the_second_time(
    checkout: Path, run: Run
) -> None:
    first = run("demo").stdout
    assert len(access_tokens(first)) == 1
    for command in ("key generate", "key prove", "cert self-signed", "rehearse", "fetch"):
        assert f"$ .venv/bin/hsm-token {command} " in first
    assert "fetch --config hsm-token.toml --profile demo\n" in first
    made = profile(checkout)

    port = int(re.search(r":(\d+)/", made["token-endpoint"])[1])
    with socket.create_server(("127.0.0.1", port)):
        second = run("demo").stdout
    assert access_tokens(second) != access_tokens(first)
    assert re.search(r"fetch .* --token-endpoint http://127\.0\.0\.1:\d+/am/oauth2/access_token\n", second)
    assert "key generate" not in second
    assert profile(checkout) == made

    pins = [(checkout / ".softhsm" / name).read_text() for name in ("pin", "so-pin")]
    assert not [pin for pin in pins if len(pin) < 8 or pin in first + second]


def test_setup_pins_key_and_token_and_keeps_everything_private(checkout: Path, run: Run) -> None:
    done = run()
    assert "fetch --config hsm-token.toml --profile demo" in done.stdout
    found = profile(checkout)
    assert re.fullmatch(r"[\w-]{43}", found["key-thumbprint"])
    assert re.fullmatch(r"pkcs11:token=demo;serial=[0-9a-f]{16}", found["token"])
    assert found["module-env"]["SOFTHSM2_CONF"] == str(checkout / ".softhsm/softhsm2.conf")
    for path in ("hsm-token.toml", ".softhsm/pin", ".softhsm/so-pin", found["audit-log"]):
        assert (checkout / path).stat().st_mode & 0o777 == 0o600
    assert (checkout / ".softhsm").stat().st_mode & 0o777 == 0o700
    certificate = x509.load_pem_x509_certificate((checkout / found["certificate"]).read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=das-api-auth private_key_jwt authentication"

    log = (checkout / found["audit-log"]).read_text()
    intents = [json.loads(line).get("intent") for line in log.splitlines()]
    assert {"key generation", "certificate"} <= set(intents)

    before = (checkout / "hsm-token.toml").read_bytes()
    assert "already" in run().stdout
    assert (checkout / "hsm-token.toml").read_bytes() == before


def test_a_setup_that_was_cut_short_is_done_again_and_all_of_it_can_be_removed(
    checkout: Path, run: Run
) -> None:
    before = {path.name for path in checkout.iterdir()}
    (checkout / ".softhsm/tokens/half").mkdir(parents=True)
    (checkout / "hsm-token.toml").write_text("# Made by softhsm-setup\n\n[profiles.demo]\n")
    run()
    assert "key-thumbprint" in profile(checkout)
    run("clean")
    assert {path.name for path in checkout.iterdir()} == before - {".venv"}
    run("clean")


def test_a_profile_of_somebody_else_stays(checkout: Path, run: Run) -> None:
    (checkout / "hsm-token.toml").write_text("[profiles.das]\n")
    assert "error: hsm-token.toml" in run(status=1).stderr
    run("clean")
    assert (checkout / "hsm-token.toml").read_text() == "[profiles.das]\n"


def test_help_explains_and_another_word_is_refused(run: Run) -> None:
    explained = run("--help").stdout
    assert all(word in explained for word in ("demo", "clean", ".softhsm"))
    assert run("dmeo", status=2).stderr == explained
