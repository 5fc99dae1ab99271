"""Records made from libvirt's domains and networks, and the records in force."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.errors import Problem
from imdsproxy.model.claims import address_keys
from imdsproxy.model.entities import ID_PATTERN, Instance, InstanceId, Network, NetworkId
from imdsproxy.model.observation import Observation
from imdsproxy.model.records import Findings, Json, Path, Refused, parse_instance, parse_network
from imdsproxy.sources.in_force import Entry, InForce
from imdsproxy.sources.libvirt.xml import ROUTING, Domain, DomainInterface, LibvirtNetwork

_NETWORK_ID: Final = re.compile(ID_PATTERN)


def _id_of(network: LibvirtNetwork) -> str:
    """Return a network's id: its name, or its UUID if the name is not a valid id."""
    return network.name if _NETWORK_ID.fullmatch(network.name) else network.uuid


def describe_network(network: LibvirtNetwork) -> Network | Refused:
    """Return the record of a network that is `made_by_libvirt`.

    The host is the gateway, as in libvirt's DHCP, except in an isolated network.
    """
    identity = _id_of(network)
    record: dict[str, Json] = {"id": identity, "listener": {"bridge": network.bridge or ""}}
    if identity != network.name:
        record["name"] = network.name
    if network.mtu is not None:
        record["mtu"] = network.mtu
    subnets: list[Json] = []
    for address in network.addresses:
        subnet: dict[str, Json] = {"cidr": str(address.network)}
        if network.mode in ROUTING:
            subnet["gateway"] = str(address.ip)
        if network.resolves:
            subnet["dns"] = [str(address.ip)]
        subnets.append(subnet)
    if subnets:
        record["subnets"] = subnets
    return parse_network(record, ("network",), Findings(network.place))


@dataclass(slots=True)
class LibvirtKnown:
    """Domains by UUID, networks by name, and their records.

    A domain whose element becomes invalid keeps its earlier record, as in a record file (see `in_force`).

    Args:
        selected: Report only these libvirt networks, by name, and bridges of the host, by device; `None` for all.
        marked_only: Report only domains with our element in their metadata.

    `networks`: records of active networks whose bridge libvirt creates.
    """

    selected: frozenset[str] | None = None
    marked_only: bool = False
    networks: Mapping[NetworkId, Network] = field(default_factory=dict)
    _domains: dict[str, Domain | Refused] = field(default_factory=dict)
    # Domains as last parsed, for the networks of domains that cannot be parsed now.
    _read: dict[str, Domain] = field(default_factory=dict)
    _described: dict[str, LibvirtNetwork] = field(default_factory=dict)
    _leases: dict[tuple[str, str], list[Json]] = field(default_factory=dict)
    _network_problems: tuple[Problem, ...] = ()
    _instances: InForce[Instance] = field(init=False)

    def __post_init__(self) -> None:
        self._instances = InForce(address_keys, self._where)

    @property
    def records(self) -> Observation:
        return Observation.of_changes(self.networks, self._instances.records)

    @property
    def implied(self) -> frozenset[NetworkId]:
        """Networks of ports without a network record: inactive networks, and bridges created by the operator."""
        return frozenset(
            network
            for domain in self._read.values()
            for interface in domain.interfaces
            if interface.network is None or interface.network in self._described
            if (network := self._network_of(interface)) is not None and network not in self.networks
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        return (*self._network_problems, *self._instances.problems())

    def place_of(self, instance: InstanceId) -> str | None:
        entry = self._instances.entry_of(instance)
        return None if entry is None else self._where(entry)[1]

    def update(
        self,
        domains: Mapping[str, Domain | Refused | None],
        networks: Iterable[LibvirtNetwork | Refused],
        *,
        everything: bool = False,
    ) -> Observation:
        """Update domains and networks. Return the changes of the records in force.

        Args:
            everything: Whether `domains` has all domains.
        """
        if everything:
            domains = {**dict.fromkeys(self._domains), **domains}
        described, before = self._described, self.networks
        self._take_networks(tuple(networks))
        for uuid, domain in domains.items():
            if domain is None:
                self._domains.pop(uuid, None)
                self._read.pop(uuid, None)
            else:
                self._domains[uuid] = domain
            if isinstance(domain, Domain):
                self._read[uuid] = domain
        stale = self._domains if self._described != described else {}
        for uuid in sorted({*stale, *domains}):
            self._derive(uuid)
        changed = {
            key: self.networks.get(key)
            for key in before.keys() | self.networks.keys()
            if before.get(key) != self.networks.get(key)
        }
        return Observation.of_changes(changed, self._instances.settle())

    def _take_networks(self, described: tuple[LibvirtNetwork | Refused, ...]) -> None:
        self._described = {each.name: each for each in described if not isinstance(each, Refused)}
        self._leases = {}
        for network in self._described.values():
            for mac, address in network.hosts:
                self._leases.setdefault((_id_of(network), mac), []).append(address)
        records = [
            describe_network(network)
            for network in self._described.values()
            if network.active and network.made_by_libvirt and self._selects(network.name)
        ]
        self.networks = {each.id: each for each in records if isinstance(each, Network)}
        refused = [each for each in (*described, *records) if isinstance(each, Refused)]
        self._network_problems = tuple(problem for each in refused for problem in each.problems)

    def _derive(self, uuid: str) -> None:
        domain = self._domains.get(uuid)
        record = self._describe(domain) if isinstance(domain, Domain) else domain
        entries: list[Entry[Instance]] = []
        unclear = isinstance(record, Refused) and record.id is None
        if isinstance(record, Refused):
            entries = [Entry(record.id or uuid, uuid, 0, problems=record.problems)]
        elif record is not None:
            entries = [Entry(record.id, uuid, 0, record=record)]
        self._instances.replace_file(uuid, entries, unclear=unclear)

    def _describe(self, domain: Domain) -> Instance | Refused | None:
        """Return the record of a domain; `None` for a domain that is not reported.

        A domain without our element has its UUID as id, and its name as name and host name.
        """
        ports: list[Json] = []
        for interface in domain.interfaces:
            network = self._network_of(interface)
            if network is not None:
                port: dict[str, Json] = {"network": network, "mac": interface.mac}
                addresses = self._leases.get((network, interface.mac.lower()))
                ports.append({**port, "addresses": addresses} if addresses else port)
        if not domain.marked and (self.marked_only or not ports):
            return None
        record: dict[str, Json] = {"id": domain.uuid, "name": domain.name, "ports": ports}
        parsed = parse_instance({**record, **domain.keys}, ("instance",), Findings(domain.place))
        if not domain.problems:
            return parsed
        more = parsed.problems if isinstance(parsed, Refused) else ()
        return Refused((*domain.problems, *more), parsed.id)

    def _network_of(self, interface: DomainInterface) -> NetworkId | None:
        """Return the network of an interface; `None` if the guest cannot be served there.

        All guests on a bridge of the host are in the same network, whether or not libvirt has a network for the bridge.
        """
        network = self._described.get(interface.network or "")
        if network is None:
            found = interface.bridge or interface.network
            selected = self._selects(found)
        elif network.made_by_libvirt:
            found, selected = _id_of(network), self._selects(network.name)
        else:
            found = network.bridge if network.mode == "bridge" else None
            selected = self._selects(network.name) or self._selects(found)
        return NetworkId(found) if found and selected and _NETWORK_ID.fullmatch(found) else None

    def _selects(self, name: str | None) -> bool:
        return name is not None and (self.selected is None or name in self.selected)

    def _where(self, entry: Entry[Instance]) -> tuple[Path, str | None]:
        domain = self._read.get(entry.file)
        return ("instance",), None if domain is None else domain.place
