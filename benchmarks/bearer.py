"""What BearerAuth costs for each request while its access token lives."""

import time
from collections.abc import Callable, Iterator

import requests
from measure import Row, in_turn
from office import SCOPE, Office

from hsm_signer import BearerAuth, ClientAssertion, TokenClient

REQUESTS = 2000


class Anybody:
    """The server of this benchmark grants whatever comes."""

    alg, kid, jwk = "ES256", "", {"kty": "EC"}

    def sign(self, data: bytes) -> bytes:
        return bytes(64)


def rows(office: Office) -> Iterator[Row]:
    assertion = ClientAssertion("das-api-auth", office.endpoint)
    client = TokenClient(
        office.endpoint, assertion=assertion, signer=Anybody(), scope=SCOPE, ca_bundle=office.ca
    )
    header = f"Bearer {client.fetch().access_token}"
    auth = BearerAuth(client, origins=["https://api.example"])

    def plain(request: requests.PreparedRequest) -> None:
        request.headers["Authorization"] = header

    times = in_turn(15, plain=lambda: _microseconds(plain), auth=lambda: _microseconds(auth))
    more = sorted(one - other for one, other in zip(times["auth"], times["plain"], strict=True))
    yield Row(
        "`BearerAuth.__call__` on a live token",
        "setting the header",
        more[len(more) // 2],
        5,
        2,
        unit=" µs more",
        low=more[len(more) // 4],
        high=more[-len(more) // 4],
    )


def _microseconds(call: Callable[[requests.PreparedRequest], object]) -> float:
    new = [requests.Request("GET", "https://api.example/applications/1").prepare() for _ in range(REQUESTS)]
    began = time.perf_counter()
    for request in new:
        call(request)
    return (time.perf_counter() - began) / REQUESTS * 1e6
