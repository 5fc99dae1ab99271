"""What is known of libvirt's domains and networks, as records in force."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imdsproxy.core.inventory import address_keys
from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId
from imdsproxy.core.records import Refused, parse_instance
from imdsproxy.core.records.fields import root
from imdsproxy.core.records.scalars import parse_network_id
from imdsproxy.errors import Problem
from imdsproxy.sources.api import Origin
from imdsproxy.sources.clash import taken_address, taken_id
from imdsproxy.sources.in_force import Clash, Entry, InForce
from imdsproxy.sources.libvirt_domain import Domain, DomainInterface, parse_domain
from imdsproxy.sources.libvirt_network import (
    LibvirtNetwork,
    describe_network,
    parse_libvirt_network,
)

if TYPE_CHECKING:
    from imdsproxy.core.records import Json

__all__ = ["Changes", "LibvirtKnown", "NetworkXml", "Selection", "describe_domain"]


@dataclass(frozen=True, slots=True)
class NetworkXml:
    """A network as libvirt describes it, live where it is active."""

    text: str
    active: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """What of all that libvirt has is told.

    Attributes:
        networks: Only these: networks of libvirt's by name, bridges of the host's by device; `None` for all.
        marked_only: Only domains that have our element in their metadata.
    """

    networks: frozenset[str] | None = None
    marked_only: bool = False


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs from the last time: new records, `None` for those that are gone."""

    networks: Mapping[NetworkId, Network | None]
    instances: Mapping[InstanceId, Instance | None]


class LibvirtKnown:
    """Domains and networks by their UUIDs, and the records that they make.

    A domain whose element breaks keeps the record that it had, as a record file would (see `in_force`).
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._domains: dict[str, Domain] = {}
        self._unreadable: dict[str, tuple[Problem, ...]] = {}
        self._places: Places = Places({}, selection)
        self._networks: dict[NetworkId, Network] = {}
        self._network_problems: tuple[Problem, ...] = ()
        self._instances: InForce[Instance] = InForce(address_keys, self._explain)

    @property
    def networks(self) -> Mapping[NetworkId, Network]:
        """All in force."""
        return dict(self._networks)

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

    def origin_of_port(self, instance: InstanceId) -> Origin | None:
        """The domain whose record is in force."""
        entry = self._instances.entry_of(instance)
        domain = None if entry is None else self._domains.get(entry.file)
        return None if domain is None else Origin("instance.ports", domain.place)

    def update(
        self,
        domains: Mapping[str, str | None],
        networks: Iterable[NetworkXml] | None,
        *,
        everything: bool = False,
    ) -> Changes:
        """Take what libvirt says now.

        Args:
            domains: XML by UUID; `None` for a domain that is gone.
            networks: All of them; `None` where nothing is to change.
            everything: `domains` is all that there are.
        """
        gone = set(self._domains | self._unreadable) - set(domains) if everything else set()
        before = self._places
        told = dict(self._networks)
        if networks is not None:
            self._take_networks(networks)
        for uuid in gone:
            self._take_domain(uuid, None)
        for uuid, text in domains.items():
            self._take_domain(uuid, text)
        stale = set(self._domains) if self._places != before else set()
        for uuid in sorted(stale | set(domains) | gone):
            self._derive(uuid)
        changed = self._instances.settle()
        return Changes(
            _difference(told, self._networks),
            {InstanceId(key): record for key, record in changed.items()},
        )

    def _take_networks(self, described: Iterable[NetworkXml]) -> None:
        parsed = [parse_libvirt_network(each.text, active=each.active) for each in described]
        problems = [each.problems for each in parsed if isinstance(each, Refused)]
        by_name = {each.name: each for each in parsed if isinstance(each, LibvirtNetwork)}
        self._places = Places(by_name, self._selection)
        self._networks = {}
        for network in by_name.values():
            if not (network.active and self._places.serves(network)):
                continue
            record = describe_network(network, network_id(network))
            if isinstance(record, Refused):
                problems.append(record.problems)
            else:
                self._networks[record.id] = record
        self._network_problems = tuple(problem for found in problems for problem in found)

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
        if domain is None:
            self._instances.replace_file(uuid, ())
            return
        record = describe_domain(domain, self._places)
        if record is None:
            self._instances.replace_file(uuid, ())
        elif isinstance(record, Refused):
            entry: Entry[Instance] = Entry(record.id or uuid, uuid, 0, problems=record.problems)
            self._instances.replace_file(uuid, (entry,), unclear=record.id is None)
        else:
            self._instances.replace_file(uuid, (Entry(record.id, uuid, 0, record=record),))

    def _explain(self, clash: Clash[Instance]) -> Iterable[Problem]:
        domain, other = (self._domains.get(one.file) for one in (clash.entry, clash.other))
        file = None if domain is None else domain.place
        place = "" if other is None else other.place
        if not clash.addresses or clash.entry.record is None:
            yield taken_id(clash.entry.id, path=("instance",), place=place, file=file)
            return
        for address in clash.addresses:
            yield taken_address(
                clash.entry.record,
                address,
                clash.other.id,
                path=("instance",),
                place=place,
                file=file,
            )


def network_id(network: LibvirtNetwork) -> str:
    """A network's id: its name, or its UUID where the name is no id."""
    return network.name if _is_network_id(network.name) else network.uuid


def _is_network_id(name: str) -> bool:
    field, _findings = root(name, file=None, line_of=None, path=())
    return parse_network_id(field) is not None


class Places:
    """Which network an interface is in, and which addresses it gets there.

    Args:
        networks: Libvirt's, by name.
        selection: What of them is told.
    """

    def __init__(self, networks: Mapping[str, LibvirtNetwork], selection: Selection) -> None:
        self._networks = networks
        self._selection = selection
        self._leases: dict[tuple[str, str], list[str]] = defaultdict(list)
        for network in networks.values():
            for mac, address in network.hosts:
                self._leases[network_id(network), mac].append(address)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and self._networks == other._networks

    __hash__ = None  # type: ignore[assignment]  # it holds mappings

    def serves(self, network: LibvirtNetwork) -> bool:
        """Whether a network is told of."""
        return network.made_by_libvirt and self._selected(network.name)

    def network_of(self, interface: DomainInterface) -> NetworkId | None:
        """The network that an interface is a port of; `None` where its guest cannot be served there.

        Guests on a bridge of the host's are in one network, whether libvirt has a network for that bridge or not.
        """
        name, bridge = interface.network, interface.bridge
        network = None if name is None else self._networks.get(name)
        if network is not None and not network.made_by_libvirt:
            bridge = network.bridge if network.mode == "bridge" else None
            found = bridge if self._selected(network.name) or self._selected(bridge) else None
        elif network is not None:
            found = network_id(network) if self._selected(network.name) else None
        else:
            found = bridge or name
            found = found if self._selected(found) else None
        return NetworkId(found) if found is not None and _is_network_id(found) else None

    def vouches(self, interface: DomainInterface) -> bool:
        """Whether the interface's network exists though it may have no record."""
        return interface.network is None or interface.network in self._networks

    def addresses_of(self, network: NetworkId, mac: str) -> list[str]:
        """The addresses that libvirt's DHCP keeps for a MAC."""
        return list(self._leases.get((network, mac.lower()), ()))

    def marked_only(self) -> bool:
        """Whether only domains with our element are told of."""
        return self._selection.marked_only

    def _selected(self, name: str | None) -> bool:
        chosen = self._selection.networks
        return name is not None and (chosen is None or name in chosen)


def describe_domain(domain: Domain, places: Places) -> Instance | Refused | None:
    """The record of a domain; `None` for one that is not told of.

    Without an element of ours a domain has its UUID as id, and its name as name and host name.
    """
    ports = list(_ports(domain, places))
    if not domain.marked and (places.marked_only() or not ports):
        return None
    record: dict[str, Json] = {"id": domain.uuid, "name": domain.name, "ports": list(ports)}
    parsed = parse_instance({**record, **domain.keys}, file=domain.place, path=("instance",))
    if not domain.problems:
        return parsed
    more = parsed.problems if isinstance(parsed, Refused) else ()
    return Refused((*domain.problems, *more), parsed.id)


def _ports(domain: Domain, places: Places) -> Iterator[dict[str, Json]]:
    for interface in domain.interfaces:
        network = places.network_of(interface)
        if network is not None:
            port: dict[str, Json] = {"network": network, "mac": interface.mac}
            addresses = places.addresses_of(network, interface.mac)
            yield {**port, "addresses": list(addresses)} if addresses else port


def _difference(
    before: Mapping[NetworkId, Network], after: Mapping[NetworkId, Network]
) -> dict[NetworkId, Network | None]:
    keys = before.keys() | after.keys()
    return {key: after.get(key) for key in keys if before.get(key) != after.get(key)}
