"""The rehearsal server over https: WIPO's assertion from a key in a token, by the whole command."""

import time
from pathlib import Path

import pytest
from office import SCOPE, Office


@pytest.mark.parametrize("found_by", ["token_endpoint", "issuer"])
def test_the_command_fetches_from_it(tls_office: Office, tmp_path: Path, found_by: str) -> None:
    office = tls_office.copy(tmp_path)
    other = {"token_endpoint": "issuer", "issuer": "token_endpoint"}[found_by]
    done = office.configure(**{other: None}).run("fetch", "--format", "json")
    assert (done.status, done.stderr) == (0, "")
    assert done.json["scope"] == SCOPE
    assert 3500 < done.json["expires_at"] - time.time() <= 3599
    assert done.json["access_token"].count(".") == 2
    again = office.run("fetch", "--format", "json")
    assert again.json == done.json


def test_what_the_issuer_published_is_kept_with_the_access_token(tls_office: Office, tmp_path: Path) -> None:
    office = tls_office.copy(tmp_path).configure(token_endpoint=None, cache=str(tmp_path / "kept"))
    assert office.run("fetch", "--no-cache").status == 0
    assert not (tmp_path / "kept").exists()
    first = office.run("fetch")
    assert first.status == 0
    assert sorted(path.suffix for path in (tmp_path / "kept").iterdir()) == [".lock", ".metadata", ".token"]
    (tmp_path / "ca.pem").write_bytes(Path(str(tls_office.profile["ca-bundle"])).read_bytes())
    assert office.run("fetch", "-v").stdout == first.stdout
    assert "looking for the metadata" not in office.run("fetch", "-vv").stderr
    assert (
        "looking for the metadata"
        in office.run("fetch", "-vv", "--ca-bundle", str(tmp_path / "ca.pem")).stderr
    )
