"""Files of another account: opened only if just root and that account can change them, or given to the account."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.errors import ConfigUnreadable, FileUntrusted, refusing
from imdsproxy.host.files import Owner, ensure_directory, opened

_MOST_LINKS: Final = 40
"""Maximum number of symbolic links, as in the kernel (path_resolution(7))."""

_HERE: Final = Path("/")


@dataclass(frozen=True, slots=True)
class OwnedFile:
    """Open file, by `O_PATH`, and its open directory: later changes of names on the path affect neither."""

    itself: int
    directory: int
    name: str

    @property
    def path(self) -> Path:
        """Return a path to replace the file in its directory, wherever the directory is now."""
        return Path(f"/proc/self/fd/{self.directory}") / self.name

    def read(self) -> bytes:
        return Path(f"/proc/self/fd/{self.itself}").read_bytes()


@contextlib.contextmanager
def open_owned(path: Path, owner: Owner, root: Path = _HERE) -> Iterator[OwnedFile]:
    """Open a regular file for the block.

    The file, and every directory and symbolic link on the path, must belong to root or the owner, and no other user may
    write to them. Symbolic links are followed within the root, as `/proc/PID/root`. Raises `ConfigUnreadable` if the
    file does not exist; `FileUntrusted` if another user may change the file, or replace it.
    """
    shown = root / path.relative_to("/")
    with _reading(shown), contextlib.ExitStack() as stack:
        found = _walk(stack, path, owner, root)
        if not stat.S_ISREG(os.fstat(found.itself).st_mode):
            raise ConfigUnreadable(f"cannot read {shown}: it is not a regular file")
        yield found


def list_owned(path: Path, owner: Owner, root: Path = _HERE) -> list[str]:
    """Return the sorted names in a directory, to which the rules and errors of `open_owned` apply."""
    with _reading(root / path.relative_to("/")), contextlib.ExitStack() as stack:
        directory = Path(f"/proc/self/fd/{_walk(stack, path, owner, root).itself}")
        return sorted(entry.name for entry in directory.iterdir())


@contextlib.contextmanager
def _reading(shown: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigUnreadable(f"cannot read {shown}: {error.strerror}") from error


def _walk(stack: contextlib.ExitStack, path: Path, owner: Owner, root: Path) -> OwnedFile:
    """Open each part of a path relative to the part before, so that no process can replace a part after its check."""
    base = stack.enter_context(opened(root, os.O_PATH | os.O_DIRECTORY))
    way = [(base, str(root))]
    _check(base, str(root), owner)
    left, links = _parts(str(path)), 0
    while True:
        name = left.pop()
        if name == "..":
            way = way[:-1] or way
            if not left:
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            continue
        directory, shown = way[-1][0], f"{way[-1][1].rstrip('/')}/{name}"
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        found = os.open(name, flags, dir_fd=directory)
        stack.callback(os.close, found)
        _check(found, shown, owner)
        if stat.S_ISLNK(os.fstat(found).st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink("", dir_fd=found)
            way = way[:1] if target.startswith("/") else way
            left += _parts(target)
        elif left:
            way.append((found, shown))
        else:
            return OwnedFile(found, directory, name)


def _parts(path: str) -> list[str]:
    """Return the parts of a path, the last one first; an empty path is the directory itself."""
    return [part for part in reversed(path.split("/")) if part not in {"", "."}]


def _check(descriptor: int, shown: str, owner: Owner) -> None:
    status = os.fstat(descriptor)
    user, group = owner
    if status.st_uid not in {0, user}:
        raise FileUntrusted(
            f"{shown} belongs to user {status.st_uid}", hint=f"chown root {shown}, if it is genuine"
        )
    # A link's mode is meaningless; in a directory with the sticky bit only an entry's owner may replace the entry.
    if stat.S_ISLNK(status.st_mode) or (
        stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    ):
        return
    if status.st_mode & stat.S_IWOTH:
        raise FileUntrusted(f"every user may write to {shown}", hint=f"chmod o-w {shown}")
    if status.st_mode & stat.S_IWGRP and status.st_gid not in {0, group}:
        raise FileUntrusted(
            f"group {status.st_gid} may write to {shown}", hint=f"chmod g-w {shown}"
        )


def give_files(directory: Path, paths: Iterable[Path], owner: Owner) -> None:
    """Give regular files of a directory, and the directory, to an account, as root; raise `HostRefused`."""
    with refusing(f"give {directory} to its account"):
        for path in paths:
            with opened_regular(path) as file:
                if file is not None:
                    os.fchown(file, *owner)
    ensure_directory(directory, mode=0o700, owner=owner)


@contextlib.contextmanager
def opened_regular(path: Path) -> Iterator[int | None]:
    """Open a regular file without other names; yield `None` otherwise, for example for a link the account created."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ELOOP}:
            raise
        yield None
        return
    try:
        status = os.fstat(file)
        yield file if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else None
    finally:
        os.close(file)
