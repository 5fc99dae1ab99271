"""Listening sockets on the metadata addresses: sock_diag(7), /proc, and a trial bind.

HAProxy binds with SO_REUSEADDR and SO_REUSEPORT as root. A socket that listens on an address that
covers ours, on the same device or either on none, is in its way unless it too has SO_REUSEPORT and
belongs to root (inet_csk_bind_conflict). No interface of the kernel shows a foreign socket's
SO_REUSEPORT, so the question is put to the kernel itself: `try_bind` does what HAProxy does,
without listening, and lets go.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from imdsproxy.core.hoststate import Family, ListeningSocket, SocketOwner
from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6, METADATA_PORT, IpAddress
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket, parse_attributes
from imdsproxy.host.process import command_name, open_sockets, read_arguments, read_stat

SOCK_DIAG: Final = 4
"""The netlink protocol whose channel `listening_sockets` needs."""

# Both families in one answer: only the older of the two questions can ask for that.
_TCPDIAG_GETSOCK: Final = 18
_QUESTION: Final = struct.Struct("=BBBB HH16s16sI8s II")
_ANSWER: Final = struct.Struct("=BBBB HH16s16sI8s IIIII")
_V6_ONLY: Final = 11
_LISTEN: Final = 10
_WORTH_SEARCHING: Final = 3

_BY_FAMILY: Final = 20
_DESTROY: Final = 21
_REQUEST: Final = struct.Struct("=BBBBI")
_ID: Final = struct.Struct("=HH16s16sI8s")
_ID_AT: Final = 4
# SYN_RECV, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING
_ALIVE: Final = sum(1 << state for state in (1, 3, 4, 5, 8, 9, 11))

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
        one = _parse_socket(message, names)
        if one.address in _RELEVANT and one.port == port:
            found.append(one)
    return found


def _parse_socket(payload: bytes, names: dict[int, str]) -> ListeningSocket:
    fields = _ANSWER.unpack_from(payload)
    family, sport, source, index = fields[0], fields[4], fields[6], fields[8]
    inode = fields[14]
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
        v6_only=only != b"\0",
    )


def try_bind(family: Family, device: str | None, index: int = 0, port: int = METADATA_PORT) -> int:
    """Try a bind like HAProxy's in the calling thread's namespace: errno or 0.

    The socket never listens, so no connection can come to it, and it is closed at once.

    Args:
        family: Which metadata address.
        device: The device to bind to, or `None`.
        index: The device's index, the scope of the link-local address; IPv6 only.
        port: The port.
    """
    number = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    address = (str(family.metadata_address), port)
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
        config: HAProxy's configuration: whose command line names it is ours too. A HAProxy that has just been
            started again listens before its pids are known.
    """

    def __init__(self, proc: Path = Path("/proc"), config: Path | None = None) -> None:
        self._proc = proc
        self._config = None if config is None else str(config)
        self._ours: dict[int, int] = {}
        self._foreign: dict[int, dict[int, str]] = {}
        self._fruitless: dict[int, int] = {}

    def resolve(
        self,
        sockets: Iterable[ListeningSocket],
        our_pids: Collection[int],
        namespaces: Collection[int] = (),
    ) -> dict[int, ListeningSocket]:
        """The same sockets with their owners, by inode.

        Args:
            sockets: As `listening_sockets` gave them; one call for those of many namespaces is much
                cheaper than many calls.
            our_pids: HAProxy's master and workers; their children count as ours too, so that a
                worker which has just been started is never taken for a stranger.
            namespaces: Inodes of the namespaces they are in; whose processes are looked at first.
        """
        given = {one.inode: one for one in sockets}
        if not given:
            return {}
        self._ours = {inode: pid for inode, pid in self._ours.items() if pid in our_pids}
        self._read_ours(our_pids, set(given))
        unknown = given.keys() - self._ours.keys()
        if unknown:
            self._find_foreign(unknown, namespaces)
        commands: dict[int, str] = {}
        return {inode: self._owned(one, our_pids, commands) for inode, one in given.items()}

    def _owned(
        self, one: ListeningSocket, our_pids: Collection[int], commands: dict[int, str]
    ) -> ListeningSocket:
        pid = self._ours.get(one.inode)
        holders = sorted(self._foreign.get(one.inode, ())) if pid is None else [pid]
        owners: list[SocketOwner] = []
        for holder in holders:
            if holder not in commands:
                commands[holder] = command_name(holder, self._proc)
            owners.append(SocketOwner(holder, commands[holder]))
        ours = pid is not None or any(self._is_ours(holder, our_pids) for holder in holders)
        return replace(one, owners=tuple(owners), ours=ours)

    def _read_ours(self, our_pids: Collection[int], wanted: set[int]) -> None:
        if wanted <= self._ours.keys():
            return
        for pid in our_pids:
            for inode, _ in open_sockets(pid, self._proc):
                self._ours.setdefault(inode, pid)

    def _is_ours(self, pid: int, our_pids: Collection[int]) -> bool:
        if pid in our_pids:
            return True
        stat = read_stat(pid, self._proc) if our_pids else None
        if stat is not None and stat.parent in our_pids:
            return True
        return self._config is not None and self._config in read_arguments(pid, self._proc)

    def _find_foreign(self, wanted: Collection[int], namespaces: Collection[int]) -> None:
        missing = {inode for inode in wanted if not self._still_held(inode)}
        missing = {i for i in missing if self._fruitless.get(i, 0) < _WORTH_SEARCHING}
        if not missing:
            return
        found: dict[int, dict[int, str]] = {}
        inside, outside = self._split(namespaces)
        for pids in (inside, outside):
            for pid in pids:
                for inode, path in open_sockets(pid, self._proc):
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

    def _split(self, namespaces: Collection[int]) -> tuple[list[int], list[int]]:
        pids = [int(one.name) for one in self._proc.iterdir() if one.name.isdigit()]
        links = {f"net:[{namespace}]" for namespace in namespaces}
        inside = [pid for pid in pids if _link(f"{self._proc}/{pid}/ns/net") in links]
        return inside, sorted(set(pids) - set(inside))


def _link(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - called for every descriptor of a host
    except OSError:
        return ""


def try_tcp_listen(host: str, port: int) -> str | None:
    """Why an address of the host cannot be listened on now; `None` when it can.

    Without SO_REUSEPORT: a port that another process would share is not free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
            trial.listen(1)
        except OSError as error:
            return f"{host} port {port}: {error.strerror}"
    return None


@dataclass(frozen=True, slots=True)
class Established:
    """A connection of a guest, by its peer; `identity` is the kernel's word for the socket."""

    address: IpAddress
    port: int
    identity: bytes


def list_connections(channel: NetlinkSocket, port: int) -> Iterator[Established]:
    """Connections to a metadata address and port, in the namespace of the channel.

    Args:
        channel: Speaks SOCK_DIAG.
        port: Ours.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        wanted = _ID.pack(socket.htons(port), 0, bytes(16), bytes(16), 0, b"\xff" * 8)
        question = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALIVE) + wanted
        for message in channel.dump(_BY_FAMILY, question):
            identity = message[_ID_AT : _ID_AT + _ID.size]
            _, dport, source, target, _, _ = _ID.unpack(identity)
            ours: IpAddress
            peer: IpAddress
            if family == socket.AF_INET:
                ours, peer = IPv4Address(source[:4]), IPv4Address(target[:4])
            else:
                ours, peer = IPv6Address(source), IPv6Address(target)
            if ours in (METADATA_IPV4, METADATA_IPV6):
                yield Established(peer, socket.ntohs(dport), identity)


def end_connections(port: int, peers: Collection[IpAddress]) -> int:
    """End what is open between some guests and a port of ours, with all that is still to be sent; how many.

    In the namespace of the calling thread.

    Raises:
        NetlinkRefused: The kernel lists or ends no connections (CONFIG_INET_DIAG_DESTROY).
    """
    ended = 0
    with NetlinkSocket(SOCK_DIAG) as channel:
        for one in [one for one in list_connections(channel, port) if one.address in peers]:
            family = socket.AF_INET if isinstance(one.address, IPv4Address) else socket.AF_INET6
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALIVE) + one.identity
            try:
                channel.change(_DESTROY, request)
            except NetlinkRefused as error:
                if error.errno != errno.ENOENT:  # it has ended by itself
                    raise
            ended += 1
    return ended
