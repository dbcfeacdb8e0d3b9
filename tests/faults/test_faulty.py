"""The faulty module does what it is told; seen by python-pkcs11 as it comes, a stranger to our code."""

import ctypes
import hashlib
import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pkcs11
import pytest
from conftest import SoftToken
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from pkcs11 import Attribute, KeyType, Mechanism, TokenFlag
from pkcs11.util.ec import encode_named_curve_parameters

from faults import Call, FaultyModule
from hsm_signer.ecdsa import der_from_raw

DATA = b"what is signed"
DIGEST = hashlib.sha256(DATA).digest()


@dataclass
class Opened:
    """The module as a program has it that opened it while all was well."""

    library: pkcs11.lib
    session: pkcs11.Session
    public: pkcs11.PublicKey
    private: pkcs11.PrivateKey
    pin: str

    @property
    def token(self) -> pkcs11.Token:
        return self.session.token.slot.get_token()

    def sign(self) -> bytes:
        return self.private.sign(DIGEST, mechanism=Mechanism.ECDSA)

    def verify(self, raw: bytes) -> None:
        point = self.public[Attribute.EC_POINT][2:]
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        public.verify(der_from_raw(raw), DIGEST, ec.ECDSA(utils.Prehashed(SHA256())))


@pytest.fixture
def opened(soft_token: SoftToken, faulty: FaultyModule) -> Iterator[Opened]:
    library = pkcs11.lib(faulty.path)
    session = library.get_token(token_label=soft_token.label).open(user_pin=soft_token.pin)
    curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    parameters = session.create_domain_parameters(KeyType.EC, curve, local=True)
    opened = Opened(library, session, *parameters.generate_keypair(), soft_token.pin)
    opened.sign()  # python-pkcs11 asks for the key type once
    faulty.forget()
    yield opened
    faulty.set()
    library.finalize()


def test_it_forwards_and_writes_down_every_call_with_its_result(opened: Opened, faulty: FaultyModule) -> None:
    raw = opened.sign()
    assert [(call.function, call.result) for call in faulty.log()] == [
        ("C_SignInit", "CKR_OK"),
        ("C_Sign", "CKR_OK"),
        ("C_Sign", "CKR_OK"),
    ]
    assert faulty.calls("C_Sign") == 2
    opened.verify(raw)


def test_the_nth_call_fails_once_and_the_others_do_not(opened: Opened, faulty: FaultyModule) -> None:
    faulty.set("fail C_SignInit 2 CKR_DEVICE_ERROR")
    opened.sign()
    with pytest.raises(pkcs11.exceptions.DeviceError):
        opened.sign()
    opened.sign()


def test_every_call_fails_until_the_rule_is_gone(opened: Opened, faulty: FaultyModule) -> None:
    faulty.set("fail C_SignInit 0 CKR_HOST_MEMORY")
    for _ in range(3):
        with pytest.raises(pkcs11.exceptions.HostMemory):
            opened.sign()
    faulty.set()
    opened.verify(opened.sign())


def test_a_delay_takes_time(opened: Opened, faulty: FaultyModule) -> None:
    faulty.set("delay C_SignInit 50")
    start = time.monotonic()
    opened.sign()
    assert time.monotonic() - start >= 0.05


def test_a_call_hangs_until_the_rule_is_gone_and_is_counted_meanwhile(
    opened: Opened, faulty: FaultyModule
) -> None:
    faulty.set("hang C_SignInit")
    signing = threading.Thread(target=opened.sign)
    signing.start()
    while not faulty.calls("C_SignInit"):
        time.sleep(0.01)
    assert [call.result for call in faulty.log()] == [None]
    faulty.set()
    signing.join(timeout=60)
    assert not signing.is_alive()


@pytest.mark.parametrize(("how", "length"), [("short", 63), ("long", 65), ("empty", 0)])
def test_signatures_have_the_wrong_length(
    opened: Opened, faulty: FaultyModule, how: str, length: int
) -> None:
    faulty.set(f"signature {how}")
    assert len(opened.sign()) == length


def test_signatures_are_der(opened: Opened, faulty: FaultyModule) -> None:
    faulty.set("signature der")
    for _ in range(50):  # short and padded integers among them
        der = opened.sign()
        r, s = utils.decode_dss_signature(der)
        assert utils.encode_dss_signature(r, s) == der
        opened.verify(r.to_bytes(32) + s.to_bytes(32))


def test_a_wrong_signature_has_the_right_length(opened: Opened, faulty: FaultyModule) -> None:
    faulty.set("signature wrong")
    raw = opened.sign()
    assert len(raw) == 64
    with pytest.raises(InvalidSignature):
        opened.verify(raw)


def test_points_lose_their_wrapping(opened: Opened, faulty: FaultyModule) -> None:
    whole = opened.public[Attribute.EC_POINT]
    faulty.set("point raw")
    assert opened.public[Attribute.EC_POINT] == whole[2:]
    assert len(whole) == 67
    faulty.set("point bare")
    assert opened.public[Attribute.EC_POINT] == whole[3:]


def test_only_hashing_mechanisms_are_offered_and_work(opened: Opened, faulty: FaultyModule) -> None:
    faulty.set("only-hashing")
    mechanisms = opened.token.slot.get_mechanisms()
    assert Mechanism.ECDSA_SHA256 in mechanisms
    assert Mechanism.ECDSA not in mechanisms
    with pytest.raises(pkcs11.exceptions.MechanismInvalid):
        opened.sign()
    raw = opened.private.sign(DATA, mechanism=Mechanism.ECDSA_SHA256)
    faulty.set()
    opened.verify(raw)


def test_locked_initialisation_is_refused(faulty: FaultyModule) -> None:
    faulty.set("cant-lock")
    module = ctypes.CDLL(faulty.path)
    functions = ctypes.POINTER(ctypes.c_void_p)()
    assert module.C_GetFunctionList(ctypes.byref(functions)) == 0
    initialize = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(functions[1])  # after the version
    with_os_locking = (ctypes.c_ulong * 6)(0, 0, 0, 0, 2, 0)  # CK_C_INITIALIZE_ARGS, CKF_OS_LOCKING_OK
    initialize(with_os_locking)
    assert [call.result for call in faulty.log()] == ["CKR_CANT_LOCK"]
    pkcs11.lib(faulty.path).finalize()


@pytest.mark.parametrize("flag", ["USER_PIN_COUNT_LOW", "USER_PIN_FINAL_TRY", "USER_PIN_LOCKED"])
def test_the_token_shows_flags(opened: Opened, faulty: FaultyModule, flag: str) -> None:
    assert TokenFlag[flag] not in opened.token.flags
    faulty.set(f"token-flags CKF_{flag}")
    assert TokenFlag[flag] in opened.token.flags


def test_a_locked_token_refuses_the_right_pin(soft_token: SoftToken, faulty: FaultyModule) -> None:
    faulty.set("token-flags CKF_USER_PIN_LOCKED")
    library = pkcs11.lib(faulty.path)
    with pytest.raises(pkcs11.exceptions.PinLocked):
        library.get_token(token_label=soft_token.label).open(user_pin=soft_token.pin)
    library.finalize()


def test_the_pin_is_typed_on_the_pad(soft_token: SoftToken, faulty: FaultyModule) -> None:
    faulty.set("pin-pad", f"pin {soft_token.pin}")
    library = pkcs11.lib(faulty.path)
    token = library.get_token(token_label=soft_token.label)
    assert TokenFlag.PROTECTED_AUTHENTICATION_PATH in token.flags
    with pytest.raises(pkcs11.exceptions.ArgumentsBad):
        token.open(user_pin=soft_token.pin)
    token.open(user_pin=pkcs11.PROTECTED_AUTH)
    assert [call.result for call in faulty.log() if call.function == "C_Login"] == [
        "CKR_ARGUMENTS_BAD",
        "CKR_OK",
    ]
    library.finalize()


def test_an_always_authenticate_key_needs_its_pin_for_each_signature(opened: Opened) -> None:
    """SoftHSM2 does it by itself; no rule is needed."""
    curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    parameters = opened.session.create_domain_parameters(KeyType.EC, curve, local=True)
    _, private = parameters.generate_keypair(private_template={Attribute.ALWAYS_AUTHENTICATE: True})
    private.sign(DIGEST, mechanism=Mechanism.ECDSA, pin=opened.pin)
    with pytest.raises(pkcs11.exceptions.UserNotLoggedIn):
        private.sign(DIGEST, mechanism=Mechanism.ECDSA)


def test_sessions_are_limited_and_counted(opened: Opened, faulty: FaultyModule) -> None:
    assert faulty.sessions() == 1
    faulty.set("max-sessions 2")
    second = opened.token.open()
    assert faulty.sessions() == 2
    with pytest.raises(pkcs11.exceptions.SessionCount):
        opened.token.open()
    second.close()
    assert faulty.sessions() == 1


def test_read_only_sessions_are_refused(opened: Opened, faulty: FaultyModule) -> None:
    faulty.set("only-read-write")
    with pytest.raises(pkcs11.exceptions.FunctionFailed):
        opened.token.open()
    opened.token.open(rw=True)


def test_a_token_that_is_pulled_out_loses_its_sessions_and_comes_back(
    soft_token: SoftToken, opened: Opened, faulty: FaultyModule
) -> None:
    faulty.set("removed")
    with pytest.raises(pkcs11.exceptions.DeviceRemoved):
        opened.sign()
    with pytest.raises(pkcs11.exceptions.TokenNotPresent):
        opened.token.open()
    assert opened.library.get_slots(token_present=True) == []
    assert faulty.sessions() == 0
    faulty.set()
    with pytest.raises(pkcs11.exceptions.SessionHandleInvalid):
        opened.sign()
    assert opened.library.get_token(token_label=soft_token.label).open(user_pin=soft_token.pin)


def _open_and_wait(path: str, label: str, opened: int, parties: multiprocessing.Barrier) -> None:
    token = pkcs11.lib(path).get_token(token_label=label)
    sessions = [token.open() for _ in range(opened)]
    parties.wait()  # counted
    parties.wait()
    assert sessions


def test_calls_and_sessions_of_many_processes_are_counted(
    soft_token: SoftToken, faulty: FaultyModule
) -> None:
    context = multiprocessing.get_context("spawn")
    parties = context.Barrier(9, timeout=60)
    arguments = (faulty.path, soft_token.label, 3, parties)
    processes = [context.Process(target=_open_and_wait, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    parties.wait()
    assert faulty.sessions() == 24
    assert faulty.calls("C_OpenSession") == 24
    parties.wait()
    for process in processes:
        process.join()
    assert faulty.sessions() == 0
    assert all(isinstance(call, Call) and call.result == "CKR_OK" for call in faulty.log())
