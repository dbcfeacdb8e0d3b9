"""What the README shows is what happens."""

from pathlib import Path

import manual
import pytest
from manual import CHECKOUT, Desk, blocks, protected_api, sit_down


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
