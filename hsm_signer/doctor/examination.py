"""What is examined, and what earlier checks leave for later ones."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from hsm_signer import assembly
from hsm_signer.assembly import Login
from hsm_signer.config import Settings, default_pin_source, proxy_for
from hsm_signer.doctor.finding import NotCheckedError
from hsm_signer.errors import ConfigError
from hsm_signer.oauth.transport import Transport
from hsm_signer.url import Url, parse_proxy
from hsm_signer.url import parse as parse_url

if TYPE_CHECKING:
    from hsm_signer.hsm.module import SlotInfo, TokenInfo
    from hsm_signer.hsm.signer import HsmSigner
    from hsm_signer.hsm.token import Token
    from hsm_signer.oauth.metadata import ServerMetadata
    from hsm_signer.oauth.response import TokenResponse

T = TypeVar("T")


@dataclass
class Examination:
    """One run of the doctor. ``may_log_in``: an unattended PIN may be sent to the token (``--login``)."""

    settings: Settings
    login: Login
    may_log_in: bool = False
    offline: bool = False
    clock: Callable[[], float] = time.time
    held: ExitStack = field(default_factory=ExitStack)

    module: str | None = None
    slot: "SlotInfo | None" = None
    writable: bool = False  # the audit log, or there is none to write
    token: "Token | None" = None
    signer: "HsmSigner | None" = None
    resolved: bool = False
    connected: bool = False  # to the server, or to the proxy on the way
    reached: bool = False
    metadata: "ServerMetadata | None" = None
    differing_audience: str | None = None
    response: "TokenResponse | None" = None

    def __post_init__(self) -> None:
        # Named once: a PIN in a variable is gone from the environment after it was looked at.
        source = self.settings.pin_source or default_pin_source()
        self.settings = replace(self.settings, pin_source=source)

    @cached_property
    def server(self) -> Url:
        """Where access tokens come from, or at least where the server says so."""
        text = self.settings.token_endpoint or self.given("issuer")
        try:
            return parse_url(text, what="token endpoint")
        except ConfigError:
            raise NotCheckedError("the URL of the server is not one that we use: see configuration") from None

    @cached_property
    def proxy(self) -> str | None:
        """URL of the proxy on the way to :attr:`server`."""
        proxy = proxy_for(self.settings, self.server.text)
        return parse_proxy(proxy) if proxy and self.server.host != "localhost" else None

    @cached_property
    def transport(self) -> Transport:
        """As the real requests have it."""
        return assembly.transport(self.settings, self.server.text)

    def given(self, name: str) -> str:
        """A setting; a check cannot be made without."""
        value = getattr(self.settings, name)
        if value is None:
            raise NotCheckedError(f"{name.replace('_', '-')} is not set")
        return str(value)

    @property
    def deadline(self) -> float:
        """For one request, of ``time.monotonic``."""
        return time.monotonic() + min(self.settings.deadline, 30.0)

    @property
    def token_info(self) -> "TokenInfo":
        """Of the token that was found."""
        return known(known(self.slot, "token").token, "token")


def known(value: T | None, check: str) -> T:
    """What an earlier check found out; this one cannot be made where it did not."""
    if not value:
        raise NotCheckedError(f"the check '{check}' has to succeed first")
    return value
