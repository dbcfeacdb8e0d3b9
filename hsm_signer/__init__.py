"""Log in to an OAuth API with a key that never leaves its hardware.

The private key is generated inside a PKCS#11 token and signs there; the ES256 signature becomes the client
assertion of ``private_key_jwt`` (RFC 7523), and the assertion becomes an access token::

    from hsm_signer import ClientAssertion, TokenClient, open_token

    ENDPOINT = "https://www5.wipo.int/am/oauth2/access_token"

    with open_token("pkcs11:token=office", module="/usr/lib/softhsm/libsofthsm2.so", pin=getpass) as token:
        signer = token.signer("pkcs11:object=das-2026")
        assertion = ClientAssertion(client_id="das-api-auth", audience=ENDPOINT)
        client = TokenClient(ENDPOINT, assertion=assertion, signer=signer, scope="das-api/das-access")
        response = client.fetch()

Names are loaded when they are first used (PEP 562): ``import hsm_signer`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsm_signer.assertion import ClientAssertion
    from hsm_signer.errors import HsmSignerError
    from hsm_signer.hsm.token import open_token
    from hsm_signer.oauth.auth import BearerAuth
    from hsm_signer.oauth.client import TokenClient
    from hsm_signer.oauth.response import TokenResponse
    from hsm_signer.pin import PIN_PAD

__version__ = "0.1.0"

__all__ = [
    "PIN_PAD",
    "BearerAuth",
    "ClientAssertion",
    "HsmSignerError",
    "TokenClient",
    "TokenResponse",
    "open_token",
]

_HOMES = {
    "PIN_PAD": "hsm_signer.pin",
    "BearerAuth": "hsm_signer.oauth.auth",
    "ClientAssertion": "hsm_signer.assertion",
    "HsmSignerError": "hsm_signer.errors",
    "TokenClient": "hsm_signer.oauth.client",
    "TokenResponse": "hsm_signer.oauth.response",
    "open_token": "hsm_signer.hsm.token",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  # PEP 562: any of the names above
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
