"""What is written into a configuration file is read back as it was."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_signer import toml
from hsm_signer.errors import ConfigError


@given(st.text(st.characters(codec="utf-8")))
def test_texts_and_keys_are_read_back_as_they_were(text: str) -> None:
    assert tomllib.loads(f"{toml.key(text)} = {toml.text(text)}") == {text: text}


def test_only_what_needs_quotes_has_them() -> None:
    assert [toml.key(name) for name in ("das-2026_B", "a.b", "")] == ["das-2026_B", '"a.b"', '""']
    assert toml.text('a"\n\x7fü') == '"a\\"\\n\\u007fü"'


def test_what_is_no_unicode_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="Unicode"):
        toml.text("client-\udcff")
