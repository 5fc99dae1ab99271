"""Look-up of the process that listens at a socket's path, by sock_diag(7), /proc and, as a last resort, a connection.

The kernel does not list a socket under its path if the process binds elsewhere and renames, as HAProxy does; but it
also lists the socket file's inode. It lists the sockets of one network namespace only, while a path may lead to a
socket of any: only for sockets that are not listed, this module connects.
"""

import contextlib
import os
import re
import socket
import stat
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.errors import HostRefused, host_refused, refusing
from imdsproxy.host.files import Owner, apply_owner_and_mode, opened
from imdsproxy.host.nlmessages import NetlinkSocket, parse_attributes
from imdsproxy.host.process import PROC, command_name, read_arguments
from imdsproxy.host.servers import open_unix_socket
from imdsproxy.host.sockets import SOCK_DIAG, SocketOwners
from imdsproxy.host.state import SeenSocket, SocketOwner, SocketState

_BY_FAMILY: Final = 20
_QUESTION: Final = struct.Struct("=BBHIII8s")
_ANSWER: Final = struct.Struct("=BBBBI8s")
_FILE: Final = struct.Struct("=II")
_LISTENING: Final = 1 << 10
_SHOW_NAME, _SHOW_FILE = 0x1, 0x2
_NAME, _VFS = 0, 1
_CREDENTIALS: Final = struct.Struct("=iII")
_PATIENCE_S: Final = 1.0
_MINOR_BITS: Final = 20

_BEFORE_RENAME: Final = rb"(\.[0-9]+\.tmp)?"
"""Suffix that HAProxy appends to a path when it binds; HAProxy then renames the socket, and the kernel keeps the first
name."""

FileIdentity: TypeAlias = tuple[int, int, int, int, int]
"""Device, inode, mode, user and group of a file."""


@dataclass(frozen=True, slots=True)
class _Listening:
    inode: int
    name: bytes
    file: int
    device: int


class SocketFiles(SocketOwners):
    """Observer of socket files; caches which processes hold which sockets."""

    def observe(self, path: Path, our_pids: Collection[int]) -> SeenSocket:
        """Return the state of the socket at a path; raise `HostRefused` if the path cannot be examined."""
        listening = _listening()
        pattern = re.compile(re.escape(os.fsencode(path)) + _BEFORE_RENAME)
        bound = {one.inode: one for one in listening if pattern.fullmatch(one.name)}
        with refusing(f"look at {path}"):
            try:
                status = path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                status = None
        # Do not compare devices here: btrfs shows different devices for files and for sockets.
        here = [one for one in bound.values() if status and one.file == status.st_ino]
        file = (status.st_ino, status.st_dev) if status else None
        there = [one for one in listening if (one.file, one.device) == file]
        reached = [one.inode for one in there or here]
        holders = self.holders({*bound, *reached}, our_pids)
        held = [one for one in bound.values() if not {*our_pids}.isdisjoint(holders[one.inode])]
        orphaned = bool(held)
        if status is None:
            return SeenSocket(SocketState.MISSING, orphaned=orphaned)
        if not stat.S_ISSOCK(status.st_mode):
            return SeenSocket(SocketState.OCCUPIED, orphaned=orphaned)
        if any(one in here for one in held):
            return SeenSocket(SocketState.OURS)
        if not reached:
            return _ask(path, our_pids, orphaned=orphaned)
        owners = tuple(SocketOwner(pid, command_name(pid)) for pid in holders[reached[0]])
        return SeenSocket(SocketState.FOREIGN, owners, orphaned)


def _ask(path: Path, our_pids: Collection[int], *, orphaned: bool) -> SeenSocket:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(_PATIENCE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return SeenSocket(SocketState.STALE, orphaned=orphaned)
        except (TimeoutError, BlockingIOError):
            # The socket's queue is full, so a process listens.
            return SeenSocket(SocketState.FOREIGN, orphaned=orphaned)
        except OSError as error:
            raise host_refused(f"find the process that listens on {path}", error) from error
        pid = _peer(probe)
    # The process that began to listen may have passed the socket to another worker and ended.
    if pid in our_pids or (orphaned and not (PROC / str(pid)).exists()):
        return SeenSocket(SocketState.OURS)
    owners = (SocketOwner(pid, command_name(pid)),) if pid else ()
    return SeenSocket(SocketState.FOREIGN, owners, orphaned)


def _peer(connected: socket.socket) -> int:
    """Return the process that began to listen on the socket's peer (`SO_PEERCRED` in unix(7))."""
    data = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(data)[0]
    return pid


def read_listener(path: Path) -> int | None:
    """Return the pid of the process that listens at a path; `None` if there is none, or its queue is full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError:
            return None
        return _peer(probe)


@dataclass(frozen=True, slots=True)
class SocketHolder:
    """Process that holds a listening socket; `pid` is `None` if no process is visible."""

    pid: int | None = None
    command: tuple[str, ...] = ()


def find_socket_holder(path: Path) -> SocketHolder | None:
    """Return the process that listens at a path; `None` without one, even if there is a file."""
    seen = SocketFiles().observe(path, ())
    if seen.state is not SocketState.FOREIGN:
        return None
    if not seen.owners:
        return SocketHolder()
    return SocketHolder(seen.owners[0].pid, read_arguments(seen.owners[0].pid))


def open_sole_socket(path: Path, *, mode: int, owner: Owner) -> socket.socket:
    """Open a socket as `open_unix_socket`, but raise `HostRefused` if a running process listens there."""
    state = SocketFiles().observe(path, ()).state
    if state is SocketState.OCCUPIED:
        raise HostRefused(f"{path} exists and is not a socket")
    if state is SocketState.FOREIGN:
        hint = "is another controller running? imdsproxy status"
        raise HostRefused(f"another process listens on {path}", hint=hint)
    return open_unix_socket(path, mode=mode, owner=owner)


def give_socket(path: Path, *, mode: int, owner: tuple[int, int]) -> None:
    """Set mode and owner of a socket file; raise `HostRefused` if there is no socket, or the file system refuses.

    If another account owns the directory, it could replace the socket by a link to any file meanwhile. So mode and
    owner are set on the file that was checked.
    """
    with (
        refusing(f"give {path} its mode and owner"),
        opened(path, os.O_PATH | os.O_NOFOLLOW) as descriptor,
    ):
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise HostRefused(f"{path} is no longer a socket")
        apply_owner_and_mode(descriptor, mode, owner)


def identify_file(path: Path) -> FileIdentity | None:
    """Return the identity of the file at a path; `None` if there is none, or it is not visible."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mode, status.st_uid, status.st_gid


def remove_file(path: Path, identity: FileIdentity) -> None:
    """Remove exactly this file, and no other that has replaced it meanwhile."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.old")
    with refusing(f"remove {path}"), contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if identify_file(aside) != identity:
            # Another process has bound here meanwhile: restore its socket, unless a third process has bound by now.
            with contextlib.suppress(FileExistsError):
                os.link(aside, path, follow_symlinks=False)
        aside.unlink()


def _listening() -> list[_Listening]:
    """Return every listening unix socket with a file, in the calling thread's network namespace."""
    show = _SHOW_NAME | _SHOW_FILE
    question = _QUESTION.pack(socket.AF_UNIX, 0, 0, _LISTENING, 0, show, b"\xff" * 8)
    try:
        with NetlinkSocket(SOCK_DIAG) as channel:
            messages = channel.dump(_BY_FAMILY, question)
    except OSError:
        # The kernel lacks unix_diag; the caller then connects.
        return []
    found: list[_Listening] = []
    for message in messages:
        inode = _ANSWER.unpack_from(message)[4]
        attributes = parse_attributes(message, _ANSWER.size)
        if _VFS in attributes:
            file, device = _FILE.unpack(attributes[_VFS])
            name = attributes.get(_NAME, b"").rstrip(b"\0")
            # The kernel packs device numbers in another way than stat(2).
            major, minor = device >> _MINOR_BITS, device & ((1 << _MINOR_BITS) - 1)
            found.append(_Listening(inode, name, file, os.makedev(major, minor)))
    return found
