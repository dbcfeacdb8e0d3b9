"""PKCS#11 URIs with all path attributes of RFC 7512 §2.3, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_signer.errors import ConfigError
from hsm_signer.hsm.uri import Uri, key_uri, parse, token_uri

EVERYTHING = (
    "pkcs11:token=The%20Office;manufacturer=Snake%20Oil%2C%20Inc.;serial=ab12;model=1.0"
    ";library-manufacturer=Oil;library-description=The%20library;library-version=3.11"
    ";slot-manufacturer=Snake;slot-description=Slot%200;slot-id=327"
    ";object=das-2026;type=private;id=%01%ffA"
)


def test_every_path_attribute_is_read() -> None:
    uri = parse(EVERYTHING)
    assert uri.token_attributes() == {
        "token": "The Office",
        "manufacturer": "Snake Oil, Inc.",
        "serial": "ab12",
        "model": "1.0",
        "library-manufacturer": "Oil",
        "library-description": "The library",
        "library-version": (3, 11),
        "slot-manufacturer": "Snake",
        "slot-description": "Slot 0",
        "slot-id": 327,
    }
    assert (uri.object, uri.type, uri.id) == ("das-2026", "private", b"\x01\xffA")


@pytest.mark.parametrize(
    "example",  # RFC 7512 §3, those without query attributes
    [
        "pkcs11:",
        "pkcs11:object=my-pubkey;type=public",
        "pkcs11:object=my-key;type=private",
        "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc."
        ";model=1.0;object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial=",
        "pkcs11:slot-description=Sun%20Metaslot",
        "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;library-description=Soft%20Token%20Library"
        ";library-version=1.23",
        "pkcs11:token=My%20token%25%20created%20by%20Joe;library-version=3;id=%01%02%03%Ba%dd%Ca%fe%04%05%06",
        "pkcs11:token=A%20name%20with%20a%20substring%20%25%3B;object=my-certificate;type=cert",
        "pkcs11:token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1;object=my-certificate;type=cert",
    ],
)
def test_the_examples_of_the_rfc_are_read(example: str) -> None:
    assert parse(str(parse(example))) == parse(example)


def test_the_minor_version_may_be_left_out() -> None:
    assert parse("pkcs11:library-version=3").library_version == (3, 0)


@given(
    st.builds(
        Uri,
        token=st.none() | st.text(),
        serial=st.none() | st.text(),
        object=st.none() | st.text(),
        id=st.none() | st.binary(),
        slot_id=st.none() | st.integers(0, 2**64 - 1),
        library_version=st.none() | st.tuples(st.integers(0, 255), st.integers(0, 255)),
    )
)
def test_what_is_written_is_read_again(uri: Uri) -> None:
    assert parse(str(uri)) == uri


@given(st.text())
def test_no_text_raises_anything_but_a_configuration_error(text: str) -> None:
    for read in (parse, token_uri, key_uri):
        for written in (text, f"pkcs11:{text}", f"pkcs11:token={text}"):
            try:
                assert isinstance(read(written), Uri)
            except ConfigError:
                continue


def test_a_label_alone_is_a_token_or_a_key() -> None:
    assert token_uri("office; 50% ?") == Uri(token="office; 50% ?")
    assert key_uri("das-2026") == Uri(object="das-2026")
    assert token_uri("PKCS11:token=x") == Uri(token="x")  # a scheme has no case: RFC 3986 §3.1


@pytest.mark.parametrize(
    ("query", "setting"),
    [
        ("module-path=/usr/lib/x.so", "module"),
        ("module-name=x", "module"),
        ("pin-source=file:/etc/pin", "pin-source"),
        ("pin-value=19283746", "pin-source"),
        ("x=1&pin-value=19283746", "pin-source"),
    ],
)
def test_query_attributes_are_refused_with_the_setting_to_use_and_never_quoted(
    query: str, setting: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        token_uri(f"pkcs11:token=office?{query}")
    assert f"use the setting {setting}" in str(caught.value.hint)
    assert "19283746" not in f"{caught.value}{caught.value.hint}"


@pytest.mark.parametrize(
    "text",
    [
        "token=office",
        "pkcs11:office",
        "pkcs11:token=office;",
        "pkcs11:token=a;token=b",
        "pkcs11:token=100%",
        "pkcs11:token=%zz",
        "pkcs11:token=%ff",
        "pkcs11:token=a b",
        "pkcs11:token=a/b",
        "pkcs11:token=a#b",
        "pkcs11:token=ü",
        "pkcs11:slot-id=-1",
        "pkcs11:slot-id=x",
        "pkcs11:slot-id=",
        "pkcs11:library-version=1.2.3",
        "pkcs11:type=password",
        "pkcs11:tokn=office",
        "pkcs11:x-vendor=1",
    ],
)
def test_everything_else_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:pin-value=19283746",
        "pkcs11:token=a;pin-value=19283746#",
        "pkcs11:token=a;type=privatepin-value=19283746",
        "pkcs11:slot-id=1pin-value=19283746",
    ],
)
def test_a_pin_in_the_path_is_not_shown_either(text: str) -> None:
    with pytest.raises(ConfigError, match="PKCS#11 URI") as caught:
        token_uri(text)
    assert "19283746" not in f"{caught.value}{caught.value.hint}"


def test_an_empty_label_chooses_nothing() -> None:
    for read in (token_uri, key_uri):
        with pytest.raises(ConfigError):
            read("")


def test_bytes_of_the_command_line_that_are_no_utf_8_are_refused() -> None:
    for read in (token_uri, key_uri, parse):
        with pytest.raises(ConfigError):
            read(b"caf\xe9".decode(errors="surrogateescape"))


@pytest.mark.parametrize("kind", ["public", "cert", "secret-key", "data"])
def test_what_signs_is_a_private_key(kind: str) -> None:
    with pytest.raises(ConfigError, match=kind):
        key_uri(f"pkcs11:object=x;type={kind}")
    assert key_uri("pkcs11:object=x;type=private").object == "x"
