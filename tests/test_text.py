"""Strangers' text is safe to print wherever it goes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.markup import render
from software_signer import SoftwareSigner

from hsm_signer import ClientAssertion
from hsm_signer.text import printable

ASSERTION = ClientAssertion("das-api-auth", "https://as.example/token", claims="oidc").issue(SoftwareSigner())
HEADER, CLAIMS, SIGNATURE = ASSERTION.split(".")


@pytest.mark.parametrize(
    "text",
    [
        "Client authentication failed",
        "unknown kid kHMgWv3HQUdW_LAhnwAcXtJtUlE462i-KaN3lb9mjHo",
        "logindev.wipo.int:443/am/oauth2/access_token is not authorization-server.patent-office.example",
        "the_keyboard_framework_and_new_money_key-identifiers are eyed by they",
        "naïve 特許庁 – “quotes” and array[0] [1] [Bold]",
    ],
)
def test_what_a_person_needs_to_read_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x1b[0m", "a\\x1b[31mred\\x1b[0m"),
        ("a\r\nb\tc\x00\x7f", "a\\r\\nb\\tc\\x00\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202eevil\u2066\u200f\u061c", "\\u202eevil\\u2066\\u200f\\u061c"),
        ("zero\u200bwidth\ufeff\u2028\U000e0041", "zero\\u200bwidth\\ufeff\\u2028\\U000e0041"),
        ("\ud800 alone", "\\ud800 alone"),
        (
            "[red]x[/red] [link=https://evil.example]y[/]",
            "\\x5bred]x\\x5b/red] \\x5blink=https://evil.example]y\\x5b/]",
        ),
    ],
)
def test_what_a_terminal_would_obey_becomes_visible(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "echo",
    [
        f"bad assertion {ASSERTION} given",
        f"client_assertion={ASSERTION}&scope=x",
        f"Bearer%20{ASSERTION}",
        f"{HEADER}.{CLAIMS}",
        f"{HEADER}\u200b.{CLAIMS}\n.{SIGNATURE}",
        ASSERTION[:60],
        f"payload {CLAIMS}",
        f"signature {SIGNATURE} is wrong",
        f"{'x' * 480}{ASSERTION}",
        "c29tZXRoaW5nLWVsc2U.c29tZXRoaW5nLWVsc2U." + "A" * 43,
    ],
)
def test_nothing_shaped_like_a_jws_comes_through(echo: str) -> None:
    shown = printable(echo)
    assert "(JWS left out)" in shown
    assert not any(part[i : i + 20] in shown for part in (CLAIMS, SIGNATURE) for i in range(len(part) - 19))


def test_a_long_text_is_cut_and_says_so() -> None:
    assert printable("x y" * 1000) == ("x y" * 1000)[:499] + "…"
    assert len(printable("\x1b" * 1000)) == 500
    assert printable("a" * 30, 10) == "a" * 9 + "…"


def test_a_megabyte_made_to_be_slow_is_done_at_once() -> None:
    for unit in ("ey", "eyJ", "a.", "[a", "x" * 16 + ".", "\x1b", "eyJhbGciOiJub25lIn0."):
        assert len(printable(unit * (2**20 // len(unit)))) <= 500


@given(st.text(st.characters(), max_size=700), st.integers(1, 600))
def test_any_text_comes_out_printable_short_and_without_markup(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    shown.encode()  # no surrogates
    assert not render(shown, emoji=False).spans
    assert render(shown, emoji=False).plain == shown


@given(st.text(), st.text())
def test_an_assertion_is_never_shown_whatever_stands_around_it(before: str, after: str) -> None:
    shown = printable(before + ASSERTION + after, 5000)
    assert ASSERTION not in shown
    assert not re.search(re.escape(SIGNATURE), shown)
