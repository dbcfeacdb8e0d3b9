"""Files that decide about secrets: opened without following links, judged by ``fstat`` on what was opened.

A path says nothing: between a look at it and its opening another user can put something else there.
``UnsafeFileError`` means that the file is not one to trust; that it is missing or cannot be read stays an
``OSError``. Where a platform has no owners and modes (Windows) only kind and size are judged.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hsm_signer.errors import UnsafeFileError

PRIVATE = 0o077  # group and others may do nothing
UNTOUCHED = 0o022  # group and others may not write
MAX_LINKS = 40  # on the way of one path, as Linux has it

# O_NONBLOCK: the opening of a FIFO must not wait for a writer, and a terminal must not become ours.
_READ = sum(
    getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
_CREATE = sum(
    getattr(os, flag, 0) for flag in ("O_WRONLY", "O_CREAT", "O_EXCL", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY")
)
_CHANGE = _READ | os.O_RDWR | os.O_CREAT
_DIRECTORY = _READ | getattr(os, "O_DIRECTORY", 0)
_HAS_DIR_FD = os.open in os.supports_dir_fd


def open_regular(
    path: Path,
    *,
    forbidden: int = PRIVATE,
    forbidden_to_root: int | None = None,
    max_size: int | None = None,
    dir_fd: int | None = None,
) -> BinaryIO:
    """Open a regular file of ours or root's for reading.

    ``forbidden``: mode bits that it must not have; ``forbidden_to_root`` replaces them where the file is
    root's. ``max_size``: bytes. ``dir_fd``: of its directory, here and below; then the path is for texts.
    The caller closes the file.
    """
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise UnsafeFileError(f"{path} is a link, not a regular file")
    try:
        descriptor = os.open(_at(path, dir_fd), _READ, dir_fd=dir_fd)
    except OSError as exc:
        raise _judged(path, exc, stat.S_ISREG, "a regular file", dir_fd) from None
    try:
        found = os.fstat(descriptor)
        _check_kind(path, found, max_size)
        _check_access(path, found, forbidden, forbidden_to_root)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(
    path: Path,
    *,
    max_size: int,
    forbidden: int = PRIVATE,
    forbidden_to_root: int | None = None,
    dir_fd: int | None = None,
) -> bytes:
    """Read the whole of a file that passes :func:`open_regular`."""
    with open_regular(
        path, forbidden=forbidden, forbidden_to_root=forbidden_to_root, max_size=max_size, dir_fd=dir_fd
    ) as file:
        content = file.read(max_size + 1)
    if len(content) > max_size:  # it grew, or it is a file whose size says nothing, as below /proc
        del content  # which may be a secret: tracebacks may show what the frames hold
        raise UnsafeFileError(f"{path} holds more than the {max_size} bytes that are read")
    return content


def create(
    path: Path, content: bytes, *, mode: int = 0o600, group: int | None = None, dir_fd: int | None = None
) -> None:
    """Write a file that must not exist yet, and sync it; ``FileExistsError`` where anything has that name."""
    descriptor = os.open(_at(path, dir_fd), _CREATE, 0o600, dir_fd=dir_fd)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if group is not None and hasattr(os, "fchown"):
                os.fchown(descriptor, -1, group)  # before the mode, which could open it to another group
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)  # whatever the umask is
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        os.unlink(_at(path, dir_fd), dir_fd=dir_fd)
        raise


def replace(path: Path, content: bytes, *, mode: int | None = None, dir_fd: int | None = None) -> None:
    """Put a file in the place of ``path`` in one step; whoever reads sees the old content or the new.

    Without ``mode`` a file that exists keeps its own and its group, and a new one gets 0600; ``OSError``
    where the group may not be given.
    """
    group = None
    if mode is None:
        mode = 0o600
        with suppress(OSError):
            found = os.stat(_at(path, dir_fd), dir_fd=dir_fd, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode):
                mode, group = stat.S_IMODE(found.st_mode) & 0o777, found.st_gid
    fresh = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    create(fresh, content, mode=mode, group=group, dir_fd=dir_fd)
    try:
        os.replace(_at(fresh, dir_fd), _at(path, dir_fd), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        os.unlink(_at(fresh, dir_fd), dir_fd=dir_fd)
        raise
    if dir_fd is None:
        sync_directory(path.parent)
    else:
        os.fsync(dir_fd)


def guarded(path: Path) -> Path:
    """Follow the links of a path and judge all that it passes; the path without links.

    Who can write a directory can put another file in the place of one that nobody can write. So each
    directory from the root on, and each link, is ours or root's, and nobody else can write the directory,
    by its mode or by an ACL. Passed over are a sticky bit, which keeps what is ours in ``/tmp``; a mount that is
    read-only, as Kubernetes has them with mode 0777; and the groups of :func:`_is_alone_in`. Root may work in a
    directory of a user's, by ``sudo`` or in a container: what is used there has to be root's all the same.
    Raises :class:`UnsafeFileError`.
    """
    uid = _uid()
    if uid is None:
        return path.resolve()
    here, links = "/", 0
    rest = list(path.absolute().parts[:0:-1])  # the last one comes first
    _check_directory(here, os.lstat(here), uid)
    while rest:
        part = rest.pop()
        if part == "..":
            here = os.path.dirname(here)  # noqa: PTH120  # a Path takes ten times as long
            continue
        there = f"{here.rstrip('/')}/{part}"
        found = os.lstat(there)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), there)
            if uid or found.st_uid != os.lstat(here).st_uid:
                _check_owner(there, found, uid)
            target = Path(os.readlink(there))  # noqa: PTH115  # as above
            here = "/" if target.is_absolute() else here
            rest += [step for step in target.parts[::-1] if step != "/"]
            continue
        if stat.S_ISDIR(found.st_mode):
            _check_directory(there, found, uid)
        here = there
    return Path(here)


def _check_directory(path: str, found: os.stat_result, uid: int) -> None:
    if found.st_uid not in (uid, 0) or found.st_mode & UNTOUCHED:
        if getattr(os.statvfs(path), "f_flag", 0) & getattr(os, "ST_RDONLY", 0):
            return
        if uid:
            _check_owner(path, found, uid)
        if found.st_mode & stat.S_ISVTX:
            return
        has_acl = found.st_mode & 0o020 and _has_acl(path)
        by_group = found.st_mode & 0o020 and not any(
            _is_alone_in(found.st_gid, user) for user in (uid, found.st_uid)
        )
        if has_acl or by_group or found.st_mode & 0o002:
            mode = stat.S_IMODE(found.st_mode)
            raise UnsafeFileError(
                f"{path} has mode {mode:04o}{' and an ACL' * bool(has_acl)}: "
                "other users could put another file into it",
                hint=f"chmod {mode & ~UNTOUCHED:04o} {path}",
            )


def _check_owner(path: str | Path, found: os.stat_result, uid: int) -> None:
    if found.st_uid not in (uid, 0):
        raise UnsafeFileError(f"{path} belongs to user id {found.st_uid}, neither to us ({uid}) nor to root")


def _has_acl(path: str) -> bool:
    """Whether a directory has a POSIX ACL; the mode's group bits are then what *any* user in it may have at most.

    So ``chmod g-w`` takes the writing from all of them.
    """
    if not hasattr(os, "getxattr"):
        return False
    try:
        os.getxattr(path, "system.posix_acl_access", follow_symlinks=False)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise
    return True


def _is_alone_in(gid: int, uid: int) -> bool:
    """Whether a group is root's (0), or has nobody in it but the user.

    That is one of the user's name, as distributions make, where new directories are writable by that group; or
    one of ours without any name, as Kubernetes gives a volume (``fsGroup``). Not looked for are users whose
    *primary* group it is: the only way is to list all users, which a directory service may take long over, or
    refuse; whoever makes such a user means to share.
    """
    if gid == 0:
        return True
    import grp
    import pwd

    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return gid in (os.getegid(), *os.getgroups())
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}


class PrivateDirectory:
    """A directory of ours, held open: what happens in it happens there, whatever its path means later."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path = path
        self._descriptor = descriptor  # None where there is no openat(2): then the path has to do

    def __repr__(self) -> str:
        return f"PrivateDirectory({str(self.path)!r})"

    def exists(self, name: str) -> bool:
        """Whether anything has this name, a dangling link too."""
        try:
            os.stat(self._at(name), dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        """List what is in it, sorted."""
        place = self.path if self._descriptor is None else self._descriptor
        return sorted(os.listdir(place))  # noqa: PTH208  # pathlib knows no descriptors

    def read_bytes(self, name: str, *, max_size: int, forbidden: int = PRIVATE) -> bytes:
        """Read a file of ours or root's, judged as in :func:`open_regular`."""
        return read_bytes(self.path / name, max_size=max_size, forbidden=forbidden, dir_fd=self._descriptor)

    def create(self, name: str, content: bytes, *, mode: int = 0o600) -> None:
        """Write a file that must not exist yet, and sync it together with its name."""
        create(self.path / name, content, mode=mode, dir_fd=self._descriptor)
        self.sync()

    def replace(self, name: str, content: bytes, *, mode: int = 0o600) -> None:
        """Put a file of this mode in the place of ``name`` in one step."""
        replace(self.path / name, content, mode=mode, dir_fd=self._descriptor)

    def open_to_change(self, name: str, *, append: bool = False) -> int:
        """Open a file of ours to lock it or write into it, made where it is missing.

        ``append``: whatever is written goes to its end. The caller closes the descriptor.
        """
        path = self.path / name
        flags = _CHANGE | (os.O_APPEND if append else 0)
        try:
            descriptor = os.open(self._at(name), flags, 0o600, dir_fd=self._descriptor)
        except OSError as exc:
            raise _judged(path, exc, stat.S_ISREG, "a regular file", self._descriptor) from None
        try:
            found = os.fstat(descriptor)
            _check_kind(path, found, None)
            _check_access(path, found, PRIVATE)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def remove(self, name: str) -> None:
        """Remove a file; nothing where there is none."""
        with suppress(FileNotFoundError):
            os.unlink(self._at(name), dir_fd=self._descriptor)
            self.sync()

    def sync(self) -> None:
        """Make the names in it last."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def _at(self, name: str) -> Path | str:
        return _at(self.path / name, self._descriptor)


@contextmanager
def private_directory(
    path: Path, *, forbidden: int = PRIVATE, create: bool = True
) -> Iterator[PrivateDirectory]:
    """Open a directory of ours, made with mode 0700 (and so its parents) where it is missing.

    ``forbidden``: mode bits that one which was there must not have.
    """
    if create:
        _make(path)
    if not _HAS_DIR_FD:
        yield PrivateDirectory(path, None)
        return
    try:
        descriptor = os.open(path, _DIRECTORY)
    except OSError as exc:
        raise _judged(path, exc, stat.S_ISDIR, "a directory") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != _uid():
            raise UnsafeFileError(f"{path} belongs to user id {found.st_uid}, not to us ({_uid()})")
        _check_access(path, found, forbidden)
        yield PrivateDirectory(path, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def guarded_directory(path: Path, *, create: bool = True) -> Iterator[PrivateDirectory]:
    """Open a directory as :func:`private_directory` does, where nobody else can write, or move it away.

    For what must not be forgotten: that another user takes the name away from it is as if it was not there.
    """
    if create and not path.exists():
        guarded(next(above for above in path.absolute().parents if above.exists()))  # before it is made there
        _make(path)
    there = guarded(path.parent) / path.name
    with private_directory(there, forbidden=UNTOUCHED, create=False) as directory:
        yield directory


def sync_directory(path: Path) -> None:
    """Make the names in a directory last (nothing where directories cannot be opened)."""
    if _HAS_DIR_FD:
        descriptor = os.open(path, _DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _at(path: Path, dir_fd: int | None) -> Path | str:
    """What to open it by: in a directory that is held open, its name."""
    return path if dir_fd is None else path.name


def _make(path: Path) -> None:
    if not path.exists():
        _make(path.parent)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)


def _check_kind(path: Path, found: os.stat_result, max_size: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeFileError(f"{path} is {_kind(found.st_mode)}, not a regular file")
    if max_size is not None and found.st_size > max_size:
        raise UnsafeFileError(f"{path} holds {found.st_size} bytes; at most {max_size} are read")


def _check_access(
    path: Path, found: os.stat_result, forbidden: int, forbidden_to_root: int | None = None
) -> None:
    uid = _uid()
    if uid is None:
        return
    _check_owner(path, found, uid)
    if found.st_uid == 0 and forbidden_to_root is not None:
        forbidden = forbidden_to_root
    mode = stat.S_IMODE(found.st_mode)
    if mode & forbidden:
        raise UnsafeFileError(
            f"{path} has mode {mode:04o}: other users could {_access(mode & forbidden)} it",
            hint=f"chmod {mode & ~forbidden & 0o777:04o} {path}",
        )


def _judged(
    path: Path, exc: OSError, is_sought: Callable[[int], bool], sought: str, dir_fd: int | None = None
) -> OSError | UnsafeFileError:
    """Name what it is that O_NOFOLLOW or O_DIRECTORY refused, or that cannot be opened at all (a socket)."""
    try:
        mode = os.stat(_at(path, dir_fd), dir_fd=dir_fd, follow_symlinks=False).st_mode
    except OSError:
        return exc
    return exc if is_sought(mode) else UnsafeFileError(f"{path} is {_kind(mode)}, not {sought}")


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISREG, "a file"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")


def _access(bits: int) -> str:
    names = [name for mask, name in ((0o044, "read"), (0o022, "write"), (0o011, "run")) if bits & mask]
    return " and ".join(names)


def _uid() -> int | None:
    return os.geteuid() if hasattr(os, "geteuid") else None
