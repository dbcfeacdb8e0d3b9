"""oidc-provider, a certified server that insists on ``jti``, over https with a private CA."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from hsm_signer import ClientAssertion, TokenClient, enrolment
from hsm_signer.errors import OAuthError
from hsm_signer.jose import Signer
from hsm_signer.oauth.metadata import ServerMetadata, discover
from hsm_signer.oauth.transport import Transport
from interop import ServerProcess
from interop.conftest import Office

pytestmark = pytest.mark.xdist_group("oidc-provider")

HERE = Path(__file__).parent
SCOPE = "das-api/das-access"


@pytest.fixture(scope="module")
def provider(
    office: Office,
    server_files: dict[str, str],
    server_environment: dict[str, str],
    ca_bundle: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    node = shutil.which("node")
    assert node, "Node is not installed: tests/run installs it"
    assert (HERE / "node_modules/oidc-provider").is_dir(), "not installed: tests/run does it (npm ci)"
    config = json.dumps(
        {
            "tls": server_files,
            "certificates": office.files(enrolment.CERTIFICATE),
            "keySets": list(office.files(enrolment.JWKS).values()),
        }
    )
    log = tmp_path_factory.mktemp("oidc-provider") / "stderr.log"
    environment = server_environment | {"NODE_EXTRA_CA_CERTS": ca_bundle}
    with ServerProcess([node, str(HERE / "oidc-provider.mjs"), config], log, environment) as process:
        yield process


@pytest.fixture
def reason(provider: ServerProcess) -> Iterator[Callable[[], str]]:
    """Why the server refused, in words that it does not send; a refusal that a test did not look at fails it."""

    def reason() -> str:
        give_up = time.monotonic() + 60
        while not provider.said and time.monotonic() < give_up:
            time.sleep(0.01)
        return provider.said.pop(0)["refused"]

    yield reason
    assert provider.said == []


@pytest.fixture
def transport(ca_bundle: str) -> Transport:
    return Transport(ca_bundle)


def found(issuer: str, transport: Transport) -> ServerMetadata:
    return discover(issuer, transport, deadline=time.monotonic() + 60)


def client(
    endpoint: str, assertion: ClientAssertion, signer: Signer, ca_bundle: str, scope: str = SCOPE
) -> TokenClient:
    return TokenClient(endpoint, assertion=assertion, signer=signer, scope=scope, ca_bundle=ca_bundle)


def introspected(issuer: str, access_token: str, ca_bundle: str) -> dict[str, Any]:
    """What the server says about an access token of its own (RFC 7662), asked by a resource server."""
    answer = requests.post(
        f"{issuer}/token/introspection",
        data={"token": access_token},
        auth=("rs", "rs-secret"),
        verify=ca_bundle,
        timeout=60,
    )
    assert answer.status_code == 200
    return answer.json()


def test_it_grants_to_a_registered_certificate(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    issuer = provider.up["issuers"]["plain"]
    endpoint = f"{issuer}/token"
    assertion = ClientAssertion("one-key", endpoint, claims="oidc")
    response = client(endpoint, assertion, office.k1, ca_bundle).fetch()
    assert (response.token_type, response.scope) == ("Bearer", SCOPE)
    assert response.expires_at
    assert 590 <= response.expires_at - time.time() <= 600
    said = introspected(issuer, response.access_token, ca_bundle)
    assert (said["active"], said["client_id"], said["scope"]) == (True, "one-key", SCOPE)


def test_it_takes_the_issuer_as_audience(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    issuer = provider.up["issuers"]["plain"]
    assertion = ClientAssertion("one-key", issuer, claims="oidc")
    assert client(f"{issuer}/token", assertion, office.k1, ca_bundle).fetch().access_token


def test_under_fapi_2_it_takes_the_issuer_as_audience_and_nothing_else(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    issuer = provider.up["issuers"]["fapi"]
    endpoint = f"{issuer}/token"
    assertion = ClientAssertion("one-key", issuer, claims="oidc")
    assert client(endpoint, assertion, office.k1, ca_bundle).fetch().access_token
    assertion = ClientAssertion("one-key", endpoint, claims="oidc")
    with pytest.raises(OAuthError) as caught:
        client(endpoint, assertion, office.k1, ca_bundle).fetch()
    assert (caught.value.error, caught.value.status) == ("invalid_client", 401)
    assert repr(endpoint) in str(caught.value.hint)
    assert "aud" in reason()


def test_of_two_keys_the_kid_names_the_one(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    endpoint = f"{provider.up['issuers']['plain']}/token"
    for kid, signer in (("k1", office.k1), ("k2", office.k2)):
        assertion = ClientAssertion("two-keys", endpoint, claims="oidc", kid=kid)
        assert client(endpoint, assertion, signer, ca_bundle).fetch().access_token
    assertion = ClientAssertion("two-keys", endpoint, claims="oidc", kid="k2")
    with pytest.raises(OAuthError, match="invalid_client"):
        client(endpoint, assertion, office.k1, ca_bundle).fetch()
    assert "signature verification failed" in reason()


@pytest.mark.parametrize("kid", [True, False])
def test_both_keys_of_the_exported_key_sets_are_taken_with_and_without_their_kid(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str], kid: bool
) -> None:
    endpoint = f"{provider.up['issuers']['plain']}/token"
    for signer in (office.k1, office.k2):
        assertion = ClientAssertion("key-sets", endpoint, claims="oidc", kid=kid)
        assert client(endpoint, assertion, signer, ca_bundle).fetch().access_token


@pytest.mark.parametrize("client_id", ["one-key", "two-keys"])
def test_a_kid_that_the_server_was_not_told_is_refused_and_named_among_the_causes(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str], client_id: str
) -> None:
    endpoint = f"{provider.up['issuers']['plain']}/token"
    assertion = ClientAssertion(client_id, endpoint, claims="oidc", kid=True)
    with pytest.raises(OAuthError, match="invalid_client") as caught:
        client(endpoint, assertion, office.k1, ca_bundle).fetch()
    assert f"the server does not know kid {office.k1.kid!r}" in str(caught.value.hint)
    assert "no applicable key" in reason()


def test_a_key_that_is_not_registered_is_refused_and_named_first(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    endpoint = f"{provider.up['issuers']['plain']}/token"
    assertion = ClientAssertion("one-key", endpoint, claims="oidc")
    with pytest.raises(OAuthError, match="invalid_client") as caught:
        client(endpoint, assertion, office.k2, ca_bundle).fetch()
    assert re.search(
        f"1. the certificate of the key .*{office.k2.kid} is not registered", str(caught.value.hint)
    )
    assert "signature verification failed" in reason()


def test_it_fetches_the_key_of_a_client_that_registered_a_jwks_uri(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    endpoint = f"{provider.up['issuers']['plain']}/token"
    assertion = ClientAssertion("jwks-uri", endpoint, claims="oidc", kid="k1")
    assert client(endpoint, assertion, office.k1, ca_bundle).fetch().access_token


def test_wipos_exact_assertion_is_refused_in_its_own_words(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    endpoint = f"{provider.up['issuers']['plain']}/token"
    with pytest.raises(OAuthError) as caught:
        client(endpoint, ClientAssertion("one-key", endpoint), office.k1, ca_bundle).fetch()
    error = caught.value
    assert (error.error, error.status) == ("invalid_client", 401)
    assert error.description == "client authentication failed"
    assert "invalid_client: client authentication failed" in str(error)
    assert "jti" in reason()


def test_an_assertion_is_taken_once(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    endpoint = f"{provider.up['issuers']['plain']}/token"
    assertion = ClientAssertion("one-key", endpoint, claims="oidc")
    exchanging = client(endpoint, assertion, office.k1, ca_bundle)
    issued = assertion.issue(office.k1)
    assert exchanging.exchange(issued).access_token
    with pytest.raises(OAuthError, match="invalid_client"):
        exchanging.exchange(issued)
    assert "only be used once" in reason()


def test_a_scope_that_the_client_may_not_have_is_refused_by_name(
    provider: ServerProcess, office: Office, ca_bundle: str, reason: Callable[[], str]
) -> None:
    endpoint = f"{provider.up['issuers']['plain']}/token"
    assertion = ClientAssertion("one-key", endpoint, claims="oidc")
    with pytest.raises(OAuthError) as caught:
        client(endpoint, assertion, office.k1, ca_bundle, "das-api/other").fetch()
    assert caught.value.error == "invalid_scope"
    assert "das-api/other" in str(caught.value.hint)
    assert reason()


@pytest.mark.parametrize("name", ["plain", "fapi"])
def test_its_metadata_is_found_from_the_issuer_and_leads_to_an_access_token(
    provider: ServerProcess,
    office: Office,
    ca_bundle: str,
    reason: Callable[[], str],
    transport: Transport,
    name: str,
) -> None:
    issuer = provider.up["issuers"][name]
    metadata = found(issuer, transport)
    assert metadata == ServerMetadata(issuer, f"{issuer}/token", f"{issuer}/jwks")
    assertion = ClientAssertion("one-key", issuer, claims="oidc")
    assert client(metadata.token_endpoint, assertion, office.k1, ca_bundle).fetch().access_token
