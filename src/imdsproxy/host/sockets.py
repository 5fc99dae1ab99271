"""Listening sockets on the metadata addresses: sock_diag(7), /proc, and a trial bind.

HAProxy binds with SO_REUSEADDR and SO_REUSEPORT as root. Another socket blocks that bind if its address covers ours,
and if both are bound to the same device, or one of them to none. A socket with SO_REUSEPORT that belongs to root does
not block (inet_csk_bind_conflict). No kernel interface shows a foreign socket's SO_REUSEPORT, so `try_bind` asks the
kernel: it binds as HAProxy does, without listening, and closes the socket.
"""

import errno
import socket
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final, TypeAlias

from imdsproxy.errors import Ignoring
from imdsproxy.host import process
from imdsproxy.host.netlink import device_name
from imdsproxy.host.nlmessages import NetlinkSocket, number, parse_attributes
from imdsproxy.host.state import Family, ListeningSocket, SocketOwner
from imdsproxy.model.entities import METADATA_IPV4, METADATA_IPV6, METADATA_PORT, IpAddress

SOCK_DIAG: Final = 4
"""Netlink protocol of the channel for `listening_sockets`."""

L3_PROXY_PORT: Final = 9697
"""Default port of the HAProxies of Neutron's L3 agent (its `metadata_port`)."""

# The older of the two requests, because only that one returns both families in one answer.
_TCPDIAG_GETSOCK: Final = 18
_QUESTION: Final = struct.Struct("=BBBB HH16s16sI8s II")
_ANSWER: Final = struct.Struct("=BBBB HH16s16sI8s IIIII")
_Fields: TypeAlias = tuple[Any, ...]
_OWN_PORT, _OWN_ADDRESS, _INODE = 4, 6, -1
_V6_ONLY: Final = 11
_LISTEN: Final = 10
_SEARCHES: Final = 3

_DESTROY: Final = 21
_REQUEST: Final = struct.Struct("=BBBBI")
_ID: Final = struct.Struct("=HH16s16sI8s")
_ID_AT: Final = 4
# ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING
_ALIVE: Final = (1, 3, 4, 5, 8, 9, 11)

_METADATA: Final = frozenset((METADATA_IPV4, METADATA_IPV6))
_ANSWERED: Final = frozenset(
    packed
    for ipv4, ipv6 in ((METADATA_IPV4, METADATA_IPV6), (IPv4Address(0), IPv6Address(0)))
    for packed in (
        ipv4.packed + bytes(12),
        bytes(10) + b"\xff\xff" + ipv4.packed,
        ipv6.packed,
    )
)
"""Metadata addresses and wildcards as the kernel's answer has them; IPv4 also mapped, of a socket for both families."""


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """TCP socket in a namespace.

    Attributes:
        index: Index of the device to which the socket is bound; 0 for none.
    """

    local: IpAddress
    peer: IpAddress
    port: int
    index: int
    inode: int
    message: bytes


def _dump(
    channel: NetlinkSocket, ports: Collection[int], states: Iterable[int]
) -> Iterator[tuple[int, _Fields, bytes]]:
    wanted_ports = {socket.htons(port): port for port in ports}
    # 0 selects every port.
    sport, nothing = next(iter(wanted_ports)) if len(ports) == 1 else 0, bytes(16)
    wanted = sum(1 << state for state in states)
    question = _QUESTION.pack(0, 0, 0, 0, sport, 0, nothing, nothing, 0, b"\xff" * 8, wanted, 0)
    for message in channel.dump(_TCPDIAG_GETSOCK, question):
        fields = _ANSWER.unpack_from(message)
        if (own := fields[_OWN_PORT]) in wanted_ports:
            yield wanted_ports[own], fields, message


def _tcp_socket(fields: _Fields, message: bytes) -> TcpSocket:
    family, _, _, _, _, dport, source, target, index, *_, inode = fields
    local, remote = _address(family, source), _address(family, target)
    return TcpSocket(local, remote, socket.ntohs(dport), index, inode, message)


def _address(family: int, packed: bytes) -> IpAddress:
    return IPv4Address(packed[:4]) if family == socket.AF_INET else IPv6Address(packed)


def listening_sockets(
    channel: NetlinkSocket, ports: Collection[int] = (METADATA_PORT,)
) -> list[ListeningSocket]:
    """Return every TCP socket that listens on one of these ports of a metadata address or a wildcard."""
    found: list[ListeningSocket] = []
    for port, fields, message in _dump(channel, ports, (_LISTEN,)):
        if fields[_OWN_ADDRESS] in _ANSWERED:
            one = _tcp_socket(fields, message)
            address = one.local
            if isinstance(address, IPv6Address):
                address = address.ipv4_mapped or address
            device = (device_name(one.index) or str(one.index)) if one.index else None
            only = bool(number(parse_attributes(message, _ANSWER.size).get(_V6_ONLY)))
            found.append(ListeningSocket(address, port, device, one.inode, v6_only=only))
    return found


def listening_inodes(channel: NetlinkSocket, ports: Collection[int]) -> frozenset[int]:
    """Return the inodes of `listening_sockets` in a third of their time."""
    return frozenset(
        fields[_INODE]
        for _, fields, _ in _dump(channel, ports, (_LISTEN,))
        if fields[_OWN_ADDRESS] in _ANSWERED
    )


def list_connections(channel: NetlinkSocket, port: int) -> Iterator[TcpSocket]:
    """Return the connections to a metadata address and port, in the namespace of the channel."""
    found = (_tcp_socket(fields, message) for _, fields, message in _dump(channel, (port,), _ALIVE))
    return (one for one in found if one.local in _METADATA)


def end_connections(port: int, peers: Collection[IpAddress]) -> None:
    """Abort connections between these guests and our port in the calling thread's namespace, with all unsent data.

    Raises `NetlinkRefused` if the kernel cannot list or abort connections (CONFIG_INET_DIAG_DESTROY).
    """
    with NetlinkSocket(SOCK_DIAG) as channel:
        for one in list_connections(channel, port):
            if one.peer in peers:
                request = _REQUEST.pack(one.message[0], socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
                with Ignoring(errno.ENOENT):  # the connection has ended by itself
                    channel.change(_DESTROY, request + one.message[_ID_AT : _ID_AT + _ID.size])


def try_bind(
    family: Family,
    device: str | None,
    index: int = 0,
    port: int = METADATA_PORT,
    address: IpAddress | None = None,
) -> int:
    """Try a bind like HAProxy's in the calling thread's namespace; return errno or 0.

    The socket never listens, so it gets no connections, and it is closed at once. The index of the device is the scope
    of the link-local address, for IPv6 only.
    """
    number = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    place = (str(address or family.metadata_address), port)
    try:
        trial = socket.socket(number, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:  # a kernel without IPv6
        return error.errno or 0
    with trial:
        try:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if device is not None:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
            if family is Family.IPV6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind((*place, 0, index))
            else:
                trial.bind(place)
        except OSError as error:
            return error.errno or 0
    return 0


class SocketOwners:
    """Finder of the processes that hold sockets, with a cache.

    The finder reads our own processes' descriptors again if a socket is unknown, and every process's only for foreign
    sockets. A process with HAProxy's configuration, `config`, in its command line is ours too: after a restart HAProxy
    listens before its pids are known.
    """

    def __init__(self, proc: Path = process.PROC, config: Path | None = None) -> None:
        self._proc = proc
        self._config = None if config is None else str(config)
        self._ours: dict[int, int] = {}
        self._foreign: dict[int, dict[int, str]] = {}
        self._searches: Counter[int] = Counter()

    def resolve(
        self, sockets: Iterable[ListeningSocket], our_pids: Collection[int]
    ) -> dict[int, ListeningSocket]:
        """Return the sockets with their owners, by inode; one call for many namespaces is much cheaper than many calls.

        Our pids are HAProxy's master and workers. Their children count as ours too, so that a new worker is never
        mistaken for a foreign process.
        """
        given = {one.inode: one for one in sockets}
        holders = self.holders(given, our_pids)
        pids = {pid for some in holders.values() for pid in some}
        owners = {pid: SocketOwner(pid, process.command_name(pid, self._proc)) for pid in pids}
        ours = {pid for pid in pids if self._is_ours(pid, our_pids)}
        for inode, by in holders.items():
            known = tuple(owners[pid] for pid in by)
            given[inode] = replace(given[inode], owners=known, ours=not ours.isdisjoint(by))
        return given

    def holders(
        self, inodes: Collection[int], our_pids: Collection[int]
    ) -> dict[int, tuple[int, ...]]:
        """Return the visible processes that hold each socket; for our sockets, one process."""
        foreign = set(inodes) - self.find_ours(inodes, our_pids)
        # Keep the other entries while their sockets are held, because callers check the networks in turn.
        held = {inode: self._still_held(inode) for inode in {*self._foreign, *foreign}}
        self._foreign = {one: by for one, by in held.items() if by or one in foreign}
        missing = {
            one for one in foreign if not self._foreign[one] and self._searches[one] < _SEARCHES
        }
        for pid in [int(one.name) for one in self._proc.glob("[0-9]*")] if missing else ():
            for inode, path in process.open_sockets(pid, self._proc):
                if inode in missing:
                    self._foreign[inode][pid] = path
        self._searches.update(one for one in missing if not self._foreign[one])
        return {
            one: tuple(sorted(self._foreign[one])) if one in foreign else (self._ours[one],)
            for one in inodes
        }

    def find_ours(self, inodes: Collection[int], our_pids: Collection[int]) -> frozenset[int]:
        self._ours = {inode: pid for inode, pid in self._ours.items() if pid in our_pids}
        for pid in our_pids if not self._ours.keys() >= set(inodes) else ():
            self._ours.update({one: pid for one, _ in process.open_sockets(pid, self._proc)})
        return frozenset(inodes) & self._ours.keys()

    def _still_held(self, inode: int) -> dict[int, str]:
        held = self._foreign.get(inode, {})
        return {pid: path for pid, path in held.items() if process.socket_at(path) == inode}

    def _is_ours(self, pid: int, our_pids: Collection[int]) -> bool:
        if pid in our_pids:
            return True
        stat = process.read_stat(pid, self._proc) if our_pids else None
        if stat is not None and stat.parent in our_pids:
            return True
        return self._config is not None and self._config in process.read_arguments(pid, self._proc)
