"""Identification of a guest by the listener's network and the peer address that the kernel reports.

Nothing that the guest sends is used (design §3.1). If the network checks MACs, the address's MAC in the neighbour table
counts too:

- A port that lists addresses of a family has only those in that family, and only together with its MAC.
- A port that lists no address of a family has any address of its MAC in that family.

A link-local address that no record claims is looked up by MAC in every network: guests with privacy addresses (RFC
7217, RFC 8981) have no EUI-64 address.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from imdsproxy.model.addresses import link_local_of, mac_of, normalise_address
from imdsproxy.model.entities import Instance, InstanceId, IpAddress, MacAddress, NetworkId, Port
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Claimant, Conflict, Expired


class How(StrEnum):
    ADDRESS = "address"
    EUI64 = "eui64"
    NEIGHBOUR = "neighbour"
    ROUTER = "router"


class UnknownReason(StrEnum):
    NETWORK = "no such network"
    ADDRESS = "no instance has the address in this network"
    MAC = "no instance has the address, nor the MAC that the neighbour table has for it"
    OTHER_ADDRESS = "no instance has the address; the port with its MAC lists others of this family"


@dataclass(frozen=True, slots=True)
class Found:
    instance: Instance
    port: Port
    how: How


@dataclass(frozen=True, slots=True)
class Unknown:
    """No instance. While a source is not in sync, it may still report one."""

    reason: UnknownReason


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Several records claim the address: answered 503, never guessed."""

    claimants: tuple[Claimant, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Address of an instance, used by another MAC than its port's: answered 403."""

    instance: Instance
    expected: MacAddress


class Denial(StrEnum):
    """Reason why a guest gets no document, as metrics name it. Only this class decides the HTTP status."""

    UNKNOWN = "unknown"
    UNAVAILABLE = "unavailable"
    """The guest cannot be identified now, or its record is not in force yet."""
    CONFLICT = "conflict"
    MISMATCH = "mismatch"
    OVER_LIMIT = "over-limit"
    """Too many requests of unknown addresses are waiting."""

    @property
    def status(self) -> int:
        return {Denial.UNKNOWN: 404, Denial.MISMATCH: 403}.get(self, 503)


Identity: TypeAlias = Found | Unknown | Ambiguous | Mismatch | Expired


@dataclass(frozen=True, slots=True)
class Learned:
    """Address that no record claims, assigned to an instance until the next lookup.

    Attributes:
        until: Expiry, by the monotonic clock in seconds.
        via: For an address behind a router: the address in its own network that identifies the instance; the entry is
            valid only while that address is. `None` for an address from the neighbour table.
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
    """Return the instance that has `address` in `network`.

    Args:
        address: Peer address from the kernel (mapped and scoped forms are normalised).
        neighbour_mac: MAC of the address in the neighbour table of the listener's namespace. If the network does not
            check MACs, it counts for link-local addresses only: another address may be behind a router, and the MAC is
            then the router's.
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
    """Return the reason why the guest is denied; until sources are `in_sync`, an unknown address may be late."""
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
    """Return whether an address counts only together with its MAC; false for a network that is only implied."""
    record = inventory.networks.get(network)
    return record is not None and record.checks_macs


def holds(inventory: Inventory, key: AddressKey, entry: Learned) -> bool:
    """Return whether a new lookup would give the learned entry again."""
    if entry.via is not None:
        return inventory.owner(entry.via) == entry.instance
    if entry.mac is None:
        return True
    identity = identify(inventory, *key, neighbour_mac=entry.mac)
    return isinstance(identity, Found) and identity.instance.id == entry.instance


def port_at(instance: Instance, key: AddressKey) -> Port | None:
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
    # The link-local address of the MAC has the same owner, and the rules for contested addresses apply to it.
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
    """Return whether the port lists addresses of a family; a link-local address does not count."""
    return any(one.version == version and not one.is_link_local for one in port.addresses)
