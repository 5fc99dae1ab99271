"""A kernel with gates, as far as `app.gates` uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from imdsproxy.core.gates import Gate
from imdsproxy.core.model import IpAddress, MacAddress, NetworkId
from imdsproxy.errors import DataplaneError, HostRefused
from imdsproxy.host.gates import GateMissing, Opened, PairMap

__all__ = ["FakeGates"]


@dataclass
class FakeGates:
    """Tables by network.

    Attributes:
        watch: Called after each change, as somebody who looks all the time.
        busy: Networks in which connections might be open, at each filling.
        refuse: Why no gate is opened; empty where it is.
    """

    tables: dict[NetworkId, dict[IpAddress, MacAddress]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    told: list[tuple[IpAddress, int, MacAddress]] = field(default_factory=list)
    senders: dict[tuple[IpAddress, int], MacAddress] = field(default_factory=dict)
    watch: Callable[[], None] = lambda: None
    refuse: str = ""
    busy: list[frozenset[NetworkId]] = field(default_factory=list)
    _gates: dict[NetworkId, Gate] = field(default_factory=dict)

    async def open(self, gates: Iterable[Gate]) -> Mapping[NetworkId, Opened | DataplaneError]:
        found: dict[NetworkId, Opened | DataplaneError] = {}
        for gate in gates:
            await asyncio.sleep(0)
            if self.refuse:
                found[gate.network] = HostRefused(self.refuse, hint="do something")
                continue
            same = self._gates.get(gate.network) == gate and gate.network in self.tables
            if not same:
                self.log.append(f"open {gate.network}")
                self.tables[gate.network] = {}
                self._gates[gate.network] = gate
            found[gate.network] = Opened(dict(self.tables[gate.network]), fresh=not same)
            self.watch()
        return found

    async def fill(
        self, gates: Iterable[tuple[Gate, PairMap]], *, busy: Collection[NetworkId]
    ) -> Mapping[NetworkId, DataplaneError | None]:
        self.busy.append(frozenset(busy))
        found: dict[NetworkId, DataplaneError | None] = {}
        for gate, pairs in gates:
            await asyncio.sleep(0)
            if gate.network not in self.tables:
                found[gate.network] = HostRefused("it is gone")
                continue
            self.log.append(f"fill {gate.network}")
            self.tables[gate.network].update(pairs)
            found[gate.network] = None
            self.watch()
        return found

    async def withdraw(self, gate: Gate, pairs: PairMap) -> None:
        table = self._table(gate)
        for address, mac in pairs.items():
            await asyncio.sleep(0)
            assert table.pop(address) == mac
            self.log.append(f"withdraw {address}")
            self.watch()

    async def grant(self, gate: Gate, pairs: PairMap) -> None:
        table = self._table(gate)
        for address, mac in pairs.items():
            await asyncio.sleep(0)
            assert address not in table, "one address has one MAC"
            table[address] = mac
            self.log.append(f"grant {address}")
            self.watch()

    async def sender(self, gate: Gate, address: IpAddress, port: int) -> MacAddress | None:
        self._table(gate)
        return self.senders.get((address, port))

    async def tell(self, gate: Gate, address: IpAddress, port: int, mac: MacAddress) -> bool:
        self._table(gate)
        self.told.append((address, port, mac))
        return True

    async def close(self, places: Collection[tuple[str | None, str]]) -> None:
        names = {table for _, table in places}
        for network in [one for one, gate in self._gates.items() if gate.table in names]:
            self.lose(network)
            self.log.append(f"close {network}")

    def lose(self, network: NetworkId) -> None:
        """Somebody else takes a table away."""
        self.tables.pop(network, None)
        self._gates.pop(network, None)

    def _table(self, gate: Gate) -> dict[IpAddress, MacAddress]:
        if gate.network not in self.tables:
            raise GateMissing(gate.network)
        return self.tables[gate.network]
