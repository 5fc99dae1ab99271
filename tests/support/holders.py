"""Which processes keep a network namespace alive: those in it, with it open, or with a socket in it.

`lsns` would also count what the mount namespaces of strangers (a container that was started meanwhile) have
copied; and the number of a namespace that is gone is given to the next one that anybody makes.
"""

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_PIDFD_GETFD: Final = 438
_SIOCGSKNS: Final = 0x894C
_libc = ctypes.CDLL(None, use_errno=True)


def holders(inodes: set[int], pids: Iterable[int]) -> list[str]:
    """What of these processes holds any of these namespaces, in words."""
    found: list[str] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found += _held_by(pid, Path(f"/proc/{pid}"), inodes)
    return found


def _held_by(pid: int, entry: Path, inodes: set[int]) -> Iterator[str]:
    who = (entry / "comm").read_text().strip()
    if (entry / "ns" / "net").stat().st_ino in inodes:
        yield f"process {pid} ({who}) is in it"
    sockets: list[int] = []
    for link in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(link.readlink())
            if _inode_of(target) in inodes:
                yield f"process {pid} ({who}) has it open"
            elif target.startswith("socket:"):
                sockets.append(int(link.name))
    if inodes & _namespaces_of_sockets(pid, sockets):
        yield f"process {pid} ({who}) has a socket in it"


def _inode_of(text: str) -> int | None:
    return int(text[5:-1]) if text.startswith("net:[") else None


def _namespaces_of_sockets(pid: int, descriptors: list[int]) -> set[int]:
    found: set[int] = set()
    if not descriptors:
        return found
    handle = os.pidfd_open(pid)
    try:
        for descriptor in descriptors:
            copy = _libc.syscall(_PIDFD_GETFD, handle, descriptor, 0)
            if copy < 0:
                continue
            with contextlib.suppress(OSError):
                namespace = fcntl.ioctl(copy, _SIOCGSKNS)
                found.add(os.fstat(namespace).st_ino)
                os.close(namespace)
            os.close(copy)
    finally:
        os.close(handle)
    return found
