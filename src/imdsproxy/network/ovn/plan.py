"""Planner for the namespaces and ports that OVN's networks need on this host. Pure.

The layout is that of Neutron's agent, so that either can take over from the other (neutron/agent/ovn/metadata/agent.py,
`provision_datapath`):

    integration bridge ── tap<10>0 ══veth══ tap<10>1 in namespace ovnmeta-NETWORK: the metadata port's MAC and addresses

`<10>` is the first ten characters of the network's id. The inner device also has the metadata addresses.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Final

from imdsproxy.host.names import Naming
from imdsproxy.host.state import Family, ObservedHost, ObservedNamespace
from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import NetworkId
from imdsproxy.network.planned import (
    LOOPBACK,
    AttachOvn,
    ChangePorts,
    DetachOvn,
    HostOp,
    MetadataPlace,
)
from imdsproxy.sources.ovn.ports import (
    IpInterface,
    LocalChassis,
    OvnKnown,
    devices_of,
    namespace_of,
)

_NAMESPACE_PREFIX: Final = namespace_of(NetworkId(""))
_DATAPATH_IN_USER_SPACE: Final = "netdev"
_LINK_LOCAL_BITS: Final = 64
_METADATA: Final = tuple(family.metadata_address for family in Family)


@dataclass(frozen=True, slots=True)
class OvnWanted:
    """What OVN's networks need on this host.

    Attributes:
        spared: Networks with ports here but without a known metadata port that has a MAC: their objects stay unchanged.
        sweep: Whether to remove orphaned objects; off while the ports on this host are uncertain.
    """

    places: Mapping[NetworkId, MetadataPlace]
    spared: tuple[NetworkId, ...]
    local: LocalChassis
    sweep: bool

    @classmethod
    def of(cls, known: OvnKnown, local: LocalChassis, *, sweep: bool) -> "OvnWanted":
        places: dict[NetworkId, MetadataPlace] = {}
        spared: list[NetworkId] = []
        for network, rows in sorted(known.ports_by_network().items()):
            port = known.metadata_ports.get(network)
            if port is None or port.mac is None:
                spared.append(network)
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
        return cls(places, tuple(spared), local, sweep)

    def is_new(self, before: "OvnWanted | None") -> bool:
        """Return whether a plan is due: the needs differ from those before, or Open vSwitch's ports from the needs."""
        if before is None or (self.places, self.spared, self.sweep) != (
            before.places,
            before.spared,
            before.sweep,
        ):
            return True
        ports = self.local.ports
        marked = {port.network for port in ports.values() if port.network}
        lacking = any(ports.get(one.outer) != one.plugged for one in self.places.values())
        return lacking or (self.sweep and not marked <= {*self.places, *self.spared})


def plan_interface(one: IpInterface) -> IpInterface:
    """Return an address in the form of a place: a metadata address has no subnet, however it was added."""
    return ip_interface(one.ip) if one.ip in _METADATA else one


def plan_ovn(
    wanted: OvnWanted, observed: ObservedHost, naming: Naming, overdue: Collection[NetworkId]
) -> tuple[tuple[HostOp, ...], frozenset[NetworkId]]:
    """Plan the operations that OVN's networks need: a place is plugged in once it is whole.

    Args:
        overdue: Networks whose namespaces no longer wait for processes that listen there.

    Returns:
        The operations, and the networks without ports here whose namespaces wait for another process.
    """
    ports, root = wanted.local.ports, observed.root.devices
    lacking = [place for place in wanted.places.values() if _lacks(place, observed)]
    kept, waiting = {*wanted.places, *wanted.spared}, set[NetworkId]()
    remove: list[NetworkId] = []
    for name, seen in observed.namespaces.items() if wanted.sweep else ():
        network = network_of(name)
        if network is None or network in kept:
            continue
        outer = devices_of(network)[0]
        # An unmarked namespace without a device here belongs to another host that shares the directory.
        if not (is_ours(seen, network, naming) or outer in root or outer in ports):
            continue
        wait = is_listened(seen) and network not in overdue
        (waiting.add if wait else remove.append)(network)
    removed = {devices_of(network)[0] for network in remove}
    unplug = {
        device
        for device, port in ports.items()
        if device in removed
        or (wanted.sweep and port.network and port.network not in kept | waiting)
    }
    unplug -= {place.outer for place in wanted.places.values()}
    plug = tuple(
        place
        for place in wanted.places.values()
        if place not in lacking and ports.get(place.outer) != place.plugged
    )
    ops: tuple[HostOp, ...] = (
        *(AttachOvn(place, naming) for place in lacking),
        *((ChangePorts(plug, tuple(sorted(unplug))),) if plug or unplug else ()),
        *(DetachOvn(network, naming) for network in remove),
    )
    return ops, frozenset(waiting)


def _lacks(place: MetadataPlace, observed: ObservedHost) -> bool:
    outer = observed.root.devices.get(place.outer)
    seen = observed.namespaces.get(place.namespace)
    inner = None if seen is None else seen.devices.get(place.inner)
    end = None if seen is None else seen.end
    if inner is None or outer is None or end is None:
        return True
    return (
        not (inner.up and outer.up)
        or inner.mac != place.mac
        or (place.mtu is not None and {inner.mtu, outer.mtu} != {place.mtu})
        or (place.in_user_space and not end.has_checksums)
        or frozenset(map(plan_interface, end.interfaces)) != place.addresses(ipv6=end.ipv6)
    )


def is_ours(seen: ObservedNamespace, network: NetworkId, naming: Naming) -> bool:
    """Return whether a namespace has our mark, or is only a file left by a killed program."""
    loopback = seen.devices.get(LOOPBACK)
    if loopback is None:
        return seen.ref is None and not seen.problem
    return naming.owner_of(loopback.alias) == network


def is_listened(seen: ObservedNamespace) -> bool:
    return any(not one.ours for one in seen.sockets)


def network_of(namespace: str) -> NetworkId | None:
    """Return the network of a namespace with the name of one of OVN's networks; `None` for other names."""
    if not namespace.startswith(_NAMESPACE_PREFIX):
        return None
    return NetworkId(namespace.removeprefix(_NAMESPACE_PREFIX))
