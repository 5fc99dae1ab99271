"""Where MAC filters are needed, and which address goes with which MAC. Pure.

HAProxy cannot see a client's MAC, so nf_tables sorts packets on each device that guests of a network use. Packets from
an address with its own MAC (a pair) are redirected to a port of their own, where HAProxy answers from its maps.
All others stay on the port that they were sent to, where HAProxy asks the resolver. Without a filter every request
goes to the resolver: nothing is trusted by accident.

    guest ─► port 80 ─► MAC filter ─┬─ a pair        ─► port 254 ─► maps
                                    └─ anything else ─► port 80  ─► resolver

Where the owner's record has no MAC, any MAC will do (`ANY_MAC`). While HAProxy's map says that an address belongs to an
instance, no pair but that instance's may exist for it: pairs are withdrawn before the map changes and granted after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from imdsproxy.core.endpoints import ENSLAVING, LOOPBACK, Endpoint
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedHost
from imdsproxy.core.identity import Learned, checks_macs, holds, port_at
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import IpAddress, MacAddress, Network, NetworkId
from imdsproxy.core.observation import AddressKey, Conflict, Expired
from imdsproxy.core.wire import VERIFIED_PORT

ANY_MAC: Final = MacAddress("*")
"""In place of a MAC: the owner's record has none."""

LEARNED_PER_MAC: Final = 16
"""Addresses that one MAC of a network can have at once; a guest may take as many as it likes."""

Pairs: TypeAlias = Mapping[AddressKey, MacAddress | None]
"""The MAC of each address; `None`: it has no pair."""

PairMap: TypeAlias = Mapping[IpAddress, MacAddress]
"""The MAC of each address of one network; `ANY_MAC` for any."""


@dataclass(frozen=True, slots=True)
class MacFilter:
    """The filter of one network, on all devices that its guests use.

    Attributes:
        namespace: Where; `None` is the host's own.
        devices: Names and indexes: another device may have the name next time.
        table: Its name in nf_tables, ours alone.
    """

    network: NetworkId
    namespace: NamespaceRef | None
    devices: tuple[tuple[str, int], ...]
    table: str


@dataclass(frozen=True, slots=True)
class MacFilterPlan:
    """What HAProxy binds, by who answers there.

    Attributes:
        plain: Answered from the maps, as in networks that check no MACs.
        verified: The same, behind a filter.
        unverified: Answered by the resolver.
        filters: By network.
    """

    plain: tuple[Endpoint, ...] = ()
    verified: tuple[Endpoint, ...] = ()
    unverified: tuple[Endpoint, ...] = ()
    filters: Mapping[NetworkId, MacFilter] = field(default_factory=dict)

    @property
    def plain_networks(self) -> frozenset[NetworkId]:
        """Networks in which MACs are not checked."""
        return frozenset(one.network for one in self.plain)

    @property
    def binds(self) -> tuple[Endpoint, ...]:
        """Everything that HAProxy listens on."""
        return (*self.plain, *self.verified, *self.unverified)

    def without(self, refused: Collection[NetworkId]) -> MacFilterPlan:
        """The same where the kernel has no filter for some networks: nothing is verified there."""
        return replace(
            self,
            verified=tuple(one for one in self.verified if one.network not in refused),
            filters={name: one for name, one in self.filters.items() if name not in refused},
        )


def plan_mac_filters(
    networks: Mapping[NetworkId, Network],
    endpoints: Iterable[Endpoint],
    observed: ObservedHost,
    naming: Naming,
    carries_macs: Callable[[NetworkId], bool],
) -> MacFilterPlan:
    """Which networks need a filter, and where.

    Args:
        networks: All of them.
        endpoints: What can be bound.
        observed: The host that they were planned from.
        naming: How our own tables are named.
        carries_macs: Whether a network's ports have MACs; where none has, nothing can be checked.
    """
    given = tuple(endpoints)
    checked = {
        name
        for name in {one.network for one in given} & networks.keys()
        if networks[name].checks_macs and carries_macs(name)
    }
    devices = {one: _devices(one, observed) for one in given if one.network in checked}
    filters: dict[NetworkId, MacFilter] = {}
    for one, some in devices.items():
        name = one.network
        before = filters[name].devices if name in filters else ()
        if both := tuple(dict.fromkeys((*before, *some))):
            filters[name] = MacFilter(name, one.namespace, both, naming.link(name))
    return MacFilterPlan(
        plain=tuple(one for one in given if one.network not in checked),
        verified=tuple(
            replace(one, port=VERIFIED_PORT, device=device, device_index=index)
            for one, some in devices.items()
            for device, index in some
        ),
        unverified=tuple(devices),
        filters=filters,
    )


def _devices(endpoint: Endpoint, observed: ObservedHost) -> tuple[tuple[str, int], ...]:
    """The devices on which packets for an endpoint arrive."""
    if endpoint.device is not None:
        return ((endpoint.device, endpoint.device_index),)
    if endpoint.namespace is None:
        return ()
    seen = observed.namespaces.get(endpoint.namespace.name)
    if seen is None:
        return ()
    kinds = {one.index: one.kind for one in seen.devices.values()}
    # IPv4 is answered on every device, wherever the address is; but only what has a MAC can be checked.
    return tuple(
        (one.name, one.index)
        for one in sorted(seen.devices.values(), key=lambda one: one.index)
        if one.name != LOOPBACK and one.mac and one.up and kinds.get(one.master) not in ENSLAVING
    )


def plan_pair(
    inventory: Inventory, key: AddressKey, learned: Mapping[AddressKey, Learned]
) -> MacAddress | None:
    """The MAC that must have an address, `ANY_MAC`, or `None` where its owner is unknown or MACs are not checked."""
    if not checks_macs(inventory, key[0]):
        return None
    owner = inventory.owner(key)
    if isinstance(owner, Expired):
        # HAProxy answers its guest, with 503.
        owner = owner.instance
    if isinstance(owner, Conflict):
        return None
    if owner is None:
        entry = learned.get(key)
        return entry.mac if entry is not None and holds(inventory, key, entry) else None
    instance = inventory.instances.get(owner)
    port = None if instance is None else port_at(instance, key)
    if port is None:
        return None
    return port.mac or ANY_MAC


def plan_pairs(
    inventory: Inventory, keys: Iterable[AddressKey], learned: Mapping[AddressKey, Learned]
) -> dict[AddressKey, MacAddress | None]:
    """`plan_pair` for many addresses."""
    return {key: plan_pair(inventory, key, learned) for key in keys}


def excess_learned(
    learned: Mapping[AddressKey, Learned], key: AddressKey, mac: MacAddress
) -> tuple[AddressKey, ...]:
    """Addresses to forget, the oldest first, so that a MAC has no more than its share of learned ones."""
    others = [
        one
        for one, entry in learned.items()
        if entry.mac == mac and one[0] == key[0] and one != key
    ]
    return tuple(others[: max(0, len(others) + 1 - LEARNED_PER_MAC)])
