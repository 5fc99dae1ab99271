"""The process that listens on the socket at a path, by sock_diag(7), /proc, and a connection as the last resort.

A process that binds elsewhere and renames, as HAProxy does, is not listed under the path; the kernel lists the socket
file's inode as well. It lists the sockets of one network namespace only, while a path leads to sockets of any: only to
a socket that is not listed a connection is made.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.core.hoststate import SeenSocket, SocketOwner, SocketState
from imdsproxy.errors import HostRefused
from imdsproxy.host.files import apply_owner_and_mode
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket, parse_attributes
from imdsproxy.host.process import command_name, open_sockets, read_arguments, socket_holders
from imdsproxy.host.refusal import host_refused
from imdsproxy.host.sockets import SOCK_DIAG

_BY_FAMILY: Final = 20
_QUESTION: Final = struct.Struct("=BBHIII8s")
_ANSWER: Final = struct.Struct("=BBBBI8s")
_FILE: Final = struct.Struct("=II")
_LISTENING: Final = 1 << 10
_SHOW_NAME: Final = 0x1
_SHOW_FILE: Final = 0x2
_NAME: Final = 0
_VFS: Final = 1
_CREDENTIALS: Final = struct.Struct("=iII")
_PATIENCE_S: Final = 1.0
_MINOR_BITS: Final = 20
_ACCEPTS: Final = 0x10000
"""`__SO_ACCEPTCON` in the flags of `/proc/net/unix` (proc_net(5))."""

_BEFORE_RENAME: Final = re.compile(r"\.[0-9]+\.tmp")
"""What HAProxy appends to a path when it binds; the socket is then renamed, and the kernel keeps the first name."""


@dataclass(frozen=True, slots=True)
class _Listening:
    """A listening socket: its own inode, the name it was bound under, its file's inode and device."""

    inode: int
    name: bytes
    file: int
    device: int


class SocketFiles:
    """Looks at socket files, remembering which sockets are our own processes'.

    Args:
        proc: Where the kernel shows processes.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._ours: dict[int, int] = {}

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
        held = self._held(path, listening, our_pids)
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return SeenSocket(SocketState.MISSING, orphaned=bool(held))
        except OSError as error:
            raise host_refused(f"look at {path}", error) from error
        if not stat.S_ISSOCK(status.st_mode):
            return SeenSocket(SocketState.OCCUPIED, orphaned=bool(held))
        # Not the device: btrfs shows one in its files and another one in its sockets.
        if any(one.file == status.st_ino for one in held):
            return SeenSocket(SocketState.OURS)
        for one in listening:
            if (one.file, one.device) == (status.st_ino, status.st_dev):
                owners = tuple(self._owners(one.inode))
                return SeenSocket(SocketState.FOREIGN, owners, orphaned=bool(held))
        return self._ask(path, our_pids, held=bool(held))

    def _held(
        self, path: Path, listening: Iterable[_Listening], our_pids: Collection[int]
    ) -> list[_Listening]:
        named = _bound_under(path, listening)
        self._ours = {inode: pid for inode, pid in self._ours.items() if pid in our_pids}
        if any(one.inode not in self._ours for one in named):
            for pid in our_pids:
                self._ours.update({inode: pid for inode, _ in open_sockets(pid, self._proc)})
        return [one for one in named if one.inode in self._ours]

    def _ask(self, path: Path, our_pids: Collection[int], *, held: bool) -> SeenSocket:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.settimeout(_PATIENCE_S)
            try:
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                return SeenSocket(SocketState.STALE, orphaned=held)
            except (TimeoutError, BlockingIOError):
                # Its queue is full: a process listens.
                return SeenSocket(SocketState.FOREIGN, orphaned=held)
            except OSError as error:
                raise host_refused(f"find out who listens on {path}", error) from error
            data = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid = _CREDENTIALS.unpack(data)[0]
        # The process that began to listen may have handed the socket to another worker and ended.
        if pid in our_pids or (held and not (self._proc / str(pid)).exists()):
            return SeenSocket(SocketState.OURS)
        owners = (SocketOwner(pid, command_name(pid, self._proc)),) if pid else ()
        return SeenSocket(SocketState.FOREIGN, owners, orphaned=held)

    def _owners(self, inode: int) -> Iterator[SocketOwner]:
        for pid in socket_holders({inode}, self._proc):
            yield SocketOwner(pid, command_name(pid, self._proc))


def give_socket(path: Path, *, mode: int, owner: tuple[int, int]) -> None:
    """Set mode and owner of a socket file.

    Its directory may be another account's, who could put a link to any file in its place meanwhile: both are given
    to the file that was looked at.

    Raises:
        HostRefused: There is no socket, or the file system refuses.
        PrivilegeMissing: We may not do that.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                raise HostRefused(f"{path} is no socket any more")
            apply_owner_and_mode(descriptor, mode, owner)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise host_refused(f"give {path} its mode and owner", error) from error


def identify_file(path: Path) -> tuple[int, int] | None:
    """Which file is at a path, `(device, inode)`; `None` where there is none, or it cannot be seen."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def remove_file(path: Path, identity: tuple[int, int]) -> None:
    """Remove exactly this file, and none that was put in its place since it was looked at.

    Args:
        path: Where it was.
        identity: As `identify_file` gave it.

    Raises:
        HostRefused: The file system refuses.
        PrivilegeMissing: We may not do that.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.old")
    try:
        path.rename(aside)
        if identify_file(aside) != identity:
            # Another process has bound here meanwhile, and yet another one may have by now.
            with contextlib.suppress(FileExistsError):
                os.link(aside, path, follow_symlinks=False)
        aside.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise host_refused(f"remove {path}", error) from error


def _bound_under(path: Path, listening: Iterable[_Listening]) -> list[_Listening]:
    """Those that were bound under this path, or beside it to be renamed."""
    name = os.fsencode(path)
    return [one for one in listening if one.name == name or one.name.startswith(name + b".")]


def _listening() -> list[_Listening]:
    """Every unix socket with a file that listens in the calling thread's network namespace."""
    question = _QUESTION.pack(
        socket.AF_UNIX, 0, 0, _LISTENING, 0, _SHOW_NAME | _SHOW_FILE, b"\xff" * 8
    )
    try:
        with NetlinkSocket(SOCK_DIAG) as channel:
            messages = channel.dump(_BY_FAMILY, question)
    except (NetlinkRefused, OSError):
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


@dataclass(frozen=True, slots=True)
class SocketHolder:
    """The process that has a listening socket open; `pid` is `None` where none can be seen."""

    pid: int | None = None
    command: tuple[str, ...] = ()


def find_socket_holder(path: Path, proc: Path = Path("/proc")) -> SocketHolder | None:
    """The process that listens at a path, found without connecting; `None` without one, even if there is a file.

    Args:
        path: The socket's absolute path, as it was bound.
        proc: Where the kernel shows processes.
    """
    listening = list(_bound_at(path, proc))
    if not listening:
        return None
    inodes = {inode for inode, _ in listening}
    if len(inodes) > 1:
        # A HAProxy or an agent whose socket was replaced still listens, and cannot be reached. Where the kernel does
        # not say which socket is reached, it is the one that was bound by the path's own name.
        exact = {inode for inode, same in listening if same}
        # Not by its device: btrfs shows one in its files and another one in its sockets.
        file = identify_file(path)
        bound = _bound_under(path, _listening()) if file is not None else []
        reached = {one.inode for one in bound if file is not None and one.file == file[1]}
        inodes = inodes & reached or exact or inodes
    for pid in socket_holders(inodes, proc):
        return SocketHolder(pid, read_arguments(pid, proc))
    return SocketHolder()


def _bound_at(path: Path, proc: Path) -> Iterator[tuple[int, bool]]:
    """Inodes of the sockets that listen there, and whether each was bound under exactly this name."""
    try:
        lines = (proc / "net" / "unix").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines[1:]:
        # Num RefCount Protocol Flags Type St Inode Path
        fields = line.split(maxsplit=7)
        if len(fields) < 8 or not int(fields[3], 16) & _ACCEPTS:  # noqa: PLR2004 - as above
            continue
        rest = fields[7].removeprefix(str(path))
        exact = fields[7] == str(path)
        if exact or (rest != fields[7] and _BEFORE_RENAME.fullmatch(rest)):
            yield int(fields[6]), exact
