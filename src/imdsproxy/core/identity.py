"""Which guest is it? From the listener's network and the peer address that the kernel reports.

Never from anything that the guest sends (design §3.1). A link-local address that no record claims
is looked up by the MAC that the neighbour table has for it: guests with privacy addresses (RFC
7217, RFC 8981) have no EUI-64 one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from imdsproxy.core.addresses import link_local_of, mac_of, normalise_address
from imdsproxy.core.inventory import AddressKey, Claimant, Conflict, Inventory

if TYPE_CHECKING:
    from imdsproxy.core.model import (
        Instance,
        InstanceId,
        IpAddress,
        MacAddress,
        NetworkId,
        Port,
    )

__all__ = [
    "Ambiguous",
    "Found",
    "How",
    "Identity",
    "Learned",
    "Unknown",
    "UnknownReason",
    "identify",
    "link_local_of",
    "mac_of",
    "normalise_address",
]


class How(StrEnum):
    """By what a guest was known."""

    ADDRESS = "address"
    EUI64 = "eui64"
    NEIGHBOUR = "neighbour"
    ROUTER = "router"


class UnknownReason(StrEnum):
    """Why nobody was found."""

    NETWORK = "no such network"
    ADDRESS = "no instance has the address in this network"
    MAC = "no instance has the address, nor the MAC that the neighbour table has for it"


@dataclass(frozen=True, slots=True)
class Found:
    """One instance, by one of its ports."""

    instance: Instance
    port: Port
    how: How


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nobody; in a source that is not in sync it may still come."""

    reason: UnknownReason


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """More than one record claims it: answered 503, never guessed."""

    claimants: tuple[Claimant, ...]


Identity: TypeAlias = Found | Unknown | Ambiguous


@dataclass(frozen=True, slots=True)
class Learned:
    """An address that no record claims, given to an instance until somebody looks again.

    Attributes:
        until: When, by the monotonic clock in seconds.
        via: For an address behind a router: the address in its own network by which the instance is known;
            the two stand and fall together. `None` where the neighbour table told.
    """

    instance: InstanceId
    until: float
    via: AddressKey | None = None


def identify(
    inventory: Inventory,
    network: NetworkId,
    address: IpAddress,
    *,
    neighbour_mac: MacAddress | None = None,
) -> Identity:
    """Who has `address` in `network`.

    Args:
        inventory: Everything known.
        network: The listener's network.
        address: The peer address, as the kernel gives it (mapped and scoped forms are normalised).
        neighbour_mac: What the neighbour table of the listener's namespace has for the address.
            Only asked for link-local addresses: another address may be a router's, whose MAC is not
            the guest's.
    """
    if not inventory.knows(network):
        return Unknown(UnknownReason.NETWORK)
    address = normalise_address(address)
    owner = inventory.owner((network, address))
    if isinstance(owner, Conflict):
        return Ambiguous(owner.claimants)
    if owner is not None:
        return _found(inventory, owner, network, address)
    if neighbour_mac is None or not address.is_link_local:
        return Unknown(UnknownReason.ADDRESS)
    return _by_neighbour(inventory, network, neighbour_mac)


def _found(
    inventory: Inventory, owner: InstanceId, network: NetworkId, address: IpAddress
) -> Identity:
    instance = inventory.instances[owner]
    mac = mac_of(address)
    ports = [port for port in instance.ports if port.network == network]
    for port in ports:
        if address in port.addresses:
            return Found(instance, port, How.ADDRESS)
    for port in ports:
        if mac is not None and port.mac == mac:
            return Found(instance, port, How.EUI64)
    return Unknown(UnknownReason.ADDRESS)


def _by_neighbour(inventory: Inventory, network: NetworkId, mac: MacAddress) -> Identity:
    # The MAC's own link-local address has the same owner, and all of the rules for contested ones.
    owner = inventory.owner((network, link_local_of(mac)))
    if isinstance(owner, Conflict):
        return Ambiguous(owner.claimants)
    if owner is None:
        return Unknown(UnknownReason.MAC)
    instance = inventory.instances[owner]
    for port in instance.ports:
        if port.network == network and port.mac == mac:
            return Found(instance, port, How.NEIGHBOUR)
    return Unknown(UnknownReason.MAC)
