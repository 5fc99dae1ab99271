"""Planner for the namespaces and ports that OVN's networks need on this host. Pure.

The layout is that of Neutron's agent, so that either can take over from the other (neutron/agent/ovn/metadata/agent.py,
`provision_datapath`):

    integration bridge ── tap<10>0 ══veth══ tap<10>1 in namespace ovnmeta-NETWORK: the metadata port's MAC and addresses

`<10>` is the first ten characters of the network's id. The inner device also has the metadata addresses.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, ip_interface
from typing import Final

from imdsproxy.host.state import Family, ObservedDevice
from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import MacAddress, NetworkId
from imdsproxy.sources.ovn.chassis import BridgePort, LocalChassis
from imdsproxy.sources.ovn.ports import (
    IpInterface,
    OvnKnown,
    devices_of,
    namespace_of,
)

NAMESPACE_PREFIX: Final = "ovnmeta-"
_DATAPATH_IN_USER_SPACE: Final = "netdev"
_LINK_LOCAL_BITS: Final = 64
_METADATA: Final = tuple(family.metadata_address for family in Family)


@dataclass(frozen=True, slots=True)
class MetadataPlace:
    """Planned namespace and devices of a network on this host.

    Attributes:
        port: Id of the network's metadata port, to which the device on the bridge belongs.
        mtu: MTU in bytes; `None` leaves the MTU unchanged.
        interfaces: Addresses of the metadata port in subnets that have ports here, its link-local address, and the
            metadata addresses.
        bridge: Integration bridge.
        in_user_space: Whether Open vSwitch forwards packets in user space, and needs their checksums.
    """

    network: NetworkId
    port: str
    mac: MacAddress
    mtu: int | None
    interfaces: frozenset[IpInterface]
    bridge: str
    in_user_space: bool

    @property
    def namespace(self) -> str:
        """The network's namespace."""
        return namespace_of(self.network)

    @property
    def outer(self) -> str:
        """The device on the bridge."""
        return devices_of(self.network)[0]

    @property
    def inner(self) -> str:
        """The device in the namespace."""
        return devices_of(self.network)[1]

    @property
    def plugged(self) -> BridgePort:
        """The port on the bridge that Open vSwitch should have."""
        return BridgePort(self.bridge, self.port, self.network)

    def addresses(self, *, ipv6: bool) -> frozenset[IpInterface]:
        """Return the planned addresses of the inner device, with or without IPv6."""
        if ipv6:
            return self.interfaces
        return frozenset(one for one in self.interfaces if isinstance(one, IPv4Interface))


@dataclass(frozen=True, slots=True)
class SeenPlace:
    """Observed namespace and devices on this host.

    Attributes:
        interfaces: Addresses of the inner device, in the form of `plan_interface`.
        ipv6: Whether the inner device accepts IPv6 addresses: IPv6 is enabled, and the MTU is large enough.
        has_checksums: Whether the kernel computes checksums for the inner device, instead of leaving them to a NIC.
        is_ours: Whether the namespace has our mark, or is only a file left by a killed program.
        is_listened: Whether a process listens on a metadata address in the namespace.
    """

    inner: ObservedDevice | None = None
    outer: ObservedDevice | None = None
    interfaces: frozenset[IpInterface] = frozenset()
    ipv6: bool = True
    has_checksums: bool = False
    is_ours: bool = False
    is_listened: bool = False


@dataclass(frozen=True, slots=True)
class OvnPlan:
    """Operations on this host.

    Attributes:
        make: Incomplete places.
        plug: Places whose device Open vSwitch does not have, or has elsewhere.
        remove: Names of namespaces that no network needs.
        unplug: Devices without a network that Open vSwitch still has.
        wait: Names of namespaces to remove once no process listens there: HAProxy could not read a configuration that
            names a removed namespace.
    """

    make: tuple[MetadataPlace, ...] = ()
    plug: tuple[MetadataPlace, ...] = ()
    remove: tuple[str, ...] = ()
    unplug: tuple[str, ...] = ()
    wait: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.make or self.plug or self.remove or self.unplug)


def plan_places(known: OvnKnown, local: LocalChassis) -> dict[NetworkId, MetadataPlace]:
    """Return the place of each network with ports on this host; none if its metadata port is unknown."""
    places: dict[NetworkId, MetadataPlace] = {}
    for network, rows in known.ports_by_network().items():
        port = known.metadata_ports.get(network)
        if port is None or port.mac is None:
            continue
        addresses = {one.ip for row in rows for one in row.interfaces}
        link_local = ip_interface((link_local_of(port.mac), _LINK_LOCAL_BITS))
        places[network] = MetadataPlace(
            network=network,
            port=port.port,
            mac=port.mac,
            mtu=port.mtu,
            interfaces=frozenset(
                one for one in port.interfaces if any(each in one.network for each in addresses)
            )
            | {link_local, *map(ip_interface, _METADATA)},
            bridge=local.bridge,
            in_user_space=local.datapath == _DATAPATH_IN_USER_SPACE,
        )
    return places


def plan_interface(one: IpInterface) -> IpInterface:
    """Return an address in the form of a place: a metadata address has no subnet, however it was added."""
    return ip_interface(one.ip) if one.ip in _METADATA else one


def networks_without_port(known: OvnKnown) -> tuple[NetworkId, ...]:
    """Return networks with ports on this host but without a known metadata port that has a MAC."""
    found = known.metadata_ports
    return tuple(
        network
        for network in sorted(known.ports_by_network())
        if network not in found or found[network].mac is None
    )


def plan_host(
    places: Mapping[NetworkId, MetadataPlace],
    seen: Mapping[str, SeenPlace],
    local: LocalChassis,
    *,
    whole: Collection[MetadataPlace] = (),
    spared: Iterable[NetworkId] = (),
    overdue: Collection[str] = (),
    sweep: bool,
) -> OvnPlan:
    """Compare planned places with the host, and return the operations.

    Args:
        places: Needed places by network.
        seen: Observed namespaces of OVN's networks on this host, by name.
        local: This chassis, with the ports of Open vSwitch.
        whole: Places that were complete at the last observation, and were not observed again.
        spared: Networks with ports here but without a place: their objects stay unchanged.
        overdue: Namespaces that no longer wait for processes that listen there.
        sweep: Also remove orphaned objects; off while the ports on this host are uncertain.
    """
    needed = {place.namespace: place for place in places.values()}
    kept = {namespace_of(network) for network in spared}
    # An unmarked namespace without a device here belongs to another host that shares the directory.
    unneeded = {
        name: device
        for name, one in seen.items()
        if sweep and name not in needed and name not in kept
        for device in (device_of_namespace(name),)
        if one.is_ours or one.outer is not None or device in local.ports
    }
    wait = {name for name in unneeded if seen[name].is_listened and name not in overdue}
    kept |= wait
    remove = {name: device for name, device in unneeded.items() if name not in wait}
    gone = {
        device
        for device, port in local.ports.items()
        if device in remove.values()
        or (sweep and port.network and namespace_of(NetworkId(port.network)) not in kept)
    }
    devices = {place.outer for place in places.values()}
    return OvnPlan(
        make=tuple(p for name, p in needed.items() if p not in whole and _lacks(p, seen.get(name))),
        plug=tuple(p for p in needed.values() if local.ports.get(p.outer) != p.plugged),
        remove=tuple(sorted(remove)),
        unplug=tuple(sorted(gone - devices)),
        wait=tuple(sorted(wait)),
    )


def _lacks(place: MetadataPlace, seen: SeenPlace | None) -> bool:
    if seen is None or seen.inner is None or seen.outer is None:
        return True
    return (
        not (seen.inner.up and seen.outer.up)
        or seen.inner.mac != place.mac
        or (place.mtu is not None and {seen.inner.mtu, seen.outer.mtu} != {place.mtu})
        or (place.in_user_space and not seen.has_checksums)
        or seen.interfaces != place.addresses(ipv6=seen.ipv6)
    )


def device_of_namespace(name: str) -> str:
    """Return the device on the bridge that belongs to a namespace."""
    return devices_of(NetworkId(name.removeprefix(NAMESPACE_PREFIX)))[0]


def is_metadata_namespace(name: str) -> bool:
    """Return whether a namespace has the name of one of OVN's networks."""
    return name.startswith(NAMESPACE_PREFIX)
