"""What each network of OVN needs on this host, and what is to be done for it: pure.

As Neutron's agent makes it, so that either can take over from the other (neutron/agent/ovn/metadata/agent.py,
`provision_datapath`):

    integration bridge ── tap<10>0 ══veth══ tap<10>1 in namespace ovnmeta-NETWORK: the metadata port's MAC and addresses

`<10>` is the beginning of the network's id. The metadata addresses themselves are the listener's business
(`imdsproxy.listeners.plan`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.hoststate import ObservedDevice
from imdsproxy.core.model import MacAddress, NetworkId
from imdsproxy.sources.ovn.chassis import BridgePort, LocalChassis
from imdsproxy.sources.ovn.ports import (
    IpInterface,
    OvnKnown,
    devices_of,
    namespace_of,
)

NAMESPACE_PREFIX: Final = "ovnmeta-"
_DATAPATH_IN_USER_SPACE: Final = "netdev"


@dataclass(frozen=True, slots=True)
class MetadataPlace:
    """What a network has on this host.

    Attributes:
        port: Id of the network's metadata port, which the device on the bridge stands for.
        mtu: In bytes; `None` leaves it as it is.
        interfaces: The metadata port's addresses in the subnets that have ports here.
        bridge: The integration bridge.
        in_user_space: Open vSwitch forwards packets itself, and needs their checksums.
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
        """Its namespace."""
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
        """The device on the bridge, as Open vSwitch is to have it."""
        return BridgePort(self.bridge, self.port)


@dataclass(frozen=True, slots=True)
class SeenPlace:
    """What there is of a namespace on this host.

    Attributes:
        interfaces: On the inner device, without link-local and metadata addresses.
    """

    inner: ObservedDevice | None = None
    outer: ObservedDevice | None = None
    interfaces: frozenset[IpInterface] = frozenset()


@dataclass(frozen=True, slots=True)
class OvnPlan:
    """What to do on this host.

    Attributes:
        make: Places that lack something.
        plug: Those whose device Open vSwitch does not have, or has elsewhere.
        remove: Names of namespaces that no network needs.
        unplug: Devices of those that Open vSwitch still has.
    """

    make: tuple[MetadataPlace, ...] = ()
    plug: tuple[MetadataPlace, ...] = ()
    remove: tuple[str, ...] = ()
    unplug: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.make or self.plug or self.remove or self.unplug)


def plan_places(known: OvnKnown, local: LocalChassis) -> dict[NetworkId, MetadataPlace]:
    """What each network with ports on this host needs; none for a network whose metadata port is not known."""
    places: dict[NetworkId, MetadataPlace] = {}
    for network, rows in known.ports_by_network().items():
        port = known.metadata_ports.get(network)
        if port is None or port.mac is None:
            continue
        addresses = {one.ip for row in rows for one in row.interfaces}
        places[network] = MetadataPlace(
            network=network,
            port=port.port,
            mac=port.mac,
            mtu=port.mtu,
            interfaces=frozenset(
                one for one in port.interfaces if any(each in one.network for each in addresses)
            ),
            bridge=local.bridge,
            in_user_space=local.datapath == _DATAPATH_IN_USER_SPACE,
        )
    return places


def plan_host(
    places: Mapping[NetworkId, MetadataPlace],
    seen: Mapping[str, SeenPlace],
    local: LocalChassis,
    *,
    sweep: bool,
) -> OvnPlan:
    """Compare.

    Args:
        places: What is needed.
        seen: Every namespace of OVN's networks that is on this host, by name.
        local: What is plugged into Open vSwitch.
        sweep: Also remove what no network needs; off while the ports on this host are not known for certain.
    """
    needed = {place.namespace: place for place in places.values()}
    devices = {place.outer for place in places.values()}
    unneeded = {
        name: devices_of(NetworkId(name.removeprefix(NAMESPACE_PREFIX)))[0]
        for name in (seen if sweep else ())
        if name not in needed
    }
    # A namespace whose device is not on this host belongs to another one that has the same directory.
    remove = [n for n, d in unneeded.items() if seen[n].outer is not None or d in local.ports]
    stale = {unneeded[name] for name in remove}
    return OvnPlan(
        make=tuple(p for name, p in needed.items() if _lacks(p, seen.get(name))),
        plug=tuple(p for p in needed.values() if local.ports.get(p.outer) != p.plugged),
        remove=tuple(sorted(remove)),
        unplug=tuple(sorted(one for one in stale - devices if one in local.ports)),
    )


def _lacks(place: MetadataPlace, seen: SeenPlace | None) -> bool:
    if seen is None or seen.inner is None or seen.outer is None:
        return True
    return (
        not (seen.inner.up and seen.outer.up)
        or seen.inner.mac != place.mac
        or (place.mtu is not None and seen.inner.mtu != place.mtu)
        or seen.interfaces != place.interfaces
    )


def is_metadata_namespace(name: str) -> bool:
    """Whether a namespace has the name of one of OVN's networks."""
    return name.startswith(NAMESPACE_PREFIX)
