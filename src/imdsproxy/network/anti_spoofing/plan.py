"""Planner for the pairs of address and MAC that MAC filters (`network.endpoints`) let through. Pure.

If the owner's record has no MAC, any MAC is accepted (`ANY_MAC`). While HAProxy's map assigns an address to an
instance, only that instance's pair may exist for the address: pairs are withdrawn before the map changes, and granted
afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

from imdsproxy.model.entities import IpAddress, MacAddress
from imdsproxy.model.identity import Learned, checks_macs, holds, port_at
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Conflict, Expired

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
