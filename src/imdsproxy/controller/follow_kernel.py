"""Follows changes of neighbour tables and of our own tables, as the kernel reports them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

import structlog

from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.errors import HostRefused
from imdsproxy.host.events import NeighbourChange, watch_neighbours, watch_tables
from imdsproxy.listeners.watch import HostWatch

_EXPIRE_EVERY_S = 5.0
_PAUSE_S = 0.5
"""After changes were lost: a guest that floods us with changes must not keep us busy."""


@dataclass(slots=True)
class PairFollower:
    """Passes events of the kernel on to look-up, MAC filters and hop limits."""

    records: RecordLoop
    lookup: Lookup
    mac_filters: MacFilters
    hop_limits: HopLimits
    watch: HostWatch

    def plan_again(self, networks: frozenset[NetworkId]) -> None:
        """Plan the records of these networks again."""
        inventory = self.records.inventory
        for network in networks:
            for instance in inventory.instances_in(network):
                for key in inventory.addresses_of(instance):
                    if key[0] == network:
                        self.records.touch(key)
        for key in self.records.learned:
            if key[0] in networks:
                self.records.touch(key)

    def _key(self, change: NeighbourChange) -> AddressKey | None:
        """The address, where a guest is known by it."""
        namespace = None if change.nsid is None else self.watch.namespace_of_id(change.nsid)
        if change.nsid is not None and namespace is None:
            return None
        network = self.mac_filters.network_at(namespace, change.index)
        key = None if network is None else (network, change.address)
        return key if key in self.records.learned else None

    async def follow_neighbours(self) -> None:
        """Follow addresses that guests are known by through the neighbour table."""
        async with watch_neighbours(lambda change: self._key(change) is not None) as changes:
            async for change in changes:
                if change is None:
                    await self.lookup.review_all()
                    await asyncio.sleep(_PAUSE_S)
                elif (key := self._key(change)) is not None:
                    self.lookup.on_neighbour(key, change.mac)

    async def follow_tables(self) -> None:
        """Create tables again that another program has removed, as `nft flush ruleset` does."""
        async with watch_tables(self._tables) as removals:
            async for table in removals:
                self.mac_filters.lost(table)
                await self.hop_limits.lost(table)

    def _tables(self) -> Collection[str]:
        return {*self.mac_filters.tables(), self.hop_limits.kernel.table}

    async def expire(self) -> None:
        """Withdraw pairs of addresses that have no owner any more."""
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            try:
                await self.mac_filters.expire()
            except HostRefused as error:
                structlog.get_logger().warning("pairs not withdrawn", error=error.message)
