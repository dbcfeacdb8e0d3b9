"""One encoding per signature; everything else is refused."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)
from hypothesis import example, given
from hypothesis import strategies as st

from hsm_signer import ecdsa
from hsm_signer.errors import KeyMismatchError, SignatureFormatError

ORDERS = {
    32: 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    48: 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
    66: int("01" + "ff" * 32 + "fa51868783bf2f966b7fcc0148f709a5d03bb5c9b8899c47aebb6fb71e91386409", 16),
}
N = ORDERS[32]
SIZES = st.sampled_from(sorted(ORDERS))
# short integers and the edges come up by themselves almost never, and are what breaks encoders
scalars = st.one_of(
    st.integers(1, N - 1), st.integers(1, 2**16), st.integers(0, 255).map(lambda bits: min(1 << bits, N - 1))
)


def integer(value: int, *, padding: bytes = b"") -> bytes:
    content = padding + value.to_bytes(value.bit_length() // 8 + 1, signed=True)
    return b"\x02" + bytes([len(content)]) + content


def sequence(content: bytes) -> bytes:
    return b"\x30" + bytes([len(content)]) + content


@given(scalars, scalars)
@example(1, 2)
@example(N - 1, N - 1)
@example(2**255, 2**247)
def test_der_and_raw_are_inverse_and_der_is_what_cryptography_writes(r: int, s: int) -> None:
    raw = r.to_bytes(32) + s.to_bytes(32)
    der = ecdsa.der_from_raw(raw)
    assert der == encode_dss_signature(r, s)
    assert ecdsa.raw_from_der(der) == raw
    assert ecdsa.raw_from_device(raw) == raw
    assert (
        ecdsa.raw_from_device(der) == raw or len(der) == 64
    )  # which is then taken for r‖s, and never verifies


@pytest.mark.parametrize("size", [0, 31, 64, 32.0, True, None, "32", []])
def test_a_size_that_no_curve_has_is_refused(size: int) -> None:
    with pytest.raises(SignatureFormatError, match="32, 48 or 66 bytes"):
        ecdsa.raw_from_der(ecdsa.der_from_raw(bytes([1]) * 64), size)


@given(SIZES, st.data())
def test_larger_curves_are_padded_to_their_own_size(size: int, data: st.DataObject) -> None:
    r, s = (data.draw(st.integers(1, ORDERS[size] - 1)) for _ in range(2))
    assert ecdsa.raw_from_der(encode_dss_signature(r, s), size) == r.to_bytes(size) + s.to_bytes(size)
    for out_of_range in (0, ORDERS[size]):
        with pytest.raises(SignatureFormatError):
            ecdsa.raw_from_der(encode_dss_signature(out_of_range, s), size)


@given(st.binary(max_size=200), SIZES)
def test_no_bytes_give_anything_but_a_signature_or_the_error(der: bytes, size: int) -> None:
    try:
        raw = ecdsa.raw_from_der(der, size)
    except SignatureFormatError:
        return
    assert len(raw) == 2 * size
    assert encode_dss_signature(int.from_bytes(raw[:size]), int.from_bytes(raw[size:])) == der


@given(scalars, scalars, st.data())
def test_a_signature_with_one_byte_changed_is_another_signature_or_the_error(
    r: int, s: int, data: st.DataObject
) -> None:
    der = bytearray(encode_dss_signature(r, s))
    place = data.draw(st.integers(0, len(der) - 1))
    der[place] ^= data.draw(st.integers(1, 255))
    try:
        raw = ecdsa.raw_from_der(bytes(der))
    except SignatureFormatError:
        return
    assert decode_dss_signature(bytes(der)) == (int.from_bytes(raw[:32]), int.from_bytes(raw[32:])) != (r, s)


ONE = integer(1)
GOOD = sequence(ONE + ONE)


def test_the_smallest_signature_is_taken() -> None:
    assert ecdsa.raw_from_der(GOOD) == (b"\0" * 31 + b"\1") * 2


@pytest.mark.parametrize(
    "der",
    {
        "nothing": b"",
        "no sequence": ONE,
        "an empty sequence": sequence(b""),
        "r only": sequence(ONE),
        "three integers": sequence(ONE * 3),
        "bytes after it": GOOD + b"\0",
        "cut short": GOOD[:-1],
        "a set": b"\x31" + GOOD[1:],
        "a length in two bytes": b"\x30\x81\x06" + GOOD[2:],
        "a length in three bytes": b"\x30\x82\x00\x06" + GOOD[2:],
        "a length without end": b"\x30\x80" + GOOD[2:] + b"\0\0",
        "a long length of r": sequence(b"\x02\x81\x01\x01" + ONE),
        "a padded r": sequence(integer(1, padding=b"\0") + ONE),
        "a padded s": sequence(ONE + integer(1, padding=b"\0")),
        "a negative r": sequence(integer(-1) + ONE),
        "a negative s": sequence(ONE + integer(-(2**255))),
        "r without its sign byte": sequence(b"\x02\x20" + (N - 1).to_bytes(32) + ONE),
        "an empty integer": sequence(b"\x02\x00" + ONE),
        "r of 0": sequence(integer(0) + ONE),
        "s of 0": sequence(ONE + integer(0)),
        "r of n": sequence(integer(N) + ONE),
        "s of n": sequence(ONE + integer(N)),
        "octet strings": sequence(b"\x04\x01\x01" * 2),
        "constructed integers": sequence(b"\x22\x03\x02\x01\x01" + ONE),
        "a boolean": sequence(ONE + b"\x01\x01\x01"),
        "a tag of another class": sequence(b"\x82\x01\x01" + ONE),
        "a megabyte": sequence(ONE + ONE) + bytes(1 << 20),
    }.items(),
    ids=lambda item: item[0],
)
def test_every_other_encoding_is_refused(der: tuple[str, bytes]) -> None:
    with pytest.raises(SignatureFormatError):
        ecdsa.raw_from_der(der[1])


@pytest.mark.parametrize("value", [None, "text", bytearray(GOOD), memoryview(GOOD), 7, [48], object()])
def test_what_is_no_bytes_is_refused(value: object) -> None:
    with pytest.raises(SignatureFormatError):
        ecdsa.raw_from_der(value)
    with pytest.raises(SignatureFormatError):
        ecdsa.der_from_raw(value)


def test_a_size_that_belongs_to_no_curve_is_refused() -> None:
    with pytest.raises(SignatureFormatError):
        ecdsa.raw_from_der(GOOD, 33)


@pytest.mark.parametrize("length", [0, 1, 32, 63, 65, 96, 128])
def test_a_raw_signature_has_64_bytes(length: int) -> None:
    with pytest.raises(SignatureFormatError):
        ecdsa.der_from_raw(b"\1" * length)


@pytest.mark.parametrize("bad", [0, N, N + 1, 2**256 - 1])
@pytest.mark.parametrize("place", [0, 1])
def test_r_and_s_lie_between_1_and_n(bad: int, place: int) -> None:
    halves = [(1).to_bytes(32), (1).to_bytes(32)]
    halves[place] = bad.to_bytes(32)
    for refuse in (ecdsa.der_from_raw, ecdsa.raw_from_device, ecdsa.integers_from_raw):
        with pytest.raises(SignatureFormatError):
            refuse(b"".join(halves))


@pytest.mark.parametrize("answer", [b"", b"\1" * 32, b"\1" * 63, b"\1" * 65, b"\1" * 96, GOOD[:-1]])
def test_what_a_device_should_not_answer_is_refused(answer: bytes) -> None:
    with pytest.raises(SignatureFormatError):
        ecdsa.raw_from_device(answer)


def test_points_come_out_of_every_wrapping_that_tokens_have() -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    for value in (b"\x04\x41" + point, point, point[1:]):
        assert ecdsa.point_from_ec_point(value) == point
    spki = ecdsa.spki_from_point(point)
    assert load_der_public_key(spki) == key
    assert load_pem_public_key(ecdsa.pem("PUBLIC KEY", spki).encode()) == key
    assert ecdsa.point_from_jwk(ecdsa.jwk_from_point(point)) == point


@pytest.mark.parametrize(
    "value", [b"", b"\x04", b"\x03" + bytes(32), b"\x02" + bytes(64), bytes(65), bytes(97)]
)
def test_what_is_no_uncompressed_point_of_p_256_is_refused(value: bytes) -> None:
    with pytest.raises(KeyMismatchError):
        ecdsa.point_from_ec_point(value)


def test_a_signature_of_64_bytes_needs_no_asn1crypto() -> None:
    program = (
        "import sys; from hsm_signer import ecdsa; ecdsa.raw_from_device(b'\\1' * 64);"
        "assert not [name for name in sys.modules if name.startswith('asn1crypto')]"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


OUT_OF_RANGE = "r or s of the ECDSA signature is outside 1…n−1"


@pytest.mark.parametrize(
    ("read", "value", "text"),
    [
        (ecdsa.raw_from_der, "text", "a DER signature is bytes, found str"),
        (ecdsa.raw_from_der, GOOD + b"\0", "9 bytes that are no DER ECDSA signature"),
        (ecdsa.raw_from_der, bytes(74), "74 bytes are no DER ECDSA signature of 32-byte integers"),
        (ecdsa.raw_from_der, bytes(73), "73 bytes that are no DER ECDSA signature"),
        (ecdsa.raw_from_der, sequence(ONE), "5 bytes that are no DER ECDSA signature"),
        (ecdsa.raw_from_der, b"\x30\x81\x06" + ONE + ONE, "an ECDSA signature in BER that is not DER"),
        (ecdsa.raw_from_der, sequence(integer(0) + ONE), OUT_OF_RANGE),
        (ecdsa.raw_from_device, bytes(64), OUT_OF_RANGE),
        (ecdsa.der_from_raw, bytes(64), OUT_OF_RANGE),
        (ecdsa.der_from_raw, bytes(63), "a raw ES256 signature has 64 bytes, found 63 bytes"),
        (ecdsa.der_from_raw, "text", "a raw ES256 signature has 64 bytes, found str"),
        (ecdsa.point_from_ec_point, bytes(65), "CKA_EC_POINT of 65 bytes is no uncompressed point of P-256"),
    ],
)
def test_a_refusal_says_what_was_found(read: Callable[[object], object], value: object, text: str) -> None:
    with pytest.raises((SignatureFormatError, KeyMismatchError)) as refused:
        read(value)
    assert str(refused.value) == text


def test_a_refused_size_is_named() -> None:
    with pytest.raises(SignatureFormatError) as refused:
        ecdsa.raw_from_der(GOOD, 33)
    assert str(refused.value) == "an integer of the signature has 32, 48 or 66 bytes, found 33"


def test_pem_has_lines_of_64_characters_and_ends_with_a_newline() -> None:
    lines = ("-----BEGIN X-----", "A" * 64, "A" * 32, "-----END X-----", "")
    assert ecdsa.pem("X", bytes(72)) == "\n".join(lines)


@pytest.mark.parametrize(
    "value", [b"\x04\x41\x05" + bytes(64), b"\x04\x40\x04" + bytes(64), b"\x05\x41\x04" + bytes(64)]
)
def test_67_bytes_are_a_point_only_in_an_octet_string_of_an_uncompressed_one(value: bytes) -> None:
    with pytest.raises(KeyMismatchError):
        ecdsa.point_from_ec_point(value)
