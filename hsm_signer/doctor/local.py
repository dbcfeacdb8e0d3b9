"""The checks that need no network: configuration, module, token, PIN, key, certificate."""

import json
import os
import secrets
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hsm_signer import assembly, files, validity
from hsm_signer.config import prepared_module
from hsm_signer.doctor.examination import Examination, known
from hsm_signer.doctor.finding import NotCheckedError, Outcome, ok, warning
from hsm_signer.errors import (
    ConfigError,
    KeyExportableError,
    KeyMismatchError,
    PinError,
    PinRefusedError,
    TokenError,
    UnsafeFileError,
    VerificationError,
)
from hsm_signer.url import parse as parse_url

if TYPE_CHECKING:
    from hsm_signer.x509 import Certificate

_UNPINNED_SERIAL = frozenset("0 ")


def configuration(x: Examination) -> Outcome:
    """Everything that a fetch needs is there and fits together."""
    settings = x.settings
    settings.require("module", "token", "key", "client_id")
    if not settings.issuer:
        settings.require("token_endpoint")
    if settings.token_endpoint:
        assembly.client_assertion(settings, parse_url(settings.token_endpoint, what="token-endpoint").text)
    facts = {
        "preset": settings.preset,
        "claims": settings.claims,
        "lifetime": settings.lifetime,
        "clock_offset": settings.clock_offset,
        "kid_sent": bool(settings.kid),
    }
    where = f"profile {settings.profile} in {settings.config}" if settings.profile else "no profile is used"
    if not settings.scope:
        return warning(f"{where}; no scope is asked for", "set scope, unless the server has a default", facts)
    return ok(where, facts)


def module(x: Examination) -> Outcome:
    """The module is one to trust, loads and starts."""
    x.given("module")
    path = prepared_module(x.settings)
    from hsm_signer.hsm.module import module_info

    info = module_info(path)
    x.module = path
    version, cryptoki = info.version, info.cryptoki_version
    threads = "for threads" if info.threads else "one call at a time"
    return ok(
        f"{info.description} {version} by {info.manufacturer}, PKCS#11 {cryptoki}, {threads}: {path}",
        {
            "module": info.description,
            "module_version": version,
            "module_vendor": info.manufacturer,
            "cryptoki": cryptoki,
            "threads": info.threads,
        },
    )


def token(x: Examination) -> Outcome:
    """The token is there, once, and its flags let us log in."""
    path = known(x.module, "module")
    wanted = x.given("token")
    from hsm_signer.hsm import module as modules
    from hsm_signer.hsm.pins import judge_lock
    from hsm_signer.hsm.search import find_token
    from hsm_signer.hsm.uri import Uri, token_uri

    uri = token_uri(wanted)
    info = find_token(modules.load(path), uri).info
    x.slot = next(slot for slot in modules.slots(path) if slot.slot_id == info.slot_id)
    kind = "hardware" if info.hardware else "software"
    evidence = f"{info.label}, serial {info.serial}: {info.manufacturer} {info.model}, a slot of {kind}"
    facts = {
        "token_vendor": info.manufacturer,
        "token_model": info.model,
        "firmware": info.firmware_version,
        "hardware": info.hardware,
        "flags": sorted(info.flags),
    }
    judge_lock(info)
    _require_a_user_pin(info.flags, info.label)
    if "USER_PIN_FINAL_TRY" in info.flags:
        return warning(evidence, "the next wrong PIN locks it: log in once with the token's own tool", facts)
    if "USER_PIN_COUNT_LOW" in info.flags:
        return warning(evidence, "a wrong PIN was tried lately: check the PIN source", facts)
    if "USER_PIN_TO_BE_CHANGED" in info.flags:
        return warning(evidence, "the token wants another PIN: change it with the token's own tool", facts)
    is_pinned = uri.serial is not None or set(info.serial) <= _UNPINNED_SERIAL
    advice = None if is_pinned else f'pin its serial: token = "{Uri(token=info.label, serial=info.serial)}"'
    return ok(evidence, facts, advice=advice)


def _require_a_user_pin(flags: frozenset[str], label: str) -> None:
    if "LOGIN_REQUIRED" in flags and "USER_PIN_INITIALIZED" not in flags:
        raise PinError(
            f"token {label!r} has no user PIN yet",
            code="CKR_USER_PIN_NOT_INITIALIZED",
            hint="the security officer sets the first one, with the token's own tool",
        )


def mechanism(x: Examination) -> Outcome:
    """The token signs with ECDSA."""
    offered = known(x.slot, "token").mechanisms
    for name, evidence in (("ECDSA", "CKM_ECDSA"), ("ECDSA_SHA256", "CKM_ECDSA_SHA256: the token hashes")):
        if name in offered:
            return ok(evidence, {"mechanism": name})
    raise TokenError(
        f"the token offers neither CKM_ECDSA nor CKM_ECDSA_SHA256; {len(offered)} mechanisms are others",
        code="CKR_MECHANISM_INVALID",
        hint="ES256 needs a token with elliptic curves: see hsm-token slots",
    )


def pin_source(x: Examination) -> Outcome:
    """The PIN can be fetched, and nothing keeps it from being sent; it is not sent here."""
    from hsm_signer.pin import PinSource

    name = str(x.settings.pin_source)
    if name == "prompt" and x.login.prompt is None:
        raise NotCheckedError(
            "the PIN is asked for, and here is no terminal", "for a service, set pin-source"
        )
    source = assembly.pin_source(x.settings, x.login)
    if not isinstance(source, PinSource):
        if x.slot and "PROTECTED_AUTHENTICATION_PATH" not in x.token_info.flags:
            raise PinRefusedError("the token has no PIN pad", hint="choose another pin-source")
        return ok("typed at the token's PIN pad", {"pin_source": "pinpad"})
    kind = name.partition(":")[0]
    if not source.unattended:
        return ok("asked for at the terminal", {"pin_source": kind})
    _check_state(assembly.state_directory(x.settings))
    if x.slot:
        source.check(x.token_info.identity)
    if kind == "command":  # running it can ask a person for something; the login does that
        _check_command(name)
        return ok(f"{source.name} is there, and is run at a login only", {"pin_source": kind})
    source()
    return ok(
        f"{source.name} gives what can be a PIN, and no unsuccessful login stands", {"pin_source": kind}
    )


def _check_state(directory: Path) -> None:
    """No unattended login without a directory for its marker."""
    try:
        with files.guarded_directory(directory):
            writable = os.access(directory, os.W_OK)
    except (OSError, UnsafeFileError) as exc:
        raise PinRefusedError(
            f"state directory {directory}: {exc}", hint="set state-dir to one of ours"
        ) from None
    if not writable:
        raise PinRefusedError(f"state directory {directory} is not writable", hint=f"chmod u+w {directory}")


def _check_command(name: str) -> None:
    program = shlex.split(name.partition(":")[2])[0]
    if not shutil.which(program):
        raise ConfigError(
            f"the program of the PIN command is not there: {program}", hint="pin-source needs it"
        )


def audit_log(x: Examination) -> Outcome:
    """What the key is used for can be written down; it is not here, and nothing is made."""
    log = assembly.audit_log(x.settings)
    head = log.look() if log else None
    x.writable = True
    if log is None:
        return ok("no audit-log is set: what the key is used for is not written down")
    if head is None:
        return ok(f"{log.path} is made by the first use of the key")
    return ok(f"{log.path}, {head.count} lines; hsm-token audit verify checks them")


def login(x: Examination) -> Outcome:
    """The token takes the PIN."""
    known(x.slot, "token")
    known(x.writable, "audit log")
    name = str(x.settings.pin_source)
    how = x.login
    if name == "prompt":
        if how.prompt is None:
            raise NotCheckedError("nobody is there to type the PIN")
        ask = how.prompt

        def ask_or_pass(question: str) -> str:
            pin = ask(f"{question.rstrip(': ')} (Enter alone goes on without): ")
            if not pin:
                raise NotCheckedError("no PIN was typed")
            return pin

        how = assembly.Login(ask_or_pass, how.retry)
    elif not x.may_log_in and "LOGIN_REQUIRED" in x.token_info.flags:
        raise NotCheckedError("no PIN is sent to a token unasked", "hsm-token doctor --login")
    x.token = x.held.enter_context(assembly.open_token(x.settings, how))
    return ok("the token took the PIN")


def key(x: Examination) -> Outcome:
    """The key is there, once, is the pinned one, and its public half is its own."""
    token = known(x.token, "login")
    name, pinned = x.given("key"), x.settings.key_thumbprint
    signer = token.signer(name, thumbprint=pinned)
    thumbprint = signer.kid  # signs a fresh challenge
    x.signer = signer
    advice = None if pinned else f'pin it: key-thumbprint = "{thumbprint}"'
    return ok(f"{name}, thumbprint {thumbprint}, {'as' if pinned else 'not'} pinned", advice=advice)


def proof(x: Examination) -> Outcome:
    """The key cannot leave the token, as far as trying shows."""
    known(x.signer, "key")
    shown = known(x.token, "login").prove(str(x.settings.key))
    facts = {
        "key_flags": sorted(name for name, value in shown.claimed.items() if value),
        "probes": [f"{probe.name}: {probe.answer}" for probe in shown.probed],
    }
    if not shown.ok:
        raise KeyExportableError(shown.statement, hint="hsm-token key prove shows what was tried")
    return ok(shown.statement, facts)


def signature(x: Examination) -> Outcome:
    """A signature verifies in software, and on the token where it can tell."""
    from hsm_signer.ecdsa import point_from_jwk
    from hsm_signer.errors import SignatureInvalidError
    from hsm_signer.verification import PublicKey

    signer = known(x.signer, "key")
    data = b"hsm-signer: test signature\0" + secrets.token_bytes(32)  # by which the audit log knows it
    began = time.perf_counter()
    made = signer.sign(data)
    milliseconds = round((time.perf_counter() - began) * 1000, 1)
    PublicKey(point_from_jwk(signer.jwk)).verify(made, data)
    by_token = signer.verified_by_token(made, data)
    if by_token is False:
        raise SignatureInvalidError("the signature verifies in software, but the token itself refuses it")
    also = "and by the token" if by_token else "; the token does not verify"
    facts = {"verified_by_token": by_token, "milliseconds": milliseconds}
    return ok(f"made in {milliseconds} ms, verified in software {also}", facts)


def cache(x: Examination) -> Outcome:
    """Access tokens can be kept where nobody else reads them; without, each fetch asks the server."""
    directory = assembly.cache_directory(x.settings)
    try:
        with files.private_directory(directory, create=False):
            writable = os.access(directory, os.W_OK)
    except FileNotFoundError:
        return ok(f"{directory} is made by the first fetch")
    except (OSError, UnsafeFileError) as unfit:
        return warning(
            f"the cache is not used: {unfit}",
            getattr(unfit, "hint", None) or "set cache to a directory of ours",
        )
    if not writable:
        return warning(f"the cache is not used: {directory} is not writable", f"chmod u+w {directory}")
    return ok(f"{directory} is ours alone")


def certificate(x: Examination) -> Outcome:
    """The registered certificate is of this key, in date, and the one that was enrolled."""
    now = int(x.clock())
    where, found, replaced = _certificate(x, now)
    thumbprint = x.signer.kid if x.signer else x.settings.key_thumbprint
    if thumbprint and not found.holds(thumbprint):
        raise KeyMismatchError(
            f"{where} is not of the key with thumbprint {thumbprint}",
            hint="what is registered decides: name its certificate, or its key",
        )
    days = found.days_left(now)
    if now >= found.not_after.timestamp():
        raise VerificationError(
            f"{where} ended {found.not_after:%Y-%m-%d}", hint="hsm-token rollover prepare"
        )
    if now < found.not_before.timestamp():
        raise VerificationError(
            f"{where} starts {found.not_before:%Y-%m-%d %H:%M} UTC only", hint="see the clock"
        )
    if x.settings.certificate:
        _compare_receipt(Path(where), found.fingerprint)
    whose = "of the key" if thumbprint else "not compared with the key"
    evidence = f"{where}: {found.subject}, {whose}, {days} days left"
    facts = {"certificate_days": days}
    if days < validity.WARN_DAYS:
        return warning(evidence, "register the next one in time: hsm-token rollover prepare", facts)
    if replaced:
        evidence += f"; ended, and still on the token: {replaced}"
        return warning(evidence, "hsm-token cert import --replace removes them from the token", facts)
    return ok(evidence, facts)


def _certificate(x: Examination, now: int) -> "tuple[str, Certificate, int]":
    """The file that the profile names, else what lies beside the key on the token, and how much of it is old."""
    if x.settings.certificate:
        return x.settings.certificate, validity.read_file(Path(x.settings.certificate)), 0
    stored = validity.on_token(x.signer, str(x.settings.key), now) if x.signer else []
    if not stored:
        raise NotCheckedError(
            "no certificate is named",
            "hsm-token enroll makes one and names it; one that is there already is named in the profile:"
            ' certificate = "…/es256_cert.pem"',
        )
    return stored[0].where, stored[0].certificate, sum(each.replaced for each in stored)


def _compare_receipt(path: Path, fingerprint: str) -> None:
    """Beside a certificate in its enrolment folder lies what was sent."""
    from hsm_signer.enrolment import RECEIPT

    receipt = path.resolve().parent / RECEIPT
    try:
        told = json.loads(files.read_bytes(receipt, max_size=1 << 20, forbidden=0))
        enrolled = told["certificate"]["sha256"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{receipt} cannot be read, so nobody knows which certificate was sent") from None
    if enrolled != fingerprint:
        raise VerificationError(
            f"{path} is not the certificate that {receipt} says was enrolled",
            hint="ask the operator which of the two is registered",
        )
