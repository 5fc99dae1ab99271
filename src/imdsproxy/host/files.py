"""Files that are replaced as a whole, and files that hold secrets."""

import contextlib
import fcntl
import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

from imdsproxy.errors import HostRefused, ImdsproxyError, SecretUnreadable, refusing

T = TypeVar("T")

MAX_SECRET_BYTES: Final = 64 * 1024
"""Maximum size of a secret: a key or a password, never a document."""

MAX_LOG_BYTES: Final = 4 * 1024 * 1024
"""Maximum size of a log: without systemd, logs are in memory."""

_OTHERS: Final = 0o007
_GROUP: Final = 0o070
_UNFINISHED: Final = re.compile(r"\..+\.(\d+)-\d+\.tmp")


Owner: TypeAlias = tuple[int, int]
"""Ids of user and group; -1 keeps the present one."""


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file and close it after the block; a new file is accessible to its owner only."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_atomic(
    path: Path, data: bytes, *, mode: int = 0o640, owner: Owner | None = None, durable: bool = False
) -> None:
    """Replace `path` by a file with exactly `data`: a reader sees the old bytes or the new ones.

    The new file is written beside the old one, so that the rename stays within one file system. Its hidden name has the
    ids of this process and thread; see `sweep_unfinished`. Raises `HostRefused` if the file system refused; `path` is
    unchanged.

    Args:
        mode: Permission bits, whatever the umask is.
        owner: User and group ids, or `None` to leave them.
        durable: Also survive a power cut (fsync of the file and its directory).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with refusing(f"write {path}"):
        try:
            with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(file, rest) :]
                if owner is not None:
                    os.fchown(file, *owner)
                os.fchmod(file, mode)
                if durable:
                    os.fsync(file)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    if durable:
        sync_directory(path.parent)


@dataclass(slots=True)
class Journal(Generic[T]):
    """JSON file that is read once; without a file its content is `empty`. Errors have the hint."""

    path: Path
    empty: T
    hint: str
    _content: T | None = None

    def load(self) -> T:
        """Return the content; raise `HostRefused` if the file cannot be read."""
        if self._content is None:
            try:
                self._content = json.loads(self.path.read_bytes())
            except FileNotFoundError:
                self._content = self.empty
            except (OSError, ValueError) as error:
                raise HostRefused(f"cannot read {self.path}: {error}", hint=self.hint) from error
        return self._content

    def store(self, content: T) -> None:
        """Replace the file unless it has this content; raise `HostRefused` if the file cannot be written."""
        if content != self._content:
            write_atomic(self.path, json.dumps(content, sort_keys=True).encode(), mode=0o600)
            self._content = content


def remove_file(path: Path, action: str, *, denied: str = "") -> bool:
    """Remove a file; return `False` if there was none; raise `HostRefused`, with an action as "remove the map"."""
    with refusing(action, denied=denied):
        try:
            path.unlink()
        except FileNotFoundError:
            return False
    return True


def sweep_unfinished(directory: Path) -> int:
    """Remove temporary files of killed writers from a directory; return their number.

    Files of running processes, ours included, stay. Raises `HostRefused` if the file system refused.
    """
    removed = 0
    with refusing(f"remove temporary files in {directory}"), contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            match = _UNFINISHED.fullmatch(path.name)
            if match is not None and not Path(f"/proc/{match[1]}").exists():
                path.unlink(missing_ok=True)
                removed += 1
    return removed


def sync_directory(path: Path) -> None:
    """Make renames and removals within `path` survive a power cut; raise `HostRefused` if the file system refused."""
    with refusing(f"sync {path}"), opened(path, os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.fsync(directory)


def ensure_directory(path: Path, *, mode: int = 0o755, owner: Owner | None = None) -> None:
    """Create a directory, or set its mode (and owner), whatever the umask is; new parents get 0755.

    Raises `HostRefused` if the name is taken by another kind of file, or the file system refused.
    """
    with refusing(f"create the directory {path}"):
        missing = [one for one in path.parents if not one.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for parent in missing:
            parent.chmod(0o755)
        with opened(path, os.O_RDONLY | os.O_DIRECTORY) as directory:
            apply_owner_and_mode(directory, mode, owner)


def apply_owner_and_mode(descriptor: int, mode: int, owner: Owner | None) -> None:
    """Set owner and mode if they differ: a read-only file system refuses even calls that change nothing.

    An `O_PATH` descriptor will do. An id of -1 stays, and so do both for `None`.
    """
    itself = f"/proc/self/fd/{descriptor}"
    status = os.fstat(descriptor)
    is_so = (status.st_uid, status.st_gid)
    if owner is not None and any(
        wanted not in (-1, now) for wanted, now in zip(owner, is_so, strict=True)
    ):
        os.chown(itself, *owner)
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
        os.chmod(itself, mode)  # noqa: PTH101 - of a descriptor that may only name it


def open_log(path: Path) -> int:
    """Open a file for appending, but no symbolic link; a new file gets mode 0640 whatever the umask is."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o640)
    except FileExistsError:
        # Keep the mode of an existing file, which logrotate may have set.
        return os.open(path, flags)
    os.fchmod(descriptor, 0o640)
    return descriptor


def limit_log(path: Path, limit: int = MAX_LOG_BYTES) -> None:
    """Truncate a log of over `limit` bytes, and keep its end as `NAME.1`; writers that append (`open_log`) go on."""
    # The file is absent under systemd.
    with contextlib.suppress(OSError), path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size > limit:
            file.seek(size - limit)
            # If there is no room for the copy, at least the truncation frees some.
            with contextlib.suppress(ImdsproxyError):
                write_atomic(path.with_name(f"{path.name}.1"), file.read(), mode=0o640)
            file.truncate(0)


def open_locked(path: Path, flags: int, mode: int = 0o600) -> int | None:
    """Open a file and lock it (flock(2)) until its last copy is closed; return `None` if another process locks it."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def is_file_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


@contextlib.contextmanager
def hold_directory(path: Path) -> Iterator[None]:
    """Lock a directory of ours for the block; raise `HostRefused` if another process holds the lock."""
    with refusing(f"lock {path}"):
        descriptor = open_locked(path, os.O_RDONLY | os.O_DIRECTORY)
    if descriptor is None:
        raise HostRefused(
            f"another controller keeps its state in {path}",
            hint="end it, or give this one a state directory of its own: paths.state_dir",
        )
    try:
        yield
    finally:
        os.close(descriptor)


def find_directory_holder(path: Path) -> int | None:
    """Return the pid of the process that holds `hold_directory`'s lock; `None` if there is none, or it is hidden."""
    with refusing(f"find the process that has locked {path}"):
        lines = Path("/proc/locks").read_text().splitlines()
    # Do not compare device and inode: for some file systems the kernel lists other numbers than stat(2).
    for kind, _, _, pid in (line.split()[1:5] for line in lines):
        if kind == "FLOCK" and _has_open(pid, path):
            return int(pid)
    return None


def _has_open(pid: str, path: Path) -> bool:
    """Return whether a process has a file open; false if it has ended, or we may not look."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc", pid, "fd").iterdir():
            with contextlib.suppress(OSError):
                if entry.samefile(path):
                    return True
    return False


def read_secret(path: Path, *, owner: int | None = None, shared: bool = True) -> bytes:
    """Read the secret in `path`, without the newline at its end.

    Raises `SecretUnreadable` if the file is missing, empty, too big, not a regular file, owned by another user, or
    others may read or write it.

    Args:
        owner: User that may own the file, besides root and this process's user.
        shared: Whether the file's group may use it.
    """
    try:
        with opened(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as file:
            _check_secret(path, os.fstat(file), owner, shared=shared)
            data = os.read(file, MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise SecretUnreadable(
            f"cannot read the secret {path}: {error.strerror}",
            hint="create it with mode 0600, owned by the user that runs imdsproxy",
        ) from error
    secret = data.removesuffix(b"\n").removesuffix(b"\r")
    if not secret.strip():
        raise SecretUnreadable(f"the secret {path} is empty", hint="put the secret in the file")
    return secret


def _check_secret(path: Path, status: os.stat_result, trusted: int | None, *, shared: bool) -> None:
    mode, owner, size = stat.S_IMODE(status.st_mode), status.st_uid, status.st_size
    for refused, reason, hint in (
        (not stat.S_ISREG(status.st_mode), "is not a regular file", ""),
        (
            mode & _OTHERS,
            f"has mode {mode:04o}: every user of this host can use it",
            f"chmod o-rwx {path}",
        ),
        (
            mode & _GROUP and not shared,
            f"has mode {mode:04o}: its group can use it",
            f"chmod 0600 {path}",
        ),
        (owner not in (0, os.geteuid(), trusted), f"belongs to user {owner}", f"chown root {path}"),
        (size > MAX_SECRET_BYTES, f"has {size} bytes", f"a secret has at most {MAX_SECRET_BYTES}"),
    ):
        if refused:
            raise SecretUnreadable(f"the secret {path} {reason}", hint=hint)
