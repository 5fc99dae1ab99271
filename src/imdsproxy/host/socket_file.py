"""The process that listens on the socket at a path, by sock_diag(7), /proc, and a connection as the last resort.

A process that binds elsewhere and renames, as HAProxy does, is not listed under the path; the kernel lists the socket
file's inode as well. It lists the sockets of one network namespace only, while a path leads to sockets of any: only to
a socket that is not listed a connection is made.
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

from imdsproxy.core.hoststate import SeenSocket, SocketOwner, SocketState
from imdsproxy.errors import HostRefused, host_refused, refusing
from imdsproxy.host.files import Owner, apply_owner_and_mode, opened
from imdsproxy.host.nlmessages import NetlinkSocket, parse_attributes
from imdsproxy.host.process import PROC, command_name, read_arguments
from imdsproxy.host.servers import open_unix_socket
from imdsproxy.host.sockets import SOCK_DIAG, SocketOwners

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
"""What HAProxy appends to a path when it binds; the socket is then renamed, and the kernel keeps the first name."""

FileIdentity: TypeAlias = tuple[int, int, int, int, int]
"""Of a file at a path: device, inode, mode, user, group."""


@dataclass(frozen=True, slots=True)
class _Listening:
    """A listening socket: its own inode, the name it was bound under, its file's inode and device."""

    inode: int
    name: bytes
    file: int
    device: int


class SocketFiles(SocketOwners):
    """Looks at socket files, remembering which processes have which sockets open."""

    def observe(self, path: Path, our_pids: Collection[int]) -> SeenSocket:
        """What is at the path.

        Args:
            path: Where the socket is, or is to be.
            our_pids: HAProxy's master and workers.

        Raises:
            HostRefused: It cannot be looked at.
            PrivilegeMissing: We may not look there.
        """
        listening = _listening()
        pattern = re.compile(re.escape(os.fsencode(path)) + _BEFORE_RENAME)
        bound = {one.inode: one for one in listening if pattern.fullmatch(one.name)}
        with refusing(f"look at {path}"):
            try:
                status = path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                status = None
        # Not the device of those: btrfs shows one in its files and another one in its sockets.
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
            # Its queue is full: a process listens.
            return SeenSocket(SocketState.FOREIGN, orphaned=orphaned)
        except OSError as error:
            raise host_refused(f"find out who listens on {path}", error) from error
        pid = _peer(probe)
    # The process that began to listen may have handed the socket to another worker and ended.
    if pid in our_pids or (orphaned and not (PROC / str(pid)).exists()):
        return SeenSocket(SocketState.OURS)
    owners = (SocketOwner(pid, command_name(pid)),) if pid else ()
    return SeenSocket(SocketState.FOREIGN, owners, orphaned)


def _peer(connected: socket.socket) -> int:
    """The process that began to listen where a socket is connected to (`SO_PEERCRED` in unix(7))."""
    data = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(data)[0]
    return pid


def read_listener(path: Path) -> int | None:
    """The pid of the process that listens at a path; `None` where none does, or its queue is full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError:
            return None
        return _peer(probe)


@dataclass(frozen=True, slots=True)
class SocketHolder:
    """The process that has a listening socket open; `pid` is `None` where none can be seen."""

    pid: int | None = None
    command: tuple[str, ...] = ()


def find_socket_holder(path: Path) -> SocketHolder | None:
    """The process that listens at a path; `None` without one, even if there is a file.

    Raises:
        HostRefused: It cannot be looked at.
        PrivilegeMissing: We may not look there.
    """
    seen = SocketFiles().observe(path, ())
    if seen.state is not SocketState.FOREIGN:
        return None
    if not seen.owners:
        return SocketHolder()
    return SocketHolder(seen.owners[0].pid, read_arguments(seen.owners[0].pid))


def open_sole_socket(path: Path, *, mode: int, owner: Owner) -> socket.socket:
    """`open_unix_socket`, but not in place of the socket of a running process.

    Raises:
        HostRefused: Another process listens there, or it cannot be bound.
        PrivilegeMissing: This process may not do that there.
    """
    state = SocketFiles().observe(path, ()).state
    if state is SocketState.OCCUPIED:
        raise HostRefused(f"{path} is there and is no socket")
    if state is SocketState.FOREIGN:
        hint = "is another controller running? imdsproxy status"
        raise HostRefused(f"another process listens on {path}", hint=hint)
    return open_unix_socket(path, mode=mode, owner=owner)


def give_socket(path: Path, *, mode: int, owner: tuple[int, int]) -> None:
    """Set mode and owner of a socket file.

    Its directory may be another account's, who could put a link to any file in its place meanwhile: both are given
    to the file that was looked at.

    Raises:
        HostRefused: There is no socket, or the file system refuses.
        PrivilegeMissing: We may not do that.
    """
    with (
        refusing(f"give {path} its mode and owner"),
        opened(path, os.O_PATH | os.O_NOFOLLOW) as descriptor,
    ):
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise HostRefused(f"{path} is no socket any more")
        apply_owner_and_mode(descriptor, mode, owner)


def identify_file(path: Path) -> FileIdentity | None:
    """Which file is at a path; `None` where there is none, or it cannot be seen."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mode, status.st_uid, status.st_gid


def remove_file(path: Path, identity: FileIdentity) -> None:
    """Remove exactly this file, and none that was put in its place since it was looked at.

    Args:
        path: Where it was.
        identity: As `identify_file` gave it.

    Raises:
        HostRefused: The file system refuses.
        PrivilegeMissing: We may not do that.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.old")
    with refusing(f"remove {path}"), contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if identify_file(aside) != identity:
            # Another process has bound here meanwhile, and yet another one may have by now.
            with contextlib.suppress(FileExistsError):
                os.link(aside, path, follow_symlinks=False)
        aside.unlink()


def _listening() -> list[_Listening]:
    """Every unix socket with a file that listens in the calling thread's network namespace."""
    show = _SHOW_NAME | _SHOW_FILE
    question = _QUESTION.pack(socket.AF_UNIX, 0, 0, _LISTENING, 0, show, b"\xff" * 8)
    try:
        with NetlinkSocket(SOCK_DIAG) as channel:
            messages = channel.dump(_BY_FAMILY, question)
    except OSError:
        # A kernel without unix_diag: a connection is made then.
        return []
    found: list[_Listening] = []
    for message in messages:
        inode = _ANSWER.unpack_from(message)[4]
        attributes = parse_attributes(message, _ANSWER.size)
        if _VFS in attributes:
            file, device = _FILE.unpack(attributes[_VFS])
            name = attributes.get(_NAME, b"").rstrip(b"\0")
            # The kernel's own number of a device, not the one that stat(2) has.
            major, minor = device >> _MINOR_BITS, device & ((1 << _MINOR_BITS) - 1)
            found.append(_Listening(inode, name, file, os.makedev(major, minor)))
    return found
