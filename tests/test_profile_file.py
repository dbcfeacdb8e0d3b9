"""A profile is changed in its TOML file, and nothing else in it."""

import errno
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_signer import toml
from hsm_signer.errors import ConfigError, ProfileNotChangedError
from hsm_signer.profile_file import add, change, changed, exclusive

FILE = """\
# our office
[profiles.test]
key = "das-test"

[profiles.das]   # production
preset         = "wipo-das"
key            = "das-2026"      # until 2028
key-thumbprint = 'old'
certificate    = "das-2026/es256_cert.pem"
# pin-source stays last
pin-source     = "systemd:hsm-pin"

[profiles.das.module-env]
key = "not this one"
"""


def test_a_value_is_replaced_and_everything_else_stays() -> None:
    after = changed(FILE, "das", {"key": "das-2028", "key-thumbprint": "new"})
    assert after == FILE.replace('"das-2026" ', '"das-2028" ').replace("'old'", '"new"')


def test_a_new_setting_comes_after_the_last_one_of_its_profile() -> None:
    after = changed(FILE, "das", {"next-key": "das-2028"})
    assert after == FILE.replace('hsm-pin"\n', 'hsm-pin"\nnext-key = "das-2028"\n')


def test_a_setting_is_removed_and_what_is_not_there_needs_no_removing() -> None:
    after = changed(FILE, "das", {"key-thumbprint": None, "next-key": None})
    assert after == FILE.replace("key-thumbprint = 'old'\n", "")


def test_a_text_with_quotes_and_backslashes_comes_back() -> None:
    odd = 'pkcs11:object=a"b\\c#d'
    after = changed(FILE, "das", {"key": odd})
    assert tomllib.loads(after)["profiles"]["das"]["key"] == odd
    assert changed(after, "das", {"key": "das-2026"}) == FILE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('[profiles.das]\nkey = "a"', '[profiles.das]\nkey = "b"\nnext-key = "c"\n'),
        ("[profiles.das]", '[profiles.das]\nkey = "b"\nnext-key = "c"\n'),
        ("[profiles.das]\r\n", '[profiles.das]\r\nkey = "b"\r\nnext-key = "c"\r\n'),
        ('[ profiles . "das" ]\n"key"="a"#\n', '[ profiles . "das" ]\n"key"="b"#\nnext-key = "c"\n'),
    ],
)
def test_other_ways_of_writing_are_edited(before: str, after: str) -> None:
    assert changed(before, "das", {"key": "b", "next-key": "c"}) == after


@pytest.mark.parametrize(
    "written",
    [
        'profiles.das.key = "a"\n',
        'profiles = { das = { key = "a" } }\n',
        '[profiles]\ndas = { key = "a" }\n',
        '[profiles.das]\nkey = """\na"""\n',
        "[profiles.das]\nkey = '''a'''\n",
        '[profiles]\ndas.key = "a"\n',
    ],
)
def test_what_is_written_in_another_way_is_left_and_the_lines_are_named(written: str) -> None:
    with pytest.raises(ProfileNotChangedError) as refused:
        changed(written, "das", {"key": "b", "next-key": None})
    assert refused.value.lines == ("[profiles.das]", 'key = "b"', "# next-key: remove this setting")


def test_a_profile_that_is_not_there_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="'other'"):
        changed(FILE, "other", {"key": "b"})


def test_a_value_with_control_characters_is_refused() -> None:
    with pytest.raises(ConfigError, match="printable"):
        changed(FILE, "das", {"key": "a\nb"})


HEADERS = ["[profiles]", '[profiles."a.b"]', "[profiles.das.module-env]", '["profiles".other] # x']
SETTINGS = [
    "",
    "# key = 'x'",
    'key = "a"',
    "key = 'a' # c",
    '  key="\\"#" ',
    "sessions = 4",
    "timeout = [\n  5,\n  15 ]",
    "scope = [\n[5] ]",
    'scope = """\n[profiles.das]\nkey = "b"\n"""',
    'next-key = "n"',
]
settings = st.lists(st.sampled_from(SETTINGS), max_size=4, unique_by=lambda line: line.split("=")[0].strip())
sections = st.lists(st.tuples(st.sampled_from(HEADERS), settings), max_size=3, unique_by=lambda pair: pair[0])
words = st.text(st.characters(exclude_categories=("C", "Z"), codec="utf-8"), max_size=8)


@given(sections, settings, sections, words, words | st.none())
def test_the_result_means_what_was_asked_or_nothing_is_changed(
    above: list[tuple[str, list[str]]],
    own: list[str],
    below: list[tuple[str, list[str]]],
    key: str,
    following: str | None,
) -> None:
    text = "\n".join(
        line for header, lines in [*above, ("[profiles.das]", own), *below] for line in [header, *lines]
    )
    try:
        wanted = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # a header twice
        return
    try:
        after = changed(text, "das", {"key": key, "next-key": following})
    except ProfileNotChangedError:
        assert '"""' in text, "only what looks like a header inside a string may be too much"
        return
    wanted["profiles"]["das"]["key"] = key
    wanted["profiles"]["das"].pop("next-key", None)
    if following is not None:
        wanted["profiles"]["das"]["next-key"] = following
    assert tomllib.loads(after) == wanted
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in after.splitlines() if line.startswith("#")] == comments


def test_the_file_is_replaced_at_once_and_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(FILE)
    file.chmod(0o640)
    before = file.stat()
    change(file, "das", {"key": "das-2028"})
    assert file.read_text() == FILE.replace('"das-2026" ', '"das-2028" ')
    assert file.stat().st_mode == before.st_mode
    assert file.stat().st_ino != before.st_ino
    assert list(tmp_path.iterdir()) == [file]


def another_group() -> int:
    """A group that we may give a file, other than the one that new files get, if there is one."""
    if os.geteuid() == 0:
        return 1
    return next((group for group in os.getgroups() if group != os.getegid()), os.getegid())


def test_the_file_keeps_its_group_which_is_who_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(FILE)
    os.chown(file, -1, another_group())
    file.chmod(0o640)
    change(file, "das", {"key": "das-2028"})
    assert (file.stat().st_gid, file.stat().st_mode & 0o777) == (another_group(), 0o640)


def test_a_file_whose_group_cannot_be_kept_is_left_and_the_lines_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    file = tmp_path / "config.toml"
    file.write_text(FILE)
    monkeypatch.setattr(os, "fchown", refused)  # as for a member of no such group
    with pytest.raises(ProfileNotChangedError, match="not permitted") as caught:
        change(file, "das", {"key": "das-2028"})
    assert caught.value.lines == ("[profiles.das]", 'key = "das-2028"')
    assert file.read_text() == FILE
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_not_made_longer_than_it_may_be(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(FILE + "#" * (toml.MAX_SIZE - len(FILE)))
    with pytest.raises(ConfigError, match="bytes"):
        change(file, "das", {"next-key": "das-2028"})
    file.write_text(FILE + "#" * (toml.MAX_SIZE - len(FILE) + 1))
    with pytest.raises(ConfigError, match="bytes"):
        change(file, "das", {"key-thumbprint": None})


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "real.toml", tmp_path / "config.toml"
    file.write_text(FILE)
    link.symlink_to(file)
    change(link, "das", {"key": "das-2028"})
    assert link.is_symlink()
    assert "das-2028" in file.read_text()


@pytest.mark.parametrize(
    "content", [None, b"\xff", b"profiles = ", b"[profiles.other]\n", b"a = " + b"[" * 10_000]
)
def test_a_file_that_is_gone_or_damaged_is_a_configuration_error(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "config.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError):
        change(file, "das", {"key": "das-2028"})


def test_a_state_directory_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="state"), exclusive(tmp_path / "file" / "state"):
        pytest.fail("no lock was taken")


def test_a_file_that_is_not_ours_to_write_is_left_and_the_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(FILE)
    file.chmod(0o444)
    with pytest.raises(ProfileNotChangedError) as refused:
        change(file, "das", {"key": "das-2028"})
    assert refused.value.lines == ("[profiles.das]", 'key = "das-2028"')
    assert file.read_text() == FILE
    change(file, "das", {"key": "das-2026"})  # nothing to do is no failure


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ('profiles = {das = {key = "a"}}\n', "the file is written in a way that is not edited here"),
        ('[profiles.next]\nkey = "a"\n', "has a profile 'next' already; nothing is overwritten"),
    ],
)
def test_a_profile_is_not_added_where_that_would_break_the_file(
    tmp_path: Path, before: str, said: str
) -> None:
    file = tmp_path / "config.toml"
    file.touch(mode=0o600)
    file.write_text(before)
    with pytest.raises(ConfigError, match=said):
        add(file, "next", '[profiles.next]\nkey = "b"\n')
    assert file.read_text() == before
