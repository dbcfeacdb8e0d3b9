"""idpyoidc (and cryptojwt below it) takes our assertions, WIPO's minimal one too."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsm_signer import ClientAssertion, TokenClient, enrolment
from hsm_signer.errors import OAuthError
from hsm_signer.oauth.metadata import ServerMetadata, discover
from hsm_signer.oauth.transport import Transport
from interop import ServerProcess
from interop.conftest import Office

pytestmark = pytest.mark.xdist_group("idpyoidc")

SCOPE = "das-api/das-access"


@pytest.fixture(scope="module")
def provider(
    office: Office,
    server_files: dict[str, str],
    server_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    config = json.dumps({"tls": server_files, "certificates": office.files(enrolment.CERTIFICATE)})
    log = tmp_path_factory.mktemp("idpyoidc") / "stderr.log"
    script = str(Path(__file__).with_name("idpyoidc_server.py"))
    with ServerProcess([sys.executable, script, config], log, server_environment) as process:
        yield process


@pytest.fixture
def fetch(provider: ServerProcess, office: Office, ca_bundle: str) -> Callable[..., object]:
    provider.said.clear()
    endpoint = f"{provider.up['issuer']}/token"

    def fetch(client_id: str = "one-key", *, audience: str = endpoint, key: str = "k1", **claims: object):
        assertion = ClientAssertion(client_id, audience, **claims)
        signer = getattr(office, key)
        client = TokenClient(endpoint, assertion=assertion, signer=signer, scope=SCOPE, ca_bundle=ca_bundle)
        return client.fetch()

    return fetch


def why(provider: ServerProcess) -> str:
    """Why the server refused, from its log."""
    give_up = time.monotonic() + 60
    while not provider.said and time.monotonic() < give_up:
        time.sleep(0.01)
    return provider.said.pop(0)["refused"]


@pytest.mark.parametrize("claims", ["minimal", "oidc"])
def test_it_grants_to_a_registered_certificate(fetch: Callable[..., object], claims: str) -> None:
    response = fetch(claims=claims)
    assert (response.token_type, response.scope) == ("Bearer", SCOPE)
    assert 590 <= response.expires_at - time.time() <= 600
    assert response.access_token.count(".") == 2


def test_it_takes_each_of_two_keys_under_its_kid(
    fetch: Callable[..., object], provider: ServerProcess
) -> None:
    for key in ("k1", "k2"):
        assert fetch("two-keys", key=key, kid=key, claims="oidc").access_token
    with pytest.raises(OAuthError, match="invalid_client"):
        fetch("two-keys", key="k1", kid="k2")
    assert why(provider)


@pytest.mark.parametrize("wrong", [{"audience": "https://other.example/token"}, {"key": "k2"}])
def test_it_refuses_what_is_not_for_it_or_not_by_the_registered_key(
    fetch: Callable[..., object], provider: ServerProcess, wrong: dict[str, str]
) -> None:
    with pytest.raises(OAuthError, match="invalid_client: ") as caught:
        fetch(**wrong)
    assert caught.value.status == 401
    assert ("Not for me" in why(provider)) == ("audience" in wrong)


def test_its_metadata_is_found_where_rfc_8414_puts_it(provider: ServerProcess, ca_bundle: str) -> None:
    issuer = provider.up["issuer"]
    found = discover(issuer, Transport(ca_bundle), deadline=time.monotonic() + 60)
    assert found == ServerMetadata(issuer, f"{issuer}/token", f"{issuer}/jwks.json")
