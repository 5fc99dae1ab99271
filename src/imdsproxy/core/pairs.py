"""Which address goes with which MAC: what the kernel lets through to the data plane's quick answers.

A pair is an address of a network and the MAC that must have it. Where no MAC is known of the owner, any will do
(`ANY_MAC`). An address without a pair is answered by the resolver, which asks the neighbour table (`core.identity`).

While HAProxy's map says that an address is an instance's, no pair may stand for it but that instance's: pairs are
withdrawn before the map changes, and granted after it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from imdsproxy.core.identity import Learned, checks_macs, holds, port_at
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import MacAddress
from imdsproxy.core.observation import AddressKey, Conflict

ANY_MAC: Final = MacAddress("*")
"""In place of a MAC: the owner's record has none."""

LEARNED_PER_MAC: Final = 16
"""Addresses that one MAC of a network can have at once; a guest may take as many as it likes."""

Pairs = Mapping[AddressKey, MacAddress | None]
"""What each address goes with; `None`: it has no pair."""


def plan_pair(
    inventory: Inventory, key: AddressKey, learned: Mapping[AddressKey, Learned]
) -> MacAddress | None:
    """The MAC that must have an address, `ANY_MAC`, or `None` where it is not known whose it is."""
    if not checks_macs(inventory, key[0]):
        return None
    owner = inventory.owner(key)
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
    """`plan_pair` for many addresses; those of networks that check no MACs have none."""
    return {key: plan_pair(inventory, key, learned) for key in keys}


def excess_learned(
    learned: Mapping[AddressKey, Learned], key: AddressKey, mac: MacAddress
) -> tuple[AddressKey, ...]:
    """Who must go, the oldest first, so that a MAC has no more than its share of learned addresses."""
    others = [
        one
        for one, entry in learned.items()
        if entry.mac == mac and one[0] == key[0] and one != key
    ]
    return tuple(others[: max(0, len(others) + 1 - LEARNED_PER_MAC)])
