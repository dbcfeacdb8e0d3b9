"""A proof says what is claimed and what trying shows, apart, and no more than that."""

import json
from collections.abc import Callable

import pytest
from conftest import SoftToken
from faults import FaultyModule

from hsm_signer import open_token
from hsm_signer.errors import TokenError
from hsm_signer.hsm.proof import NOT_AN_ATTESTATION, Proof


@pytest.fixture(scope="module")
def soft(new_token: Callable[..., SoftToken]) -> SoftToken:
    return new_token()


def held(proof: Proof) -> dict[str, bool | None]:
    return {probe.name: probe.held for probe in proof.probed}


def test_a_generated_key_is_proved(soft: SoftToken) -> None:
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        key = token.generate_key("stays")
        proof = token.prove("stays")
    assert proof.ok
    assert proof.claims_hold
    assert proof.probes_hold
    assert proof.key.thumbprint == key.thumbprint
    assert {"read CKA_VALUE", "wrap with CKM_AES_KEY_WRAP", "copy with CKA_EXTRACTABLE True"} <= set(
        held(proof)
    )
    assert proof.claimed["extractable"] is False


def test_attributes_are_tried_to_be_changed_only_on_a_key_of_this_run(soft: SoftToken) -> None:
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        token.generate_key("new")
        assert "set CKA_EXTRACTABLE to True" in held(token.prove("new"))
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        assert not any(name.startswith("set ") for name in held(token.prove("new")))


def test_a_key_that_can_leave_is_caught_by_its_claims_and_by_trying(soft: SoftToken) -> None:
    generate = [
        "--keypairgen",
        "--key-type",
        "EC:prime256v1",
        "--usage-sign",
        "--label",
        "leaves",
        "--id",
        "e0",
    ]
    soft.pkcs11_tool(*generate, "--extractable")
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        proof = token.prove("leaves")
    assert not proof.ok
    assert not proof.claims_hold
    assert not held(proof)["wrap with CKM_AES_KEY_WRAP_PAD"]
    assert held(proof)["read CKA_VALUE"]  # it is still sensitive: it leaves only wrapped
    assert "can leave" in proof.statement


def test_the_proof_says_that_it_is_none_of_hardware_and_no_attestation(soft: SoftToken) -> None:
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        token.generate_key("said")
        proof = token.prove("said")
    assert not proof.hardware
    assert NOT_AN_ATTESTATION in proof.statement
    assert "no hardware" in proof.statement


def test_the_proof_is_json_with_claims_and_probes_apart(soft: SoftToken) -> None:
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        token.generate_key("json")
        found = json.loads(json.dumps(token.prove("json").as_dict()))
    assert found["ok"] is True
    assert found["claimed"]["attributes"]["sensitive"] is True
    assert {"try": "read CKA_VALUE", "held": True, "answer": "CKR_ATTRIBUTE_SENSITIVE"} in found["probed"][
        "tries"
    ]
    assert NOT_AN_ATTESTATION in found["statement"]


def test_proving_leaves_nothing_on_the_token(soft: SoftToken) -> None:
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        token.generate_key("tidy")
        before = soft.pkcs11_tool("--list-objects")
        token.prove("tidy")
    assert soft.pkcs11_tool("--list-objects") == before


def test_session_objects_of_a_proof_are_destroyed_also_where_the_key_came_out(
    soft: SoftToken, faulty: FaultyModule
) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        token.generate_key("counted")
        faulty.forget()
        token.prove("counted")
        made = faulty.calls("C_GenerateKey") + faulty.calls("C_CreateObject")
        assert made == faulty.calls("C_DestroyObject") == 1


def test_a_token_that_breaks_in_the_middle_proves_nothing(soft: SoftToken, faulty: FaultyModule) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        token.generate_key("breaks")
        faulty.set("fail C_WrapKey 0 CKR_DEVICE_ERROR")
        with pytest.raises(TokenError, match="CKR_DEVICE_ERROR"):
            token.prove("breaks")
        faulty.set()
        assert token.prove("breaks").ok


def test_a_token_that_makes_no_wrapping_key_is_told_apart(soft: SoftToken, faulty: FaultyModule) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        token.generate_key("no-aes")
        faulty.set("fail C_GenerateKey 0 CKR_MECHANISM_INVALID")
        proof = token.prove("no-aes")
    assert proof.ok
    assert held(proof)["wrap with an AES key"] is None
    assert "not tried: no key to wrap with: CKR_MECHANISM_INVALID" in [probe.answer for probe in proof.probed]


def test_attributes_are_tried_to_be_changed_in_a_session_that_could_change_them(soft: SoftToken) -> None:
    with open_token(soft.uri, module=soft.module, pin=soft.pin) as token:
        token.generate_key("writable")
        proof = token.prove("writable")
    tries = {probe.name: (probe.held, probe.answer) for probe in proof.probed}
    assert tries["set CKA_SENSITIVE to False"] == (True, "CKR_ATTRIBUTE_READ_ONLY")
    assert tries["set CKA_EXTRACTABLE to True"] == (True, "CKR_ATTRIBUTE_READ_ONLY")


def test_a_change_that_no_session_allows_is_not_tried_and_counts_for_nothing(
    soft: SoftToken, faulty: FaultyModule
) -> None:
    with open_token(soft.uri, module=faulty.path, pin=soft.pin) as token:
        token.generate_key("read-only")
        faulty.set("fail C_OpenSession 0 CKR_SESSION_COUNT")
        proof = token.prove("read-only")
        faulty.set("fail C_OpenSession 1 CKR_DEVICE_ERROR")
        assert {probe.held for probe in token.prove("read-only").probed} == {True}
    tries = {probe.name: (probe.held, probe.answer) for probe in proof.probed}
    not_tried = (None, "not tried: no read-write session: CKR_SESSION_COUNT")
    assert tries["set CKA_SENSITIVE to False"] == tries["set CKA_EXTRACTABLE to True"] == not_tried
    assert proof.ok
