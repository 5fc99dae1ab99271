"""MAC filters and their pairs, kept in step with networks and records.

Two loops use this module. The listener loop creates filters before HAProxy listens behind them, and fills them
afterwards. The record loop withdraws and grants pairs around a change of HAProxy's maps. This module keeps the granted
pairs, so that a recreated filter gets the pairs of the earlier filter.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import structlog

from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.host.clock import Clock
from imdsproxy.host.names import Naming
from imdsproxy.host.state import NamespaceRef, ObservedHost
from imdsproxy.model.entities import IpAddress, MacAddress, Network, NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.packed import PackedPairs
from imdsproxy.network.anti_spoofing.kernel import (
    Claims,
    KernelMacFilters,
    TableGone,
    TableJournal,
    name_of,
)
from imdsproxy.network.anti_spoofing.plan import (
    ANY_MAC,
    MacFilter,
    MacFilterPlan,
    PairMap,
    Pairs,
    plan_mac_filters,
)
from imdsproxy.network.planned import Endpoint

T = TypeVar("T")
_Mac = TypeVar("_Mac", MacAddress, MacAddress | None)

_RELEASED: Final = "released"
"""Mark in the journal: the filter redirects no new connections, and must be recreated before its next use."""

_LINGER_S: Final = 30.0
"""Seconds for which pairs and released filters linger: longer than HAProxy keeps an idle connection."""


@dataclass(slots=True)
class MacFilters:
    """All MAC filters of this host.

    Args:
        on_missing: Called when another program has removed a filter.
    """

    kernel: KernelMacFilters
    inventory: Inventory
    naming: Naming
    journal: TableJournal
    clock: Clock
    on_missing: Callable[[NetworkId], object] = lambda _: None
    plan: MacFilterPlan = field(default_factory=MacFilterPlan)
    refused: dict[NetworkId, Problem] = field(default_factory=dict)
    _plain: frozenset[NetworkId] = frozenset()
    _open: dict[NetworkId, MacFilter] = field(default_factory=dict)
    _devices: dict[tuple[NamespaceRef | None, int], NetworkId] = field(default_factory=dict)
    _full: set[NetworkId] = field(default_factory=set)
    _granted: PackedPairs = field(default_factory=PackedPairs)
    _known: bool = False
    _partial: bool = False
    _settled: bool = False
    _busy: set[NetworkId] = field(default_factory=set)
    _found: dict[NetworkId, PairMap] = field(default_factory=dict)
    _lingering: dict[AddressKey, float] = field(default_factory=dict)
    _suspect: set[NetworkId] = field(default_factory=set)
    _released_at: dict[NetworkId, float] = field(default_factory=dict)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    # State

    def is_plain(self, network: NetworkId) -> bool:
        """Return whether HAProxy answers, or is about to answer, in a network without MAC checks."""
        return network in self._plain

    def is_up(self, network: NetworkId) -> bool:
        """Return whether the kernel filters a network's guests by their MACs."""
        return network in self._full

    def granted(self, key: AddressKey) -> MacAddress | None:
        return self._granted.get(key[0], {}).get(key[1])

    def keys(self) -> Iterator[AddressKey]:
        for network in tuple(self._granted):
            yield from ((network, address) for address in self._granted.get(network, {}))

    @property
    def pair_count(self) -> int:
        return self._granted.total

    # For the listener loop

    async def open(
        self,
        networks: Mapping[NetworkId, Network],
        endpoints: Iterable[Endpoint],
        observed: ObservedHost,
        *,
        running: bool,
    ) -> MacFilterPlan:
        """Plan the endpoints and create their filters, before HAProxy listens behind them.

        Args:
            running: Whether HAProxy listens already.

        Raises:
            HostRefused: Our journal cannot be read or written.
        """
        plan = plan_mac_filters(networks, endpoints, observed, self.naming, self._checkable)
        listened = plan if running and not self._settled else self.plan
        # Open connections of another process there must continue too.
        self._busy = {one.network for one in listened.binds} | {
            name for name, one in plan.filters.items() if _is_shared(one, observed)
        }
        # Mark plain networks before HAProxy changes: a record that comes meanwhile must not rely on a missing filter.
        self._plain |= plan.plain_networks
        async with self._lock:
            released = self._released().keys()
            anew = self._suspect | released
            new = {
                name: one
                for name, one in plan.filters.items()
                if self._open.get(name) != one or name in anew
            }
            await self._close(new.keys() & released)
            if new:
                places = {name: [name_of(one.namespace), one.table] for name, one in new.items()}
                self.journal.store({**self.journal.load(), **places})
            self._full -= new.keys() - self._suspect
            # The next round handles a removal during this call.
            self._suspect -= new.keys()
            opened = await self.kernel.open(new.values())
            # Earlier refusals were tried again just now, or are no longer relevant.
            before, self.refused = self.refused, {}
            for name, result in opened.items():
                self._opened(new[name], result)
            for name in self.refused.keys() - before.keys():
                structlog.get_logger().error(
                    "no MAC filter", network=name, reason=self.refused[name].reason
                )
            self._devices = {
                (one.namespace, index): name
                for name, one in self._open.items()
                for _, index in one.devices
            }
        return plan.without(self.refused)

    def _checkable(self, network: NetworkId) -> bool:
        if self.inventory.carries_macs(network):
            return True
        # Existing filters stay: closing a filter would end its guests' connections. Until all sources are in sync, the
        # filters of an earlier process stay too.
        kept = {} if self.inventory.in_sync else self.journal.load()
        return network in self._open or network in kept

    def _opened(self, mac_filter: MacFilter, found: PairMap | DataplaneError | None) -> None:
        name = mac_filter.network
        if isinstance(found, DataplaneError):
            self._refuse(name, found)
            return
        self._open[name] = mac_filter
        if found is None:
            self._full.discard(name)
            return
        self._full.add(name)
        granted = self._granted.get(name, {})
        # If not all sources were in sync, the pairs that an earlier process granted stay valid.
        if not self._known or self._partial:
            granted = self._granted[name] = {**found, **granted}
        if found != granted:
            self._found[name] = found

    async def release(self, plan: MacFilterPlan, *, sweep: bool) -> None:
        """Make filters that are no longer needed redirect only open connections.

        HAProxy still listens: other processes get each connection that begins from now on.

        Raises:
            HostRefused: A filter cannot be changed, or our journal cannot be written.
        """
        async with self._lock:
            places, released = self.journal.load(), self._released()
            going = (self._unneeded(plan, sweep=sweep) & places.keys()) - released.keys()
            if not going:
                return
            await self.kernel.release([places[name] for name in going])
            self._released_at |= dict.fromkeys(going, self.clock.monotonic())
            self.journal.store(places | {name: [*places[name], _RELEASED] for name in going})

    def _released(self) -> dict[NetworkId, list[str | None]]:
        return {n: place for n, place in self.journal.load().items() if _RELEASED in place[2:]}

    def _unneeded(self, plan: MacFilterPlan, *, sweep: bool) -> set[NetworkId]:
        known = self._open.keys() | (self.journal.load().keys() if sweep else set())
        return known - plan.filters.keys()

    async def settle(self, plan: MacFilterPlan, *, sweep: bool) -> frozenset[NetworkId]:
        """Fill new filters and remove unneeded ones, after HAProxy listens.

        Args:
            sweep: Also remove filters left by an earlier process; off until all sources are in sync.

        Returns:
            Networks whose rule for trusting guests has changed.

        Raises:
            HostRefused: A filter cannot be removed, or our journal cannot be written.
        """
        before = self.plan
        async with self._lock:
            empty = plan.filters.keys() - self._full
            found: dict[NetworkId, PairMap] = {**self._found, **{name: {} for name in empty}}
            changes = [
                (plan.filters[name], has, self._granted.get(name, {}))
                for name, has in found.items()
                if name in plan.filters
            ]
            self._found = {}
            filled = await self.kernel.fill(changes, fresh=empty, busy=self._busy & empty)
            for network, error in filled.items():
                if error is None:
                    self._full.add(network)
                else:
                    self._refuse(network, error)
            self.plan = plan
            self._plain = plan.plain_networks
            await self._close_idle(self._unneeded(plan, sweep=sweep))
        first, self._settled = not self._settled, True
        changed = before.plain_networks ^ plan.plain_networks
        # In the first round all records are planned anyway.
        return frozenset() if first else changed | empty

    def _refuse(self, network: NetworkId, error: DataplaneError) -> None:
        self._drop(network)
        self.refused[network] = Problem(f"networks.{network}", error.message, error.hint)

    async def close_all(self) -> None:
        async with self._lock:
            await self._close(self.journal.load().keys() | self._open.keys())

    async def _close_idle(self, networks: Collection[NetworkId]) -> None:
        """Remove filters, but keep a released filter for a while as long as its network has open connections.

        Connections that it does not redirect count too: until they end, their answers are bound to a MAC.
        """
        released, now = self._released(), self.clock.monotonic()
        kept = {
            name
            for name in released.keys() & networks
            if now - self._released_at.setdefault(name, now) < _LINGER_S
            and await self.kernel.has_connections(released[name][0])
        }
        await self._close(set(networks) - kept)

    async def _close(self, networks: Collection[NetworkId]) -> None:
        if not networks:
            return
        places = {name: place[:2] for name, place in self.journal.load().items()}
        await self.kernel.close([places[one] for one in networks if one in places])
        places = self.journal.load()
        for name in networks:
            self._drop(name)
        self.journal.store({name: place for name, place in places.items() if name not in networks})

    # For the record loop

    def preload(self, pairs: Pairs) -> None:
        self._known = True
        # This stays set: these pairs were planned without the sources that are in sync only later.
        self._partial |= not self.inventory.in_sync
        some = _by_network((key, mac) for key, mac in pairs.items() if mac is not None)
        for network, coming in some.items():
            self._granted[network] = {**self._granted.get(network, {}), **coming}

    def withheld(self, pairs: Pairs) -> frozenset[AddressKey]:
        """Return addresses that HAProxy must not know yet, because their network does not check MACs now."""
        return frozenset(
            key
            for key, mac in pairs.items()
            if mac is not None and mac != ANY_MAC and key[0] in self._plain
        )

    def differing(self, pairs: Pairs) -> Pairs:
        return {
            (network, address): mac
            for network, some in _by_network(pairs.items()).items()
            for granted in (self._granted.get(network, {}),)
            for address, mac in some.items()
            if granted.get(address) != mac or (network, address) in self._lingering
        }

    async def withdraw(self, pairs: Pairs, staying: Collection[AddressKey] = ()) -> None:
        """Withdraw pairs of addresses that have another MAC in `pairs`.

        An address without an owner keeps its pair for a while, so that open connections get an answer instead of being
        cut; HAProxy's map has no entry for the address.

        Args:
            pairs: Wanted MACs by address; `None` for an address without an owner.
            staying: Addresses that stay with their instance. Their new pairs replace the old ones at once: a controller
                killed before `grant` would otherwise leave the guest without a pair.
        """
        async with self._lock:
            gone: list[AddressKey] = []
            exchanged: dict[AddressKey, MacAddress] = {}
            for network, some in _by_network(pairs.items()).items():
                granted = self._granted.get(network, {})
                for address, mac in some.items():
                    held = granted.get(address)
                    if held is None or held == mac:
                        self._lingering.pop((network, address), None)
                    elif mac is None:
                        until = self.clock.monotonic() + _LINGER_S
                        self._lingering.setdefault((network, address), until)
                    elif (network, address) in staying:
                        self._lingering.pop((network, address), None)
                        exchanged[network, address] = mac
                    else:
                        gone.append((network, address))
            await self._withdraw(gone)
            for network, come in _by_network(exchanged.items()).items():
                granted = self._granted.get(network, {})
                await self._change(network, granted, {one: granted[one] for one in come}, come)

    async def expire(self) -> None:
        """Withdraw lingering pairs whose time is over, and remove idle released filters."""
        now = self.clock.monotonic()
        async with self._lock:
            await self._withdraw([key for key, until in self._lingering.items() if until <= now])
            await self._close_idle(self._released())

    async def _withdraw(self, keys: Iterable[AddressKey]) -> None:
        for network, addresses in _by_network((key, None) for key in keys).items():
            granted = self._granted.get(network, {})
            for address in addresses:
                self._lingering.pop((network, address), None)
            gone = {one: mac for one, mac in granted.items() if one in addresses}
            await self._change(network, granted, gone, {})

    async def grant(self, pairs: Pairs) -> None:
        """Add these pairs. Raises `HostRefused`: the kernel refuses."""
        async with self._lock:
            self._known = True
            for network, some in _by_network(pairs.items()).items():
                granted = self._granted.get(network, {})
                come = {one: mac for one, mac in some.items() if mac and granted.get(one) != mac}
                await self._change(network, granted, {}, come)

    async def _change(
        self, network: NetworkId, granted: PairMap, gone: PairMap, come: PairMap
    ) -> None:
        if gone or come:
            await self._try(network, partial(self.kernel.change, has=gone, wanted=come))
            left = {a: mac for a, mac in granted.items() if a not in gone} if gone else granted
            self._granted[network] = {**left, **come}

    async def sender(self, key: AddressKey, port: int) -> MacAddress | None:
        """Return the MAC that an unverified connection came from; `None` if unknown."""
        mac_filter = self._open.get(key[0])
        return None if mac_filter is None else await self.kernel.sender(mac_filter, key[1], port)

    async def bind_answers(self, key: AddressKey, port: int, mac: MacAddress) -> bool:
        """Send answers on an unverified connection to this MAC only. Return false if no filter can."""
        network, address = key
        kernel = self.kernel
        bound = await self._try(network, lambda one: kernel.bind_answers(one, address, port, mac))
        return bool(bound)

    async def read_claims(
        self, before: Mapping[NetworkId, Claims]
    ) -> Mapping[NetworkId, Claims | DataplaneError]:
        full = [one for name, one in self._open.items() if name in self._full]
        return await self.kernel.read_claims(full, before)

    async def _try(self, network: NetworkId, work: Callable[[MacFilter], Awaitable[T]]) -> T | None:
        if network in self._full:
            try:
                return await work(self._open[network])
            except TableGone:
                # Without the filter all requests go to the resolver. A new filter gets the pairs granted by then.
                structlog.get_logger().warning("MAC filter is gone", network=network)
                self._drop(network)
                self.on_missing(network)
        return None

    def _drop(self, network: NetworkId) -> None:
        self._open.pop(network, None)
        self._full.discard(network)

    def lost(self, table: str | None) -> None:
        """Check the filters of this name (`None`: all) after a table was removed, perhaps by us."""
        for name in [name for name, one in self._open.items() if table in (None, one.table)]:
            self._suspect.add(name)
            self.on_missing(name)

    def tables(self) -> Collection[str]:
        return {mac_filter.table for mac_filter in self._open.values()}

    def namespace_of(self, network: NetworkId) -> NamespaceRef | None:
        """Return the namespace of a network's filter; `None` for the host's own, or without a filter."""
        mac_filter = self._open.get(network)
        return None if mac_filter is None else mac_filter.namespace

    def network_at(self, namespace: NamespaceRef | None, index: int) -> NetworkId | None:
        """Return the network whose guests use a device; `None` without a filter there."""
        network = self._devices.get((namespace, index))
        return network if network in self._open else None


def _is_shared(one: MacFilter, observed: ObservedHost) -> bool:
    name = name_of(one.namespace)
    seen = observed.root if name is None else observed.namespaces.get(name)
    return seen is not None and any(not each.ours for each in seen.sockets)


def _by_network(pairs: Iterable[tuple[AddressKey, _Mac]]) -> dict[NetworkId, dict[IpAddress, _Mac]]:
    found: dict[NetworkId, dict[IpAddress, _Mac]] = {}
    for (network, address), mac in pairs:
        found.setdefault(network, {})[address] = mac
    return found
