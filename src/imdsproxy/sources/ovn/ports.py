"""This chassis in Open vSwitch's database, and the rows of OVN's table Port_Binding with their records.

Neutron copies all data that a metadata service needs into `external_ids` (`neutron:*`): the instance, its project, the
network and the addresses (neutron/plugins/ml2/drivers/ovn/mech_driver/ovsdb/ovn_client.py, `create_port`). Tenants can
write the instance's id on a port, so no value is trusted: `NeutronPort` refuses invalid values.

Source for rows: ovn-sb(5), "Port_Binding TABLE"; for the chassis: ovn-controller(8).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Final, TypeAlias, TypeVar

from imdsproxy.errors import Problem
from imdsproxy.model.addresses import normalise_address
from imdsproxy.model.entities import (
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.model.observation import Observation
from imdsproxy.sources.neutron.ports import NeutronPort, plan_instance

_K = TypeVar("_K")
_V = TypeVar("_V")

IpInterface: TypeAlias = IPv4Interface | IPv6Interface

METADATA_OWNER: Final = "network:distributed"
"""`neutron:device_owner` of a network's metadata port (neutron_lib/constants.py, `DEVICE_OWNER_DISTRIBUTED`)."""

_SWITCH: Final = "neutron-"
_MAC: Final = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_TAP_DIGITS: Final = 10
_VIF_TYPES: Final = frozenset(("", "external"))


NETWORK_KEY: Final = "imdsproxy-network"
"""Key that marks our interfaces in Open vSwitch's database. They survive a reboot; their devices do not."""


@dataclass(frozen=True, slots=True)
class BridgePort:
    """Port of a bridge with one interface.

    Attributes:
        interface_id: `external_ids:iface-id`, the logical port; empty without one.
        network: `external_ids:imdsproxy-network`, the network that this interface of ours serves; else empty.
    """

    bridge: str
    interface_id: str
    network: str = ""


@dataclass(frozen=True, slots=True)
class LocalChassis:
    """This chassis, from ovn-controller's configuration.

    Attributes:
        name: `external_ids:system-id`; empty while Open vSwitch has none.
        hostname: `external_ids:hostname`, Neutron's name of the host.
        southbound: `external_ids:ovn-remote`.
        datapath: `datapath_type` of the bridge: `netdev` is in user space; `None` without the bridge.
    """

    name: str
    hostname: str
    southbound: str
    bridge: str
    datapath: str | None
    ports: Mapping[str, BridgePort] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(filter(None, (self.name, self.hostname)))


@dataclass(frozen=True)
class PortBinding:
    """Row of Port_Binding. Derived values are computed once, until the row changes.

    Attributes:
        chassis: UUID of the Chassis row that has claimed the port, or empty.
        additional: UUIDs of chassis to which the port is about to move.
        requested: Names of the chassis that the Northbound database requests for the port.
    """

    port: str
    kind: str
    macs: tuple[str, ...]
    chassis: str
    additional: frozenset[str]
    requested: tuple[str, ...]
    external_ids: Mapping[str, str]

    @cached_property
    def network(self) -> NetworkId | None:
        """The network's id in Neutron; `None` if the row is not Neutron's."""
        name = self.external_ids.get("neutron:network_name", "")
        return NetworkId(name.removeprefix(_SWITCH)) if name.startswith(_SWITCH) else None

    @cached_property
    def is_metadata_port(self) -> bool:
        """Whether this is the port through which its network's metadata is served, the same on every chassis."""
        owner = self.external_ids.get("neutron:device_owner")
        return self.kind == "localport" and owner == METADATA_OWNER

    @cached_property
    def mac(self) -> MacAddress | None:
        """The port's MAC; `None` if OVN does not have it, as for a port without port security and DHCP."""
        first = self.macs[0].split() if self.macs else []
        mac = first[0].lower() if first else ""
        return MacAddress(mac) if _MAC.fullmatch(mac) else None

    @cached_property
    def interfaces(self) -> tuple[IpInterface, ...]:
        """The port's addresses with prefixes, from `neutron:cidrs`: column `mac` may lack them ("unknown")."""
        return tuple(_interfaces(self.external_ids.get("neutron:cidrs", "").split()))

    @property
    def lacks_keys(self) -> bool:
        """Whether this looks like a guest's port, but lacks the keys that Neutron writes on each port."""
        known = self.network is not None and "neutron:device_id" in self.external_ids
        return self.kind == "" and not known

    @property
    def mtu(self) -> int | None:
        text = self.external_ids.get("neutron:mtu", "")
        return int(text) if text.isdecimal() else None

    @cached_property
    def neutron_port(self) -> NeutronPort | None:
        """The port of an instance; `None` for every other row."""
        network = self.network
        if network is None or self.kind not in _VIF_TYPES:
            return None
        addresses: tuple[IpAddress, ...] = tuple(
            address
            for interface in self.interfaces
            if _is_host(address := normalise_address(interface.ip))
        )
        return NeutronPort(
            id=self.port,
            network=network,
            mac=self.mac,
            addresses=addresses,
            device=self.external_ids.get("neutron:device_id", ""),
            owner=self.external_ids.get("neutron:device_owner", ""),
            project=self.external_ids.get("neutron:project_id", ""),
        )

    @cached_property
    def problem(self) -> Problem | None:
        return None if self.neutron_port is None else self.neutron_port.problem()


def _interfaces(texts: Iterable[str]) -> Iterable[IpInterface]:
    for text in texts:
        try:
            yield ip_interface(text)
        except ValueError:
            # Only Neutron writes the row, and its owner would not see a problem: serve the rest of the port.
            continue


def _is_host(address: IpAddress) -> bool:
    return not (address.is_unspecified or address.is_loopback or address.is_multicast)


@dataclass(frozen=True, slots=True)
class SouthboundView:
    """Rows that concern this host, at one moment.

    Attributes:
        chassis: UUID of this host's row in Chassis; `None` without a row, as after `ovn-controller` was stopped.
        private: `external_ids` of this host's row in Chassis_Private; `None` without a row.
        nb_cfg: Number of the configuration, which live agents repeat.
    """

    chassis: str | None
    names: frozenset[str]
    bindings: tuple[PortBinding, ...] = ()
    private: Mapping[str, str] | None = None
    nb_cfg: int | None = None

    def may_claim(self, row: PortBinding) -> bool:
        """Return whether a port is unbound, and requests this chassis or none."""
        meant = not row.requested or not self.names.isdisjoint(row.requested)
        return meant and not row.chassis


def namespace_of(network: NetworkId) -> str:
    """Return the network's namespace (neutron/agent/ovn/metadata/agent.py, `_get_namespace_name`)."""
    return f"ovnmeta-{network}"


def devices_of(network: NetworkId) -> tuple[str, str]:
    """Return the veth devices on the integration bridge and in the namespace (same file, `_get_veth_name`)."""
    stem = f"tap{network[:_TAP_DIGITS]}"
    return f"{stem}0", f"{stem}1"


@dataclass(slots=True)
class OvnKnown:
    networks: dict[NetworkId, Network] = field(default_factory=dict)
    instances: dict[InstanceId, Instance] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    metadata_ports: Mapping[NetworkId, PortBinding] = field(default_factory=dict)
    _here: dict[str, PortBinding] = field(default_factory=dict)
    _made: dict[InstanceId, tuple[tuple[NeutronPort, ...], Instance]] = field(default_factory=dict)

    @property
    def records(self) -> Observation:
        return Observation.of_changes(self.networks, self.instances)

    def update(
        self, view: SouthboundView, *, keep_absent: bool = False, keep_unclaimed: bool = False
    ) -> Observation:
        """Apply the current rows. Return the changes of the records in force.

        Args:
            keep_absent: Keep ports that were bound here while their rows are missing. If this chassis's row is removed,
                all its bindings disappear although the guests keep running; they may also be late when it comes back.
            keep_unclaimed: Keep ports that were bound here, are unclaimed now, and may be claimed by this chassis.
        """
        here = self._bindings_here(view)
        present = {row.port: row for row in view.bindings}
        for name, before in self._here.items():
            now = present.get(name)
            # The same row of the chassis had claimed the port and has released it: the port is gone.
            if name in here or before.chassis == view.chassis:
                continue
            if now is None and keep_absent:
                here[name] = before
            elif now is not None and keep_unclaimed and view.may_claim(now):
                here[name] = now
        ports = [(row, port) for row in here.values() if (port := row.neutron_port) is not None]
        self._here = {row.port: row for row, _ in ports}
        self.problems = (
            *_list_unserved(sorted(row.port for row in here.values() if row.lacks_keys)),
            *(one for row, _ in ports if (one := row.problem) is not None),
        )
        by_instance: dict[InstanceId, list[NeutronPort]] = {}
        for row, port in sorted(ports, key=lambda pair: pair[1].id):
            if port.names_instance and row.problem is None:
                by_instance.setdefault(port.instance, []).append(port)
        instances: dict[InstanceId, Instance] = {}
        made = self._made
        self._made = {}
        for key, own in by_instance.items():
            ports_before, planned = made.get(key, ((), None))
            if ports_before != tuple(own):
                planned = plan_instance(key, tuple(own))
            if planned is not None:
                instances[key] = planned
                self._made[key] = (tuple(own), planned)
        served = {port.network for own in by_instance.values() for port in own}
        metadata = {
            row.network: row
            for row in view.bindings
            if row.is_metadata_port and row.network is not None
        }
        # Without this chassis's row the conditions may hide metadata ports: keep the earlier ones.
        self.metadata_ports = (
            metadata if view.chassis is not None else {**self.metadata_ports, **metadata}
        )
        networks = {
            network: Network(
                network,
                # `imdsproxy.network.ovn` adds the addresses before it plugs the device in.
                NamespaceListener(namespace_of(network), devices_of(network)[1]),
                project=self._project_of(network),
            )
            for network in served
        }
        changed_networks = _changes(self.networks, networks)
        changed_instances = _changes(self.instances, instances)
        self.networks, self.instances = networks, instances
        return Observation.of_changes(
            changed_networks, changed_instances, moves=len(changed_instances) > 1
        )

    def ports_by_network(self) -> dict[NetworkId, list[PortBinding]]:
        found: dict[NetworkId, list[PortBinding]] = {}
        for row in self._here.values():
            if row.network is not None:
                found.setdefault(row.network, []).append(row)
        return found

    def _project_of(self, network: NetworkId) -> str | None:
        port = self.metadata_ports.get(network)
        return None if port is None else port.external_ids.get("neutron:project_id") or None

    def _bindings_here(self, view: SouthboundView) -> dict[str, PortBinding]:
        return {
            row.port: row
            for row in view.bindings
            if view.chassis is not None
            and (row.chassis == view.chassis or view.chassis in row.additional)
        }


def _list_unserved(ports: Sequence[str]) -> Iterator[Problem]:
    if ports:
        yield Problem(
            "Port_Binding",
            f"{len(ports)} ports bound here are not served, for example {ports[0]}: "
            "they lack neutron:network_name or neutron:device_id",
            "Neutron writes these keys since Queens (networking-ovn 4.0); ports of other programs lack them",
        )


def _changes(before: Mapping[_K, _V], after: Mapping[_K, _V]) -> dict[_K, _V | None]:
    return {
        key: after.get(key)
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }
