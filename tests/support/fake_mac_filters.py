"""Kernels without a kernel, for MAC filters and hop limits."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imdsproxy.errors import DataplaneError, HostRefused
from imdsproxy.host.clock import Clock
from imdsproxy.host.names import Naming
from imdsproxy.model.entities import IpAddress, MacAddress, NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.network.anti_spoofing.kernel import (
    FilterChange,
    HopPlace,
    KernelHopLimits,
    KernelMacFilters,
    TableGone,
    TableJournal,
)
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.anti_spoofing.plan import MacFilter, PairMap


@dataclass
class FakeMacFilters(KernelMacFilters):
    """Tables by network.

    Attributes:
        watch: Called after each change, to check every state in between.
        busy: Networks in which connections might be open, at each filling.
        refuse: Why no filter is created; empty where it is.
        connected: Namespaces in which connections to the metadata addresses are open.
    """

    connected: set[str | None] = field(default_factory=set)

    tables: dict[NetworkId, dict[IpAddress, MacAddress]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    watch: Callable[[], None] = lambda: None
    refuse: str = ""
    busy: list[frozenset[NetworkId]] = field(default_factory=list)
    _filters: dict[NetworkId, MacFilter] = field(default_factory=dict)

    async def release(self, places: Collection[Sequence[str | None]]) -> None:
        self.log += [f"release {table}" for _, table in places]

    async def has_connections(self, namespace: str | None) -> bool:
        return namespace in self.connected

    async def open(
        self, filters: Iterable[MacFilter]
    ) -> dict[NetworkId, PairMap | DataplaneError | None]:
        found: dict[NetworkId, PairMap | DataplaneError | None] = {}
        for one in filters:
            await asyncio.sleep(0)
            if self.refuse:
                found[one.network] = HostRefused(self.refuse, hint="do something")
                continue
            same = self._filters.get(one.network) == one and one.network in self.tables
            if not same:
                self.log.append(f"open {one.network}")
                self.tables[one.network] = {}
                self._filters[one.network] = one
            found[one.network] = dict(self.tables[one.network]) if same else None
            self.watch()
        return found

    async def fill(
        self,
        changes: Iterable[FilterChange],
        *,
        fresh: Collection[NetworkId],
        busy: Collection[NetworkId],
    ) -> dict[NetworkId, DataplaneError | None]:
        self.busy.append(frozenset(busy))
        assert frozenset(busy) <= frozenset(fresh)
        found: dict[NetworkId, DataplaneError | None] = {}
        for one, has, wanted in changes:
            await asyncio.sleep(0)
            if one.network not in self.tables:
                found[one.network] = HostRefused("it is gone")
                continue
            self.log.append(f"fill {one.network}")
            table = self.tables[one.network]
            assert table == has
            self.tables[one.network] = dict(wanted)
            found[one.network] = None
            self.watch()
        return found

    async def change(
        self, one: MacFilter, *, has: PairMap | None = None, wanted: PairMap | None = None
    ) -> None:
        if one.network not in self.tables:
            raise TableGone(one.network)
        table = self.tables[one.network]
        for address, mac in (has or {}).items():
            await asyncio.sleep(0)
            assert table.pop(address) == mac
            self.watch()
        for address, mac in (wanted or {}).items():
            await asyncio.sleep(0)
            assert address not in table, "one address has one MAC"
            table[address] = mac
            self.watch()

    async def close(self, places: Collection[Sequence[str | None]]) -> None:
        names = {table for _, table in places}
        for network in [one for one, it in self._filters.items() if it.table in names]:
            self.lose(network)

    def lose(self, network: NetworkId) -> None:
        """Another program removes a table."""
        self.tables.pop(network, None)
        self._filters.pop(network, None)


@dataclass
class FakeHopLimits(KernelHopLimits):
    """The rule by namespace.

    Attributes:
        refuses: Where it cannot be created.
        watch: Called after each creation, and before a removal.
    """

    table: str = "td-hops"
    there: set[HopPlace] = field(default_factory=set)
    known: set[HopPlace] = field(default_factory=set)
    refuses: set[HopPlace] = field(default_factory=set)
    watch: Callable[[], None] = lambda: None

    async def open(self, places: Iterable[HopPlace]) -> dict[HopPlace, DataplaneError | None]:
        given = set(places)
        self.known |= given
        self.there |= given - self.refuses
        self.watch()
        return {one: HostRefused("no") if one in self.refuses else None for one in given}

    async def restore(self, names: Collection[str | None]) -> frozenset[HopPlace]:
        self.there = {one for one in self.known if (one and one.name) in names} - self.refuses
        return frozenset(self.there)

    async def close(self, places: Collection[Sequence[str | None]]) -> None:
        self.watch()
        names = {name for name, _ in places}
        self.there = {one for one in self.there if (one and one.name) not in names}


class MemoryJournal(TableJournal):
    """A journal of a process that has no disk."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent/journal.json"), {}, "")

    def store(self, content: dict[NetworkId, list[str | None]]) -> None:
        self._content = content


def no_mac_filters(inventory: Inventory | None = None) -> MacFilters:
    """Filters of a host that has none yet."""
    return MacFilters(
        FakeMacFilters(), inventory or Inventory(), Naming(), MemoryJournal(), Clock()
    )


def no_hop_limits() -> HopLimits:
    """Hop limits of a host that has none yet."""
    return HopLimits(FakeHopLimits(), MemoryJournal())
