"""What makes commands fast, as counts and names: no test here looks at a clock (benchmarks/ does)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint import Endpoint, Reply
from faults import FaultyModule
from office import Office

ONLY_A_MISS_NEEDS = {
    *("hsm_signer.assertion", "hsm_signer.hsm", "hsm_signer.jose", "hsm_signer.pin"),
    *("hsm_signer.oauth.client", "hsm_signer.oauth.transport", "hsm_signer.validity", "hsm_signer.x509"),
    *("email", "http", "ssl", "secrets"),
}
NO_FETCH_NEEDS = {
    *(
        "requests",
        "charset_normalizer",
        "filelock",
        "rich",
        "joserfc",
        "authlib",
        "flask",
        "keyring",
        "httpx",
    ),
    *("hsm_signer.doctor", "hsm_signer.enrolment", "hsm_signer.rollover", "hsm_signer.verify"),
    "hsm_signer.audit",  # unless a log is named
}


@pytest.fixture
def scratch(tls_office: Office, endpoint: Endpoint, tmp_path: Path) -> Office:
    """An office of its own with a quick server; it names all directories, so nothing has to be looked for."""
    places = {"cache": str(tmp_path / "cache"), "state_dir": str(tmp_path / "state")}
    return tls_office.copy(tmp_path).configure(token_endpoint=endpoint.url, **places)


def imported(office: Office, *options: str) -> set[str]:
    """The modules that ``hsm-token fetch`` imports, and the packages that they are in."""
    command = office.command("fetch", "--config", str(office.config), *options)
    program = [sys.executable, "-X", "importtime", *command[1:]]
    done = subprocess.run(program, env=office.environment, capture_output=True, text=True)
    assert done.stdout == "access-token-canary\n", done.stderr
    modules = re.findall(r"\| +([\w.]+)\n", done.stderr)
    return {".".join(parts[:n]) for module in modules for parts in [module.split(".")] for n in range(1, 9)}


def test_a_cached_fetch_imports_nothing_that_a_miss_alone_needs(scratch: Office) -> None:
    with scratch.config.open("a") as profile:
        profile.write('audit-log = "audit.jsonl"\naudit-syslog = true\n')
    assert scratch.run("fetch").status == 0
    assert (scratch.home / "audit.jsonl").exists()
    assert imported(scratch) & (ONLY_A_MISS_NEEDS | NO_FETCH_NEEDS) == set()


def test_a_fetch_imports_no_command_but_its_own(scratch: Office) -> None:
    ours = {name for name in imported(scratch, "--no-cache") if name.startswith("hsm_signer.cli.")}
    shared = ("streams", "program", "exits", "interrupt", "options", "terminal")
    assert ours - {"hsm_signer.cli.fetch"} == {f"hsm_signer.cli.{name}" for name in shared}


def test_a_cold_fetch_imports_nothing_that_no_fetch_needs(scratch: Office) -> None:
    found = imported(scratch, "--no-cache")
    assert found & NO_FETCH_NEEDS == set()
    assert found >= ONLY_A_MISS_NEEDS  # these names are still the names of what is there


def test_an_audit_log_costs_a_cold_fetch_its_own_module_alone(scratch: Office) -> None:
    without = imported(scratch, "--no-cache")
    log = f"--audit-log={scratch.home}/audit.jsonl"
    own = {"hsm_signer.audit", "contextvars", "_contextvars"}  # the last two are built into Python
    assert imported(scratch, "--no-cache", log) - without == own


@pytest.mark.parametrize("stored", [False, True], ids=["", "stored"])
@pytest.mark.parametrize(
    "settings", [{}, {"certificate": None, "key_thumbprint": None}], ids=["full", "plain"]
)
def test_a_cold_fetch_calls_the_module_at_most_42_times(
    settings: dict[str, object], stored: bool, scratch: Office, faulty: FaultyModule
) -> None:
    if stored:
        assert scratch.run("cert", "import", str(scratch.home / "es256_cert.pem")).status == 0
    try:
        done = scratch.configure(module=faulty.path, **settings).run("fetch", "--no-cache")
    finally:
        if stored:
            scratch.token.pkcs11_tool("--delete-object", "--type", "cert", "--label", "das")
    assert (done.status, done.stderr) == (0, "")
    per_slot = {"C_GetSlotInfo", "C_GetTokenInfo"}  # the tests' SoftHSM has many tokens, an office's a few
    assert len([call for call in faulty.log() if call.function not in per_slot]) <= 42 - 2 * len(per_slot)
    assert faulty.calls("C_SignInit") == 1


def test_a_refusal_is_explained_without_a_signature(
    scratch: Office, endpoint: Endpoint, faulty: FaultyModule
) -> None:
    endpoint.answer = Reply(401, {"error": "invalid_client"})
    refused = scratch.configure(module=faulty.path, token_endpoint=endpoint.url)
    done = refused.run("fetch", "--no-cache")
    assert done.status == 6
    assert str(scratch.profile["key-thumbprint"]) in done.stderr
    assert faulty.calls("C_SignInit") == 1


def test_a_command_ends_without_a_look_for_garbage() -> None:
    program = """
import gc, sys
looks = []
gc.callbacks.append(lambda phase, info: looks.append(phase))
sys.argv = ["hsm-token", "config", "presets"]
from hsm_signer.cli import main
looks.clear()
try:
    main()
finally:
    print(len(looks), gc.get_freeze_count() > 0, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "0 True\n")
