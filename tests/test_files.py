"""Files and directories are judged by what was opened, never by what their path looked like."""

import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsm_signer import files
from hsm_signer.errors import ConfigError, UnsafeFileError

NOBODY = 65534
ANOTHER = 65533


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    files.create(path, b"content")
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_private_file_is_read_whole(secret: Path) -> None:
    assert files.read_bytes(secret, max_size=7) == b"content"
    with files.open_regular(secret) as file:
        assert file.read() == b"content"


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o602, 0o620, 0o610, 0o601, 0o666])
def test_a_file_that_others_can_use_is_refused_with_the_remedy(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    with pytest.raises(UnsafeFileError, match=f"{mode:04o}") as caught:
        files.read_bytes(secret, max_size=100)
    assert caught.value.hint == f"chmod 0600 {secret}"


def test_the_forbidden_bits_are_the_callers(secret: Path) -> None:
    secret.chmod(0o644)
    assert files.read_bytes(secret, max_size=100, forbidden=files.UNTOUCHED) == b"content"
    secret.chmod(0o664)
    with pytest.raises(UnsafeFileError, match="write"):
        files.read_bytes(secret, max_size=100, forbidden=files.UNTOUCHED)


def test_a_file_of_roots_can_have_rules_of_its_own(secret: Path) -> None:
    if os.geteuid() == 0:
        os.chown(secret, 0, NOBODY)
        secret.chmod(0o640)
        assert files.read_bytes(secret, max_size=100, forbidden_to_root=0o037) == b"content"
    machine = Path("/etc/passwd")  # root's on every machine
    assert files.read_bytes(machine, max_size=2**20, forbidden_to_root=files.UNTOUCHED)
    with pytest.raises(UnsafeFileError, match="read"):
        files.read_bytes(machine, max_size=2**20, forbidden_to_root=0o037)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user can enter; giving files to another user takes root."""
    assert os.geteuid() == 0, "run the tests as root, in a container: they need a second user"
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(statement: str) -> str:
    """Run a statement about ``files`` and ``Path`` as another user; answer class and text of its error."""
    program = f"""
import os
from pathlib import Path
from hsm_signer import files
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
try:
    {statement}
except Exception as exc:
    print(type(exc).__name__, exc)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_of_another_user_is_refused(shared: Path) -> None:
    files.create(shared / "theirs", b"content")
    os.chown(shared / "theirs", NOBODY, NOBODY)
    with pytest.raises(UnsafeFileError, match=f"belongs to user id {NOBODY}"):
        files.read_bytes(shared / "theirs", max_size=100)


def test_a_file_that_we_may_not_read_stays_an_oserror(shared: Path) -> None:
    files.create(shared / "roots", b"content")
    assert as_nobody(f"files.read_bytes(Path('{shared}/roots'), max_size=100)").startswith("PermissionError")


def test_a_missing_file_stays_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "missing", max_size=100)


def test_links_are_not_followed_even_to_good_files(secret: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(secret)
    with pytest.raises(UnsafeFileError, match="is a link"):
        files.read_bytes(link, max_size=100)
    link.unlink()
    link.symlink_to(tmp_path / "missing")
    with pytest.raises(UnsafeFileError, match="is a link"):
        files.read_bytes(link, max_size=100)


@pytest.mark.timeout(10)
def test_a_fifo_is_refused_at_once_with_and_without_a_writer(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(UnsafeFileError, match="is a FIFO"):
        files.read_bytes(fifo, max_size=100)
    writer = os.open(fifo, os.O_RDWR)
    with pytest.raises(UnsafeFileError, match="is a FIFO"):
        files.read_bytes(fifo, max_size=100)
    os.close(writer)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(UnsafeFileError, match="is a socket"):
            files.read_bytes(tmp_path / "socket", max_size=100)
    with pytest.raises(UnsafeFileError, match="is a directory"):
        files.read_bytes(tmp_path, max_size=100)
    with pytest.raises(UnsafeFileError, match="is a device"):
        files.read_bytes(Path("/dev/zero"), max_size=100)


def test_a_file_beyond_the_limit_is_refused(secret: Path) -> None:
    with pytest.raises(UnsafeFileError, match="7 bytes; at most 6"):
        files.read_bytes(secret, max_size=6)


def test_a_file_whose_size_says_nothing_is_refused_too() -> None:
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(UnsafeFileError, match="more than the 10 bytes"):
        files.read_bytes(Path("/proc/self/maps"), max_size=10, forbidden=files.UNTOUCHED)


def test_nothing_stays_open_after_a_refusal(secret: Path, tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (tmp_path, Path("/dev/zero"), secret):
        with pytest.raises(UnsafeFileError):
            files.open_regular(path, max_size=1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_is_judged_is_what_was_opened(secret: Path, tmp_path: Path) -> None:
    """Somebody swaps a good and a bad file under the name as fast as they can: the bad one is never read."""
    bad = tmp_path / "bad"
    files.create(bad, b"planted", mode=0o644)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for target in (bad, secret):
                fresh = tmp_path / "fresh"
                os.link(target, fresh)
                fresh.replace(tmp_path / "name")

    os.link(secret, tmp_path / "name")
    swapper = threading.Thread(target=swap)
    swapper.start()
    outcomes: Counter[bytes] = Counter()
    try:
        while min(outcomes[b"content"], outcomes[b"refused"]) < 50:
            try:
                outcomes[files.read_bytes(tmp_path / "name", max_size=100)] += 1
            except UnsafeFileError:
                outcomes[b"refused"] += 1
    finally:
        stop.set()
        swapper.join()
    assert set(outcomes) == {b"content", b"refused"}


def test_a_created_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.create(tmp_path / "open", b"")
        os.umask(0o777)
        files.create(tmp_path / "shut", b"", mode=0o640)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "open") == 0o600
    assert mode_of(tmp_path / "shut") == 0o640


def test_creating_never_touches_what_has_the_name(secret: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("secret", "link"):
        with pytest.raises(FileExistsError):
            files.create(tmp_path / name, b"new")
    assert secret.read_bytes() == b"content"
    assert not (tmp_path / "elsewhere").exists()


def test_replacing_keeps_the_mode_and_leaves_nothing_behind(secret: Path, tmp_path: Path) -> None:
    secret.chmod(0o644)
    inode = secret.stat().st_ino
    files.replace(secret, b"new")
    assert (secret.read_bytes(), mode_of(secret)) == (b"new", 0o644)
    assert secret.stat().st_ino != inode
    files.replace(tmp_path / "fresh", b"first", mode=0o640)
    assert ((tmp_path / "fresh").read_bytes(), mode_of(tmp_path / "fresh")) == (b"first", 0o640)
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "fresh"}


def test_in_a_private_directory_whatever_is_wrong_is_told_with_the_whole_path(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(mode=0o600)
    (tmp_path / "link").symlink_to("file")
    path.chmod(0o644)
    with files.private_directory(tmp_path, forbidden=files.UNTOUCHED) as directory:
        for use in (directory.open_to_change, lambda name: directory.read_bytes(name, max_size=9)):
            with pytest.raises(UnsafeFileError, match=f"^{path} has mode 0644") as caught:
                use("file")
            assert caught.value.hint == f"chmod 0600 {path}"
            with pytest.raises(UnsafeFileError, match=f"^{tmp_path}/link is a link"):
                use("link")


def test_in_a_private_directory_a_replacement_is_private_whatever_was_there(tmp_path: Path) -> None:
    with files.private_directory(tmp_path / "d") as directory:
        directory.create("name", b"old", mode=0o644)
        directory.replace("name", b"new")
    assert mode_of(tmp_path / "d" / "name") == 0o600


def test_replacing_a_link_leaves_its_target_alone(secret: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(secret)
    files.replace(tmp_path / "link", b"new")
    assert secret.read_bytes() == b"content"
    assert not (tmp_path / "link").is_symlink()


def test_a_replacement_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError):
        files.replace(tmp_path / "directory", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_a_directory_is_made_private_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c"
    before = os.umask(0)
    try:
        with files.private_directory(path):
            pass
    finally:
        os.umask(before)
    assert [mode_of(made) for made in (path, path.parent, path.parent.parent)] == [0o700] * 3


def test_a_directory_is_not_made_where_nobody_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.private_directory(tmp_path / "new", create=False):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d").chmod(mode)
    with pytest.raises(UnsafeFileError, match=f"{mode:04o}"), files.private_directory(tmp_path / "d"):
        pass


def test_a_directory_that_others_only_read_can_be_asked_for(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with files.private_directory(tmp_path, forbidden=files.UNTOUCHED) as directory:
        assert directory.names() == []


def test_a_directory_behind_a_link_or_of_another_kind_is_refused(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("d")
    with pytest.raises(UnsafeFileError, match="is a link"), files.private_directory(tmp_path / "link"):
        pass
    with pytest.raises(UnsafeFileError, match="not a directory"), files.private_directory(secret):
        pass
    with pytest.raises(NotADirectoryError), files.private_directory(secret / "below"):
        pass


def test_a_directory_of_another_user_is_refused_roots_too(shared: Path) -> None:
    (shared / "theirs").mkdir(mode=0o700)
    os.chown(shared / "theirs", NOBODY, NOBODY)
    with pytest.raises(UnsafeFileError, match="not to us"), files.private_directory(shared / "theirs"):
        pass
    answer = as_nobody(f"files.private_directory(Path('{shared}'), forbidden=0).__enter__()")
    assert answer.startswith("UnsafeFileError") and "belongs to user id 0" in answer


def test_work_in_a_directory_stays_in_it_when_its_name_moves(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with files.private_directory(path) as directory:
        directory.create("first", b"1")
        path.rename(tmp_path / "moved")
        path.mkdir()
        directory.create("second", b"2")
        directory.replace("first", b"11")
        assert directory.names() == ["first", "second"]
        assert directory.read_bytes("first", max_size=2) == b"11"
        assert directory.exists("second")
        directory.remove("second")
        directory.remove("second")
        assert not directory.exists("second")
        with pytest.raises(FileNotFoundError):
            directory.read_bytes("second", max_size=2)
    assert list(path.iterdir()) == []
    assert (tmp_path / "moved" / "first").read_bytes() == b"11"


def test_a_lock_file_is_made_once_and_never_emptied(tmp_path: Path) -> None:
    with files.private_directory(tmp_path / "d") as directory:
        for _ in range(2):
            os.close(directory.open_to_change("lock"))
            (tmp_path / "d" / "lock").write_bytes(b"kept")
        assert directory.read_bytes("lock", max_size=4) == b"kept"
    assert mode_of(tmp_path / "d" / "lock") == 0o600


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "wide"])
def test_what_stands_in_the_place_of_a_lock_file_is_refused(tmp_path: Path, kind: str) -> None:
    with files.private_directory(tmp_path / "d") as directory:
        name = tmp_path / "d" / "lock"
        match kind:
            case "link":
                name.symlink_to(tmp_path / "elsewhere")
            case "fifo":
                os.mkfifo(name, 0o600)
            case "directory":
                name.mkdir(0o700)
            case "wide":
                directory.create("lock", b"", mode=0o666)
        with pytest.raises(UnsafeFileError):
            directory.open_to_change("lock")
    assert not (tmp_path / "elsewhere").exists()


def test_a_dangling_link_exists(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o700)
    (tmp_path / "d" / "link").symlink_to("missing")
    with files.private_directory(tmp_path / "d") as directory:
        assert directory.exists("link")


def test_an_unsafe_file_is_a_configuration_error() -> None:
    assert issubclass(UnsafeFileError, ConfigError)


# --- what a path passes


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    path = tmp_path / "above" / "beside" / "file"
    path.parent.mkdir(parents=True)
    files.create(path, b"content")
    return path


def test_links_are_followed_and_what_root_keeps_is_passed(deep: Path, tmp_path: Path) -> None:
    (tmp_path / "to-directory").symlink_to("above")
    (deep.parent / "to-file").symlink_to("../beside/file")
    for path in (deep, tmp_path / "to-directory" / "beside" / "to-file", Path("/etc/passwd"), Path("/lib")):
        assert files.guarded(path) == path.resolve()


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o2777])
@pytest.mark.parametrize("above", [0, 1])
def test_a_directory_that_others_can_write_is_refused_with_the_remedy(
    deep: Path, mode: int, above: int
) -> None:
    directory = deep.parents[above]
    directory.chmod(mode)
    with pytest.raises(UnsafeFileError, match=f"{mode:04o}: other users could put another file") as caught:
        files.guarded(deep)
    assert caught.value.hint == f"chmod {mode & ~0o022:04o} {directory}"
    directory.chmod(0o1777)  # as /tmp: nobody else can rename or remove what is ours
    assert files.guarded(deep) == deep


def test_a_link_is_judged_by_where_it_lies_not_by_where_it_leads(deep: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "link").symlink_to(deep)
    (tmp_path / "link").symlink_to(shared / "link")
    for path in (shared / "link", tmp_path / "link", shared / ".." / "link"):
        with pytest.raises(UnsafeFileError, match="shared has mode 0777"):
            files.guarded(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        files.guarded(tmp_path / "loop")
    with pytest.raises(FileNotFoundError):
        files.guarded(deep.with_name("none"))


def test_a_link_of_another_user_is_refused_where_anybody_can_make_one(deep: Path, tmp_path: Path) -> None:
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "link").symlink_to(deep)
    assert files.guarded(sticky / "link") == deep
    os.chown(sticky / "link", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(UnsafeFileError, match=f"link belongs to user id {NOBODY}"):
        files.guarded(sticky / "link")


def test_a_directory_of_another_user_is_refused_but_for_root_who_may_work_there(shared: Path) -> None:
    theirs = shared / "theirs"
    theirs.mkdir(mode=0o755)
    files.create(theirs / "file", b"content")
    (theirs / "link").symlink_to("file")
    for path in (theirs, theirs / "link"):
        os.chown(path, ANOTHER, ANOTHER, follow_symlinks=False)
    assert files.guarded(theirs / "link") == theirs / "file"
    answer = as_nobody(f"print(files.guarded(Path('{theirs}/file')))")
    assert answer.startswith(f"UnsafeFileError {theirs} belongs to user id {ANOTHER}")
    theirs.chmod(0o775)
    with pytest.raises(UnsafeFileError, match="mode 0775"):
        files.guarded(theirs / "file")


def test_a_directory_that_an_acl_opens_to_another_user_is_refused(deep: Path) -> None:
    def entry(tag: int, mode: int, user: int = 0xFFFFFFFF) -> bytes:
        return struct.pack("<HHI", tag, mode, user)

    directory = deep.parent
    for mode in (5, 7):  # of user 65534: acl(5), as the kernel keeps it
        acl = entry(1, 7) + entry(2, mode, NOBODY) + entry(4, 5) + entry(0x10, mode) + entry(0x20, 5)
        os.setxattr(directory, "system.posix_acl_access", struct.pack("<I", 2) + acl)
        assert mode_of(directory) == 0o705 | mode << 3
        if mode == 5:
            assert files.guarded(deep) == deep
    with pytest.raises(UnsafeFileError, match="mode 0775 and an ACL: other users could put") as caught:
        files.guarded(deep)
    subprocess.run(str(caught.value.hint).split(), check=True)
    assert files.guarded(deep) == deep
    os.removexattr(directory, "system.posix_acl_access")
    directory.chmod(0o775)
    assert files.guarded(deep) == deep  # root's own group


GROUPS = """
set -eu
printf 'me:x:0:0::/:/bin/sh\n' > passwd
printf 'root:x:0:\nme:x:4242:\nme2:x:4243:\nstaff:x:4244:\n' > group
mount --bind passwd /etc/passwd
mount --bind group /etc/group
mkdir shared && touch shared/file
for gid in 0 4242 4243 4244 9999; do
    chgrp $gid shared && chmod 2775 shared && "$@" $gid
done
printf 'me:x:4242:me,you\n' > group
chgrp 4242 shared && "$@" with-you
chgrp 9999 shared && setpriv --groups 9999 "$@" given-to-us
chmod 0777 shared
mount --bind shared shared && mount -o remount,ro,bind shared
"$@" read-only
"""
GUARDED = """
import sys
from pathlib import Path
from hsm_signer import errors, files
try:
    files.guarded(Path("shared/file"))
    print(sys.argv[1])
except errors.UnsafeFileError as unsafe:
    print(sys.argv[1], "refused", unsafe.hint.split()[1])
"""


def test_groups_that_hold_nobody_else_and_mounts_that_nobody_writes_are_passed(tmp_path: Path) -> None:
    command = ["unshare", "--mount", "sh", "-c", GROUPS, "sh", sys.executable, "-c", GUARDED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        *("0", "4242", "4243 refused 2755", "4244 refused 2755", "9999 refused 2755"),
        *("with-you refused 2755", "given-to-us", "read-only"),
    ], done.stderr
