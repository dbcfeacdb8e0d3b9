"""One opened token: its keys made, listed, proved, used and deleted."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hsm_signer import ecdsa
from hsm_signer.errors import (
    ConfigError,
    KeyExportableError,
    KeyMismatchError,
    PinRefusedError,
    SigningKeyError,
    TokenError,
)
from hsm_signer.hsm import generation, module, objects, proof
from hsm_signer.hsm.keys import FoundKey, KeyInfo, find_in, find_keys
from hsm_signer.hsm.login import Login
from hsm_signer.hsm.module import TokenInfo
from hsm_signer.hsm.pins import Pin, Source, sealed
from hsm_signer.hsm.proof import Proof
from hsm_signer.hsm.public_half import described, not_its_own, proved_point, public_points, require_p256
from hsm_signer.hsm.search import find_token
from hsm_signer.hsm.sessions import Lane, Sessions
from hsm_signer.hsm.signer import HsmSigner
from hsm_signer.hsm.uri import Uri, key_uri, token_uri
from hsm_signer.jose import thumbprint as thumbprint_of
from hsm_signer.pin import PinPad

if TYPE_CHECKING:
    from hsm_signer.audit import AuditLog

log = logging.getLogger(__name__)


@contextmanager
def open_token(
    uri: str,
    *,
    module: str,
    pin: Pin | None = None,
    sessions: int = 1,
    verify: bool = True,
    allow_final_try: bool = False,
    audit: "AuditLog | None" = None,
) -> Iterator["Token"]:
    """Open the one token that matches, log in, and log out at the end of the block.

    ``uri``: RFC 7512 path attributes, or the token's label alone. ``module``: path of the PKCS#11 module.
    ``pin``: text, a callable that returns text, ``PIN_PAD``, or :func:`hsm_signer.pin.from_source`. One login
    per token in a process is shared: on a token that is logged in, a second call neither asks for a PIN nor
    checks one. ``sessions`` that sign in parallel are for network HSMs. ``verify=False`` hands out signatures
    unchecked. ``allow_final_try`` sends the PIN where the token says that a wrong one locks it. ``audit``: the
    log that gets two lines for each use of a private key; where it cannot be written, no key is used.

    Raises :class:`TokenError` and its kinds, :class:`PinError` and its kinds, :class:`ConfigError`.
    """
    source = sealed(pin)
    del pin
    if audit is not None:
        audit.check()  # before a PIN is spent
    token = Token._open(
        uri, module, source, sessions, verify=verify, allow_final_try=allow_final_try, audit=audit
    )
    try:
        yield token
    finally:
        token._close()


class Token:
    """A token in its slot, opened by :func:`open_token`; safe from any thread, unusable after a fork.

    ``key`` arguments are RFC 7512 URIs or the key's label alone, and mean exactly one private EC key.
    """

    def __init__(self, login: Login, sessions: Sessions, pin: Source | None, *, verify: bool) -> None:
        self._login = login
        self._sessions = sessions
        self._pin = pin
        self._verify = verify
        self._generated: set[bytes] = set()

    @classmethod
    def _open(
        cls,
        uri: str,
        path: str,
        pin: Source | None,
        sessions: int,
        *,
        verify: bool,
        allow_final_try: bool,
        audit: "AuditLog | None",
    ) -> "Token":
        loaded = module.load(path)
        loaded.check_process()
        found = find_token(loaded, token_uri(uri))
        with loaded.lock:
            fresh = Login(loaded, found)
            login = loaded.logins.setdefault(fresh.key, fresh)
            login.users += 1
        with ExitStack() as undo:
            undo.callback(login.leave)
            pool = Sessions(login, sessions, audit)
            undo.callback(pool.close)
            try:
                login.enter(pin, found.info, allow_final_try=allow_final_try)
            except TokenError:
                loaded.suspect = True
                raise
            undo.pop_all()
        return cls(login, pool, pin, verify=verify)

    def _close(self) -> None:
        """Leave everything as it is in a forked child: it belongs to the parent."""
        if self._login.module.here:
            self._sessions.close()
            self._login.leave()

    def __repr__(self) -> str:
        return f"Token({self.info.identity!r})"

    @property
    def info(self) -> TokenInfo:
        """``CK_TOKEN_INFO`` as it was at the login."""
        return self._login.info

    def keys(self) -> list[KeyInfo]:
        """The private EC keys, each with the public half under which a challenge verified."""
        return self._sessions.run(
            lambda lane: [described(lane, key) for key in find_keys(lane.session, Uri(), self._login)],
            self._cannot("list the keys"),
        )

    def generate_key(self, label: str, *, id: bytes | None = None) -> KeyInfo:  # noqa: A002  # CKA_ID
        """Generate a P-256 key pair in the token that does not leave it (``CKM_EC_KEY_PAIR_GEN``).

        ``id``: CKA_ID, 16 random bytes by default. A key whose attributes say that it could leave the token,
        or be made to, is destroyed: :class:`KeyExportableError`. A label that is taken is a
        :class:`KeyAmbiguousError`.
        """
        info = self._sessions.run(
            lambda lane: generation.generate(lane, label, id), self._cannot(f"generate key {label!r}")
        )
        self._generated.add(info.id)
        return info

    def prove(self, key: str) -> Proof:
        """Find out whether a key can leave the token: what is claimed, and what trying shows."""
        uri = self._key_uri(key)
        return self._sessions.run(
            lambda lane: proof.prove(lane, find_in(lane, uri), self._generated),
            self._cannot(f"prove key {uri}"),
        )

    def signer(self, key: str, *, thumbprint: str | None = None, allow_exportable: bool = False) -> HsmSigner:
        """Make a signer of a key.

        ``thumbprint`` (RFC 7638) pins the key: another one is a :class:`KeyMismatchError`. A key that can
        leave the token is a :class:`KeyExportableError` unless ``allow_exportable``.
        """
        uri = self._key_uri(key)
        found, points = self._sessions.run(
            lambda lane: self._look_up(lane, uri), self._cannot(f"find key {uri}")
        )
        self._judge(found, allow_exportable=allow_exportable)
        candidates = points
        if thumbprint is not None:
            candidates = [
                point for point in points if thumbprint_of(ecdsa.jwk_from_point(point)) == thumbprint
            ]
            if points and not candidates:
                raise self._not_pinned(found, points, thumbprint)
        # a first signature that is verified proves the same, and costs nothing
        if len(candidates) == 1 and (self._verify or thumbprint is None):
            return HsmSigner(self._sessions, found, candidates[0], proved=False, verify=self._verify)
        point = self._sessions.run(
            lambda lane: proved_point(lane, find_in(lane, found.uri), candidates),
            self._cannot(f"use key {uri}"),
        )
        if point is None:
            raise not_its_own(found, len(candidates))
        return HsmSigner(self._sessions, found, point, proved=True, verify=self._verify)

    def delete_key(self, key: str, *, thumbprint: str | None = None) -> None:
        """Destroy a private key, its public half and its certificates; what else has its label stays.

        ``thumbprint`` is compared with what a challenge proves, right before the key is destroyed by handle.
        """
        uri = self._key_uri(key)
        self._sessions.run(
            lambda lane: objects.delete(lane, uri, thumbprint), self._cannot(f"delete key {uri}")
        )

    def store_certificate(
        self, key: str, der: bytes, *, label: str | None = None, replace: bool = False
    ) -> int:
        """Put a certificate of the key on the token, under the key's CKA_ID, unless it is there.

        ``label``: by default the key's. ``replace`` then destroys the other certificates of the key; the answer
        is how many others there were. Raises :class:`KeyMismatchError` unless it holds the public half,
        :class:`ConfigError` for what is no certificate in DER.
        """
        uri = self._key_uri(key)
        return self._sessions.run(
            lambda lane: objects.store_certificate(lane, uri, der, label, replace=replace),
            self._cannot(f"store a certificate of key {uri}"),
        )

    def certificates(self, key: str) -> list[bytes]:
        """The certificates on the token, in DER, that hold the key's proved public half; the last to end first."""
        uri = self._key_uri(key)
        return self._sessions.run(
            lambda lane: objects.certificates(lane, uri),
            self._cannot(f"read certificates of key {uri}"),
        )

    def _look_up(self, lane: Lane, uri: Uri) -> tuple[FoundKey, list[bytes]]:
        found = find_in(lane, uri)
        require_p256(found)
        return found, public_points(found)

    def _judge(self, key: FoundKey, *, allow_exportable: bool) -> None:
        if key.flags.get("sign") is False:
            raise SigningKeyError(f"key {key.name} is not for signing (CKA_SIGN is false)")
        if key.info(None).exportable and not allow_exportable:
            raise KeyExportableError(
                f"key {key.name} can leave the token: the module does not say that it is sensitive and not "
                "extractable",
                hint="generate a key with hsm-token key generate",
            )
        if key.always_authenticate:
            if isinstance(self._pin, PinPad):
                raise PinRefusedError(
                    f"key {key.name} wants its PIN for each signature (CKA_ALWAYS_AUTHENTICATE), which no "
                    "PIN pad can give",
                    hint="use a key without CKA_ALWAYS_AUTHENTICATE, or another pin-source",
                )
            if self._pin is not None:
                self._login.adopt(self._pin)

    def _not_pinned(self, key: FoundKey, points: list[bytes], thumbprint: str) -> KeyMismatchError:
        found = ", ".join(thumbprint_of(ecdsa.jwk_from_point(point)) for point in points)
        return KeyMismatchError(
            f"key {key.name} is not the pinned one: thumbprint {found}, pinned {thumbprint}",
            hint="somebody replaced or relabelled the key, or key-thumbprint is an old one",
        )

    def _key_uri(self, key: str) -> Uri:
        uri = key_uri(key)
        self.require_own(uri)
        return uri

    def require_own(self, uri: Uri) -> None:
        """Raise :class:`ConfigError` where a key's URI names another token than this one."""
        here = module.attributes_of(self._login.module, self._login.token, self.info)
        for name, value in uri.token_attributes().items():
            if here[name] != value:
                raise ConfigError(
                    f"the key's URI asks for {name}={value!r}, but the token has {here[name]!r}"
                )

    def _cannot(self, what: str) -> str:
        return f"token {self.info.label!r} did not {what}"
