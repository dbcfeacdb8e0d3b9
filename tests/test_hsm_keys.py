"""Keys on a token: made there, described, theirs and nobody else's, and deleted without harm to others."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SoftToken
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from faults import FaultyModule
from software_signer import SoftwareSigner
from stranger import plant

from hsm_signer import ecdsa, open_token, x509
from hsm_signer.errors import (
    ConfigError,
    KeyAmbiguousError,
    KeyExportableError,
    KeyMismatchError,
    KeyNotFoundError,
    SignatureInvalidError,
    SigningKeyError,
    TokenError,
)
from hsm_signer.hsm import generation
from hsm_signer.hsm.keys import KeyInfo
from hsm_signer.hsm.token import Token
from hsm_signer.jose import thumbprint


@pytest.fixture(scope="module")
def soft(new_token: Callable[..., SoftToken]) -> SoftToken:
    return new_token()


@pytest.fixture
def token(soft: SoftToken) -> Iterator[Token]:
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as opened:
        yield opened


def by_a_stranger(
    soft: SoftToken, label: str, key_id: str, *arguments: str, curve: str = "prime256v1"
) -> None:
    """A key pair as pkcs11-tool makes it: the public half can be seen and destroyed without a PIN."""
    soft.pkcs11_tool(
        "--keypairgen",
        "--key-type",
        f"EC:{curve}",
        "--label",
        label,
        "--id",
        key_id,
        "--usage-sign",
        *arguments,
    )


def self_signed(signer: object) -> bytes:
    return x509.self_signed(signer, common_name="ours", not_before=int(time.time()), days=9)


def listed(token: Token, label: str) -> KeyInfo:
    keys = token.keys()
    return next(key for key in keys if key.label == label)


# ---- generation ----


def test_a_generated_key_reads_back_as_one_that_stays(token: Token) -> None:
    key = token.generate_key("stays")
    assert (key.label, key.curve, len(key.id)) == ("stays", "P-256", 16)
    assert not key.exportable
    said = {
        name: key.flags[name] for name in ("sensitive", "extractable", "never_extractable", "private", "sign")
    }
    assert said == {
        "sensitive": True,
        "extractable": False,
        "never_extractable": True,
        "private": True,
        "sign": True,
    }
    unused = {name: key.flags[name] for name in ("decrypt", "unwrap", "derive", "copyable")}
    assert not any(unused.values()), unused
    assert key.thumbprint == token.signer("stays").kid
    assert listed(token, "stays") == key


def test_without_a_pin_nobody_sees_or_destroys_what_was_generated(soft: SoftToken, token: Token) -> None:
    token.generate_key("hidden")
    assert "hidden" not in soft.pkcs11_tool("--list-objects", login=False)
    assert "hidden" in soft.pkcs11_tool("--list-objects")


def test_a_key_takes_the_id_that_is_given_or_a_random_one(token: Token) -> None:
    assert token.generate_key("with-id", id=b"\x01\x02").id == b"\x01\x02"
    assert token.generate_key("random-1").id != token.generate_key("random-2").id
    assert token.signer("pkcs11:id=%01%02").kid == token.signer("with-id").kid


def test_a_label_that_is_longer_than_what_one_call_reads_is_read_all_the_same(token: Token) -> None:
    made = token.generate_key("long" * 75)
    assert made == listed(token, "long" * 75)
    assert token.signer("long" * 75).kid == made.thumbprint


def test_a_label_or_id_that_is_taken_is_refused_and_what_was_there_stays(token: Token) -> None:
    first = token.generate_key("once", id=b"once")
    with pytest.raises(KeyAmbiguousError):
        token.generate_key("once")
    with pytest.raises(KeyAmbiguousError):
        token.generate_key("twice", id=b"once")
    assert token.signer("once", thumbprint=first.thumbprint)


NO_NAMES = [
    ("", None),
    ("x", b""),
    ("\ud800", None),
    (5, None),
    (b"x", None),
    ("x", "id"),
    ("x", 5),
    ("x", []),
]


@pytest.mark.parametrize(("label", "key_id"), NO_NAMES)
def test_a_name_that_a_token_cannot_be_given_is_refused_and_the_module_lives_on(
    soft: SoftToken, label: object, key_id: object
) -> None:
    """In a process of its own: python-pkcs11 reads memory that is not its own over such a template."""
    program = (
        "import os, sys; from hsm_signer import open_token; from hsm_signer.errors import ConfigError\n"
        "label, key_id = eval(sys.argv[3])\n"
        "with open_token(sys.argv[1], module=sys.argv[2], pin=os.environ['TEST_PIN']) as token:\n"
        "    try: token.generate_key(label, id=key_id)\n"
        "    except ConfigError: print(token.keys() is not None)\n"
    )
    command = [sys.executable, "-c", program, soft.uri, soft.module, repr((label, key_id))]
    done = subprocess.run(command, env=os.environ | {"TEST_PIN": soft.pin}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize("refusals", range(1, 6))
def test_the_next_rung_is_taken_where_a_template_is_refused(
    soft: SoftToken, faulty: FaultyModule, refusals: int
) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        faulty.set(*(f"fail C_GenerateKeyPair {nth + 1} CKR_GENERAL_ERROR" for nth in range(refusals)))
        key = token.generate_key(f"rung-{refusals}")
        assert not key.exportable
        assert faulty.calls("C_GenerateKeyPair") == refusals + 1
        signer = token.signer(f"rung-{refusals}", thumbprint=key.thumbprint)
        assert len(signer.sign(b"data")) == 64


def test_a_token_that_generates_no_ec_keys_says_so(soft: SoftToken, faulty: FaultyModule) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        faulty.set("fail C_GenerateKeyPair 0 CKR_MECHANISM_INVALID")
        with pytest.raises(TokenError, match="CKR_MECHANISM_INVALID") as caught:
            token.generate_key("no-ec")
        assert "EC" in str(caught.value)


@pytest.mark.parametrize("function", ["C_GetAttributeValue", "C_SignInit", "C_Sign", "C_FindObjects"])
def test_a_generation_that_fails_half_way_leaves_nothing_behind(
    soft: SoftToken, faulty: FaultyModule, function: str
) -> None:
    label = f"half-{function}"
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        token.keys()
        before = soft.pkcs11_tool("--list-objects")
        faulty.set("signature wrong")
        with pytest.raises(KeyMismatchError):
            token.generate_key(label)
        faulty.set(f"fail {function} 0 CKR_FUNCTION_FAILED")
        with pytest.raises(TokenError):
            token.generate_key(label)
        faulty.set()
    if function in ("C_SignInit", "C_Sign"):  # the others are needed to clean up as well
        assert soft.pkcs11_tool("--list-objects") == before


def test_a_generation_that_lost_a_race_destroys_its_own_key_alone(
    soft: SoftToken, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one takes the same label and CKA_ID between the look whether they are free and the making."""
    made, generate_pair = [], generation._generate_pair

    def overtaken(session: object, label: str, key_id: bytes) -> object:
        if not made:
            made.append(label)
            made.append(token.generate_key(label, id=key_id))
        return generate_pair(session, label, key_id)

    monkeypatch.setattr(generation, "_generate_pair", overtaken)
    before = soft.pkcs11_tool("--list-objects").count("Key Object")
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as late, pytest.raises(KeyAmbiguousError):
        late.generate_key("raced", id=b"raced")
    assert listed(token, "raced") == made[1]
    assert token.signer("raced", thumbprint=made[1].thumbprint).sign(b"data")
    assert soft.pkcs11_tool("--list-objects").count("Key Object") == before + 2


@pytest.mark.parametrize("key_id", [None, b"interrupted"])
def test_a_key_that_ctrl_c_kept_from_being_judged_does_not_stay(
    soft: SoftToken, token: Token, monkeypatch: pytest.MonkeyPatch, key_id: bytes | None
) -> None:
    monkeypatch.setattr(generation, "_judge", lambda key: signal.raise_signal(signal.SIGINT))
    before = soft.pkcs11_tool("--list-objects")
    with pytest.raises(KeyboardInterrupt):
        token.generate_key("interrupted", id=key_id)
    assert soft.pkcs11_tool("--list-objects") == before


def test_a_key_that_ctrl_c_came_before_the_handles_of_does_not_stay(
    soft: SoftToken, faulty: FaultyModule
) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        before = soft.pkcs11_tool("--list-objects")
        faulty.set("delay C_GenerateKeyPair 400")
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            token.generate_key("slow")
        assert faulty.calls("C_GenerateKeyPair") == 1
        assert soft.pkcs11_tool("--list-objects") == before


# ---- choosing and describing ----


def test_a_key_that_is_not_there_is_told_with_those_that_are(token: Token) -> None:
    token.generate_key("is-there")
    for use in (token.signer, token.prove, token.delete_key, token.certificates):
        with pytest.raises(KeyNotFoundError) as caught:
            use("is-not")
        assert any("is-there" in line for line in caught.value.candidates)


def test_two_keys_of_one_label_are_told_apart_by_their_id(soft: SoftToken, token: Token) -> None:
    for key_id in ("a1", "a2"):
        by_a_stranger(soft, "double", key_id)
    for use in (token.signer, token.prove, token.delete_key, token.certificates):
        with pytest.raises(KeyAmbiguousError) as caught:
            use("double")
        assert len(caught.value.candidates) == 2
    assert token.signer("pkcs11:object=double;id=%a1").kid != token.signer("pkcs11:object=double;id=%a2").kid


def test_keys_of_other_curves_are_listed_and_do_not_sign_es256(soft: SoftToken, token: Token) -> None:
    by_a_stranger(soft, "p384", "3840", curve="secp384r1")
    info = listed(token, "p384")
    assert (info.curve, info.thumbprint) == ("P-384", None)
    with pytest.raises(SigningKeyError, match="P-384"):
        token.signer("p384")


def test_an_exportable_key_signs_only_for_who_says_so(soft: SoftToken, token: Token) -> None:
    by_a_stranger(soft, "exportable", "e0", "--extractable")
    assert listed(token, "exportable").exportable
    with pytest.raises(KeyExportableError):
        token.signer("exportable")
    assert len(token.signer("exportable", allow_exportable=True).sign(b"data")) == 64


def test_the_public_half_leaves_in_all_its_shapes(token: Token) -> None:
    signer = token.signer(token.generate_key("shapes").label)
    numbers = load_pem_public_key(signer.public_key_pem.encode()).public_numbers()
    assert SoftwareSigner().jwk.keys() == signer.jwk.keys()
    point = load_pem_public_key(signer.public_key_pem.encode()).public_bytes(
        Encoding.X962, PublicFormat.UncompressedPoint
    )
    assert point[1:33] == numbers.x.to_bytes(32)
    assert signer.kid == thumbprint(signer.jwk)
    assert signer.alg == "ES256"


# ---- which key is it? ----


def test_the_pinned_key_signs_and_another_does_not(token: Token) -> None:
    key, other = token.generate_key("pinned"), token.generate_key("not-pinned")
    assert token.signer("pinned", thumbprint=key.thumbprint).kid == key.thumbprint
    with pytest.raises(KeyMismatchError, match=str(other.thumbprint)):
        token.signer("pinned", thumbprint=other.thumbprint)


def test_a_pin_holds_for_signatures_that_nobody_verifies(soft: SoftToken, softhsm_module: str) -> None:
    by_a_stranger(soft, "swapped", "5a")
    with open_token(soft.uri, module=softhsm_module, pin=soft.pin, verify=False) as unverified:
        pinned = unverified.signer("swapped").kid
        soft.pkcs11_tool("--delete-object", "--type", "privkey", "--label", "swapped")
        by_a_stranger(soft, "swapped", "5a")
        with pytest.raises(KeyMismatchError):
            unverified.signer("swapped", thumbprint=pinned)


def test_planted_objects_beside_a_genuine_public_half_are_passed_over(
    soft: SoftToken, token: Token, tmp_path: Path
) -> None:
    key = token.generate_key("besieged")
    plant(soft, "besieged", key.id, tmp_path)
    signer = token.signer("besieged")
    assert signer.kid == key.thumbprint
    assert len(signer.sign(b"data")) == 64
    info = listed(token, "besieged")
    assert (info.thumbprint, info.certificate) == (key.thumbprint, None)
    assert token.certificates("besieged") == []


def test_a_planted_public_half_in_place_of_the_genuine_one_leaves_the_token_nowhere(
    soft: SoftToken, token: Token, tmp_path: Path
) -> None:
    by_a_stranger(soft, "robbed", "b0")
    genuine = token.signer("robbed").kid
    soft.pkcs11_tool("--delete-object", "--type", "pubkey", "--label", "robbed", login=False)
    plant(soft, "robbed", b"\xb0", tmp_path)
    for take in (
        lambda: token.signer("robbed").kid,
        lambda: token.signer("robbed").jwk,
        lambda: token.signer("robbed").public_key_pem,
        lambda: token.certificates("robbed"),
        lambda: token.prove("robbed"),
        lambda: token.store_certificate("robbed", (tmp_path / "cert").read_bytes()),
        lambda: token.signer("robbed", thumbprint=genuine),
    ):
        with pytest.raises(KeyMismatchError):
            take()
    with pytest.raises(SignatureInvalidError):
        token.signer("robbed").sign(b"data")
    info = listed(token, "robbed")
    assert (info.thumbprint, info.certificate) == (None, None)


def test_a_key_without_any_public_half_is_told(soft: SoftToken, token: Token) -> None:
    by_a_stranger(soft, "alone", "a0")
    soft.pkcs11_tool("--delete-object", "--type", "pubkey", "--label", "alone", login=False)
    with pytest.raises(KeyNotFoundError, match="public"):
        token.signer("alone")


def test_a_certificate_does_for_a_public_half_that_is_gone(soft: SoftToken, token: Token) -> None:
    by_a_stranger(soft, "certified", "c0")
    signer = token.signer("certified")
    kid = signer.kid
    token.store_certificate("certified", self_signed(signer))
    soft.pkcs11_tool("--delete-object", "--type", "pubkey", "--label", "certified", login=False)
    assert token.signer("certified").kid == kid


def test_another_key_that_takes_the_label_of_ours_is_not_ours(soft: SoftToken, token: Token) -> None:
    by_a_stranger(soft, "replaced", "d0")
    signer = token.signer("replaced")
    signer.sign(b"data")
    soft.pkcs11_tool("--delete-object", "--type", "privkey", "--label", "replaced")
    soft.pkcs11_tool("--delete-object", "--type", "pubkey", "--label", "replaced")
    by_a_stranger(soft, "replaced", "d1")
    with pytest.raises(KeyNotFoundError):
        signer.sign(b"data")
    unverified = open_token(soft.uri, module=soft.module, pin=soft.pin, verify=False)
    with unverified as other:
        assert len(other.signer("replaced").sign(b"data")) == 64


# ---- certificates and deletion ----


def test_a_certificate_is_stored_once_under_the_key_and_read_again(soft: SoftToken, token: Token) -> None:
    key = token.generate_key("has-cert")
    der = self_signed(token.signer("has-cert"))
    for _ in range(2):
        token.store_certificate("has-cert", der)
    assert token.certificates("has-cert") == [der]
    assert listed(token, "has-cert").certificate == der
    shown = soft.pkcs11_tool("--list-objects", "--type", "cert", login=False)
    assert shown.count(key.id.hex()) == 1
    assert "has-cert" in shown


def test_a_certificate_of_another_key_is_refused(token: Token) -> None:
    token.generate_key("no-cert")
    with pytest.raises(KeyMismatchError):
        token.store_certificate("no-cert", self_signed(SoftwareSigner()))
    assert token.certificates("no-cert") == []


def test_what_is_no_certificate_in_der_is_refused_before_the_token_is_asked(
    soft: SoftToken, faulty: FaultyModule
) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        token.generate_key("der-only")
        der = self_signed(token.signer("der-only"))
        faulty.forget()
        for content in (ecdsa.pem("CERTIFICATE", der).encode(), b"no certificate", b""):
            with pytest.raises(ConfigError):
                token.store_certificate("der-only", content)
        for label in ("", "\ud800", 5):
            with pytest.raises(ConfigError, match="label"):
                token.store_certificate("der-only", der, label=label)
        assert faulty.log() == []


def test_a_deleted_key_takes_all_that_is_its_own_and_nothing_else(
    soft: SoftToken, token: Token, tmp_path: Path
) -> None:
    key = token.generate_key("goes")
    token.store_certificate("goes", self_signed(token.signer("goes")))
    plant(soft, "goes", key.id, tmp_path)
    token.delete_key("goes", thumbprint=key.thumbprint)
    with pytest.raises(KeyNotFoundError):
        token.signer("goes")
    objects = re.split(r"^(?=\w)", soft.pkcs11_tool("--list-objects"), flags=re.MULTILINE)
    left = [text for text in objects if key.id.hex() in text]
    assert sorted(text.split()[0] for text in left) == ["Certificate", "Public"]  # both are the stranger's
    assert any("CN=stranger" in text for text in left)
    token.generate_key("goes")  # and does not take the label


def test_a_key_of_another_thumbprint_is_not_deleted(token: Token) -> None:
    key, other = token.generate_key("kept"), token.generate_key("other")
    with pytest.raises(KeyMismatchError):
        token.delete_key("kept", thumbprint=other.thumbprint)
    assert token.signer("kept", thumbprint=key.thumbprint).sign(b"data")


def test_a_key_whose_public_half_cannot_be_proved_is_deleted_only_without_a_thumbprint(
    soft: SoftToken, token: Token, tmp_path: Path
) -> None:
    by_a_stranger(soft, "unproved", "f0")
    thumb = token.signer("unproved").kid
    soft.pkcs11_tool("--delete-object", "--type", "pubkey", "--label", "unproved", login=False)
    plant(soft, "unproved", b"\xf0", tmp_path)
    with pytest.raises(KeyMismatchError):
        token.delete_key("unproved", thumbprint=thumb)
    token.delete_key("unproved")
    assert "unproved" in soft.pkcs11_tool("--list-objects", login=False)  # the planted ones
    with pytest.raises(KeyNotFoundError):
        token.signer("unproved")
