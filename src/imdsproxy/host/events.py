"""Events of the kernel: devices, addresses, neighbours and removed tables, as asynchronous iterators.

One netlink socket receives events of all namespaces that have an id in ours (NETLINK_LISTEN_ALL_NSID). `HostWatch`
gives an id to each namespace in which HAProxy listens.
"""

import contextlib
import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, Generic, Self, TypeVar

from imdsproxy.errors import host_refused, refusing
from imdsproxy.host import netlink
from imdsproxy.host.nftables import DELTABLE, NETFILTER, table_of
from imdsproxy.host.nlmessages import SOL_NETLINK, iter_messages
from imdsproxy.host.process import readable
from imdsproxy.model.entities import IpAddress, MacAddress

_LINKS: Final = (1, 5, 9)
"""RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR."""

_LISTEN_ALL_NSID: Final = 8
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 4 * 1024 * 1024
_RECEIVE_BYTES: Final = 32 * 1024
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4)
_ADDRESS_BYTES: Final = frozenset({4, 16})
_AT_ONCE: Final = 256
"""Datagrams read before other tasks run: a guest can cause many events."""

T = TypeVar("T")


@dataclass(eq=False)
class KernelEvents(Generic[T]):
    """Messages of multicast groups, as an asynchronous iterator without an end. A context manager.

    After lost messages the item is `None`: everything may have changed.

    Attributes:
        protocol: `socket.NETLINK_ROUTE` or NETLINK_NETFILTER.
        parse: Parser of the items in a message; its arguments are type, payload and namespace id (`None` for our own).
        hears_all: Whether events of other namespaces arrive too (requires CAP_NET_BROADCAST).
    """

    protocol: int
    groups: Iterable[int]
    about: str
    parse: Callable[[int, bytes, int | None], Iterable[T]]
    hears_all: bool = field(default=False, init=False)

    def __enter__(self) -> Self:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with refusing(f"watch {self.about}"):
            self._socket = socket.socket(socket.AF_NETLINK, flags, self.protocol)
            with contextlib.suppress(PermissionError):  # overflows are reported
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(SOL_NETLINK, _LISTEN_ALL_NSID, 1)
                self.hears_all = True
            self._socket.bind((0, sum(1 << (group - 1) for group in self.groups)))
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    async def __aiter__(self) -> AsyncIterator[T | None]:
        while True:
            await readable(self._socket.fileno())
            for _ in range(_AT_ONCE):
                try:
                    data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE_BYTES, _ANCILLARY_BYTES)
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise host_refused(f"receive events of {self.about}", error) from error
                    yield None
                    continue
                nsid = _nsid_of(ancillary)
                for kind, _, _, payload in iter_messages(data):
                    for item in self.parse(kind, payload, nsid):
                        yield item


def _nsid_of(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, value in ancillary:
        if (level, kind) == (SOL_NETLINK, _LISTEN_ALL_NSID):
            (nsid,) = struct.unpack("=i", value[:4])
            return int(nsid) if nsid >= 0 else None
    return None


@dataclass(frozen=True, slots=True)
class LinkChange:
    """Change of a device or an address.

    Attributes:
        nsid: Id of the namespace; `None` for the host's own.
        device: Name of the device; empty if it is gone or unknown.
        master: Index of the device's bridge; 0 for none, and `None` if the message does not tell.
        gone: Whether the device is gone, or has left its bridge.
        is_other: Whether the change is of another address than the metadata addresses.
    """

    nsid: int | None
    device: str
    master: int | None = None
    index: int = 0
    gone: bool = False
    is_other: bool = False


def watch_links() -> KernelEvents[LinkChange]:
    """Return the events of devices and addresses; in the host's own namespace only of metadata addresses."""

    def parse(kind: int, payload: bytes, nsid: int | None) -> Iterator[LinkChange]:
        if kind in (netlink.RTM_NEWLINK, netlink.RTM_DELLINK):
            link = netlink.parse_link(payload)
            # The kernel reports a port that leaves its bridge as deleted, with family AF_BRIDGE.
            gone = kind == netlink.RTM_DELLINK
            master = 0 if gone else link.master
            yield LinkChange(nsid, link.name, master=master, index=link.index, gone=gone)
        elif kind in (netlink.RTM_NEWADDR, netlink.RTM_DELADDR):
            found = netlink.parse_address(payload, {})
            if nsid is not None:
                yield LinkChange(nsid, "", is_other=found is None)
            elif found is not None:
                yield LinkChange(None, netlink.device_name(int(found.device)))

    return KernelEvents(socket.NETLINK_ROUTE, _LINKS, "the host's devices", parse)


@dataclass(frozen=True, slots=True)
class NeighbourChange:
    """Change of an address's MAC.

    Attributes:
        nsid: Id of the namespace; `None` for the host's own.
        mac: New MAC; `None` if no neighbour answers now.
    """

    nsid: int | None
    index: int
    address: IpAddress
    mac: MacAddress | None


def watch_neighbours(wanted: Callable[[NeighbourChange], bool]) -> KernelEvents[NeighbourChange]:
    """Return the wanted changes of neighbour tables; a guest can cause any number of others."""

    def parse(kind: int, payload: bytes, nsid: int | None) -> Iterator[NeighbourChange]:
        found = netlink.parse_neighbour(payload)
        if len(found.packed) not in _ADDRESS_BYTES:
            return
        mac = found.mac if kind == netlink.RTM_NEWNEIGH else None
        change = NeighbourChange(nsid, found.index, ip_address(found.packed), mac)
        if wanted(change):
            yield change

    return KernelEvents(socket.NETLINK_ROUTE, (3,), "the neighbour tables", parse)


def watch_tables(wanted: Callable[[], Collection[str]]) -> KernelEvents[str]:
    def parse(kind: int, payload: bytes, _: int | None) -> Iterator[str]:
        if kind == DELTABLE and (table := table_of(payload)) in wanted():
            yield table

    return KernelEvents(NETFILTER, (7,), "the tables of nf_tables", parse)
