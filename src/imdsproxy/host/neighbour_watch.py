"""Notices when a neighbour table says something else of an address, and when a gate's table is taken away."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from imdsproxy.core.model import IpAddress, MacAddress
from imdsproxy.host.multicast import Multicast
from imdsproxy.host.netlink import RTM_NEWNEIGH, parse_neighbour
from imdsproxy.host.nftables import DELTABLE, NETFILTER, table_of
from imdsproxy.host.nlmessages import Message

_NEIGHBOURS: Final = (3,)
_TABLES: Final = (7,)
_ADDRESS_BYTES: Final = frozenset({4, 16})


@dataclass(frozen=True, slots=True)
class NeighbourChange:
    """Who has an address now.

    Attributes:
        nsid: The id of the namespace; `None` for the host's own.
        index: The device's.
        mac: `None` when nobody answers for it any more.
    """

    nsid: int | None
    index: int
    address: IpAddress
    mac: MacAddress | None


class NeighbourWatch(Multicast[NeighbourChange | None]):
    """Changes of addresses that somebody asked about; `None` where changes were lost.

    Args:
        wanted: Whether a change matters. A guest can have the kernel tell of as many others as it likes.
    """

    def __init__(self, wanted: Callable[[NeighbourChange], bool]) -> None:
        super().__init__(socket.NETLINK_ROUTE, _NEIGHBOURS, "the neighbour tables")
        self._wanted = wanted

    def parse(self, message: Message, nsid: int | None) -> Iterator[NeighbourChange]:
        """See `Multicast.parse`."""
        found = parse_neighbour(message.payload)
        if len(found.packed) not in _ADDRESS_BYTES:
            return
        mac = found.mac if message.kind == RTM_NEWNEIGH else None
        change = NeighbourChange(nsid, found.index, ip_address(found.packed), mac)
        if self._wanted(change):
            yield change

    def overflow(self) -> None:
        """See `Multicast.overflow`."""


@dataclass(frozen=True, slots=True)
class TableRemoved:
    """A table of family netdev is gone; empty where removals were lost."""

    table: str


class TableWatch(Multicast[TableRemoved]):
    """Removals of tables whose names somebody asked about."""

    def __init__(self, wanted: Callable[[], Collection[str]]) -> None:
        super().__init__(NETFILTER, _TABLES, "the tables of nf_tables")
        self._wanted = wanted

    def parse(self, message: Message, nsid: int | None) -> Iterable[TableRemoved]:
        """See `Multicast.parse`."""
        del nsid
        if message.kind == DELTABLE and (table := table_of(message.payload)) in self._wanted():
            yield TableRemoved(table)

    def overflow(self) -> TableRemoved:
        """See `Multicast.overflow`."""
        return TableRemoved("")
