"""Claims of instances on the addresses of networks, and of networks on listeners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from itertools import zip_longest
from typing import TypeAlias

from imdsproxy.errors import Problem
from imdsproxy.model.addresses import from_number, link_local_of, to_number
from imdsproxy.model.entities import (
    BridgeListener,
    Instance,
    InstanceId,
    InterfaceListener,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.packed import ClaimingPort
from imdsproxy.model.records.schema import Path, render_path

_Claimants: TypeAlias = "InstanceId | frozenset[InstanceId]"
"""A single claimant is stored without a set, because sets cost memory and most addresses have one claimant."""


class Claims:
    """Claimants by address, stored as a number (`to_number`); contested addresses have more than one claimant."""

    __slots__ = ("_networks", "contested")

    def __init__(self) -> None:
        self._networks: dict[NetworkId, dict[int, _Claimants]] = {}
        self.contested: set[AddressKey] = set()

    def items(self) -> Iterator[tuple[AddressKey, _Claimants]]:
        """Yield every claimed address with its claimants; changes during the iteration are allowed."""
        # Networks come in the order of map keys (`controller.record_plan.record_key`).
        for network in sorted(self._networks, key=lambda one: f"{one}/"):
            for number in tuple(self._networks.get(network, ())):
                found = self._networks.get(network, {}).get(number)
                if found is not None:
                    yield (network, from_number(number)), found

    def __len__(self) -> int:
        return sum(map(len, self._networks.values()))

    def of(self, key: AddressKey) -> frozenset[InstanceId]:
        return _as_set(self.owner(key))

    def owner(self, key: AddressKey) -> _Claimants | None:
        """Return the only claimant of an address, or all claimants if it is contested."""
        claims = self._networks.get(key[0])
        return None if claims is None else claims.get(to_number(key[1]))

    def networks(self) -> KeysView[NetworkId]:
        return self._networks.keys()

    def within(self, network: NetworkId) -> Iterator[InstanceId]:
        """Yield the claimants of a network's addresses, each at least once."""
        for found in self._networks.get(network, {}).values():
            yield from _as_set(found)

    def add(self, instance: InstanceId, key: AddressKey) -> None:
        claims, number = self._networks.setdefault(key[0], {}), to_number(key[1])
        if number not in claims:
            claims[number] = instance
        else:
            claims[number] = self.of(key) | {instance}
            self.contested.add(key)

    def remove(self, instance: InstanceId, key: AddressKey) -> None:
        claims, number = self._networks[key[0]], to_number(key[1])
        left = self.of(key) - {instance}
        if len(left) > 1:
            claims[number] = left
            return
        self.contested.discard(key)
        del claims[number]
        for one in left:
            claims[number] = one
        if not claims:
            del self._networks[key[0]]


def _as_set(claimants: _Claimants | None) -> frozenset[InstanceId]:
    if isinstance(claimants, frozenset):
        return claimants
    return frozenset() if claimants is None else frozenset((claimants,))


def claim_places(instance: Instance) -> Iterator[tuple[AddressKey, tuple[str | int, ...]]]:
    """Yield each address that the record claims, its MACs' link-local ones included, with its place in the record."""
    for number, port in enumerate(instance.ports):
        for index, address in enumerate(port.addresses):
            yield (port.network, address), ("ports", number, "addresses", index)
        if port.mac is not None:
            yield (port.network, link_local_of(port.mac)), ("ports", number, "mac")


def address_keys(instance: Instance) -> frozenset[AddressKey]:
    return frozenset(key for key, _ in claim_places(instance))


def claimed_keys(ports: Iterable[ClaimingPort]) -> set[AddressKey]:
    keys: set[AddressKey] = set()
    for network, mac, addresses in ports:
        for address in addresses if mac is None else (*addresses, link_local_of(mac)):
            keys.add((network, address))
    return keys


def taken_address(
    instance: Instance,
    address: AddressKey,
    holder: str,
    *,
    path: Path = (),
    place: str = "",
    file: str | None = None,
    lines: tuple[int | None, ...] = (),
) -> Problem:
    """Return the problem of an instance that claims another's address; `lines` are in the order of `claim_places`."""
    network, shown = address
    claims = zip_longest(claim_places(instance), lines)
    part, line = next((claim[1], line) for claim, line in claims if claim[0] == address)
    what = f"{shown} in network {network}"
    if part[-1] == "mac":
        what = f"the MAC's link-local address {what}"
    where = f" ({place})" if place else ""
    return Problem(
        render_path((*path, *part)),
        f"{what} belongs to instance {holder}{where}",
        "change one of the two, or remove it",
        file,
        line,
    )


def taken_id(
    key: str, *, path: Path, place: str, file: str | None = None, line: int | None = None
) -> Problem:
    """Return the problem of a record whose id another record, at `place`, has."""
    return Problem(
        render_path((*path, "id")), f"{key} is also in {place}", "keep one of the two", file, line
    )


def listener_place(network: Network) -> tuple[str, str | None]:
    """Return the place of a network's listener, and the device in the place; `None` stands for all devices.

    The place is a device of the host, or a namespace, by name.
    """
    match network.listener:
        case NamespaceListener(namespace, device):
            return f"namespace {namespace}", device
        case InterfaceListener(device) | BridgeListener(device):
            return f"device {device}", None


def find_shared(
    networks: Iterable[Network],
    first: Mapping[NetworkId, Network],
    inode_of: Callable[[str], int | None] = lambda _: None,
) -> dict[NetworkId, NetworkId]:
    """Return the networks whose listener another network has, each with that other network.

    Args:
        first: Networks as HAProxy is configured for them. An unchanged network keeps its listener; among the others,
            the first by id gets the listener.
        inode_of: Returns the inode of a namespace: two names may lead to one namespace (`ip netns attach`).
    """

    def unchanged(network: Network) -> bool:
        known = first.get(network.id)
        return known is not None and known.listener == network.listener

    places: dict[str | int, dict[str | None, NetworkId]] = {}
    shared: dict[NetworkId, NetworkId] = {}
    for network in sorted(networks, key=lambda one: (not unchanged(one), one.id)):
        place, device = listener_place(network)
        named = isinstance(network.listener, NamespaceListener) and network.listener.namespace
        inode = inode_of(named) if named else None
        taken = places.setdefault(place if inode is None else inode, {})
        holder = taken.get(None) or taken.get(device)
        if holder is None and device is None:
            holder = next(iter(taken.values()), None)
        if holder is None:
            taken[device] = network.id
        else:
            shared[network.id] = holder
    return shared
