"""The records that libvirt's domains and networks make, and which of them are in force."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from imdsproxy.core.inventory import address_keys
from imdsproxy.core.model import ID_PATTERN, Instance, InstanceId, Network, NetworkId
from imdsproxy.core.observation import RecordSet
from imdsproxy.core.records import Json, Path, Refused, parse_instance, parse_network
from imdsproxy.errors import Problem
from imdsproxy.sources.in_force import Entry, InForce
from imdsproxy.sources.libvirt.xml import (
    ROUTING,
    Domain,
    DomainInterface,
    Interface,
    LibvirtNetwork,
    parse_domain,
    parse_libvirt_network,
)

_NETWORK_ID: Final = re.compile(ID_PATTERN)


@dataclass(frozen=True, slots=True)
class NetworkXml:
    """A network as libvirt describes it, live where it is active."""

    text: str
    active: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """Which domains and networks are reported.

    Attributes:
        networks: Only these: networks of libvirt's by name, bridges of the host's by device; `None` for all.
        marked_only: Only domains that have our element in their metadata.
    """

    networks: frozenset[str] | None = None
    marked_only: bool = False

    def has(self, name: str | None) -> bool:
        """Whether a network or bridge of that name is reported."""
        return name is not None and (self.networks is None or name in self.networks)


@dataclass(frozen=True)
class Places:
    """Which network an interface is in, and which addresses it gets there.

    Attributes:
        networks: Libvirt's, by name.
        selection: Which of them are reported.
    """

    networks: Mapping[str, LibvirtNetwork]
    selection: Selection

    @cached_property
    def _leases(self) -> Mapping[tuple[str, str], list[str]]:
        leases: dict[tuple[str, str], list[str]] = {}
        for network in self.networks.values():
            for mac, address in network.hosts:
                leases.setdefault((_id_of(network), mac), []).append(address)
        return leases

    def records(self) -> Iterator[Network | Refused]:
        """The records of active networks whose bridge is libvirt's."""
        for network in self.networks.values():
            if network.active and network.made_by_libvirt and self.selection.has(network.name):
                yield describe_network(network, _id_of(network))

    def network_of(self, interface: DomainInterface) -> NetworkId | None:
        """The network that an interface is a port of; `None` where its guest cannot be served there.

        Guests on a bridge of the host's are in one network, whether libvirt has a network for that bridge or not.
        """
        has, name = self.selection.has, interface.network
        network = None if name is None else self.networks.get(name)
        if network is None:
            found = interface.bridge or name
            selected = has(found)
        elif network.made_by_libvirt:
            found, selected = _id_of(network), has(network.name)
        else:
            found = network.bridge if network.mode == "bridge" else None
            selected = has(network.name) or has(found)
        return NetworkId(found) if found and selected and _NETWORK_ID.fullmatch(found) else None

    def vouches(self, interface: DomainInterface) -> bool:
        """Whether the interface's network exists though it may have no record."""
        return interface.network is None or interface.network in self.networks

    def ports(self, domain: Domain) -> list[dict[str, Json]]:
        """A domain's ports as keys of its record, with the addresses that libvirt's DHCP keeps for their MACs."""
        ports: list[dict[str, Json]] = []
        for interface in domain.interfaces:
            network = self.network_of(interface)
            if network is not None:
                port: dict[str, Json] = {"network": network, "mac": interface.mac}
                addresses = self._leases.get((network, interface.mac.lower()))
                ports.append({**port, "addresses": list(addresses)} if addresses else port)
        return ports


def _id_of(network: LibvirtNetwork) -> str:
    """A network's id: its name, or its UUID where the name is no id."""
    return network.name if _NETWORK_ID.fullmatch(network.name) else network.uuid


def describe_network(network: LibvirtNetwork, identity: str) -> Network | Refused:
    """The record of a network whose bridge is libvirt's.

    Its gateway is the host where libvirt's DHCP says the same: not in an isolated network.

    Args:
        network: `made_by_libvirt`.
        identity: The record's id.
    """
    record: dict[str, Json] = {"id": identity, "listener": {"bridge": network.bridge or ""}}
    if identity != network.name:
        record["name"] = network.name
    if network.mtu is not None:
        record["mtu"] = network.mtu
    subnets = [_subnet(network, each) for each in network.addresses]
    if subnets:
        record["subnets"] = list(subnets)
    return parse_network(record, file=network.place, path=("network",))


def _subnet(network: LibvirtNetwork, address: Interface) -> dict[str, Json]:
    subnet: dict[str, Json] = {"cidr": str(address.network)}
    if network.mode in ROUTING:
        subnet["gateway"] = str(address.ip)
    if network.resolves:
        subnet["dns"] = [str(address.ip)]
    return subnet


def describe_domain(domain: Domain, places: Places) -> Instance | Refused | None:
    """The record of a domain; `None` for one that is not reported.

    Without an element of ours a domain has its UUID as id, and its name as name and host name.
    """
    ports = places.ports(domain)
    if not domain.marked and (places.selection.marked_only or not ports):
        return None
    record: dict[str, Json] = {"id": domain.uuid, "name": domain.name, "ports": list(ports)}
    parsed = parse_instance({**record, **domain.keys}, file=domain.place, path=("instance",))
    if not domain.problems:
        return parsed
    more = parsed.problems if isinstance(parsed, Refused) else ()
    return Refused((*domain.problems, *more), parsed.id)


class LibvirtKnown:
    """Domains by UUID, networks by name, and the records that they make.

    A domain whose element breaks keeps the record that it had, as a record file would (see `in_force`).
    """

    def __init__(self, selection: Selection) -> None:
        self._domains: dict[str, Domain] = {}
        self._unreadable: dict[str, tuple[Problem, ...]] = {}
        self._places: Places = Places({}, selection)
        self._networks: dict[NetworkId, Network] = {}
        self._network_problems: tuple[Problem, ...] = ()
        self._instances: InForce[Instance] = InForce(address_keys, self._where)

    @property
    def networks(self) -> Mapping[NetworkId, Network]:
        """All in force."""
        return self._networks

    @property
    def instances(self) -> Mapping[InstanceId, Instance]:
        """All in force."""
        return {InstanceId(key): record for key, record in self._instances.records.items()}

    @property
    def implied(self) -> frozenset[NetworkId]:
        """Networks that ports are in without a record: inactive ones, and bridges that are the operator's."""
        return frozenset(
            network
            for domain in self._domains.values()
            for interface in domain.interfaces
            if self._places.vouches(interface)
            and (network := self._places.network_of(interface)) is not None
            and network not in self._networks
        )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is refused now."""
        unreadable = (problem for found in self._unreadable.values() for problem in found)
        return (*self._network_problems, *unreadable, *self._instances.problems())

    def place_of(self, instance: InstanceId) -> str | None:
        """The domain whose record is in force, for problems."""
        entry = self._instances.entry_of(instance)
        domain = None if entry is None else self._domains.get(entry.file)
        return None if domain is None else domain.place

    def update(
        self,
        domains: Mapping[str, str | None],
        networks: Iterable[NetworkXml],
        *,
        everything: bool = False,
    ) -> RecordSet:
        """Take in what libvirt has now; which records in force that changes.

        Args:
            domains: XML by UUID; `None` for a domain that is gone.
            networks: All of them.
            everything: `domains` is all that there are.
        """
        gone = (self._domains.keys() | self._unreadable) - domains.keys() if everything else set()
        places, before = self._places, self._networks
        self._take_networks(networks)
        for uuid, text in {**dict.fromkeys(gone), **domains}.items():
            self._take_domain(uuid, text)
        stale = set(self._domains) if self._places != places else set()
        for uuid in sorted(stale | set(domains) | gone):
            self._derive(uuid)
        after, changed = self._networks, self._instances.settle()
        return RecordSet.changes(
            {
                key: after.get(key)
                for key in before.keys() | after.keys()
                if before.get(key) != after.get(key)
            },
            {InstanceId(key): record for key, record in changed.items()},
        )

    def _take_networks(self, described: Iterable[NetworkXml]) -> None:
        parsed = [parse_libvirt_network(each.text, active=each.active) for each in described]
        by_name = {each.name: each for each in parsed if isinstance(each, LibvirtNetwork)}
        self._places = Places(by_name, self._places.selection)
        records = tuple(self._places.records())
        self._networks = {each.id: each for each in records if isinstance(each, Network)}
        refused = [each for each in (*parsed, *records) if isinstance(each, Refused)]
        self._network_problems = tuple(problem for each in refused for problem in each.problems)

    def _take_domain(self, uuid: str, text: str | None) -> None:
        self._unreadable.pop(uuid, None)
        parsed = None if text is None else parse_domain(text)
        if parsed is None:
            self._domains.pop(uuid, None)
        elif isinstance(parsed, Refused):
            self._unreadable[uuid] = parsed.problems
        else:
            self._domains[uuid] = parsed

    def _derive(self, uuid: str) -> None:
        domain = self._domains.get(uuid)
        record = None if domain is None else describe_domain(domain, self._places)
        match record:
            case None:
                self._instances.replace_file(uuid, ())
            case Refused(problems, found):
                entry: Entry[Instance] = Entry(found or uuid, uuid, 0, problems=problems)
                self._instances.replace_file(uuid, (entry,), unclear=found is None)
            case Instance():
                self._instances.replace_file(uuid, (Entry(record.id, uuid, 0, record=record),))

    def _where(self, entry: Entry[Instance]) -> tuple[Path, str | None]:
        domain = self._domains.get(entry.file)
        return ("instance",), None if domain is None else domain.place
