"""Every way in which hsm-signer fails, one tree.

::

    HsmSignerError                  .hint
    ├── ConfigError                 a setting, a file or an argument is wrong
    │   ├── UnsafeFileError         another user could have written it, or could read it
    │   ├── AuditLogError           the audit log cannot be written           .done
    │   └── ProfileNotChangedError  a person has to change the profile        .lines
    ├── TokenError                  module, slot, token or session            .code
    │   ├── ModuleError             the module does not load or start
    │   ├── TokenNotFoundError      no token matches                          .candidates
    │   ├── TokenAmbiguousError     several tokens match                      .candidates
    │   └── ForkedError             made in another process: open it in the worker
    ├── PinError
    │   ├── PinRejectedError        the token said no
    │   ├── PinLockedError          the token accepts no PIN any more
    │   └── PinRefusedError         we did not ask the token, so no try was spent
    ├── SigningKeyError
    │   ├── KeyNotFoundError        .candidates
    │   ├── KeyAmbiguousError       .candidates
    │   ├── KeyExportableError      the key can leave the token
    │   └── KeyMismatchError        another key than the pinned one, or halves that do not belong together
    ├── SignatureError
    │   ├── SignatureFormatError    not a signature in the expected encoding
    │   └── SignatureInvalidError   it does not verify under the public key
    ├── OAuthError                  the authorization server said no          .error .description .status
    │   ├── TokenResponseError      its answer is no access token that we accept
    │   └── MetadataError           its metadata is missing, or says what we do not believe
    ├── TransportError              network, TLS or server trouble            .attempts .sent
    └── VerificationError           an access token or certificate failed a check   .clause

No message holds a PIN, an assertion or an access token.
"""

from collections.abc import Sequence


class HsmSignerError(Exception):
    """Root of the tree. ``hint``: what the person at the keyboard can do, in lines, or ``None``."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(HsmSignerError):
    """A setting, a file or an argument is wrong; nothing was opened, asked or sent."""


class UnsafeFileError(ConfigError):
    """A file or directory is not one to trust: its kind, owner, mode or size."""


class AuditLogError(ConfigError):
    """The audit log cannot be written: the key is not used, or what it made is not handed out.

    ``done``: the use that lacks its outcome, if the token was asked: a deletion stands, a new key is destroyed.
    """

    def __init__(self, message: str, *, done: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.done = done


class ProfileNotChangedError(ConfigError):
    """A profile cannot be changed by us. ``lines``: what a person has to write there, as TOML."""

    def __init__(self, message: str, *, lines: Sequence[str], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.lines = tuple(lines)


class TokenError(HsmSignerError):
    """Module, slot, token or session. ``code``: the PKCS#11 return value, such as ``CKR_DEVICE_ERROR``."""

    def __init__(self, message: str, *, code: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class ModuleError(TokenError):
    """The PKCS#11 module is missing, is no module, or does not initialise."""


class _ChoiceError(HsmSignerError):
    """Not exactly one match. ``candidates``: what there was to choose from, one printable line each."""

    def __init__(self, message: str, *, candidates: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.candidates = tuple(candidates)


class TokenNotFoundError(_ChoiceError, TokenError):
    """No token matches."""

    code = None


class TokenAmbiguousError(_ChoiceError, TokenError):
    """Several tokens match."""

    code = None


class ForkedError(TokenError):
    """The handle was made in another process (before a fork); open the token in this one."""


class PinError(HsmSignerError):
    """A PIN was rejected, is locked, or was held back. ``code`` as in :class:`TokenError`."""

    def __init__(self, message: str, *, code: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class PinRejectedError(PinError):
    """The token rejected the PIN: one try is spent."""


class PinLockedError(PinError):
    """The token accepts no user PIN any more."""


class PinRefusedError(PinError):
    """We did not hand the PIN to the token; no try is spent."""


class SigningKeyError(HsmSignerError):
    """The key in the token is missing, ambiguous, or not one that we sign with."""


class KeyNotFoundError(_ChoiceError, SigningKeyError):
    """No key matches."""


class KeyAmbiguousError(_ChoiceError, SigningKeyError):
    """Several keys match."""


class KeyExportableError(SigningKeyError):
    """The private key can leave the token."""


class KeyMismatchError(SigningKeyError):
    """Not the pinned key, or a public half that does not belong to the private one."""


class SignatureError(HsmSignerError):
    """A signature cannot be used."""


class SignatureFormatError(SignatureError, ValueError):
    """Not a signature in the expected encoding."""


class SignatureInvalidError(SignatureError):
    """The signature does not verify under the public key."""


class OAuthError(HsmSignerError):
    """The authorization server refused (RFC 6749 §5.2).

    ``error`` and ``description`` are the server's own words, made printable; ``status`` is the HTTP status.
    """

    def __init__(
        self,
        message: str,
        *,
        error: str | None = None,
        description: str | None = None,
        status: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.error = error
        self.description = description
        self.status = status


class TokenResponseError(OAuthError):
    """The server answered with success, but with no access token that we accept."""


class MetadataError(OAuthError):
    """The metadata of the authorization server is missing, or says what we do not believe."""


class TransportError(HsmSignerError):
    """Network, TLS or server trouble; trying later can help.

    ``attempts``: what was tried, one line each. ``sent``: whether a part of the request may have left us.
    ``transient``: whether the same request may do better in a moment. ``retry_after``: seconds that the
    server asked us to wait, or ``None``.
    """

    def __init__(
        self,
        message: str,
        *,
        attempts: Sequence[str] = (),
        sent: bool = True,
        transient: bool = True,
        retry_after: float | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.attempts = tuple(attempts)
        self.sent = sent
        self.transient = transient
        self.retry_after = retry_after


class VerificationError(HsmSignerError):
    """A check of an access token or a certificate found something.

    ``clause``: what failed, in the standards' words, such as ``aud``; ``format``, ``signature`` and ``jwks``
    are ours.
    """

    def __init__(self, message: str, *, clause: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.clause = clause
