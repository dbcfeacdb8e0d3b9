"""RFC 4514, with cryptography as the independent reader and writer."""

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from hsm_signer.distinguished_name import TYPES, parse, text
from hsm_signer.errors import ConfigError

printable = st.characters(exclude_categories=("C", "Z"), codec="utf-8") | st.sampled_from(' ,+"\\<>;=#')
values = st.text(printable, min_size=1, max_size=60).filter(
    # 64 is a number of characters (RFC 5280 appendix A.1); cryptography counts bytes
    lambda value: value.isprintable() and value.strip() and len(value.encode()) <= 64
)
attributes = st.one_of(
    st.tuples(st.sampled_from(["CN", "O", "OU", "L", "ST", "STREET", "UID"]), values),
    st.tuples(st.just("C"), st.from_regex(r"[A-Z]{2}", fullmatch=True)),
    st.tuples(st.just("DC"), st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)),
)
names = st.lists(
    st.lists(attributes, min_size=1, max_size=3, unique_by=lambda attribute: attribute[0]),
    min_size=1,
    max_size=5,
)


@given(names)
def test_what_is_written_is_read_back(name: list[list[tuple[str, str]]]) -> None:
    assert parse(text(name)) == name


@given(names)
def test_cryptography_reads_what_we_write(name: list[list[tuple[str, str]]]) -> None:
    theirs = x509.Name.from_rfc4514_string(text(name))
    found = [{(a.rfc4514_attribute_name, a.value) for a in rdn} for rdn in reversed(theirs.rdns)]
    assert found == [set(rdn) for rdn in name]


@given(names)
def test_we_read_what_cryptography_writes(name: list[list[tuple[str, str]]]) -> None:
    theirs = x509.Name.from_rfc4514_string(text(name)).rfc4514_string()
    assert [set(rdn) for rdn in parse(theirs)] == [set(rdn) for rdn in name]


@given(st.text(max_size=80) | st.text('CN=O,+\\"# a0', max_size=30))
def test_any_text_is_a_name_or_a_configuration_error(anything: str) -> None:
    try:
        name = parse(anything)
    except ConfigError:
        return
    assert all(kind in TYPES and value.isprintable() for rdn in name for kind, value in rdn)


@pytest.mark.parametrize(
    ("written", "name"),
    [  # RFC 4514 §4
        ("UID=jsmith,DC=example,DC=net", [[("UID", "jsmith")], [("DC", "example")], [("DC", "net")]]),
        (
            "OU=Sales+CN=J.  Smith,DC=example,DC=net",
            [[("OU", "Sales"), ("CN", "J.  Smith")], [("DC", "example")], [("DC", "net")]],
        ),
        ('CN=James \\"Jim\\" Smith\\, III,DC=net', [[("CN", 'James "Jim" Smith, III')], [("DC", "net")]]),
        ("cn=Lu\\C4\\8Di\\C4\\87", [[("CN", "Lučić")]]),
    ],
)
def test_the_examples_of_the_standard_are_read(written: str, name: list[list[tuple[str, str]]]) -> None:
    assert parse(written) == name


@pytest.mark.parametrize(
    "written",
    [
        "",
        "das-2026",
        "CN",
        "CN=",
        "CN=a,",
        ",CN=a",
        "CN=a,,O=b",
        "CN=a, O=b",
        "CN =a",
        "CN=a;O=b",
        'CN="a"',
        "CN=a<b",
        "CN= a",
        "CN=a ",
        "CN=#0402",
        "CN=\\",
        "CN=a\\x",
        "CN=\\C4",
        "CN=a\\00",
        "CN=a\nO=b",
        "CN=a\u202eb",
        "CN=\\ ",
        "CN=a+CN=a",
        "1.3.6.1.4.1.1466.0=#04024869",
        "2.5.4.3=a",
        "emailAddress=a@example.org",
        "C=ch",
        "C=CHE",
        "DC=example.org",
        "CN=" + "a" * 65,
    ],
)
def test_what_the_standard_or_a_certificate_does_not_allow_is_refused(written: str) -> None:
    with pytest.raises(ConfigError):
        parse(written)
