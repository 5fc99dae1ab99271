"""Which instances claim an address of a network, and what several sources agree on that report one record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView
from dataclasses import replace
from typing import TypeAlias, TypeVar

from imdsproxy.core.addresses import from_number, link_local_of, to_number
from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId
from imdsproxy.core.observation import AddressKey

_V = TypeVar("_V")
_Number: TypeAlias = int
"""`to_number` of an address."""


class Claims:
    """Who claims an address. One claimant is the rule and is stored bare: a set each is dear.

    Attributes:
        contested: The addresses that more than one claims.
    """

    __slots__ = ("_networks", "contested")

    def __init__(self) -> None:
        self._networks: dict[NetworkId, dict[_Number, InstanceId | frozenset[InstanceId]]] = {}
        self.contested: set[AddressKey] = set()

    def items(self) -> Iterator[tuple[AddressKey, InstanceId | frozenset[InstanceId]]]:
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
        found = self.owner(key)
        if found is None:
            return frozenset()
        return found if isinstance(found, frozenset) else frozenset((found,))

    def owner(self, key: AddressKey) -> InstanceId | frozenset[InstanceId] | None:
        """The one who claims it, or all where it is contested."""
        claims = self._networks.get(key[0])
        return None if claims is None else claims.get(to_number(key[1]))

    def networks(self) -> KeysView[NetworkId]:
        """Those of which any address is claimed."""
        return self._networks.keys()

    def within(self, network: NetworkId) -> Iterator[InstanceId]:
        """Who claims any address of a network, each at least once."""
        for found in self._networks.get(network, {}).values():
            if isinstance(found, frozenset):
                yield from found
            else:
                yield found

    def replace(
        self, instance: InstanceId, before: frozenset[AddressKey], after: frozenset[AddressKey]
    ) -> None:
        """Have an instance claim `after`, where it claimed `before`."""
        for key in before - after:
            self._store(key, self.of(key) - {instance})
        for key in after - before:
            self.add(instance, key[0], to_number(key[1]))

    def add(self, instance: InstanceId, network: NetworkId, number: _Number) -> None:
        """Have an instance claim one more address, given as its number."""
        claims = self._networks.setdefault(network, {})
        if number in claims:
            key = network, from_number(number)
            self._store(key, self.of(key) | {instance})
        else:
            claims[number] = instance

    def _store(self, key: AddressKey, claimants: frozenset[InstanceId]) -> None:
        network, number = key[0], to_number(key[1])
        claims = self._networks.setdefault(network, {})
        claims.pop(number, None)
        self.contested.discard(key)
        if len(claimants) > 1:
            claims[number] = claimants
            self.contested.add(key)
        elif claimants:
            (claims[number],) = claimants
        if not claims:
            del self._networks[network]


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


def distinct(records: Iterable[_V | None]) -> tuple[_V, ...]:
    """The different ones, in their order; a plain list search, for there are as many as sources."""
    found: list[_V] = []
    for record in records:
        if record is not None and record not in found:
            found.append(record)
    return tuple(found)


def without_vaguer(versions: tuple[Instance, ...]) -> tuple[Instance, ...]:
    """Those of which no other says the same and, beside it, when the instance was made."""
    if len(versions) == 1:
        return versions
    dated = [version for version in versions if version.created_at is not None]
    known = [replace(version, created_at=None) for version in dated]
    return tuple(
        version for version in versions if version.created_at is not None or version not in known
    )


def agreed(versions: tuple[Network, ...]) -> Network | None:
    """What all versions of a network agree on, if that is enough for a listener."""
    if len(versions) == 1:
        return versions[0]
    if len({version.listener for version in versions}) == 1:
        checked = any(version.mac_check for version in versions)
        return Network(versions[0].id, versions[0].listener, mac_check=checked)
    return None
