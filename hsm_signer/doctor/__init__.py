"""What is wrong with an installation, found out one step at a time.

Nothing is changed, and without permission no PIN is sent. A check that fails stops those that need what it
was to find, and no others.
"""

import importlib.metadata
import logging
import platform
import ssl
import traceback
from collections.abc import Callable, Iterable, Iterator

from hsm_signer import __version__
from hsm_signer.doctor import local, remote
from hsm_signer.doctor.examination import Examination
from hsm_signer.doctor.finding import Finding, NotCheckedError, Outcome, Verdict, error_facts
from hsm_signer.errors import ConfigError, HsmSignerError

__all__ = ["LADDER", "Examination", "Finding", "Verdict", "bundle", "examine", "unconfigured"]

Check = Callable[[Examination], Outcome]

_log = logging.getLogger(__name__)

LOCAL: tuple[tuple[str, Check], ...] = (
    ("configuration", local.configuration),
    ("module", local.module),
    ("token", local.token),
    ("mechanism", local.mechanism),
    ("PIN source", local.pin_source),
    ("audit log", local.audit_log),
    ("login", local.login),
    ("key", local.key),
    ("proof", local.proof),
    ("signature", local.signature),
    ("certificate", local.certificate),
    ("cache", local.cache),
)
REMOTE: tuple[tuple[str, Check], ...] = (
    ("proxy", remote.proxy),
    ("DNS", remote.name_resolution),
    ("TCP", remote.connection),
    ("TLS", remote.tls),
    ("clock", remote.clock),
    ("discovery", remote.discovery),
    ("audience", remote.audience),
    ("token request", remote.token_request),
    ("scope", remote.scope),
    ("access token", remote.access_token),
)
LADDER = LOCAL + REMOTE

# What a support mail may hold: no label, serial, name, path, address, URL, client id or thumbprint.
BUNDLED = frozenset(
    {
        *("preset", "claims", "lifetime", "clock_offset", "kid_sent", "pin_source"),
        *("module", "module_version", "module_vendor", "cryptoki", "threads"),
        *("token_vendor", "token_model", "firmware", "hardware", "flags", "mechanism"),
        *("key_flags", "probes", "verified_by_token", "milliseconds", "certificate_days"),
        *("proxy", "addresses", "tls", "tls_days", "ca_bundle", "server_clock_lead"),
        *("endpoint_as_published", "audience", "expires_in", "jwt"),
    }
)
_OAUTH_ERRORS = (  # RFC 6749 §5.2
    *("", "invalid_request", "invalid_client", "invalid_grant", "unauthorized_client"),
    *("unsupported_grant_type", "invalid_scope"),
)
_PACKAGES = ("python-pkcs11", "asn1crypto", "cryptography", "requests", "urllib3", "typer", "joserfc")


def examine(x: Examination) -> Iterator[Finding]:
    """Make the checks in turn; the token is closed after the last one."""
    with x.held:
        for name, check in LADDER:
            _log.info("checking %s", name)
            yield _finding(name, check, x)


def unconfigured(error: ConfigError) -> Iterator[Finding]:
    """What can be said where the settings cannot be read."""
    yield _failure("configuration", error)
    for name, _ in LADDER[1:]:
        yield Finding(Verdict.NOT_CHECKED, "the check 'configuration' has to succeed first", check=name)


def _finding(name: str, check: Check, x: Examination) -> Finding:
    if x.offline and (name, check) in REMOTE and check is not remote.clock:
        return Finding(Verdict.NOT_CHECKED, "offline", check=name)
    try:
        done = check(x)
    except NotCheckedError as why:
        return Finding(Verdict.NOT_CHECKED, str(why), why.remedy, check=name)
    except HsmSignerError as error:
        return _failure(name, error)
    except Exception as unexpected:  # noqa: BLE001  # the other checks go on; no text, it could hold a secret
        _log.debug("%s", "".join(traceback.format_tb(unexpected.__traceback__)))
        what = f"unexpected {type(unexpected).__name__}"
        return _failure(name, HsmSignerError(what, hint="this is a bug: please report what -vv shows"))
    return Finding(done.verdict, done.evidence, done.remedy, done.facts, check=name)


def _failure(name: str, error: HsmSignerError) -> Finding:
    there = ", ".join(getattr(error, "candidates", ()))
    evidence = f"{error}; there is: {there}" if there else str(error)
    return Finding(Verdict.FAILED, evidence, error.hint, check=name, error=error)


def bundle(findings: Iterable[Finding]) -> dict[str, object]:
    """What is fit for a support mail: verdicts, codes, and the facts in :data:`BUNDLED`."""
    versions = {
        "hsm-signer": __version__,
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    checks = [
        {
            "check": each.check,
            "verdict": str(each.verdict),
            "facts": {name: value for name, value in each.facts.items() if name in BUNDLED},
            "error": _bundled_error(each),
        }
        for each in findings
    ]
    return {"versions": versions, "platform": platform.platform(), "checks": checks}


def _bundled_error(finding: Finding) -> dict[str, object] | None:
    facts = error_facts(finding.error)
    if facts and facts.get("error", "") not in _OAUTH_ERRORS:
        facts["error"] = "another"  # the server's own words can be anything
    return facts
