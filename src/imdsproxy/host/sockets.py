"""Who listens where guests ask for metadata: sock_diag(7), /proc, and a bind to try.

HAProxy binds with SO_REUSEADDR and SO_REUSEPORT as root. A socket that listens on an address that
covers ours, on the same device or either on none, is in its way unless it too has SO_REUSEPORT and
belongs to root (inet_csk_bind_conflict). No interface of the kernel tells of a foreign socket's
SO_REUSEPORT, so the question is put to the kernel itself: `try_bind` does what HAProxy does,
without listening, and lets go.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from imdsproxy.core.hoststate import Family, ListeningSocket, SocketOwner
from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6, METADATA_PORT, IpAddress
from imdsproxy.host.nlmessages import NetlinkSocket, parse_attributes

__all__ = ["SOCK_DIAG", "SocketOwners", "listening_sockets", "try_bind"]

SOCK_DIAG: Final = 4
"""The netlink protocol whose channel `listening_sockets` needs."""

# Both families in one answer: only the older of the two questions can ask for that.
_TCPDIAG_GETSOCK: Final = 18
_QUESTION: Final = struct.Struct("=BBBB HH16s16sI8s II")
_ANSWER: Final = struct.Struct("=BBBB HH16s16sI8s IIIII")
_V6_ONLY: Final = 11
_LISTEN: Final = 10
_WORTH_SEARCHING: Final = 3

_RELEVANT: Final = frozenset(
    (IPv4Address(0), IPv6Address(0), METADATA_IPV4, METADATA_IPV6),
)


def listening_sockets(
    channel: NetlinkSocket, names: dict[int, str], port: int = METADATA_PORT
) -> list[ListeningSocket]:
    """Every TCP socket that listens on `port` of a metadata address or a wildcard.

    Args:
        channel: Speaks SOCK_DIAG in the namespace in question.
        names: The devices of that namespace by index.
        port: The port.
    """
    sport = socket.htons(port)
    nothing = bytes(16)
    question = _QUESTION.pack(
        0, 0, 0, 0, sport, 0, nothing, nothing, 0, b"\xff" * 8, 1 << _LISTEN, 0
    )
    found: list[ListeningSocket] = []
    for message in channel.dump(_TCPDIAG_GETSOCK, question):
        one = _parse_socket(message.payload, names)
        if one.address in _RELEVANT and one.port == port:
            found.append(one)
    return found


def _parse_socket(payload: bytes, names: dict[int, str]) -> ListeningSocket:
    fields = _ANSWER.unpack_from(payload)
    family, sport, source, index = fields[0], fields[4], fields[6], fields[8]
    uid, inode = fields[13], fields[14]
    address: IpAddress
    if family == socket.AF_INET:
        address = IPv4Address(source[:4])
    else:
        address = IPv6Address(source)
        address = address.ipv4_mapped or address
    only = parse_attributes(payload, _ANSWER.size).get(_V6_ONLY, b"\0")
    return ListeningSocket(
        address=address,
        port=socket.ntohs(sport),
        device=names.get(index, str(index)) if index else None,
        inode=inode,
        uid=uid,
        v6_only=only != b"\0",
    )


def try_bind(family: Family, device: str | None, index: int = 0) -> int:
    """What the kernel says to a bind like HAProxy's in the calling thread's namespace: errno or 0.

    The socket never listens, so no connection can come to it, and it is closed at once.

    Args:
        family: Which metadata address.
        device: The device to bind to, or `None`.
        index: The device's index, the scope of the link-local address; IPv6 only.
    """
    number = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    address = (str(family.metadata_address), METADATA_PORT)
    with socket.socket(number, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as trial:
        try:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if device is not None:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
            if family is Family.IPV6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind((*address, 0, index))
            else:
                trial.bind(address)
        except OSError as error:
            return error.errno or 0
    return 0


class SocketOwners:
    """Finds the processes that hold sockets, remembering what it found.

    A look-up of sockets that were met before costs nothing; our own processes' descriptors are
    read again when they have sockets that are not known yet, and every process's only for foreign
    sockets.

    Args:
        proc: `/proc`, or a directory of a test.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._ours: dict[int, int] = {}
        self._foreign: dict[int, dict[int, str]] = {}
        self._fruitless: dict[int, int] = {}

    def resolve(
        self,
        sockets: Iterable[ListeningSocket],
        our_pids: Collection[int],
        namespace: int | None = None,
    ) -> tuple[ListeningSocket, ...]:
        """The same sockets with their owners.

        Args:
            sockets: As `listening_sockets` gave them.
            our_pids: HAProxy's master and workers; their children count as ours too, so that a
                worker which has just been started is never taken for a stranger.
            namespace: Inode of the namespace they are in; its own processes are looked at first.
        """
        given = list(sockets)
        if not given:
            return ()
        self._ours = {inode: pid for inode, pid in self._ours.items() if pid in our_pids}
        if any(one.inode not in self._ours for one in given):
            self._read_ours(our_pids, {one.inode for one in given})
        unknown = {one.inode for one in given if one.inode not in self._ours}
        if unknown:
            self._find_foreign(unknown, namespace)
        return tuple(self._owned(one, our_pids) for one in given)

    def _owned(self, one: ListeningSocket, our_pids: Collection[int]) -> ListeningSocket:
        pid = self._ours.get(one.inode)
        if pid is not None:
            return replace(one, owners=(SocketOwner(pid, self._command(pid)),), ours=True)
        holders = sorted(self._foreign.get(one.inode, ()))
        ours = any(self._is_ours(pid, our_pids) for pid in holders)
        owners = tuple(SocketOwner(pid, self._command(pid)) for pid in holders)
        return replace(one, owners=owners, ours=ours)

    def _read_ours(self, our_pids: Collection[int], wanted: set[int]) -> None:
        if wanted <= self._ours.keys():
            return
        for pid in our_pids:
            for inode, _ in self._sockets_of(pid):
                self._ours.setdefault(inode, pid)

    def _is_ours(self, pid: int, our_pids: Collection[int]) -> bool:
        if pid in our_pids:
            return True
        return bool(our_pids) and self._parent(pid) in our_pids

    def _find_foreign(self, wanted: set[int], namespace: int | None) -> None:
        missing = {inode for inode in wanted if not self._still_held(inode)}
        missing = {i for i in missing if self._fruitless.get(i, 0) < _WORTH_SEARCHING}
        if not missing:
            return
        found: dict[int, dict[int, str]] = {}
        inside, outside = self._split(namespace)
        for pids in (inside, outside):
            for pid in pids:
                for inode, path in self._sockets_of(pid):
                    if inode in missing:
                        found.setdefault(inode, {})[pid] = path
            if missing <= found.keys():
                break
        self._foreign.update(found)
        for inode in missing - found.keys():
            self._fruitless[inode] = self._fruitless.get(inode, 0) + 1

    def _still_held(self, inode: int) -> bool:
        holders = self._foreign.get(inode)
        if holders is None:
            return False
        link = f"socket:[{inode}]"
        alive = {pid: path for pid, path in holders.items() if _link(path) == link}
        if alive:
            self._foreign[inode] = alive
            return True
        del self._foreign[inode]
        return False

    def _split(self, namespace: int | None) -> tuple[list[int], list[int]]:
        pids = [int(one.name) for one in self._proc.iterdir() if one.name.isdigit()]
        if namespace is None:
            return pids, []
        link = f"net:[{namespace}]"
        inside = [pid for pid in pids if _link(f"{self._proc}/{pid}/ns/net") == link]
        return inside, sorted(set(pids) - set(inside))

    def _sockets_of(self, pid: int) -> Iterator[tuple[int, str]]:
        directory = f"{self._proc}/{pid}/fd"
        # A process that ends while it is looked at holds nothing any more.
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                target = _link(entry.path)
                if target.startswith("socket:["):
                    yield int(target[8:-1]), entry.path

    def _command(self, pid: int) -> str:
        try:
            return (self._proc / str(pid) / "comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            return "?"

    def _parent(self, pid: int) -> int:
        try:
            status = (self._proc / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return 0
        return int(status.rpartition(")")[2].split()[1])


def _link(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - called for every descriptor of a host
    except OSError:
        return ""
