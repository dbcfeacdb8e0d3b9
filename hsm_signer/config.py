"""Settings: options over environment over profile over preset over default, each with where it came from.

The configuration file chooses code that sees the PIN (the module, a ``command:`` source), so it is judged like
one: a regular file of ours or root's that nobody else can write or replace, and never one in the working
directory.
"""

import logging
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hsm_signer import files, paths, toml, url
from hsm_signer.errors import ConfigError, ModuleError

_log = logging.getLogger(__name__)

WIPO = "https://www5.wipo.int/am/oauth2"
WIPO_TEST = "https://logindev.wipo.int:443/am/oauth2"

PIN_SOURCES = ("prompt", "env", "file", "command", "systemd", "keyring", "pinpad")

PRESETS: Mapping[str, Mapping[str, object]] = {
    "wipo-das": {
        "token-endpoint": f"{WIPO}/access_token",
        "issuer": WIPO,
        "audience": f"{WIPO}/access_token",
        "scope": "das-api/das-access",
        "claims": "minimal",
    },
    "wipo-das-test": {
        "token-endpoint": f"{WIPO_TEST}/access_token",
        "issuer": WIPO_TEST,
        "audience": f"{WIPO_TEST}/access_token",
        "scope": "das-api/das-access",
        "claims": "minimal",
    },
    "oidc": {"claims": "oidc"},  # OpenID Connect Core §9: jti is required; aud is the token endpoint
    # FAPI 2.0 Security Profile §5.3.3.1: aud is the issuer, see Settings.audience_for
    "fapi2": {"claims": "oidc"},
}


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    if "\0" in value:
        raise ValueError("a text without NUL characters")
    return value


def _text_or_empty(value: object) -> str:
    return "" if value == "" else _text(value)


def _pin_source(value: object) -> str:
    text = _text(value)
    if text.partition(":")[0] not in PIN_SOURCES:
        raise ValueError(
            "a known source, and never a PIN: prompt, env:, file:, command:, systemd:, keyring:, pinpad"
        )
    return text


def _url(value: object) -> str:
    return url.parse(_text(value), what="URL").text


def _integer(value: object) -> int:
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,9}", value):
        value = int(value)
    if type(value) is not int:
        raise ValueError("a whole number")
    return value


def _lifetime(value: object) -> int:
    from hsm_signer.assertion import MAX_LIFETIME

    if not 1 <= (seconds := _integer(value)) <= MAX_LIFETIME:
        raise ValueError(f"1 to {MAX_LIFETIME} seconds")
    return seconds


def _clock_offset(value: object) -> int:
    from hsm_signer.assertion import MAX_CLOCK_OFFSET

    if abs(seconds := _integer(value)) > MAX_CLOCK_OFFSET:
        raise ValueError(f"at most {MAX_CLOCK_OFFSET} seconds either way")
    return seconds


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _seconds(value: object) -> float:
    if type(value) not in (int, float) or not 0 < float(str(value)) <= 3600:
        raise ValueError("seconds, more than 0 and at most 3600")
    return float(str(value))


def _timeout(value: object) -> tuple[float, float]:
    """One number for both, or [connect, read]."""
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2:
        raise ValueError("seconds, or [connect, read] in seconds")
    return _seconds(both[0]), _seconds(both[1])


def _syslog(value: object) -> str | None:
    """``true`` for where syslog daemons listen."""
    if type(value) is bool:
        return "/dev/log" if value else None
    return _text(value)


def _kid(value: object) -> bool | str:
    return value if type(value) is bool else _text(value)


def _claims(value: object) -> str:
    if value not in ("minimal", "oidc"):
        raise ValueError('"minimal" or "oidc"')
    return str(value)


def _preset(value: object) -> str:
    if not isinstance(value, str) or value not in PRESETS:
        raise ValueError(f"one of {', '.join(PRESETS)}")
    return value


def _environment(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError("a table of texts")
    if any(not name or "=" in name or "\0" in name + text for name, text in value.items()):
        raise ValueError("a table of texts, without = in the names and without NUL characters")
    return dict(value)


def _setting(
    parse: Callable[[object], object],
    about: str,
    *,
    default: object = None,
    option: bool = False,
    path: bool = False,
) -> Any:  # noqa: ANN401  # what dataclasses.field returns: the annotation beside the call is the type
    return field(default=default, metadata={"parse": parse, "about": about, "option": option, "path": path})


@dataclass(frozen=True)
class Settings:
    """What one run works with. A field's name with hyphens is its name in a profile and as an option."""

    module: str | None = _setting(_text, "PKCS#11 module: path of a shared library", option=True)
    token: str | None = _setting(_text, "token: label or PKCS#11 URI", option=True)
    key: str | None = _setting(_text, "key: label or PKCS#11 URI", option=True)
    pin_source: str | None = _setting(
        _pin_source,
        "where the PIN comes from: prompt, env:, file:, command:, systemd:, keyring:, pinpad",
        option=True,
    )
    client_id: str | None = _setting(_text, "client id, iss and sub of the assertion", option=True)
    token_endpoint: str | None = _setting(_url, "URL of the token endpoint", option=True)
    issuer: str | None = _setting(_url, "issuer of the authorization server, for discovery", option=True)
    audience: str | None = _setting(_text, "aud of the assertion, if not the token endpoint", option=True)
    scope: str | None = _setting(_text, "scopes to ask for, separated by spaces", option=True)
    lifetime: int = _setting(_lifetime, "seconds that an assertion lives", default=60, option=True)
    claims: str = _setting(
        _claims, "minimal (WIPO) or oidc (adds iat and jti)", default="minimal", option=True
    )
    ca_bundle: str | None = _setting(
        _text, "PEM file of the roots to trust instead of certifi's", option=True, path=True
    )
    proxy: str | None = _setting(_text, "URL of an HTTP proxy", option=True)

    audit_log: str | None = _setting(
        _text, "file that gets two lines for each use of a private key", option=True, path=True
    )

    preset: str | None = _setting(_preset, f"values of a known service: {', '.join(PRESETS)}")
    kid: bool | str = _setting(
        _kid, "true: kid is the thumbprint; a text: the kid that the server gave", default=False
    )
    typ: str = _setting(_text_or_empty, "typ of the assertion's header; empty leaves it out", default="JWT")
    clock_offset: int = _setting(_clock_offset, "seconds to add to our clock", default=0)
    timeout: tuple[float, float] = _setting(_timeout, "seconds to connect and to read", default=(5.0, 15.0))
    deadline: float = _setting(_seconds, "seconds for all attempts together", default=60.0)
    allow_narrower_scope: bool = _setting(_boolean, "accept a token with fewer scopes", default=False)
    verify: bool = _setting(_boolean, "verify each signature in software", default=True)
    sessions: int = _setting(_integer, "sessions that sign in parallel", default=1)
    key_thumbprint: str | None = _setting(_text, "RFC 7638 thumbprint that the key must have")
    cache: str | None = _setting(_text, "directory of cached access tokens", path=True)
    state_dir: str | None = _setting(_text, "directory of PIN markers", path=True)
    audit_syslog: str | None = _setting(
        _syslog,
        "true: syslog gets each head of the audit log; a text: its socket, if not /dev/log",
        path=True,
    )
    certificate: str | None = _setting(_text, "file of the registered certificate", path=True)
    next_key: str | None = _setting(_text, "the key after this one, while a rollover is under way")
    next_key_thumbprint: str | None = _setting(_text, "RFC 7638 thumbprint of the next key")
    next_certificate: str | None = _setting(_text, "file of the next certificate", path=True)
    previous_key: str | None = _setting(_text, "the key before this one, until it is retired")
    previous_key_thumbprint: str | None = _setting(_text, "RFC 7638 thumbprint of the previous key")
    module_env: Mapping[str, str] | None = _setting(
        _environment, "variables set before the module is loaded, with absolute paths: they are not changed"
    )

    config: Path | None = None
    profile: str | None = None
    not_chosen: tuple[str, ...] = ()  # the profiles of the file where none was named
    profile_key: str | None = None  # what key-thumbprint and certificate belong to, whatever key is in use
    origins: Mapping[str, str] = field(default_factory=dict, repr=False)

    def origin(self, name: str) -> str:
        """The layer that a setting came from: option, environment, profile, preset or default."""
        return self.origins.get(name, "default")

    def shown(self, name: str) -> object:
        """The value of a setting as it may be shown: a proxy without its password."""
        return url.without_password(self.proxy) if name == "proxy" and self.proxy else getattr(self, name)

    def require(self, *names: str) -> None:
        """Raise :class:`ConfigError` that says how to give the first of these settings that is missing."""
        for name in names:
            if getattr(self, name) is None:
                hyphened = name.replace("_", "-")
                hint = f"use --{hyphened}, {variable(name)}, or {hyphened} in a profile"
                if not self.profile:
                    hint += "; hsm-token config init writes one"
                if self.not_chosen:
                    hint = f"choose a profile with --profile: {', '.join(self.not_chosen)}"
                raise ConfigError(f"no {hyphened} given", hint=hint)

    def audience_for(self, endpoint: str) -> str:
        """The ``aud`` for a token endpoint; :class:`ConfigError` where it could name another server.

        An audience of another origin than the endpoint's is taken only when one layer set both:
        whoever can change one of them alone must not get an assertion that is good elsewhere.
        """
        name = "issuer" if self.audience is None and self.preset == "fapi2" else "audience"
        audience = getattr(self, name)
        if audience is None:
            if name == "issuer":
                self.require("issuer")
            return endpoint
        if self.strays(name, endpoint):
            source = "token_endpoint" if self.token_endpoint else "issuer"
            raise ConfigError(
                f"audience {audience!r} (from {self.origin(name)}) is of another server than"
                f" {endpoint!r} (from {self.origin(source)})",
                hint="set both in one place: both as options, both in the environment, or both in the profile",
            )
        return str(audience)

    def strays(self, name: str, endpoint: str) -> bool:
        """Whether this setting is of another server than the token endpoint, and comes from another layer."""
        source = "token_endpoint" if self.token_endpoint else "issuer"
        return self.origin(name) != self.origin(source) and _of_another_server(
            str(getattr(self, name)), endpoint
        )


def _of_another_server(audience: str, endpoint: str) -> bool:
    if "://" not in audience:
        return False  # a name, not a place
    return not url.same_origin(
        url.parse(audience, what="audience"), url.parse(endpoint, what="token endpoint")
    )


SETTINGS = {each.name: each for each in fields(Settings) if "parse" in each.metadata}


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"HSM_TOKEN_{name.upper()}"


def load(options: Mapping[str, object], environ: Mapping[str, str] = os.environ) -> Settings:
    """Put the layers together; ``options`` has ``config`` and ``profile`` too, ``None`` where not given."""
    path, document = _document(options.get("config") or environ.get(variable("config")))
    wanted = options.get("profile") or environ.get(variable("profile"))
    profile, table = _profile(path, document, None if wanted is None else str(wanted))
    layers: list[tuple[str, Mapping[str, object]]] = [
        ("option", {name: options[name] for name in SETTINGS if options.get(name) is not None}),
        ("environment", _from_environment(environ)),
        ("profile", table),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer, given in layers:
        for name, value in given.items():
            if name not in values:
                values[name] = _parsed(
                    name, value, f"profile {profile} in {path}" if given is table else layer
                )
                origins[name] = layer
    _warn_of_others(environ, values.get("pin_source"))
    for hyphened, value in PRESETS.get(values.get("preset", ""), {}).items():
        name = hyphened.replace("-", "_")
        origins.setdefault(name, "preset")
        values.setdefault(name, value)
    return Settings(
        **values,
        config=path if document else None,
        profile=profile,
        not_chosen=() if profile else tuple(document.get("profiles", ())),
        profile_key=str(table["key"]) if "key" in table else None,
        origins=origins,
    )


def given_values(
    options: Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> tuple[dict[str, object], list[str]]:
    """Options over environment, as they were given, and the variables that were taken; no file is read."""
    profile = environ.get(variable("profile")) or None
    from_environment = _from_environment(environ) | {"profile": profile}
    values = {name: from_environment.get(name) if given is None else given for name, given in options.items()}
    taken = [
        variable(name) for name, given in options.items() if given is None and from_environment.get(name)
    ]
    _warn_of_others(environ, values.get("pin_source"))
    return values, taken


def absolute(name: str, value: str) -> str:
    """Make a path that was typed absolute: it is of the working directory, and in a file of the file's."""
    here = Path.cwd()
    return str(here / value) if name == "module" else str(_relative_to(here, name, value))


def check(values: Mapping[str, object]) -> None:
    """Raise :class:`ConfigError` for a value that no profile may have."""
    for name, value in values.items():
        if value is not None:
            _parsed(name, value, "given")


def new_file(named: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where ``config init`` writes: the named file, else the user's own."""
    named = named or environ.get(variable("config"))
    return Path(named) if named else paths.user_config_file()


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """An empty variable is as good as none: ``HSM_TOKEN_PROXY= hsm-token …`` undoes an exported one."""
    optional = (name for name, each in SETTINGS.items() if each.metadata["option"])
    return {name: environ[variable(name)] for name in optional if environ.get(variable(name))}


def _warn_of_others(environ: Mapping[str, str], pin_source: object) -> None:
    """A variable with a slip in its name is read by nobody, and nobody would notice."""
    read = {variable(name) for name, each in SETTINGS.items() if each.metadata["option"]}
    read |= {variable(name) for name in ("config", "profile", "pin")}
    for name in environ:
        if name.startswith(variable("")) and name not in read and pin_source != f"env:{name}":
            import difflib

            near = difflib.get_close_matches(name, sorted(read), n=1)
            _log.warning("%s is not read%s", name, f": did you mean {near[0]}?" if near else "")


def _parsed(name: str, value: object, source: str) -> object:
    try:
        return SETTINGS[name].metadata["parse"](value)
    except ValueError as wrong:
        raise ConfigError(f"{name.replace('_', '-')} ({source}) must be {wrong}") from None
    except ConfigError as wrong:
        raise ConfigError(f"{name.replace('_', '-')} ({source}): {wrong}", hint=wrong.hint) from None


def _document(named: object) -> tuple[Path | None, Mapping[str, Any]]:
    try:
        path = Path(str(named)).absolute() if named else paths.config_file()
    except OSError as hidden:
        raise ConfigError(f"cannot read {hidden.filename}: {hidden.strerror}") from None
    if path is None:
        return None, {}
    try:
        text = files.read_bytes(files.guarded(path), max_size=toml.MAX_SIZE, forbidden=files.UNTOUCHED)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}", hint="hsm-token config init writes one") from None
    except OSError as unreadable:
        raise ConfigError(f"cannot read {path}: {unreadable.strerror}") from None
    try:
        return path, tomllib.loads(text.decode())
    # TOMLDecodeError and UnicodeDecodeError, whose texts name line and column only; brackets without end
    except (ValueError, RecursionError) as broken:
        raise ConfigError(f"{path} is no TOML: {broken}") from None


def _profile(
    path: Path | None, document: Mapping[str, object], wanted: str | None
) -> tuple[str | None, dict[str, object]]:
    if path is None:
        if wanted is None:
            return None, {}
        raise ConfigError(
            f"no profile {wanted!r}, since there is no configuration file",
            hint=f"looked for {' and '.join(map(str, paths.config_files()))}; name another one with --config",
        )
    unknown = next((name for name in document if name != "profiles"), None)
    if unknown:
        raise ConfigError(
            f"{path}: unknown key {unknown!r}", hint="profiles stand in tables: [profiles.NAME]"
        )
    profiles = document.get("profiles", {})
    if not isinstance(profiles, dict) or not all(isinstance(each, dict) for each in profiles.values()):
        raise ConfigError(f"{path}: profiles stand in tables: [profiles.NAME]")
    if wanted is None:
        wanted = next(iter(profiles)) if len(profiles) == 1 else "default"
        if wanted not in profiles:
            return None, {}
    if wanted not in profiles:
        known = ", ".join(profiles) or "none"
        raise ConfigError(f"no profile {wanted!r} in {path}", hint=f"profiles there: {known}")
    return wanted, {
        name.replace("-", "_"): _relative_to(path.parent, name.replace("-", "_"), value)
        for name, value in profiles[wanted].items()
        if _known(name, f"profile {wanted} in {path}")
    }


def _known(name: str, where: str) -> bool:
    names = [each.replace("_", "-") for each in SETTINGS]
    if name in names:
        return True
    import difflib

    if name == "pin":
        raise ConfigError(f"{where}: a PIN does not belong in a file of settings", hint="use pin-source")
    near = difflib.get_close_matches(name, names, n=1)
    raise ConfigError(
        f"{where}: unknown key {name!r}",
        hint=f"did you mean {near[0]}?" if near else f"known keys: {', '.join(names)}",
    )


def _relative_to(directory: Path, name: str, value: object) -> object:
    """Paths in a configuration file are relative to it."""
    if not isinstance(value, str) or not value:
        return value
    if SETTINGS[name].metadata["path"]:
        return str(directory / value)
    if name == "pin_source":
        return _pin_source_relative_to(directory, value)
    if name == "module" and not Path(value).is_absolute():
        raise ConfigError(f"module {value!r} must be an absolute path in a configuration file")
    return value


def _pin_source_relative_to(directory: Path, source: str) -> str:
    """Of a command only a first word with a slash in it is a path; others are looked up in ``PATH``.

    Left as it is, it would run a file of the working directory.
    """
    kind, _, argument = source.partition(":")
    if kind == "file" and argument:
        return f"file:{directory / argument}"
    if kind != "command":
        return source
    import shlex

    try:
        words = shlex.split(argument)
    except ValueError:  # pin.py says so when the PIN is wanted
        return source
    if not words or "/" not in words[0] or Path(words[0]).is_absolute():
        return source
    return f"command:{shlex.join([str(directory / words[0]), *words[1:]])}"


def prepared_module(settings: Settings) -> str:
    """The module's path, once it may be loaded.

    Nobody else can change what we are about to load and hand a PIN to, and the variables that it reads when
    it is loaded are set.
    """
    settings.require("module")
    module = Path(str(settings.module)).absolute()
    try:
        files.open_regular(files.guarded(module), forbidden=files.UNTOUCHED).close()
    except OSError as missing:
        from hsm_signer.hsm.known import known_modules

        here = ", ".join(map(str, known_modules()))
        raise ModuleError(
            f"no PKCS#11 module {module}: {missing.strerror}",
            hint=f"found on this machine: {here}" if here else "the token's vendor has a package with one",
        ) from None
    os.environ.update(settings.module_env or {})
    return str(module)


def default_pin_source(environ: Mapping[str, str] = os.environ) -> str:
    """Where the PIN comes from when no source is set: ``HSM_TOKEN_PIN``, else a person."""
    name = variable("pin")
    return f"env:{name}" if environ.get(name) else "prompt"


def proxy_for(settings: Settings, endpoint: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The proxy for an endpoint: the configured one, else ``HTTPS_PROXY`` unless ``NO_PROXY`` names the host.

    Never one for loopback: an assertion for this machine has no business elsewhere.
    """
    target = url.parse(endpoint, what="token endpoint")
    if target.is_loopback:
        return None
    proxy = settings.proxy or environ.get("https_proxy") or environ.get("HTTPS_PROXY")
    if not proxy or settings.proxy:
        return proxy or None
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # missing in typeshed

    exceptions = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    bypassed: bool = proxy_bypass_environment(target.host, {"no": exceptions})
    return None if bypassed else proxy
