"""Change settings of one profile in its TOML file, or add a profile, and nothing else in it.

The standard library reads TOML and does not write it. This edits the lines ``key = "text"`` below the header
``[profiles.NAME]``, and then has :mod:`tomllib` say whether the result means what was intended. A file that
is written in another way is left as it is, and the lines to change are handed to the person.
"""

import os
import re
import stat
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsm_signer import files, toml
from hsm_signer.errors import ConfigError, ProfileNotChangedError
from hsm_signer.locks import HeldLock, try_lock

LOCK_SECONDS = 30.0
_POLL = 0.05  # seconds
_STATEMENT = re.compile(
    r"""(?P<start>\s*(?:(?P<bare>[A-Za-z0-9_-]+)|"(?P<quoted>[^"\\]+)")\s*=\s*)"""
    r"""(?:"(?:[^"\\]|\\.)*"|'[^']*')(?P<end>\s*(?:\#.*)?)$"""
)


def change(path: Path, profile: str, changes: Mapping[str, str | None]) -> None:
    """Set, add or (``None``) remove settings of a profile by one atomic replacement.

    Comments, mode and group stay.

    Raises :class:`ProfileNotChangedError` with the lines for a person to change where the file is not ours to
    write, or is written in a way that this does not edit.
    """
    path = path.resolve()  # a link stays one
    before = _read(path)
    after = changed(before, profile, changes)
    if after == before:
        return
    try:
        _write(path, after)
    except ConfigError as failed:
        raise not_changed(str(failed), profile, changes) from None


def add(path: Path, profile: str, table: str) -> None:
    """Put the lines of a profile that is not there yet at the end of the file, as :func:`change` writes it.

    Raises :class:`ConfigError` where there is one of this name, or where the file would then mean more than that.
    """
    path = path.resolve()
    before = _read(path)
    wanted, new = _parsed(before), _parsed(table)
    if profile in wanted.setdefault("profiles", {}):
        raise ConfigError(f"{path} has a profile {profile!r} already; nothing is overwritten")
    wanted["profiles"] |= new["profiles"]
    after = f"{before.rstrip()}\n\n{table}"
    if not _means(after, wanted):
        raise ConfigError(
            "the file is written in a way that is not edited here", hint=f"add the profile to {path} by hand"
        )
    _write(path, after)


def _write(path: Path, text: str) -> None:
    if not path.stat().st_mode & stat.S_IWUSR or not os.access(path, os.W_OK):  # root may, and should not
        raise ConfigError(f"{path} is read-only")
    if len(text.encode()) > toml.MAX_SIZE:  # nobody would read it any more
        raise ConfigError(f"{path} would have more than {toml.MAX_SIZE} bytes")
    try:
        files.replace(path, text.encode())
    except OSError as exc:
        raise ConfigError(f"{path} cannot be replaced ({exc.strerror})") from None


def profiles(path: Path) -> dict[str, dict[str, object]]:
    """Read the profiles as they are written, without presets and defaults."""
    tables = _parsed(_read(path.resolve())).get("profiles", {})
    return {name: settings for name, settings in tables.items() if isinstance(settings, dict)}


@contextmanager
def exclusive(state_directory: Path) -> Iterator[None]:
    """Hold the one lock of the user under which profiles are changed, and keys that they name deleted."""
    try:
        held = _locked(state_directory)
    except OSError as failed:
        raise ConfigError(
            f"no lock in the state directory {state_directory}: {failed.strerror}",
            hint="name a directory of ours in the profile (state-dir)",
        ) from None
    try:
        yield
    finally:
        held.release()


def _locked(state_directory: Path) -> HeldLock:
    deadline = time.monotonic() + LOCK_SECONDS
    with files.guarded_directory(state_directory) as directory:
        while (held := try_lock(directory, "profiles.lock")) is None:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another hsm-token has been changing profiles for {LOCK_SECONDS:.0f} seconds",
                    hint="see which hsm-token process hangs",
                )
            time.sleep(_POLL)
        return held


def changed(text: str, profile: str, changes: Mapping[str, str | None]) -> str:
    """Give the text with the changes made; errors as in :func:`change`."""
    for value in changes.values():
        if value is not None and not value.isprintable():
            raise ConfigError(f"a setting must be printable text, found {value!r}")
    wanted = _parsed(text)
    settings = wanted.get("profiles", {}).get(profile)
    if not isinstance(settings, dict):
        raise ConfigError(f"no profile {profile!r} in the file")
    for name, value in changes.items():
        if value is None:
            settings.pop(name, None)
        else:
            settings[name] = value
    after = "".join(_edited(text.splitlines(keepends=True), profile, changes))
    if not _means(after, wanted):
        raise not_changed("the file is written in a way that is not edited here", profile, changes)
    return after


def not_changed(reason: str, profile: str, changes: Mapping[str, str | None]) -> ProfileNotChangedError:
    """Make the error that carries the lines for a person to change."""
    lines = [f"[profiles.{toml.key(profile)}]"]
    lines += [
        f"# {name}: remove this setting" if value is None else f"{name} = {toml.text(value)}"
        for name, value in changes.items()
    ]
    return ProfileNotChangedError(
        reason, lines=lines, hint="change these lines yourself: " + " / ".join(lines)
    )


def _read(path: Path) -> str:
    try:
        return files.read_bytes(path, max_size=toml.MAX_SIZE, forbidden=files.UNTOUCHED).decode()
    except OSError as failed:
        raise ConfigError(f"cannot read {path}: {failed.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as broken:
        raise ConfigError(f"the profiles are in no TOML: {broken}") from None


def _means(text: str, wanted: Mapping[str, object]) -> bool:
    try:
        return tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        return False


def _edited(lines: list[str], profile: str, changes: Mapping[str, str | None]) -> list[str]:
    headers = {n: table for n, line in enumerate(lines) if (table := _header(line)) is not None}
    start = next((n for n, table in headers.items() if table == {"profiles": {profile: {}}}), None)
    if start is None:
        return lines
    end = next((n for n in headers if n > start), len(lines))
    body, missing = [lines[start]], dict(changes)
    for line in lines[start + 1 : end]:
        name = _name(line)
        if name not in missing:
            body.append(line)
        elif (value := missing.pop(name)) is not None:
            body.append(_with_value(line, value))
    newline = "\r\n" if lines[start].endswith("\r\n") else "\n"
    added = [f"{name} = {toml.text(value)}{newline}" for name, value in missing.items() if value is not None]
    place = 1 + max(n for n, line in enumerate(body) if n == 0 or _name(line))
    if added and not body[place - 1].endswith("\n"):
        body[place - 1] += newline
    return [*lines[:start], *body[:place], *added, *body[place:], *lines[end:]]


def _header(line: str) -> dict[str, object] | None:
    """What a line says that is a table header on its own."""
    try:
        return tomllib.loads(line) if line.lstrip().startswith("[") else None
    except tomllib.TOMLDecodeError:
        return None


def _name(line: str) -> str | None:
    found = _STATEMENT.match(line.rstrip("\r\n"))
    return (found["bare"] or found["quoted"]) if found else None


def _with_value(line: str, value: str) -> str:
    content = line.rstrip("\r\n")
    return (
        _STATEMENT.sub(lambda m: f"{m['start']}{toml.text(value)}{m['end']}", content) + line[len(content) :]
    )
