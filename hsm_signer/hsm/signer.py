"""The :class:`~hsm_signer.jose.Signer` whose private key is in a token."""

from typing import TYPE_CHECKING

from hsm_signer import ecdsa
from hsm_signer.errors import KeyMismatchError, SignatureInvalidError
from hsm_signer.hsm import keys, objects, public_half
from hsm_signer.hsm.module import TokenInfo
from hsm_signer.hsm.sessions import Lane, Sessions
from hsm_signer.jose import thumbprint
from hsm_signer.verification import PublicKey

if TYPE_CHECKING:
    from hsm_signer.audit import AuditLog


class HsmSigner:
    """Signs ES256 with one key; made by :meth:`hsm_signer.hsm.token.Token.signer`, safe from any thread."""

    alg = "ES256"

    def __init__(
        self, sessions: Sessions, key: keys.FoundKey, point: bytes, *, proved: bool, verify: bool
    ) -> None:
        self._sessions = sessions
        self._uri = key.uri  # with its CKA_ID: another key that takes the label is not this one
        self._name = key.name
        self._point = point
        self._public_key = PublicKey(point) if verify else None
        self._proved = proved
        self._what = f"no signature by key {self._name} on token {sessions.login.info.label!r}"

    def __repr__(self) -> str:
        return f"HsmSigner({self._name!r})"

    @property
    def token_info(self) -> TokenInfo:
        """Of the token that the key is in."""
        return self._sessions.login.info

    @property
    def audit(self) -> "AuditLog | None":
        """The log that ``open_token`` was given; :class:`TokenClient` tells it what the server answered."""
        return self._sessions.audit

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256 over ``data``: r‖s, 64 bytes (RFC 7518 §3.4), verified before it is returned.

        Raises :class:`SignatureInvalidError` and :class:`SignatureFormatError` for what a token should not
        answer, :class:`TokenError` with the PKCS#11 code for what recovery does not mend, and
        :class:`AuditLogError`.
        """
        if type(data) is not bytes:
            data = bytes(memoryview(data))
        audit = self._sessions.audit
        if audit is None:
            return self._signed(data)
        serial, proved = self._sessions.login.info.serial, self.verifies_under if self._proved else None
        with audit.signing(data, serial=serial, key=proved, object=self._name) as outcome:
            signature = self._signed(data)
            if proved is None and self._public_key is not None:
                outcome["key"] = self.verifies_under  # which this signature has just shown
            return signature

    def _signed(self, data: bytes) -> bytes:
        signature = ecdsa.raw_from_device(self._sessions.run(self._answer, self._what, data))
        if self._public_key is not None:
            try:
                self._public_key.verify(signature, data)
            except SignatureInvalidError:
                raise self._not_by_this_key() from None
        return signature

    def verified_by_token(self, signature: bytes, data: bytes) -> bool | None:
        """Ask the token itself whether r‖s is a signature over ``data``; ``None`` where it cannot tell."""
        return self._sessions.run(
            lambda lane: objects.verify(lane.login, self._key(lane), self._point, signature, data),
            f"no verification by token {self._sessions.login.info.label!r}",
        )

    @property
    def kid(self) -> str:
        """RFC 7638 thumbprint, 43 characters."""
        return thumbprint(self.jwk)

    @property
    def verifies_under(self) -> str:
        """Thumbprint of the public half that each signature is verified under, to name the key to its owner.

        Whoever has a signature can tell as much, so it costs no challenge, unlike :attr:`kid`, by which others
        will know the key.
        """
        return thumbprint(ecdsa.jwk_from_point(self._point))

    @property
    def jwk(self) -> dict[str, str]:
        """The public half (RFC 7518 §6.2): ``kty``, ``crv``, ``x``, ``y``."""
        return ecdsa.jwk_from_point(self._own_point())

    @property
    def public_key_pem(self) -> str:
        """The public half as SubjectPublicKeyInfo (RFC 7468 §13)."""
        return ecdsa.pem("PUBLIC KEY", ecdsa.spki_from_point(self._own_point()))

    def certificates(self, *, proved: bool = True) -> list[bytes]:
        """The certificates on the token, in DER, that hold the public half; what ends last comes first.

        ``proved=False`` spares the challenge, for who looks at their dates and hands out nothing of them.
        """
        found = self._sessions.run(lambda lane: public_half.certificates_beside(self._key(lane)), self._what)
        own = [der for der, point in found if point == self._point]
        if own and proved:
            self._own_point()
        return own

    def _not_by_this_key(self) -> SignatureInvalidError:
        return SignatureInvalidError(
            f"what key {self._name} signed does not verify under the public half that lies beside it",
            hint="the public object is not its own (anybody without a PIN can write one), or the token is broken",
        )

    def _answer(self, lane: Lane, data: bytes) -> bytes:
        key = lane.handles.get(self._name) or self._key(lane)
        return keys.sign_es256(lane.login, key, data)

    def _key(self, lane: Lane) -> keys.FoundKey:
        found: keys.FoundKey | None = lane.handles.get(self._name)
        return found or keys.find_in(lane, self._uri)

    def _own_point(self) -> bytes:
        """The public half leaves us only after the private key has signed a challenge under it."""
        if not self._proved:
            point = self._sessions.run(
                lambda lane: public_half.proved_point(lane, self._key(lane), [self._point]), self._what
            )
            if point is None:
                raise KeyMismatchError(f"the public half beside private key {self._name} is not its own")
            self._proved = True
        return self._point
