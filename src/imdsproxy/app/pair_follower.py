"""Follows what neighbour tables and gates become, by the kernel's own word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass

import structlog

from imdsproxy.app.gates import Gates
from imdsproxy.app.hops import Hops
from imdsproxy.app.listener_loop import ListenerLoop
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.errors import HostRefused
from imdsproxy.host.neighbour_watch import NeighbourChange, NeighbourWatch, TableWatch
from imdsproxy.host.watch import HostWatch
from imdsproxy.serving.resolver import Resolver

_EXPIRE_EVERY_S = 5.0
_PAUSE_S = 0.5
"""After changes were lost: whoever makes the kernel tell so many is not to have us look all the time."""


@dataclass(slots=True)
class PairFollower:
    """Takes what events say to whom it concerns."""

    records: RecordLoop
    lookup: Lookup
    gates: Gates
    hops: Hops
    listeners: ListenerLoop
    resolver: Resolver
    watch: HostWatch

    @property
    def work(self) -> tuple[Callable[[], Coroutine[object, object, None]], ...]:
        """What runs as long as the controller does."""
        return self.follow_neighbours, self.follow_tables, self.expire

    def connect(self) -> None:
        """Have gates and look-up tell and ask here."""
        self.gates.on_change = self._changed
        self.gates.on_missing = self._missing
        self.hops.on_change = self._changed
        self.hops.on_need = self._needed
        self.lookup.heard = self._hears

    def _missing(self, network: NetworkId) -> None:
        self.listeners.touch("gate is gone", (network,))

    def _needed(self, networks: frozenset[NetworkId]) -> None:
        self.listeners.touch("hop limits", networks)

    def _changed(self, networks: frozenset[NetworkId]) -> None:
        inventory = self.records.inventory
        for network in networks:
            for instance in inventory.instances_in(network):
                for key in inventory.addresses_of(instance):
                    if key[0] == network:
                        self.records.touch(key)
        for key in self.records.learned:
            if key[0] in networks:
                self.records.touch(key)
        self.resolver.wake_networks(networks)

    def _hears(self, key: AddressKey) -> bool:
        return self.gates.is_up(key[0]) and self.watch.hears(self.gates.namespace_of(key[0]))

    def _key(self, change: NeighbourChange) -> AddressKey | None:
        """Whose address it is about, where somebody is known by it."""
        namespace = None if change.nsid is None else self.watch.place_of_id(change.nsid)
        if change.nsid is not None and namespace is None:
            return None
        network = self.gates.network_at(namespace, change.index)
        key = None if network is None else (network, change.address)
        return key if key in self.records.learned else None

    async def follow_neighbours(self) -> None:
        """Follow addresses that guests are known by through the neighbour table."""
        async with NeighbourWatch(lambda change: self._key(change) is not None) as changes:
            async for change in changes:
                if change is None:
                    await self.lookup.review_all()
                    await asyncio.sleep(_PAUSE_S)
                elif (key := self._key(change)) is not None:
                    self.lookup.on_neighbour(key, change.mac)

    async def follow_tables(self) -> None:
        """Have tables again that somebody else has taken away, as `nft flush ruleset` does."""
        async with TableWatch(self._tables) as removals:
            async for removed in removals:
                self.gates.lost(removed.table)
                await self.hops.lost(removed.table)

    def _tables(self) -> Collection[str]:
        return {*self.gates.tables(), self.hops.kernel.table}

    async def expire(self) -> None:
        """Let those go whose addresses are nobody's any more."""
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            try:
                await self.gates.expire()
            except HostRefused as error:
                structlog.get_logger().warning("pairs not withdrawn", error=error.message)
