"""A configuration file that belongs to the HAProxy that runs with it.

Whoever starts a proxy writes its file, locks it (flock(2)) and hands the open file on to HAProxy, which keeps it,
and so the lock, as long as it lives, whatever kills it. A file that is locked is in use: it is neither replaced nor
removed. No pid is asked, and none can be another's by now.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Final

from imdsproxy.errors import HostRefused
from imdsproxy.host.files import is_file_at, open_locked, sweep_unfinished
from imdsproxy.host.refusal import host_refused

__all__ = ["claim_file", "make_directories", "remove_unclaimed"]

_MODE: Final = 0o640
_DIRECTORY_MODE: Final = 0o755
_FOREIGN_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def claim_file(path: Path, data: bytes) -> int:
    """Have a file with exactly `data`, mode 0640 whatever the umask is, and the lock on it.

    A reader sees the old bytes or the new ones. Of several that want the same file one gets it.

    Returns:
        The open file. The lock goes when its last copy is closed.

    Raises:
        HostRefused: It is in use, or the file system refused; then it is as it was.
        PrivilegeMissing: This process may not write there.
    """
    try:
        while True:
            # Locked while it is replaced: nobody else can come between.
            before = _lock_existing(path)
            new = _write_locked(path, data, replace=before is not None)
            if before is not None:
                os.close(before)
            if new is not None:
                return new
    except OSError as error:
        raise host_refused(f"write {path}", error) from error


def remove_unclaimed(path: Path) -> bool:
    """Remove the file, and what writers that were killed left beside it; whether it was there.

    Raises:
        HostRefused: It is in use, or the file system refused.
        PrivilegeMissing: This process may not remove it.
    """
    try:
        held = _lock_existing(path)
        if held is not None:
            path.unlink(missing_ok=True)
            # HAProxy's own, of a start that was killed.
            path.with_suffix(".pid").unlink(missing_ok=True)
            os.close(held)
    except OSError as error:
        raise host_refused(f"remove {path}", error) from error
    sweep_unfinished(path.parent)
    return held is not None


def _lock_existing(path: Path) -> int | None:
    """The file that is there, locked; `None` when none is."""
    while True:
        try:
            descriptor = open_locked(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        if descriptor is None:
            raise HostRefused(
                f"{path} is in use: its proxy runs, or is being started",
                hint=f"end the haproxy that has it in its command line: pgrep -af {path.stem}",
            )
        if is_file_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _write_locked(path: Path, data: bytes, *, replace: bool) -> int | None:
    """The new file; `None` when somebody has made one meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    descriptor = open_locked(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    if descriptor is None:
        return None
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fchmod(descriptor, _MODE)
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)
    except FileExistsError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return descriptor


def make_directories(path: Path) -> None:
    """Have a directory in which nobody but its owner writes; what is made on the way is 0755 or tighter.

    A directory that others may write to would let them choose what a HAProxy that root starts is told.

    Raises:
        HostRefused: The file system refused, or something else of that name is there.
        PrivilegeMissing: This process may not make it, or not tighten it.
    """
    try:
        for directory in (*reversed(path.parents), path):
            if not directory.exists():
                directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & _FOREIGN_WRITE:
            path.chmod(mode & ~_FOREIGN_WRITE)
        if not path.is_dir():
            raise NotADirectoryError(20, "Not a directory")
    except OSError as error:
        raise host_refused(
            f"create the directory {path}", error, hint="choose another place with --state-path"
        ) from error
