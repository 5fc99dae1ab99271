"""Which guest is it? From the listener's network and the peer address that the kernel reports.

Never from anything that the guest sends (design §3.1). Where the network checks MACs, the MAC that the
neighbour table has for the address counts too:

- A port that lists addresses of a family has exactly those in that family, and only together with its MAC.
- A port that lists none of a family has whatever address its MAC has in that family.

A link-local address that no record claims is looked up by MAC in every network: guests with privacy addresses
(RFC 7217, RFC 8981) have no EUI-64 one.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from imdsproxy.core.addresses import link_local_of, mac_of, normalise_address
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, IpAddress, MacAddress, NetworkId, Port
from imdsproxy.core.observation import AddressKey, Claimant, Conflict, Expired


class How(StrEnum):
    """By what a guest was known."""

    ADDRESS = "address"
    EUI64 = "eui64"
    NEIGHBOUR = "neighbour"
    ROUTER = "router"


class UnknownReason(StrEnum):
    """Why no instance was found."""

    NETWORK = "no such network"
    ADDRESS = "no instance has the address in this network"
    MAC = "no instance has the address, nor the MAC that the neighbour table has for it"
    OTHER_ADDRESS = "no instance has the address; the port with its MAC lists others of this family"


@dataclass(frozen=True, slots=True)
class Found:
    """One instance, by one of its ports."""

    instance: Instance
    port: Port
    how: How


@dataclass(frozen=True, slots=True)
class Unknown:
    """No instance; in a source that is not in sync it may still come."""

    reason: UnknownReason


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """More than one record claims it: answered 503, never guessed."""

    claimants: tuple[Claimant, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The address is an instance's, and another MAC than its port's has it: answered 403.

    Attributes:
        expected: The MAC of its port.
    """

    instance: Instance
    expected: MacAddress


class Denial(StrEnum):
    """Why a guest gets no document, as metrics name it, and with which HTTP status: the only place that decides it."""

    UNKNOWN = "unknown"
    UNAVAILABLE = "unavailable"
    """It cannot be found out now, or it is found and not in force yet."""
    CONFLICT = "conflict"
    MISMATCH = "mismatch"
    OVER_LIMIT = "over-limit"
    """Too many requests of unknown addresses are waiting."""

    @property
    def status(self) -> int:
        """Of the answer to the guest."""
        return {Denial.UNKNOWN: 404, Denial.MISMATCH: 403}.get(self, 503)


Identity: TypeAlias = Found | Unknown | Ambiguous | Mismatch | Expired


@dataclass(frozen=True, slots=True)
class Learned:
    """An address that no record claims, given to an instance until it is looked up again.

    Attributes:
        until: When, by the monotonic clock in seconds.
        via: For an address behind a router: the address in its own network by which the instance is known;
            the two stand and fall together. `None` where it came from the neighbour table.
        mac: The neighbour table's.
    """

    instance: InstanceId
    until: float
    via: AddressKey | None = None
    mac: MacAddress | None = None


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
            Where the network does not check MACs it counts for link-local addresses only: another
            address may be a router's, whose MAC is not the guest's.
    """
    if not inventory.knows(network):
        return Unknown(UnknownReason.NETWORK)
    address = normalise_address(address)
    owner = inventory.owner((network, address))
    if isinstance(owner, Conflict):
        return Ambiguous(owner.claimants)
    if isinstance(owner, Expired):
        return owner
    checked = checks_macs(inventory, network)
    if owner is not None:
        return _found(
            inventory.instances[owner], network, address, neighbour_mac if checked else None
        )
    if neighbour_mac is None or not (checked or address.is_link_local):
        return Unknown(UnknownReason.ADDRESS)
    return _by_neighbour(inventory, network, address, neighbour_mac)


def deny(identity: Unknown | Ambiguous | Mismatch | Expired, *, in_sync: bool) -> Denial:
    """Why the guest is denied.

    Args:
        identity: What was found.
        in_sync: All sources have reported what they have: an unknown address is not just late.
    """
    match identity:
        case Ambiguous():
            return Denial.CONFLICT
        case Mismatch():
            return Denial.MISMATCH
        case Expired():
            return Denial.UNAVAILABLE
        case Unknown():
            return Denial.UNKNOWN if in_sync else Denial.UNAVAILABLE


def checks_macs(inventory: Inventory, network: NetworkId) -> bool:
    """Whether an address counts only together with its MAC; never in a network that is only vouched for."""
    record = inventory.networks.get(network)
    return record is not None and record.checks_macs


def holds(inventory: Inventory, key: AddressKey, entry: Learned) -> bool:
    """Whether what was learned is so by what is known now, were it looked up."""
    if entry.via is not None:
        return inventory.owner(entry.via) == entry.instance
    if entry.mac is None:
        return True
    identity = identify(inventory, *key, neighbour_mac=entry.mac)
    return isinstance(identity, Found) and identity.instance.id == entry.instance


def port_at(instance: Instance, key: AddressKey) -> Port | None:
    """The instance's port that lists an address, or whose MAC makes it."""
    network, address = key
    ports = [port for port in instance.ports if port.network == network]
    for port in ports:
        if address in port.addresses:
            return port
    mac = mac_of(address)
    return next((port for port in ports if mac is not None and port.mac == mac), None)


def _found(
    instance: Instance, network: NetworkId, address: IpAddress, seen: MacAddress | None
) -> Identity:
    port = port_at(instance, (network, address))
    if port is None:
        return Unknown(UnknownReason.ADDRESS)
    if seen is not None and port.mac is not None and seen != port.mac:
        return Mismatch(instance, port.mac)
    return Found(instance, port, How.ADDRESS if address in port.addresses else How.EUI64)


def _by_neighbour(
    inventory: Inventory, network: NetworkId, address: IpAddress, mac: MacAddress
) -> Identity:
    # The MAC's own link-local address has the same owner, and all of the rules for contested ones.
    owner = inventory.owner((network, link_local_of(mac)))
    if isinstance(owner, Conflict):
        return Ambiguous(owner.claimants)
    if isinstance(owner, Expired):
        return owner
    if owner is None:
        return Unknown(UnknownReason.MAC)
    instance = inventory.instances[owner]
    for port in instance.ports:
        if port.network == network and port.mac == mac:
            if not address.is_link_local and _lists(port, address.version):
                return Unknown(UnknownReason.OTHER_ADDRESS)
            return Found(instance, port, How.NEIGHBOUR)
    return Unknown(UnknownReason.MAC)


def _lists(port: Port, version: int) -> bool:
    """Whether the port has addresses of a family; a link-local one does not say where its others are."""
    return any(one.version == version and not one.is_link_local for one in port.addresses)
