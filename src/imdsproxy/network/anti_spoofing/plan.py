"""Planner for MAC filters, and for the pairs of address and MAC that they let through. Pure.

HAProxy cannot see a client's MAC, so nf_tables sorts packets on each device that guests of a network use. It redirects
packets from an address with its own MAC (a pair) to a separate port, where HAProxy answers from its maps. All other
packets stay on their port, where HAProxy asks the resolver. Without a filter every request goes to the resolver: no
guest is trusted by accident.

    guest ─► port 80 ─► MAC filter ─┬─ a pair        ─► port 254 ─► maps
                                    └─ anything else ─► port 80  ─► resolver

If the owner's record has no MAC, any MAC is accepted (`ANY_MAC`). While HAProxy's map assigns an address to an
instance, only that instance's pair may exist for the address: pairs are withdrawn before the map changes, and granted
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from imdsproxy.host.names import Naming
from imdsproxy.host.state import NamespaceRef, ObservedHost
from imdsproxy.model.entities import IpAddress, MacAddress, Network, NetworkId
from imdsproxy.model.identity import Learned, checks_macs, holds, port_at
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Conflict, Expired
from imdsproxy.model.wire import VERIFIED_PORT
from imdsproxy.network.planned import ENSLAVING, LOOPBACK, Endpoint

ANY_MAC: Final = MacAddress("*")
"""Value in place of a MAC if the owner's record has none."""

LEARNED_PER_MAC: Final = 16
"""Maximum number of learned addresses per MAC and network, because a guest can take any number of addresses."""

Pairs: TypeAlias = Mapping[AddressKey, MacAddress | None]
"""MACs by address; `None` for an address without a pair."""

PairMap: TypeAlias = Mapping[IpAddress, MacAddress]
"""MACs by address in one network; `ANY_MAC` for any MAC."""


def plan_pair(
    inventory: Inventory, key: AddressKey, learned: Mapping[AddressKey, Learned]
) -> MacAddress | None:
    """Return the MAC for an address, `ANY_MAC`, or `None` if its owner is unknown or MACs are not checked."""
    if not checks_macs(inventory, key[0]):
        return None
    owner = inventory.owner(key)
    if isinstance(owner, Expired):
        # HAProxy itself answers the guest of an expired instance, with 503.
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
    return {key: plan_pair(inventory, key, learned) for key in keys}


def excess_learned(
    learned: Mapping[AddressKey, Learned], key: AddressKey, mac: MacAddress
) -> tuple[AddressKey, ...]:
    """Return the learned addresses to forget, oldest first, so that a MAC does not exceed `LEARNED_PER_MAC`."""
    others = [
        one
        for one, entry in learned.items()
        if entry.mac == mac and one[0] == key[0] and one != key
    ]
    return tuple(others[: max(0, len(others) + 1 - LEARNED_PER_MAC)])


@dataclass(frozen=True, slots=True)
class MacFilter:
    """Filter of one network, on all devices that its guests use.

    Attributes:
        devices: Names and indexes of the devices; the index detects a new device with an old name.
    """

    network: NetworkId
    namespace: NamespaceRef | None
    devices: tuple[tuple[str, int], ...]
    table: str


@dataclass(frozen=True, slots=True)
class MacFilterPlan:
    """Endpoints that HAProxy binds, by the component that answers, and their filters.

    Attributes:
        plain: Endpoints answered from the maps, in networks without MAC checks.
        verified: Endpoints behind a filter, answered from the maps.
        unverified: Endpoints answered by the resolver.
    """

    plain: tuple[Endpoint, ...] = ()
    verified: tuple[Endpoint, ...] = ()
    unverified: tuple[Endpoint, ...] = ()
    filters: Mapping[NetworkId, MacFilter] = field(default_factory=dict)

    @property
    def plain_networks(self) -> frozenset[NetworkId]:
        return frozenset(one.network for one in self.plain)

    @property
    def binds(self) -> tuple[Endpoint, ...]:
        return (*self.plain, *self.verified, *self.unverified)

    def without(self, refused: Collection[NetworkId]) -> MacFilterPlan:
        """Return the plan without filters for some networks, in which then no request is verified."""
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
    """Plan the filters that networks need, and the endpoints.

    Args:
        carries_macs: Returns whether a network's ports have MACs; without MACs nothing can be checked.
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
    if endpoint.device is not None:
        return ((endpoint.device, endpoint.device_index),)
    if endpoint.namespace is None:
        return ()
    seen = observed.namespaces.get(endpoint.namespace.name)
    if seen is None:
        return ()
    kinds = {one.index: one.kind for one in seen.devices.values()}
    # IPv4 is answered on every device, wherever the address is. Only devices with a MAC can be checked.
    return tuple(
        (one.name, one.index)
        for one in sorted(seen.devices.values(), key=lambda one: one.index)
        if one.name != LOOPBACK and one.mac and one.up and kinds.get(one.master) not in ENSLAVING
    )
