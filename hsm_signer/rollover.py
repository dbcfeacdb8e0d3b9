"""From one key to the next, at a server that knows one certificate per client.

State is in the profile and on the token only::

    key, key-thumbprint, certificate                  the key in use
    next-key, next-key-thumbprint, next-certificate   from prepare to switch, or abandon
    previous-key, previous-key-thumbprint             from switch to retire

Whatever changes a profile or deletes a key does so under one lock of the user, and looks again once it has
the lock: two people at work, or one who is impatient, must not leave a profile without its key.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hsm_signer import profile_file
from hsm_signer.config import Settings
from hsm_signer.errors import AuditLogError, ConfigError, KeyMismatchError, KeyNotFoundError, OAuthError
from hsm_signer.hsm.uri import key_uri
from hsm_signer.validity import read_file

if TYPE_CHECKING:
    from hsm_signer.hsm.keys import KeyInfo
    from hsm_signer.hsm.token import Token
    from hsm_signer.x509 import Certificate

_log = logging.getLogger(__name__)
T = TypeVar("T")

_NEXT = ("next-key", "next-key-thumbprint", "next-certificate")


def following(settings: Settings) -> Settings:
    """The settings with the next key in the place of the one in use; :class:`ConfigError` without one."""
    if settings.next_key is None:
        raise ConfigError("the profile names no next key", hint="hsm-token rollover prepare makes one")
    return replace(
        settings,
        key=settings.next_key,
        key_thumbprint=settings.next_key_thumbprint,
        certificate=settings.next_certificate,
        next_key=None,
        next_key_thumbprint=None,
        next_certificate=None,
    )


@dataclass(frozen=True)
class KeyState:
    """A key in the course of a rollover: what the profile says, and what is there.

    ``thumbprint``: as pinned, else as proved. ``on_token``: a challenge proved it there. ``certificate``: of the
    profile's file, else of the token.
    """

    role: str
    key: str
    thumbprint: str | None
    on_token: bool
    certificate: "Certificate | None"

    @property
    def certificate_fits(self) -> bool | None:
        """Whether the certificate holds this key; ``None`` without one."""
        if self.certificate is None or self.thumbprint is None:
            return None
        return self.certificate.holds(self.thumbprint)

    def as_dict(self, now: int) -> dict[str, object]:
        """For JSON. ``now`` in Unix seconds."""
        certificate = self.certificate
        return {
            "role": self.role,
            "key": self.key,
            "thumbprint": self.thumbprint,
            "on_token": self.on_token,
            "certificate_fits": self.certificate_fits,
            "not_after": certificate and f"{certificate.not_after:%Y-%m-%dT%H:%M:%SZ}",
            "days_left": certificate and certificate.days_left(now),
        }


def status(settings: Settings, token: "Token") -> list[KeyState]:
    """The key in use, the next and the previous one, as far as the profile names them."""
    roles = (
        ("in use", settings.key, settings.key_thumbprint, settings.certificate),
        ("next", settings.next_key, settings.next_key_thumbprint, settings.next_certificate),
        ("previous", settings.previous_key, settings.previous_key_thumbprint, None),
    )
    infos = token.keys()
    return [_state(infos, role, key, pin, file) for role, key, pin, file in roles if key is not None]


def _state(infos: "list[KeyInfo]", role: str, key: str, pin: str | None, file: str | None) -> KeyState:
    matching = [info for info in infos if _means(key, info.uri) and pin in (None, info.thumbprint)]
    info = matching[0] if len(matching) == 1 else None
    certificate = None
    if file is not None:
        certificate = read_file(Path(file))
    elif info is not None and info.certificate is not None:
        from hsm_signer.x509 import read_certificate

        certificate = read_certificate(info.certificate)
    found = info.thumbprint if info else None
    return KeyState(role, key, pin or found, found is not None, certificate)


def in_use(settings: Settings, token: "Token") -> str | None:
    """The thumbprint of the key in use: as pinned, else as proved, ``None`` where no one key has its name."""
    if settings.key_thumbprint is not None or settings.key is None:
        return settings.key_thumbprint
    return _state(token.keys(), "in use", settings.key, None, None).thumbprint


def previous(settings: Settings, token: "Token") -> str | None:
    """The thumbprint of the previous key: as pinned, else as proved, ``None`` where no one key has its name."""
    if settings.previous_key_thumbprint is not None or settings.previous_key is None:
        return settings.previous_key_thumbprint
    return _state(token.keys(), "previous", settings.previous_key, None, None).thumbprint


def fetch_or_next(fetch: Callable[[], T], fetch_next: Callable[[], T]) -> T:
    """Fetch with the key in use; where the server refuses that key, once with the next one.

    Servers of WIPO's kind say ``invalid_client``, or 401 or 403 without a word (RFC 6749 §5.2).
    """
    try:
        return fetch()
    except OAuthError as refused:
        if not _refuses_the_key(refused):
            raise
        _log.warning("the server refuses the key in use; asking once with the next key")
        try:
            response = fetch_next()
        except OAuthError as also:
            refused.hint = f"the next key is refused too: {also}"
            raise refused from None
        _log.warning("the server takes the next key: it is time for hsm-token rollover switch")
        return response


def name_the_next(settings: Settings, refused: OAuthError) -> None:
    """Hint at the next key first, where there is one and the server refuses the one in use."""
    if settings.next_key and _refuses_the_key(refused):
        refused.hint = "\n".join(
            [
                "this profile has a next key, which the operator may have registered: try hsm-token fetch --or-next,"
                " or hsm-token rollover try",
                *(refused.hint or "").splitlines(),
            ]
        )


def _refuses_the_key(refused: OAuthError) -> bool:
    return refused.error == "invalid_client" or (refused.error is None and refused.status in (401, 403))


def prepare(
    token: "Token", thumbprint: str, certificate: str, path: Path, profile: str, *, state_directory: Path
) -> None:
    """Write the next key, which is on the token, into the profile, which has no next key yet.

    Raises :class:`ProfileNotChangedError` with the lines to change where we cannot, as :func:`switch` does.
    """
    with profile_file.exclusive(state_directory):
        check_none_is_prepared(path, profile)
        info = find_by_thumbprint(token, thumbprint)
        changes = {"next-key": info.uri, "next-key-thumbprint": thumbprint, "next-certificate": certificate}
        profile_file.change(path, profile, changes)


def check_none_is_prepared(path: Path, profile: str) -> None:
    """Raise :class:`ConfigError` where a rollover is under way already."""
    present = profile_file.profiles(path).get(profile, {}).get("next-key")
    if present is not None:
        raise ConfigError(
            f"profile {profile} has a next key already: {present}",
            hint="hsm-token rollover status shows whether it is on the token; rollover switch makes it the key in "
            "use; rollover abandon drops it from the profile, unless its certificate is registered already",
        )


def check_one_is_prepared(path: Path, profile: str) -> dict[str, str]:
    """What the profile says of its next key; :class:`ConfigError` where it says nothing."""
    settings = profile_file.profiles(path).get(profile, {})
    said = {name: str(settings[name]) for name in _NEXT if name in settings}
    if not said:
        raise ConfigError(f"profile {profile} has no next key", hint="there is no rollover to abandon")
    return said


def abandon(path: Path, profile: str, *, state_directory: Path) -> dict[str, str]:
    """Forget the next key, be it on the token or lost; what the profile said of it. No key is deleted."""
    with profile_file.exclusive(state_directory):
        said = check_one_is_prepared(path, profile)
        profile_file.change(path, profile, dict.fromkeys(said))
    return said


def switch(path: Path, profile: str, thumbprint: str, *, state_directory: Path) -> None:
    """Make the next key, which must be the one of ``thumbprint``, the key in use; the old one is kept."""
    with profile_file.exclusive(state_directory):
        settings = profile_file.profiles(path).get(profile, {})
        if settings.get("next-key-thumbprint") != thumbprint:
            raise KeyMismatchError(
                f"the next key of profile {profile} is not {thumbprint} any more",
                hint="somebody changed the profile meanwhile: look with hsm-token rollover status",
            )
        profile_file.change(path, profile, _switched(settings))


def _switched(settings: Mapping[str, object]) -> dict[str, str | None]:
    def text(name: str) -> str | None:
        value = settings.get(name)
        return value if isinstance(value, str) else None

    return {
        "key": text("next-key"),
        "key-thumbprint": text("next-key-thumbprint"),
        "certificate": text("next-certificate"),
        "previous-key": text("key"),
        "previous-key-thumbprint": text("key-thumbprint"),
        **dict.fromkeys(_NEXT),
    }


def destroy(
    token: "Token",
    thumbprint: str,
    path: Path | None,
    profile: str | None,
    *,
    state_directory: Path,
    key: str | None = None,
) -> "KeyInfo":
    """Destroy the key of this thumbprint, which no profile in the file may use, and forget it in the profile.

    The token compares the thumbprint, and the name ``key`` where one is given, again right before it destroys
    the key by handle: a challenge proves it.
    """
    with profile_file.exclusive(state_directory):
        info = find_by_thumbprint(token, thumbprint)
        require_unused(path, thumbprint, info.uri)
        unlogged: AuditLogError | None = None
        try:
            token.delete_key(key or info.uri, thumbprint=thumbprint)
        except AuditLogError as exc:
            if exc.done != "key deletion":
                raise
            unlogged = exc
        try:
            if path is not None and profile is not None:
                _forget_previous(path, profile, thumbprint)
        finally:
            if unlogged is not None:
                raise unlogged
    return info


def _forget_previous(path: Path, profile: str, thumbprint: str) -> None:
    settings = profile_file.profiles(path).get(profile, {})
    if settings.get("previous-key-thumbprint") == thumbprint:
        profile_file.change(path, profile, {"previous-key": None, "previous-key-thumbprint": None})


def require_unused(path: Path | None, thumbprint: str, key: str | None = None) -> None:
    """Raise :class:`KeyMismatchError` where a profile in the file pins the key, or names it without a pin.

    ``key``: its name, as far as it is known: before a login it may be a label alone.
    """
    pinned, named = [], []
    for profile, settings in profile_file.profiles(path).items() if path else ():
        for role in ("key", "next-key"):
            pin, name = settings.get(f"{role}-thumbprint"), settings.get(role)
            if pin == thumbprint:
                pinned.append(f"the {role} of {profile}")
            elif pin is None and isinstance(name, str) and key is not None and _means(name, key):
                named.append(f"the {role} of {profile}")
    if pinned:
        raise KeyMismatchError(
            f"{thumbprint} is pinned as {' and '.join(pinned)}: a key in use is not deleted",
            hint="hsm-token rollover brings a profile to another key, and its abandon drops a next key that is not "
            "registered; "
            "a profile that nobody needs can go from the file",
        )
    if named:
        raise KeyMismatchError(
            f"{key} may be {' and '.join(named)}, which is pinned to no thumbprint",
            hint="add the thumbprint of its key to each such profile: hsm-token key list shows it",
        )


def warn_of_sharing(path: Path, profile: str | None, thumbprint: str) -> None:
    """Log a warning where other profiles of the file pin the key as well: what goes wrong with it hits both."""
    for other, settings in profile_file.profiles(path).items():
        pins = (settings.get("key-thumbprint"), settings.get("next-key-thumbprint"))
        if other != profile and thumbprint in pins:
            _log.warning("the key is pinned by profile %s too: each server wants a key of its own", other)


def find_by_thumbprint(token: "Token", thumbprint: str) -> "KeyInfo":
    """The one key on the token that a challenge proves to have this thumbprint."""
    infos = token.keys()
    found = [info for info in infos if info.thumbprint == thumbprint]
    if not found:
        raise KeyNotFoundError(
            f"no key on the token has the thumbprint {thumbprint}",
            candidates=[f"{info.thumbprint}  {info.label}" for info in infos],
        )
    return found[0]


def _means(key: str, name: str) -> bool:
    """Whether ``key`` asks for nothing but what ``name`` has: the name of a key, as far as it is known."""
    asked, known = key_uri(key), key_uri(name)
    return asked.object in (None, known.object) and asked.id in (None, known.id)
