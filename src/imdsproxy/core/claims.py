"""Which instances claim an address of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView
from typing import TypeAlias

from imdsproxy.core.addresses import from_number, link_local_of, to_number
from imdsproxy.core.model import Instance, InstanceId, NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.packed import ClaimingPort

_Claimants: TypeAlias = "InstanceId | frozenset[InstanceId]"
"""One is the rule and is stored bare: a set each is dear."""


class Claims:
    """Who claims an address; addresses are kept as numbers (`to_number`).

    Attributes:
        contested: The addresses that more than one claims.
    """

    __slots__ = ("_networks", "contested")

    def __init__(self) -> None:
        self._networks: dict[NetworkId, dict[int, _Claimants]] = {}
        self.contested: set[AddressKey] = set()

    def items(self) -> Iterator[tuple[AddressKey, _Claimants]]:
        """Every address that is claimed, and by whom; others may change that meanwhile."""
        # In the order of map keys (`core.plan.record_key`), as far as the networks go.
        for network in sorted(self._networks, key=lambda one: f"{one}/"):
            for number in tuple(self._networks.get(network, ())):
                found = self._networks.get(network, {}).get(number)
                if found is not None:
                    yield (network, from_number(number)), found

    def __len__(self) -> int:
        return sum(map(len, self._networks.values()))

    def of(self, key: AddressKey) -> frozenset[InstanceId]:
        """All who claim it."""
        return _as_set(self.owner(key))

    def owner(self, key: AddressKey) -> _Claimants | None:
        """The one who claims it, or all where it is contested."""
        claims = self._networks.get(key[0])
        return None if claims is None else claims.get(to_number(key[1]))

    def networks(self) -> KeysView[NetworkId]:
        """Those of which any address is claimed."""
        return self._networks.keys()

    def within(self, network: NetworkId) -> Iterator[InstanceId]:
        """Who claims any address of a network, each at least once."""
        for found in self._networks.get(network, {}).values():
            yield from _as_set(found)

    def add(self, instance: InstanceId, key: AddressKey) -> None:
        """Have an instance claim one more address."""
        claims, number = self._networks.setdefault(key[0], {}), to_number(key[1])
        if number not in claims:
            claims[number] = instance
        else:
            claims[number] = self.of(key) | {instance}
            self.contested.add(key)

    def remove(self, instance: InstanceId, key: AddressKey) -> None:
        """Have an instance not claim an address any more."""
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
    """Each address that the record claims, its MACs' link-local ones too, and the part of the record that does so."""
    for number, port in enumerate(instance.ports):
        for index, address in enumerate(port.addresses):
            yield (port.network, address), ("ports", number, "addresses", index)
        if port.mac is not None:
            yield (port.network, link_local_of(port.mac)), ("ports", number, "mac")


def address_keys(instance: Instance) -> frozenset[AddressKey]:
    """Every (network, address) that the instance is known by."""
    return frozenset(key for key, _ in claim_places(instance))


def claimed_keys(ports: Iterable[ClaimingPort]) -> set[AddressKey]:
    """Every (network, address) that ports claim."""
    keys: set[AddressKey] = set()
    for network, mac, addresses in ports:
        for address in addresses if mac is None else (*addresses, link_local_of(mac)):
            keys.add((network, address))
    return keys
