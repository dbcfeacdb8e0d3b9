"""Signing: 64 bytes that verify, at the price of two calls, and on again after what broke."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import SoftToken
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from faults import FaultyModule

from hsm_signer import open_token
from hsm_signer.errors import (
    KeyNotFoundError,
    PinRefusedError,
    PinRejectedError,
    TokenError,
    TokenNotFoundError,
)
from hsm_signer.hsm.signer import HsmSigner
from hsm_signer.hsm.token import Token
from hsm_signer.jose import Signer

KEY = "signs"
DATA = b"what is signed"
MORE = ["C_SignInit", "C_Sign"]


@pytest.fixture(scope="module")
def soft(new_token: Callable[..., SoftToken]) -> SoftToken:
    token = new_token()
    with open_token(token.uri, module=token.module, pin=token.pin) as opened:
        opened.generate_key(KEY)
    return token


@pytest.fixture
def token(soft: SoftToken, faulty: FaultyModule) -> Iterator[Token]:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as opened:
        yield opened


@pytest.fixture
def signer(token: Token) -> HsmSigner:
    signer = token.signer(KEY)
    signer.sign(DATA)
    assert signer.kid
    return signer


def signs(signer: HsmSigner, data: bytes = DATA) -> None:
    signature = signer.sign(data)
    assert len(signature) == 64
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    key = load_pem_public_key(signer.public_key_pem.encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(SHA256()))


def names(faulty: FaultyModule) -> list[str]:
    return [call.function for call in faulty.log()]


def test_it_is_a_signer(signer: HsmSigner) -> None:
    as_signer: Signer = signer
    assert as_signer.alg == "ES256"


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 100_000])
def test_data_of_any_length_is_signed(signer: HsmSigner, size: int) -> None:
    signs(signer, b"x" * size)


def test_buffers_are_data_and_other_things_are_not(signer: HsmSigner, faulty: FaultyModule) -> None:
    assert len(signer.sign(bytearray(DATA))) == len(signer.sign(memoryview(DATA))) == 64
    faulty.forget()
    for wrong in ("text", 32, None):
        with pytest.raises(TypeError):
            signer.sign(wrong)
    assert names(faulty) == []
    signs(signer)


def test_a_further_signature_is_two_calls(signer: HsmSigner, faulty: FaultyModule) -> None:
    faulty.forget()
    signer.sign(DATA)
    assert names(faulty) == MORE


def test_a_first_signature_asks_for_nothing_twice(soft: SoftToken, faulty: FaultyModule) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        token.signer(KEY).sign(DATA)
    calls = names(faulty)
    found = [calls.count(name) for name in ("C_FindObjectsInit", "C_GetSlotList", "C_Sign")]
    assert found == [2, 2, 1]
    per_slot = {"C_GetSlotInfo", "C_GetTokenInfo"}
    assert len([call for call in calls if call not in per_slot]) <= 30
    assert "C_GetMechanismList" not in calls


# ---- recovery ----


@pytest.mark.parametrize(
    ("failures", "logins", "starts"),
    [(1, 0, 0), (2, 1, 0), (3, 2, 1)],
    ids=["another session", "a new login", "the module started again"],
)
def test_each_step_of_recovery_is_taken_only_when_the_one_before_did_not_help(
    signer: HsmSigner, faulty: FaultyModule, failures: int, logins: int, starts: int
) -> None:
    faulty.forget()
    faulty.set(*(f"fail C_SignInit {nth + 1} CKR_DEVICE_ERROR" for nth in range(failures)))
    signs(signer)
    assert (faulty.calls("C_Login"), faulty.calls("C_Initialize")) == (logins, starts)
    assert faulty.sessions() <= 2
    faulty.forget()
    signer.sign(DATA)
    assert names(faulty) == MORE


def test_what_recovery_does_not_mend_is_named_and_the_next_signature_works(
    signer: HsmSigner, faulty: FaultyModule
) -> None:
    faulty.forget()
    faulty.set("fail C_Sign 0 CKR_DEVICE_ERROR")
    with pytest.raises(TokenError) as caught:
        signer.sign(DATA)
    assert caught.value.code == "CKR_DEVICE_ERROR"
    assert faulty.calls("C_SignInit") == 4  # once, and once after each step
    faulty.set()
    signs(signer)


def test_what_is_wrong_with_the_request_starts_nothing_again(signer: HsmSigner, faulty: FaultyModule) -> None:
    faulty.forget()
    faulty.set("fail C_SignInit 0 CKR_KEY_FUNCTION_NOT_PERMITTED")
    with pytest.raises(TokenError, match="CKR_KEY_FUNCTION_NOT_PERMITTED"):
        signer.sign(DATA)
    assert faulty.calls("C_Login") == faulty.calls("C_Initialize") == 0


def test_an_operation_that_was_left_active_does_not_stick(signer: HsmSigner, faulty: FaultyModule) -> None:
    faulty.forget()
    faulty.set("fail C_Sign 1 CKR_FUNCTION_FAILED")  # after C_SignInit: SoftHSM's session stays active
    signs(signer)
    assert faulty.calls("C_Login") == 0  # another session was enough, so it was another one
    faulty.set()
    faulty.forget()
    for _ in range(5):
        signs(signer)
    assert faulty.calls("C_OpenSession") == 0


def test_a_lost_login_is_brought_back_with_the_pin_that_worked(
    soft: SoftToken, signer: HsmSigner, faulty: FaultyModule
) -> None:
    faulty.set("removed")
    with pytest.raises((TokenError, TokenNotFoundError)):
        signer.sign(DATA)
    faulty.set()
    signs(signer)
    assert faulty.sessions() <= 2


def test_a_pin_that_was_changed_meanwhile_is_sent_once(
    new_token: Callable[..., SoftToken], faulty: FaultyModule
) -> None:
    soft = new_token()
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        token.generate_key(KEY)
        signer = token.signer(KEY)
        signs(signer)
        faulty.forget()
        faulty.set("fail C_SignInit 0 CKR_USER_NOT_LOGGED_IN", "fail C_Login 1 CKR_PIN_INCORRECT")
        for expected in (PinRejectedError, PinRefusedError, PinRefusedError):
            with pytest.raises(expected):
                signer.sign(DATA)
        faulty.set()
        with pytest.raises(PinRefusedError, match="lost"):
            signer.sign(DATA)
    assert faulty.calls("C_Login") == 1


def test_starting_the_module_again_for_one_token_is_survived_by_the_others(
    soft: SoftToken, new_token: Callable[..., SoftToken], faulty: FaultyModule
) -> None:
    other = new_token()
    with (
        open_token(soft.uri, module=faulty.path, pin=soft.pin) as first,
        open_token(other.uri, module=faulty.path, pin=other.pin) as second,
    ):
        second.generate_key("other")
        one, two = first.signer(KEY), second.signer("other")
        signs(one)
        signs(two)
        faulty.set(*(f"fail C_SignInit {nth} CKR_DEVICE_ERROR" for nth in (1, 2, 3)))
        faulty.forget()
        signs(one)
        assert faulty.calls("C_Initialize") == 1
        faulty.set()
        signs(two)
        signs(one)
    assert faulty.sessions() == 0


def test_threads_recover_together(soft: SoftToken, faulty: FaultyModule) -> None:
    with (
        open_token(soft.uri, module=faulty.path, pin=soft.pin, sessions=4) as token,
        ThreadPoolExecutor(8) as pool,
    ):
        signer = token.signer(KEY)
        signs(signer)
        for step in range(6):
            faulty.set(*(f"fail C_SignInit {nth} CKR_DEVICE_ERROR" for nth in range(3, 3 + 4 * step, 2)))
            for future in [pool.submit(signs, signer) for _ in range(32)]:
                future.result()
        faulty.set()
        signs(signer)
    assert faulty.sessions() == 0


def test_a_key_that_was_deleted_is_missing(soft: SoftToken, token: Token) -> None:
    token.generate_key("short-lived")
    signer = token.signer("short-lived")
    signer.sign(DATA)
    token.delete_key("short-lived")
    with pytest.raises(KeyNotFoundError, match="short-lived"):
        signer.sign(DATA)
    signs(token.signer(KEY))
