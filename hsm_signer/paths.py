"""Where our files live, by the XDG rules; the only place that knows."""

import os
import stat
from pathlib import Path

from hsm_signer.errors import ConfigError

APP = "hsm-token"


def user_config_file() -> Path:
    """The user's own configuration file."""
    return _of_the_user("config") / "config.toml"


def config_files() -> tuple[Path, Path]:
    """Where a configuration file is looked for when none is named: the user's, then the machine's."""
    return user_config_file(), Path("/etc") / APP / "config.toml"


def config_file() -> Path | None:
    """The first of them that is there."""
    return next((path for path in config_files() if path.exists()), None)


def state_directory() -> Path:
    """The user's state: the PIN markers and their locks, and by default the audit log."""
    return _of_the_user("state")


def cache_directory() -> Path:
    """Access tokens: ``$XDG_RUNTIME_DIR`` where it is absolute, ours and private, else the user's cache."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and _ours_and_private(runtime):
        return runtime / APP
    return _of_the_user("cache")


def _of_the_user(kind: str) -> Path:
    import platformdirs

    try:
        return Path(getattr(platformdirs, f"user_{kind}_path")(APP))
    except RuntimeError:  # from Path.home(): a container's number without an entry among the users
        raise ConfigError(
            "this user has no home directory", hint="set HOME, or --config, and cache and state-dir in it"
        ) from None


def _ours_and_private(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
