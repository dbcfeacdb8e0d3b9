"""A kept access token is the right one and a live one, or there is none; trouble is a warning."""

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsm_signer.errors import TransportError, UnsafeFileError
from hsm_signer.oauth import cache
from hsm_signer.oauth.cache import TokenCache
from hsm_signer.oauth.response import TokenResponse

NOW = int(time.time())
NOBODY = 65534
SECRET = "canary-access-token-1"
IDENTITY = {
    "endpoint": "https://as.example/token",
    "client_id": "office",
    "scope": "das-api/das-access",
    "audience": "https://as.example/token",
    "ca_bundle": None,
    "module": Path("/usr/lib/module.so"),
}


def granted(access_token: str = SECRET, *, lives: int | None = 3600, now: int = NOW) -> TokenResponse:
    raw = {"access_token": access_token, "token_type": "Bearer", "note": "é\ud800"}
    expires_at = None if lives is None else now + lives
    return TokenResponse(access_token, raw, "Bearer", expires_at, "das-api/das-access")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def kept(directory: Path) -> TokenCache:
    kept = TokenCache(directory, IDENTITY)
    kept.store(granted(), NOW)
    return kept


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    caplog.set_level(logging.DEBUG)
    yield lambda: "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert SECRET not in caplog.text


@pytest.fixture
def open_to_nobody() -> Iterator[Path]:
    """A directory where another user of the machine, whom root becomes, may work."""
    path = Path(tempfile.mkdtemp(prefix="cache-"))
    if os.getuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


def entry_file(directory: Path) -> Path:
    [path] = directory.glob("*.token")
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_what_was_stored_comes_back_whole(kept: TokenCache, directory: Path) -> None:
    assert kept.load(NOW, 60) == granted()
    assert TokenCache(directory, dict(reversed(IDENTITY.items()))).load(NOW, 60) == granted()


def test_an_empty_cache_has_nothing_and_complains_of_nothing(
    directory: Path, warnings: Callable[[], str]
) -> None:
    assert TokenCache(directory, IDENTITY).load(NOW, 0) is None
    assert not directory.exists()
    assert warnings() == ""


@pytest.mark.parametrize("changed", [*IDENTITY, "proxy"])
def test_another_setting_is_another_entry(kept: TokenCache, directory: Path, changed: str) -> None:
    other = TokenCache(directory, IDENTITY | {changed: "other"})
    assert other.load(NOW, 0) is None
    other.store(granted("other"), NOW)
    assert kept.load(NOW, 60) == granted()


def test_an_entry_under_the_name_of_another_identity_is_not_believed(
    kept: TokenCache, directory: Path, warnings: Callable[[], str]
) -> None:
    theirs = entry_file(directory)
    other = TokenCache(directory, IDENTITY | {"client_id": "other"})
    other.store(granted("other"), NOW)
    [other_file] = set(directory.glob("*.token")) - {theirs}
    other_file.write_bytes(theirs.read_bytes())
    assert other.load(NOW, 0) is None
    assert "other settings" in warnings()
    assert kept.load(NOW, 0) == granted()


def test_files_and_directory_are_private_whatever_the_umask(directory: Path) -> None:
    before = os.umask(0)
    try:
        fresh = TokenCache(directory, IDENTITY)
        with fresh.lock(time.monotonic()):
            fresh.store(granted(), NOW)
    finally:
        os.umask(before)
    assert mode_of(directory) == 0o700
    assert {path.suffix: mode_of(path) for path in directory.iterdir()} == {".token": 0o600, ".lock": 0o600}


# Time


@pytest.mark.parametrize(
    ("lives", "later", "min_validity", "is_hit"),
    [
        (3600, 0, 60, True),
        (3600, 3540, 60, True),
        (3600, 3541, 60, False),
        (3600, 3599, 0, True),
        (3600, 3600, 0, False),
        (3600, 3600, -100, False),
        (3600, -1, 60, False),
        (3600, 1000, 2601, False),
        (10**9, 86_340, 60, True),
        (10**9, 86_341, 60, False),
        (0, 0, 0, False),
        (-5, 0, 0, False),
        (None, 59, 60, True),
        (None, 60, 60, False),
        (None, 60, 0, False),
    ],
)
def test_an_access_token_is_used_only_while_it_lives_long_enough(
    directory: Path, lives: int | None, later: int, min_validity: int, is_hit: bool
) -> None:
    kept = TokenCache(directory, IDENTITY)
    kept.store(granted(lives=lives), NOW)
    assert (kept.load(NOW + later, min_validity) is not None) == is_hit


def test_a_clock_that_was_set_back_gives_no_access_token_a_longer_life(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = TokenCache(directory, IDENTITY)
    ahead = NOW + 1800
    kept.store(granted(lives=3600, now=ahead), ahead)
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(time, "clock_gettime", lambda _: uptime + 3500)
    assert kept.load(NOW + 3500, 0) is not None
    assert kept.load(NOW + 3500, 120) is None
    monkeypatch.setattr(time, "clock_gettime", lambda _: uptime + 3601)
    assert kept.load(NOW + 3601, 0) is None


def test_a_restart_of_the_machine_makes_no_difference(
    kept: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "clock_gettime", lambda _: 5.0)
    assert kept.load(NOW + 100, 60) == granted()
    assert kept.load(NOW + 3600, 0) is None


# Trouble


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(SECRET.encode(), SECRET.encode()[:-1] + b"2"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(300))


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def subdirectory(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def wide(path: Path) -> None:
    path.chmod(0o640)


def foreign(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def huge(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" " * 2**20)


@pytest.mark.parametrize(
    "break_it", [truncate, flip, empty, noise, link, fifo, subdirectory, wide, foreign, huge]
)
def test_an_entry_that_is_not_as_we_left_it_is_a_warning_and_a_miss(
    kept: TokenCache, directory: Path, warnings: Callable[[], str], break_it: Callable[[Path], None]
) -> None:
    break_it(entry_file(directory))
    assert kept.load(NOW, 60) is None
    assert "the cache is not used" in warnings()
    with kept.lock(time.monotonic() + 60) as theirs:
        assert theirs is None
        kept.store(granted("new"), NOW)
    if break_it is not subdirectory:  # everything else is put right by the replacement
        assert kept.load(NOW, 60) == granted("new")
        assert mode_of(entry_file(directory)) == 0o600
    if break_it is link:
        assert SECRET in (directory.parent / "elsewhere").read_text()


def moved(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))
    directory.symlink_to(directory.with_name("elsewhere"))


def file_instead(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))
    directory.write_bytes(b"")


@pytest.mark.parametrize("break_it", [moved, file_instead, wide, foreign])
def test_a_directory_that_is_not_ours_alone_is_a_warning_and_is_left_alone(
    kept: TokenCache, directory: Path, warnings: Callable[[], str], break_it: Callable[[Path], None]
) -> None:
    break_it(directory)
    before = sorted(directory.parent.rglob("*"))
    assert kept.load(NOW, 60) is None
    with kept.lock(time.monotonic() + 60) as theirs:
        assert theirs is None
        kept.store(granted("new"), NOW)
    assert "the cache is not used" in warnings()
    assert len(warnings().splitlines()) == 1
    assert sorted(directory.parent.rglob("*")) == before
    assert not any("new" in path.read_text() for path in before if path.is_file())
    for command in (cache.entries, cache.clear):
        with pytest.raises(UnsafeFileError):
            command(directory)


@pytest.mark.parametrize("break_it", [link, fifo, subdirectory, wide, foreign])
def test_a_lock_file_that_is_not_ours_is_a_warning_and_no_lock(
    kept: TokenCache, directory: Path, warnings: Callable[[], str], break_it: Callable[[Path], None]
) -> None:
    with kept.lock(time.monotonic()):
        pass
    [lock] = directory.glob("*.lock")
    break_it(lock)
    with kept.lock(time.monotonic() + 60) as theirs:
        assert theirs is None
        kept.store(granted("new"), NOW)
    assert "the cache is not used" in warnings()
    assert kept.load(NOW, 60) == granted("new")


WITHOUT_ROOM = """
import logging, os, resource, sys, time
from pathlib import Path
from hsm_signer.oauth.cache import TokenCache
from hsm_signer.oauth.response import TokenResponse
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
kept = TokenCache(Path(sys.argv[1]), {"client_id": "office"})
if sys.argv[2] == "read-only" and os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
now = int(time.time())
response = lambda token: TokenResponse(token, {"access_token": token}, "Bearer", now + 3600, "")
kept.store(response("revoked"), now)
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    kept.store(response("fresh"), now)
else:
    Path(sys.argv[1]).chmod(0o500)
    kept.store(response("fresh"), now)
with kept.lock(time.monotonic() + 60) as theirs:
    print("lock", theirs)
found = kept.load(now, 0)
print("found", found and found.access_token)
"""


def without_room(directory: Path, how: str) -> str:
    command = [sys.executable, "-c", WITHOUT_ROOM, str(directory), how]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_is_a_warning_and_leaves_no_older_access_token(tmp_path: Path) -> None:
    said = without_room(tmp_path / "cache", "full")
    assert "the cache is not used: [Errno 27] File too large" in said
    assert said.endswith("lock None\nfound None\n")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_directory_that_cannot_be_written_is_a_warning(open_to_nobody: Path) -> None:
    said = without_room(open_to_nobody / "cache", "read-only")
    assert "the cache is not used: [Errno 13] Permission denied" in said
    assert "lock None" in said


# One fetch among many processes


FETCH = """
import os, sys, time
from pathlib import Path
from hsm_signer.oauth.cache import TokenCache
from hsm_signer.oauth.response import TokenResponse
directory, posts, lives, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
kept = TokenCache(directory, {"client_id": "office"})
print("ready", flush=True)
sys.stdin.readline()
found = kept.load(int(time.time()), 60)
if found is None:
    with kept.lock(time.monotonic() + 60) as theirs:
        found = theirs or kept.load(int(time.time()), 60)
        if found is None:
            with posts.open("a") as log:
                print("POST", file=log, flush=True)
            time.sleep(seconds)
            token = f"token-of-{os.getpid()}"
            now = int(time.time())
            found = TokenResponse(token, {"access_token": token}, "Bearer", now + lives, "")
            kept.store(found, now)
print(found.access_token)
heavy = {"filelock", "platformdirs", "requests", "pkcs11", "cryptography", "asn1crypto"}
print(sorted(heavy & set(sys.modules)))
"""


class Fetcher:
    """A process that fetches when told to, from a server that is slow."""

    def __init__(self, directory: Path, *, lives: int = 3600, seconds: float = 0.5) -> None:
        command = [
            sys.executable,
            "-c",
            FETCH,
            str(directory),
            f"{directory}-posts",
            str(lives),
            str(seconds),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        out, _ = self.process.communicate(timeout=100)
        token, modules = out.splitlines()
        assert modules == "[]"
        return token


def started(fetchers: list[Fetcher]) -> list[Fetcher]:
    """All of them, at about the same moment."""
    for fetcher in fetchers:
        fetcher.ready()
    for fetcher in fetchers:
        fetcher.go()
    return fetchers


def posts(directory: Path) -> int:
    return Path(f"{directory}-posts").read_text().count("POST")


@pytest.mark.parametrize("lives", [3600, 20], ids=["long", "shorter than min_validity"])
def test_fifty_processes_cause_one_fetch_and_get_one_access_token(directory: Path, lives: int) -> None:
    fetchers = started([Fetcher(directory, lives=lives, seconds=2) for _ in range(50)])
    assert len({fetcher.answer() for fetcher in fetchers}) == 1
    assert posts(directory) == 1


def test_a_killed_holder_releases_the_others(directory: Path) -> None:
    [holder] = started([Fetcher(directory, seconds=100)])
    while not Path(f"{directory}-posts").exists():
        time.sleep(0.01)
    others = started([Fetcher(directory) for _ in range(3)])
    time.sleep(0.3)
    holder.process.send_signal(signal.SIGKILL)
    holder.process.communicate()
    assert len({other.answer() for other in others}) == 1
    assert posts(directory) == 2


def test_the_wait_ends_at_the_deadline(directory: Path) -> None:
    first, second = (TokenCache(directory, IDENTITY) for _ in range(2))
    with first.lock(time.monotonic()) as theirs:
        assert theirs is None
        began = time.monotonic()
        with pytest.raises(TransportError, match="another process"), second.lock(began + 0.2):
            pytest.fail("this lock has one holder")
        assert 0.2 <= time.monotonic() - began < 30
    with second.lock(time.monotonic() - 1) as theirs:
        assert theirs is None


def test_an_old_access_token_is_no_news_to_one_who_waits(kept: TokenCache, directory: Path) -> None:
    with TokenCache(directory, IDENTITY).lock(time.monotonic()) as theirs:
        assert theirs is None  # --force: what is there must not be used


def test_one_who_waits_is_given_what_was_stored_meanwhile(kept: TokenCache, directory: Path) -> None:
    got: list[TokenResponse | None] = []

    def wait() -> None:
        with TokenCache(directory, IDENTITY).lock(time.monotonic() + 60) as theirs:
            got.append(theirs)

    waiter = threading.Thread(target=wait)
    with kept.lock(time.monotonic()):
        waiter.start()
        time.sleep(0.2)
        kept.store(granted("new", now=int(time.time())), int(time.time()))
        waiter.join(30)  # the lock is still held: it is the new access token that ends the wait
    assert [response and response.access_token for response in got] == ["new"]


def test_an_error_of_the_holder_lets_the_next_one_try(directory: Path) -> None:
    kept = TokenCache(directory, IDENTITY)
    with pytest.raises(RuntimeError), kept.lock(time.monotonic()):
        raise RuntimeError
    with kept.lock(time.monotonic()) as theirs:
        assert theirs is None


# What hsm-token cache shows and clears


def test_the_list_shows_no_access_token_and_none_that_is_dead(directory: Path) -> None:
    assert cache.entries(directory) == []
    now = int(time.time())
    for client_id, lives in (("a", 3600), ("b", None), ("dead", 0)):
        kept = TokenCache(directory, IDENTITY | {"client_id": client_id})
        kept.store(granted(lives=lives, now=now), now)
    a, b = sorted(cache.entries(directory), key=lambda entry: entry.client_id)
    assert (a.endpoint, a.client_id, a.scope) == ("https://as.example/token", "a", "das-api/das-access")
    assert (b.client_id, SECRET in repr([a, b])) == ("b", False)
    assert abs(a.expires_at - now - 3600) <= 1
    assert abs(b.expires_at - now - 60) <= 1


def test_the_list_skips_a_damaged_entry_with_a_warning(
    kept: TokenCache, directory: Path, warnings: Callable[[], str]
) -> None:
    TokenCache(directory, IDENTITY | {"client_id": "other"}).store(granted(), NOW)
    flip(min(directory.glob("*.token"), key=lambda path: b'"other"' in path.read_bytes()))
    assert [entry.client_id for entry in cache.entries(directory)] == ["other"]
    assert "damaged" in warnings()


def test_clearing_does_not_let_a_second_process_fetch(kept: TokenCache, directory: Path) -> None:
    with kept.lock(time.monotonic()):
        assert cache.clear(directory) == 1
        other = TokenCache(directory, IDENTITY)
        with pytest.raises(TransportError, match="another process"), other.lock(time.monotonic() + 0.2):
            pytest.fail("this lock has one holder")


def test_clearing_removes_our_files_and_nothing_else(kept: TokenCache, directory: Path) -> None:
    name = entry_file(directory).name
    (directory / f".{name}.0123456789abcdef").write_bytes(b"left by a killed writer")
    (directory / "notes.txt").write_bytes(b"")
    assert cache.clear(directory) == 1
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    assert cache.clear(directory) == 0
    assert cache.clear(directory / "missing") == 0
    assert kept.load(NOW, 0) is None


def test_neither_the_cache_nor_a_response_shows_an_access_token(kept: TokenCache) -> None:
    assert SECRET not in repr(kept) + repr(kept.load(NOW, 60)) + str(vars(kept))
