"""Gates and the pairs that they let through, kept as the networks and records want them.

Two loops work here. The listener loop opens gates before HAProxy listens behind them, and fills them afterwards; the
record loop withdraws and grants pairs around a change of HAProxy's maps. What was granted is kept here, so that a
gate that is made anew lets through what the one before did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeAlias, TypeVar

import structlog

from imdsproxy.app.place_journal import read_places, render_places
from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.gates import Gate, GatePlan, plan_gates
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedHost
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import IpAddress, MacAddress, Network, NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.packed import PackedPairs
from imdsproxy.core.pairs import ANY_MAC, Pairs
from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.host.clock import Clock
from imdsproxy.host.gates import GateMissing, Opened, PairMap

_LINGER_S: Final = 30.0
"""Longer than HAProxy keeps an idle connection."""

Place: TypeAlias = tuple[str | None, str]
"""Namespace (`None`: the host's own) and table."""


class GateKernel(Protocol):
    """`imdsproxy.host.gates.KernelGates`."""

    async def open(self, gates: Iterable[Gate]) -> Mapping[NetworkId, Opened | DataplaneError]:
        """Have these gates, letting nobody through yet."""
        ...

    async def fill(
        self, gates: Iterable[tuple[Gate, PairMap]], *, busy: Collection[NetworkId]
    ) -> Mapping[NetworkId, DataplaneError | None]:
        """Let pairs through new gates; in busy networks connections may be open."""
        ...

    async def withdraw(self, gate: Gate, pairs: PairMap) -> None:
        """Let these through no more, and end their connections."""
        ...

    async def grant(self, gate: Gate, pairs: PairMap) -> None:
        """Let these through from now on."""
        ...

    async def sender(self, gate: Gate, address: IpAddress, port: int) -> MacAddress | None:
        """The MAC that an unverified connection came from, where that is known."""
        ...

    async def tell(self, gate: Gate, address: IpAddress, port: int, mac: MacAddress) -> bool:
        """Let answers on an unverified connection go to this MAC only; false where they go to another one."""
        ...

    async def close(self, places: Collection[Place]) -> None:
        """Have no such tables."""
        ...


@dataclass(slots=True)
class Gates:
    """All gates of this host.

    Args:
        journal: Where our tables are, so that a later process takes away those that nobody needs.
        on_change: Told of networks whose guests are believed by another rule than before.
        on_missing: Told when somebody else has taken a gate away.

    Attributes:
        plan: What HAProxy listens on, by who answers there.
        refused: Why there is no gate, by network.
    """

    kernel: GateKernel
    inventory: Inventory
    naming: Naming
    journal: Path
    write: Callable[[Path, bytes], None]
    clock: Clock
    on_change: Callable[[frozenset[NetworkId]], None] = lambda _: None
    on_missing: Callable[[NetworkId], None] = lambda _: None
    plan: GatePlan = field(default_factory=GatePlan)
    refused: dict[NetworkId, Problem] = field(default_factory=dict)
    _plain: frozenset[NetworkId] = frozenset()
    _open: dict[NetworkId, Gate] = field(default_factory=dict)
    _devices: dict[tuple[NamespaceRef | None, int], NetworkId] = field(default_factory=dict)
    _full: set[NetworkId] = field(default_factory=set)
    _granted: PackedPairs = field(default_factory=PackedPairs)
    _known: bool = False
    _complete: bool = True
    _settled: bool = False
    _busy: set[NetworkId] = field(default_factory=set)
    _differing: dict[NetworkId, PairMap] = field(default_factory=dict)
    _lingering: dict[AddressKey, float] = field(default_factory=dict)
    _suspect: set[NetworkId] = field(default_factory=set)
    _places: dict[NetworkId, Place] | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    # For whoever asks

    def is_plain(self, network: NetworkId) -> bool:
        """Whether HAProxy answers there, or is about to, without anybody looking at MACs."""
        return network in self._plain

    def is_up(self, network: NetworkId) -> bool:
        """Whether the kernel sorts a network's guests by their MACs."""
        return network in self._full

    def granted(self, key: AddressKey) -> MacAddress | None:
        """The MAC that an address is believed with now; `None` for none."""
        return self._granted.get(key[0], {}).get(key[1])

    def keys(self) -> Iterator[AddressKey]:
        """Every address that has a pair."""
        for network in tuple(self._granted):
            yield from ((network, address) for address in self._granted.get(network, {}))

    @property
    def pair_count(self) -> int:
        """How many addresses have a pair."""
        return self._granted.total

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What keeps guests from being checked."""
        return tuple(self.refused[one] for one in sorted(self.refused))

    # For the listener loop

    async def open(
        self,
        networks: Mapping[NetworkId, Network],
        endpoints: Iterable[Endpoint],
        observed: ObservedHost,
        *,
        running: bool,
    ) -> GatePlan:
        """Plan what to listen on, and have the gates that it takes, before anybody listens behind them.

        Args:
            networks: All of them.
            endpoints: What can be bound.
            observed: The host that they were planned from.
            running: HAProxy listens already.

        Raises:
            HostRefused: Our journal cannot be read or written.
        """
        plan = plan_gates(networks, endpoints, observed, self.naming, self._checkable)
        listened = plan if running and not self._settled else self.plan
        self._busy = {one.network for one in listened.binds}
        # Before HAProxy is: a record that comes meanwhile must not count on a gate that is not there.
        self._plain |= plan.plain_networks
        async with self._lock:
            new = [
                gate
                for name, gate in plan.gates.items()
                if self._open.get(name) != gate or name in self._suspect
            ]
            if new:
                self._note(new)
            self._full -= {gate.network for gate in new} - self._suspect
            opened = await self.kernel.open(new)
            self._suspect -= opened.keys()
            before = dict(self.refused)
            self.refused = {name: self.refused[name] for name in self.refused if name in opened}
            for gate in new:
                self._opened(gate, opened[gate.network])
            for name in self.refused.keys() - before.keys():
                told = self.refused[name]
                structlog.get_logger().error("no gate", network=name, reason=told.reason)
        return plan.without(self.refused)

    def _checkable(self, network: NetworkId) -> bool:
        if self.inventory.carries_macs(network):
            return True
        # What there is already stays: to close it would end its guests' connections. And before the sources have
        # told everything, what an earlier process left.
        kept = {} if self.inventory.in_sync else self._known_places()
        return network in self._open or network in kept

    def _opened(self, gate: Gate, result: Opened | DataplaneError) -> None:
        if isinstance(result, DataplaneError):
            self._forget(gate.network)
            field_name = f"networks.{gate.network}"
            self.refused[gate.network] = Problem(field_name, result.message, result.hint)
            return
        self.refused.pop(gate.network, None)
        self._forget(gate.network)
        self._open[gate.network] = gate
        self._devices.update({(gate.namespace, index): gate.network for _, index in gate.devices})
        if result.fresh:
            self._full.discard(gate.network)
            return
        self._full.add(gate.network)
        if not self._known:
            self._granted[gate.network] = dict(result.pairs)
        elif not self._complete:
            primed = self._granted.get(gate.network, {})
            self._granted[gate.network] = {**result.pairs, **primed}
        if result.pairs != self._granted.get(gate.network, {}):
            self._differing[gate.network] = result.pairs

    def _forget(self, network: NetworkId) -> None:
        gate = self._open.pop(network, None)
        if gate is not None:
            for _, index in gate.devices:
                self._devices.pop((gate.namespace, index), None)

    async def settle(self, plan: GatePlan, *, sweep: bool) -> None:
        """HAProxy listens: fill what was opened, close what nobody needs.

        Args:
            plan: Of `open`.
            sweep: Also close what an earlier process left; off while sources have not told everything.

        Raises:
            HostRefused: A gate cannot be closed, or our journal not be written.
        """
        before = self.plan
        async with self._lock:
            empty = [gate for name, gate in plan.gates.items() if name not in self._full]
            filled = await self.kernel.fill(
                ((gate, self._granted.get(gate.network, {})) for gate in empty), busy=self._busy
            )
            for gate in empty:
                self._filled(gate, filled[gate.network])
            await self._reconcile()
            self.plan = plan
            self._plain = plan.plain_networks
            gone = self._known_places().keys() - plan.gates.keys() if sweep else set()
            gone |= self._open.keys() - plan.gates.keys()
            await self._close(gone)
        first, self._settled = not self._settled, True
        changed = before.plain_networks ^ plan.plain_networks
        changed |= {gate.network for gate in empty}
        # At first all records are looked at anyway.
        if changed and not first:
            self.on_change(frozenset(changed))

    async def _reconcile(self) -> None:
        """Gates that an earlier process filled, before a HAProxy that was started anew."""
        while self._differing:
            name, found = self._differing.popitem()
            gate, wanted = self._open.get(name), self._granted.get(name, {})
            if gate is None or name not in self._full:
                continue
            gone = {address: mac for address, mac in found.items() if wanted.get(address) != mac}
            come = {address: mac for address, mac in wanted.items() if found.get(address) != mac}
            await self._do(gate, gone, self.kernel.withdraw)
            await self._do(gate, come, self.kernel.grant)

    def _filled(self, gate: Gate, refused: DataplaneError | None) -> None:
        if refused is None:
            self._full.add(gate.network)
            return
        self._forget(gate.network)
        self.refused[gate.network] = Problem(
            f"networks.{gate.network}", refused.message, refused.hint
        )

    async def close_all(self) -> None:
        """Take all of ours away."""
        async with self._lock:
            await self._close(self._known_places().keys() | self._open.keys())

    async def _close(self, networks: Collection[NetworkId]) -> None:
        if not networks:
            return
        places = self._known_places()
        await self.kernel.close([places[one] for one in networks if one in places])
        for name in networks:
            self._forget(name)
            self._full.discard(name)
        self._store({name: place for name, place in places.items() if name not in networks})

    # For the record loop

    def prime(self, pairs: Pairs, *, complete: bool) -> None:
        """Whom to let through beside those said before, before HAProxy runs, and whether nobody else is."""
        self._complete = complete
        some = _by_network((key, mac) for key, mac in pairs.items() if mac is not None)
        for network, coming in some.items():
            self._granted[network] = {**self._granted.get(network, {}), **coming}
        self._known = True

    def withheld(self, pairs: Pairs) -> frozenset[AddressKey]:
        """Addresses that HAProxy must not know: nobody looks at MACs where they are."""
        return frozenset(
            key
            for key, mac in pairs.items()
            if mac is not None and mac != ANY_MAC and key[0] in self._plain
        )

    def differing(self, pairs: Pairs) -> Pairs:
        """Those that are not granted so, and those that were to end."""
        return {
            (network, address): mac
            for network, some in _by_network(pairs.items()).items()
            for granted in (self._granted.get(network, {}),)
            for address, mac in some.items()
            if granted.get(address) != mac or (network, address) in self._lingering
        }

    async def withdraw(self, pairs: Pairs) -> None:
        """Let nobody through any more who is not in `pairs` for an address that another has now.

        Who has an address that is nobody's any more goes on for a moment: a kept connection is then told so, not
        cut. HAProxy's map has nothing for it.

        Raises:
            HostRefused: The kernel refuses.
        """
        async with self._lock:
            gone: list[AddressKey] = []
            for network, some in _by_network(pairs.items()).items():
                granted = self._granted.get(network, {})
                for address, mac in some.items():
                    held = granted.get(address)
                    if held is None or held == mac:
                        self._lingering.pop((network, address), None)
                    elif mac is None:
                        until = self.clock.monotonic() + _LINGER_S
                        self._lingering.setdefault((network, address), until)
                    else:
                        gone.append((network, address))
            await self._withdraw(gone)

    async def expire(self) -> None:
        """Withdraw the pairs of addresses that have been nobody's for a while.

        Raises:
            HostRefused: The kernel refuses.
        """
        now = self.clock.monotonic()
        async with self._lock:
            await self._withdraw([key for key, until in self._lingering.items() if until <= now])

    async def _withdraw(self, keys: Iterable[AddressKey]) -> None:
        for network, addresses in _by_network((key, None) for key in keys).items():
            granted = self._granted.get(network, {})
            gone = {one: mac for one, mac in granted.items() if one in addresses}
            for address in addresses:
                self._lingering.pop((network, address), None)
            if gone and network in self._full:
                await self._do(self._open[network], gone, self.kernel.withdraw)
            if gone:
                self._granted[network] = {
                    one: mac for one, mac in granted.items() if one not in gone
                }

    async def grant(self, pairs: Pairs) -> None:
        """Let these through.

        Raises:
            HostRefused: The kernel refuses.
        """
        async with self._lock:
            for network, some in _by_network(pairs.items()).items():
                granted = self._granted.get(network, {})
                come = {
                    address: mac
                    for address, mac in some.items()
                    if mac is not None and granted.get(address) != mac
                }
                if come and network in self._full:
                    await self._do(self._open[network], come, self.kernel.grant)
                if come:
                    self._granted[network] = {**granted, **come}
            self._known = True

    async def sender(self, key: AddressKey, port: int) -> MacAddress | None:
        """The MAC that an unverified connection came from; `None` where that is not known.

        Raises:
            HostRefused: The kernel refuses.
        """
        gate = self._open.get(key[0])
        return None if gate is None else await self.kernel.sender(gate, key[1], port)

    async def tell(self, key: AddressKey, port: int, mac: MacAddress) -> bool:
        """Let answers on an unverified connection go to this MAC only; false where no gate sees to that.

        Raises:
            HostRefused: The kernel refuses.
        """
        network, address = key
        gate = self._open.get(network)
        if gate is None or network not in self._full:
            return False
        try:
            return await self.kernel.tell(gate, address, port, mac)
        except GateMissing:
            self._missing(network)
            return False

    async def _do(
        self,
        gate: Gate,
        pairs: PairMap,
        work: Callable[[Gate, PairMap], Awaitable[None]],
    ) -> None:
        try:
            if pairs:
                await work(gate, pairs)
        except GateMissing:
            # Without its gate nobody is led to the quick answers; a new one gets what is granted by then.
            self._missing(gate.network)

    def _missing(self, network: NetworkId) -> None:
        structlog.get_logger().warning("gate is gone", network=network)
        self._forget(network)
        self._full.discard(network)
        self.on_missing(network)

    def lost(self, table: str) -> None:
        """Somebody, perhaps we ourselves, has removed a table of this name (empty: any): look what is there."""
        for name in [name for name, gate in self._open.items() if table in ("", gate.table)]:
            self._suspect.add(name)
            self.on_missing(name)

    def tables(self) -> Collection[str]:
        """The names of our tables."""
        return {gate.table for gate in self._open.values()}

    def namespace_of(self, network: NetworkId) -> NamespaceRef | None:
        """Where a network's gate is; `None` in the host's own namespace, or nowhere."""
        gate = self._open.get(network)
        return None if gate is None else gate.namespace

    def network_at(self, namespace: NamespaceRef | None, index: int) -> NetworkId | None:
        """The network whose guests come in by a device."""
        return self._devices.get((namespace, index))

    # The journal

    def _known_places(self) -> dict[NetworkId, Place]:
        if self._places is None:
            self._places = self._read()
        return self._places

    def _note(self, gates: Iterable[Gate]) -> None:
        places = dict(self._known_places())
        for gate in gates:
            where = None if gate.namespace is None else gate.namespace.name
            places[gate.network] = (where, gate.table)
        self._store(places)

    def _read(self) -> dict[NetworkId, Place]:
        told = read_places(self.journal, family="netdev")
        return {name: (place[0], str(place[1])) for name, place in told.items()}

    def _store(self, places: dict[NetworkId, Place]) -> None:
        if places != self._places:
            self.write(self.journal, render_places(places))
            self._places = places


_Mac = TypeVar("_Mac", MacAddress, MacAddress | None)


def _by_network(
    pairs: Iterable[tuple[AddressKey, _Mac]],
) -> dict[NetworkId, dict[IpAddress, _Mac]]:
    found: dict[NetworkId, dict[IpAddress, _Mac]] = {}
    for (network, address), mac in pairs:
        found.setdefault(network, {})[address] = mac
    return found
