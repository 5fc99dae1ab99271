"""Rows of OVN's table Port_Binding: which are served on this host, and the records that they make.

Neutron copies all that a metadata service needs into `external_ids` (`neutron:*`): the instance, its project, the
network and the addresses (neutron/plugins/ml2/drivers/ovn/mech_driver/ovsdb/ovn_client.py, `create_port`). Tenants can
write the instance's id on a port, and no value is trusted: what does not have its form is refused by `NeutronPort`.

Source for rows: ovn-sb(5), "Port_Binding TABLE".
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Final, TypeAlias, TypeVar

from imdsproxy.core.addresses import normalise_address
from imdsproxy.core.model import (
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.core.observation import Observation
from imdsproxy.errors import Problem
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


@dataclass(frozen=True)
class PortBinding:
    """A row of Port_Binding. What is made of it is made once, as long as the row does not change.

    Attributes:
        chassis: UUID of the row in Chassis that has claimed it, or empty.
        additional: UUIDs of chassis that it is about to move to.
        requested: Names of the chassis that it is meant for, as the northbound database has them.
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
        """The network's id in Neutron; `None` where the row is not Neutron's."""
        name = self.external_ids.get("neutron:network_name", "")
        return NetworkId(name.removeprefix(_SWITCH)) if name.startswith(_SWITCH) else None

    @cached_property
    def is_metadata_port(self) -> bool:
        """It is the port that metadata of its network is served through, the same on every chassis."""
        owner = self.external_ids.get("neutron:device_owner")
        return self.kind == "localport" and owner == METADATA_OWNER

    @cached_property
    def mac(self) -> MacAddress | None:
        """The port's MAC; `None` where OVN was not given it, as for a port without port security and DHCP."""
        first = self.macs[0].split() if self.macs else []
        mac = first[0].lower() if first else ""
        return MacAddress(mac) if _MAC.fullmatch(mac) else None

    @cached_property
    def interfaces(self) -> tuple[IpInterface, ...]:
        """Its addresses with their prefixes, from `neutron:cidrs`: `mac` may have none of them ("unknown")."""
        return tuple(_interfaces(self.external_ids.get("neutron:cidrs", "").split()))

    @property
    def lacks_keys(self) -> bool:
        """It is like a guest's port, and has not what Neutron writes on each."""
        known = self.network is not None and "neutron:device_id" in self.external_ids
        return self.kind == "" and not known

    @property
    def mtu(self) -> int | None:
        """The MTU of a metadata port's network."""
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
        """Why its guest gets nothing although it is the port of an instance, if so."""
        return None if self.neutron_port is None else self.neutron_port.problem()


def _interfaces(texts: Iterable[str]) -> Iterable[IpInterface]:
    for text in texts:
        try:
            yield ip_interface(text)
        except ValueError:
            # The row is Neutron's, and shows nothing of it to its owner: the rest of the port is served.
            continue


def _is_host(address: IpAddress) -> bool:
    return not (address.is_unspecified or address.is_loopback or address.is_multicast)


@dataclass(frozen=True, slots=True)
class SouthboundView:
    """The rows that concern this host, at one moment.

    Attributes:
        chassis: UUID of this host's row in Chassis; `None` while there is none, as after `ovn-controller` was stopped.
        names: This host's chassis name and host name.
        private: `external_ids` of its row in Chassis_Private; `None` while there is none.
        nb_cfg: The configuration's number, which agents that are alive repeat.
    """

    chassis: str | None
    names: frozenset[str]
    bindings: tuple[PortBinding, ...] = ()
    private: Mapping[str, str] | None = None
    nb_cfg: int | None = None

    def may_claim(self, row: PortBinding) -> bool:
        """Whether a port is bound nowhere, and meant for this chassis or for any."""
        meant = not row.requested or not self.names.isdisjoint(row.requested)
        return meant and not row.chassis


def namespace_of(network: NetworkId) -> str:
    """The namespace's name (neutron/agent/ovn/metadata/agent.py, `_get_namespace_name`)."""
    return f"ovnmeta-{network}"


def devices_of(network: NetworkId) -> tuple[str, str]:
    """The ends of the veth pair, on the integration bridge and in the namespace (same file, `_get_veth_name`)."""
    stem = f"tap{network[:_TAP_DIGITS]}"
    return f"{stem}0", f"{stem}1"


@dataclass(slots=True)
class OvnKnown:
    """The ports that are in force, and the records that they make.

    Attributes:
        networks: Published, by id.
        instances: Published, by id.
        problems: Why ports get nothing.
        metadata_ports: The row of each network's metadata port.
    """

    networks: dict[NetworkId, Network] = field(default_factory=dict)
    instances: dict[InstanceId, Instance] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    metadata_ports: Mapping[NetworkId, PortBinding] = field(default_factory=dict)
    _here: dict[str, PortBinding] = field(default_factory=dict)
    _made: dict[InstanceId, tuple[tuple[NeutronPort, ...], Instance]] = field(default_factory=dict)

    @property
    def records(self) -> Observation:
        """All in force."""
        return Observation.of_changes(self.networks, self.instances)

    def update(
        self, view: SouthboundView, *, keep_absent: bool = False, keep_unclaimed: bool = False
    ) -> Observation:
        """Take in what the database has now; which records in force that changes.

        Args:
            view: All rows that concern this host.
            keep_absent: Ports that were bound here stay in force while their rows are not there: this chassis's row has
                gone, and with it every binding, although the guests run on; or it has just come back.
            keep_unclaimed: Those stay that no chassis has claimed since, and that are meant for this one.
        """
        here = self._bindings_here(view)
        present = {row.port: row for row in view.bindings}
        for name, before in self._here.items():
            now = present.get(name)
            # What this row of the chassis had claimed and has no more is gone.
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
        # Without this chassis's row they may be out of view: as before, then.
        self.metadata_ports = (
            metadata if view.chassis is not None else {**self.metadata_ports, **metadata}
        )
        networks = {
            network: Network(
                network,
                # Its addresses are on the device before it is plugged in (`imdsproxy.ovn`).
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
        """The ports in force of each network."""
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
    """One problem for all ports that lack Neutron's keys."""
    if ports:
        yield Problem(
            "Port_Binding",
            "ports bound here that lack neutron:network_name or neutron:device_id, and are not served: "
            f"{len(ports)}, for example {ports[0]}",
            "Neutron writes them since Queens (networking-ovn 4.0); ports that are not Neutron's have none",
        )


def _changes(before: Mapping[_K, _V], after: Mapping[_K, _V]) -> dict[_K, _V | None]:
    return {
        key: after.get(key)
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }
