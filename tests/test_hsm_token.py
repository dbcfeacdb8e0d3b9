import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from hsm_signer import errors, open_token


def verify(signer, data):
    signature = signer.sign(data)
    assert len(signature) == 64
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    key = load_pem_public_key(signer.public_key_pem.encode())
    key.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(SHA256()))


def test_a_generated_key_signs_what_another_library_verifies(soft_token):
    with open_token(soft_token.uri, module=soft_token.module, pin=soft_token.pin) as token:
        key = token.generate_key("signs")
        signer = token.signer("signs", thumbprint=key.thumbprint)
        for data in (b"", b"x", b"x" * 100_000):
            verify(signer, data)
        assert signer.kid == key.thumbprint


def test_a_wrong_pin_is_rejected_once_and_then_not_sent(new_token):
    soft = new_token()
    for expected in (errors.PinRejectedError, errors.PinRefusedError):
        with pytest.raises(expected), open_token(soft.uri, module=soft.module, pin="0000-wrong"):
            pass
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        assert token.keys() == []
