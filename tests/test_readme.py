"""What the README shows is what happens."""

import os
import re
import subprocess
from pathlib import Path

import manual
import pytest
from manual import CHECKOUT, Desk, blocks, printed_as, protected_api, sit_down
from test_softhsm_setup import checkout  # noqa: F401  # a fixture


@pytest.fixture
def desk(tmp_path: Path, softhsm_module: str) -> Desk:
    return sit_down(tmp_path, softhsm_module)


def test_the_library_example_logs_in_and_sends_the_access_token_to_the_api(desk: Desk) -> None:
    from hsm_signer.rehearsal import RehearsalServer

    options = f"--module {manual.MODULE} --token office --key das-2026 --pin-source file:{manual.PIN_FILE}"
    made = desk.type(
        [
            f"hsm-token key generate {options}",
            f"hsm-token cert self-signed {options} --client-id das-api-auth --out cert.pem",
        ]
    )
    (example,) = [block for block in blocks(CHECKOUT / "README.md") if block.runs]
    with (
        RehearsalServer({"das-api-auth": desk.home / "cert.pem"}) as server,
        protected_api() as (api, authorizations),
    ):
        done = desk.run_python(example.text, MODULE=desk.module, ENDPOINT=server.token_endpoint, API=api)
    assert (done.returncode, done.stderr) == (0, ""), made
    (authorization,) = authorizations
    assert authorization
    assert authorization.startswith("Bearer ey")


def test_the_demo_prints_what_the_readme_shows(checkout: Path, tmp_path: Path) -> None:  # noqa: F811  # a fixture
    shown = next(block for block in blocks(CHECKOUT / "README.md") if "hsm-token rehearse" in block.text)
    done = subprocess.run(
        [str(checkout / "softhsm-setup"), "demo"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    # What is another one in each run: thumbprint, port, access token
    variable = r"^[\w-]{43}$|(?<=--port )\d+|(?<=127\.0\.0\.1:)\d+|^ey\S+"
    expected = re.sub(variable, "…", shown.text, flags=re.MULTILINE)
    start = done.stdout.index("$ .venv/bin/hsm-token key generate")
    assert printed_as(expected, done.stdout[start:]), done.stdout
