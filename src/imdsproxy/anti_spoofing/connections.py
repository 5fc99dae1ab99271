"""Connections of guests, as sock_diag(7) lists them, and their end."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6, IpAddress
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.sockets import SOCK_DIAG

_BY_FAMILY: Final = 20
_DESTROY: Final = 21
_REQUEST: Final = struct.Struct("=BBBBI")
_ID: Final = struct.Struct("=HH16s16sI8s")
_ID_AT: Final = 4
# SYN_RECV, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING
_ALIVE: Final = sum(1 << state for state in (1, 3, 4, 5, 8, 9, 11))


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
            identity = message.payload[_ID_AT : _ID_AT + _ID.size]
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
