"""The independent check, held to NIST's vectors (FIPS 186-3 SigVer of the CAVP, P-256 with SHA-256)."""

import re

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from hsm_signer.ecdsa import raw_from_der
from hsm_signer.errors import KeyMismatchError, SignatureError, SignatureFormatError, SignatureInvalidError
from hsm_signer.verification import PublicKey

KEY = ec.generate_private_key(ec.SECP256R1())
POINT = KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
DATA = b"what is signed"
SIGNATURE = raw_from_der(KEY.sign(DATA, ec.ECDSA(SHA256())))
OURS = PublicKey(POINT)


def nist(file: str) -> list[dict[str, str]]:
    """The cases of the section [P-256,SHA-256]."""
    name = f"asymmetric/ECDSA/FIPS_186-3/{file}"
    with cryptography_vectors.open_vector_file(name, "rb") as lines:
        text = lines.read().decode()
    section = re.split(r"^\[", text.split("[P-256,SHA-256]")[1], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = section.replace("\r", "").strip().split("\n\n")
    return [dict(re.findall(r"^(\w+) = (\S+)", block, re.MULTILINE)) for block in blocks]


@pytest.mark.parametrize("case", nist("SigVer.rsp"))
def test_nists_verdicts_are_ours(case: dict[str, str]) -> None:
    key = PublicKey(bytes.fromhex("04" + case["Qx"] + case["Qy"]))
    signature = bytes.fromhex(case["R"].zfill(64) + case["S"].zfill(64))
    if case["Result"] == "P":
        key.verify(signature, bytes.fromhex(case["Msg"]))
    else:
        with pytest.raises(SignatureError):
            key.verify(signature, bytes.fromhex(case["Msg"]))


@pytest.mark.parametrize("case", [case for case in nist("SigGen.txt") if "Msg" in case])
def test_nists_signatures_verify(case: dict[str, str]) -> None:
    key = PublicKey(bytes.fromhex("04" + case["Qx"].zfill(64) + case["Qy"].zfill(64)))
    key.verify(bytes.fromhex(case["R"].zfill(64) + case["S"].zfill(64)), bytes.fromhex(case["Msg"]))


def test_a_signature_verifies_under_its_key_and_no_other() -> None:
    OURS.verify(SIGNATURE, DATA)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = other.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    with pytest.raises(SignatureInvalidError):
        PublicKey(point).verify(SIGNATURE, DATA)


@given(st.integers(0, 511))
def test_a_signature_with_one_bit_turned_does_not_verify(bit: int) -> None:
    turned = (int.from_bytes(SIGNATURE) ^ (1 << bit)).to_bytes(64)
    with pytest.raises(SignatureError):
        OURS.verify(turned, DATA)


@given(st.binary(max_size=80))
def test_other_data_does_not_verify(data: bytes) -> None:
    if data != DATA:
        with pytest.raises(SignatureInvalidError):
            OURS.verify(SIGNATURE, data)


@given(st.binary(max_size=140))
def test_no_bytes_verify_or_raise_anything_but_our_errors(signature: bytes) -> None:
    with pytest.raises(SignatureError):
        OURS.verify(signature, DATA)


@pytest.mark.parametrize(
    "signature",
    [b"", SIGNATURE[:-1], SIGNATURE + b"\0", KEY.sign(DATA, ec.ECDSA(SHA256()))],
    ids=["empty", "too short", "too long", "DER"],
)
def test_a_signature_is_r_then_s_of_64_bytes(signature: bytes) -> None:
    with pytest.raises(SignatureFormatError):
        OURS.verify(signature, DATA)


@pytest.mark.parametrize(
    "point",
    {
        "off the curve": POINT[:-1] + bytes([POINT[-1] ^ 1]),
        "infinity": b"\0",
        "cut short": POINT[:-1],
        "nothing": b"",
        "zeros": b"\x04" + bytes(64),
        "a coordinate beyond the field": b"\x04" + b"\xff" * 64,
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_no_point_of_the_curve_is_no_key(point: tuple[str, bytes]) -> None:
    with pytest.raises(KeyMismatchError):
        PublicKey(point[1])
