"""Merged records of all sources, and the owner of each address.

Sources report `Observation`s. `Inventory.observe` applies an observation and returns the records whose data-plane state
may have changed. The result depends only on the sources' present records, never on the order of the observations: if
two sources give one address or id to different things, that is a conflict, not a race.

The rules, in the order in which they apply:

- Equal records of a network or instance in two sources are one record. A record without a creation time does not
  contradict a record that has one.
- Different records of a network in two sources are a conflict. If the sources agree on the listener, the network stays,
  without name, subnets and MTU, so that guests are answered. Otherwise the network has no listener.
- Different records of an instance in two sources are a conflict: the instance has no documents, and every address that
  any version claims is contested. A deferring source never causes a conflict: its record is ignored if another source
  has the id.
- If two instances claim an address (or the link-local address of a MAC) in one network, the address is contested. Their
  other addresses are not.
- A port of an unknown network claims nothing until a source reports the network.
- If all sources of an instance have expired, the instance keeps its record and its addresses, and its guests get 503.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from types import MappingProxyType
from typing import TypeVar

from imdsproxy.errors import Problem
from imdsproxy.model.claims import Claims, claimed_keys
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from imdsproxy.model.observation import (
    AddressKey,
    Affected,
    Claimant,
    Conflict,
    ConflictKind,
    Expired,
    Observation,
    SourceName,
    StrandedPort,
)
from imdsproxy.model.packed import ClaimingPort, PackedInstances

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


@dataclass(slots=True)
class Report:
    """Present report of one source: its records, and the other fields of its last `Observation`."""

    networks: dict[NetworkId, Network] = field(default_factory=dict)
    instances: PackedInstances = field(default_factory=PackedInstances)
    problems: tuple[Problem, ...] = ()
    in_sync: bool = False
    implied: frozenset[NetworkId] = frozenset()
    defers: bool = False
    expired: bool = False


class Inventory:
    """Merged index of the records of the sources, which are all expected to report.

    Mutable: `observe` is its only writer. An observation takes time in proportion to its changes (a full observation:
    to the source's records), not to the inventory's size. The returned mappings are live views: iterate over them only
    while `observe` is not running.
    """

    def __init__(self, sources: Iterable[SourceName] = ()) -> None:
        self._reports: dict[SourceName, Report] = {name: Report() for name in sorted(sources)}
        self._networks: dict[NetworkId, Network] = {}
        self._network_conflicts: set[NetworkId] = set()
        self._instances = PackedInstances()
        self._instance_conflicts: dict[InstanceId, tuple[Instance, ...]] = {}
        self._addresses = Claims()
        self._macs: Counter[NetworkId] = Counter()
        self._expired = False
        self._idle: defaultdict[NetworkId, set[InstanceId]] = defaultdict(set)

    # Records in force

    @property
    def networks(self) -> Mapping[NetworkId, Network]:
        """Networks with a listener: reported by one source, or identically by several."""
        return MappingProxyType(self._networks)

    @property
    def contradictory(self) -> frozenset[NetworkId]:
        """Networks without a listener, because sources differ on it."""
        return frozenset(self._network_conflicts - self._networks.keys())

    @property
    def instances(self) -> PackedInstances:
        """Instances with documents: reported by one source, or identically by several."""
        return self._instances

    @property
    def contested_instances(self) -> Mapping[InstanceId, tuple[Instance, ...]]:
        """Versions of instances that have no documents because sources describe them differently."""
        return MappingProxyType(self._instance_conflicts)

    @property
    def in_sync(self) -> bool:
        """Whether every source has reported all of its records. False without sources."""
        return bool(self._reports) and all(report.in_sync for report in self._reports.values())

    def owner(self, key: AddressKey) -> InstanceId | Expired | Conflict | None:
        """Return the owner of an address: a `Conflict` if it is contested, `None` if no record claims it."""
        return self._judge(key, self._addresses.owner(key))

    @property
    def has_expired(self) -> bool:
        return self._expired

    def expired(self, instance: InstanceId) -> Expired | None:
        """Return an `Expired` if all sources of the instance have expired."""
        if not self._expired:
            return None
        counting = self._counting(instance)
        if not counting or not all(report.expired for _, report in counting):
            return None
        return Expired(instance, tuple(name for name, _ in counting))

    def _judge(
        self, key: AddressKey, claimant: InstanceId | frozenset[InstanceId] | None
    ) -> InstanceId | Expired | Conflict | None:
        network = key[0]
        if claimant is None or not self.knows(network):
            return None
        if network in self._network_conflicts:
            return self._network_conflict(network)
        if isinstance(claimant, frozenset):
            return self._address_conflict(key)
        if claimant in self._instance_conflicts:
            return self._instance_conflict(claimant)
        return self.expired(claimant) or claimant

    def addresses(self) -> Iterator[tuple[AddressKey, InstanceId | Expired | Conflict]]:
        """Yield every claimed address of the existing networks, with its owner, network by network.

        Addresses that observations add or remove during the iteration may be missing.
        """
        for key, claimant in self._addresses.items():
            owner = self._judge(key, claimant)
            if owner is not None:
                yield key, owner

    def addresses_of(self, instance: InstanceId) -> frozenset[AddressKey]:
        return frozenset(claimed_keys(self._ports(instance)))

    def instances_in(self, network: NetworkId) -> frozenset[InstanceId]:
        return frozenset(self._addresses.within(network)) | self._idle.get(network, set())

    def carries_macs(self, network: NetworkId) -> bool:
        return self._macs[network] > 0

    def knows(self, network: NetworkId) -> bool:
        """Return whether a source reports the network, even in conflict, or implies it."""
        return (
            network in self._networks
            or network in self._network_conflicts
            or any(network in report.implied for report in self._reports.values())
        )

    # Sources and conflicts

    def sources_of_network(self, network: NetworkId) -> tuple[SourceName, ...]:
        return tuple(name for name, report in self._reports.items() if network in report.networks)

    def sources_of_instance(self, instance: InstanceId) -> tuple[SourceName, ...]:
        return tuple(name for name, _ in self._counting(instance))

    @property
    def reports(self) -> Mapping[SourceName, Report]:
        return MappingProxyType(self._reports)

    @property
    def address_count(self) -> int:
        return len(self._addresses)

    @property
    def conflict_count(self) -> int:
        """Number of conflicts, without building them."""
        contested = len(self._addresses.contested)
        return contested + len(self._network_conflicts) + len(self._instance_conflicts)

    def digest(self) -> bytes | None:
        """Return an order-independent digest of all records in force; `None` if any is contested or expired."""
        if self.conflict_count or self._expired:
            return None
        implied = frozenset[NetworkId]().union(*(one.implied for one in self._reports.values()))
        others = sorted(self._networks.items()), sorted(implied)
        marks = sum(map(self._instances.mark, self._instances)) % (1 << 128)
        return blake2b(repr((others, len(self._instances), marks)).encode()).digest()

    def conflicts(self) -> tuple[Conflict, ...]:
        contested = sorted(
            self._addresses.contested, key=lambda key: (key[0], key[1].version, int(key[1]))
        )
        return (
            *map(self._network_conflict, sorted(self._network_conflicts)),
            *map(self._instance_conflict, sorted(self._instance_conflicts)),
            *(self._address_conflict(key) for key in contested if self.knows(key[0])),
        )

    def stranded(self) -> Iterator[StrandedPort]:
        """Yield every port in a network that no source reports, by network and instance."""
        for network in sorted(self._addresses.networks() | self._idle.keys()):
            if self.knows(network):
                continue
            for instance in sorted(self.instances_in(network)):
                for source, report in self._reports.items():
                    record = report.instances.get(instance)
                    for number, port in enumerate(() if record is None else record.ports):
                        if port.network == network:
                            yield StrandedPort(source, instance, number, network)

    # Changes

    def observe(self, observation: Observation) -> Affected:
        """Apply an observation of a source; return the records whose state may have changed."""
        in_sync = self.in_sync
        report = self._report(observation.source)
        report.defers = observation.defers
        networks, instances = observation.networks, observation.instances
        networks_gone: Iterable[NetworkId] = observation.networks_removed
        gone: Iterable[InstanceId] = observation.instances_removed
        if observation.full:
            networks_gone = [one for one in report.networks if one not in networks]
            gone = [one for one in report.instances if one not in instances]
        change = Affected()
        for instance_id in gone:
            if instance_id in report.instances and instance_id not in instances:
                del report.instances[instance_id]
                self._set_instance(instance_id, change)
        for instance_id in instances:
            if report.instances.take(instance_id, instances):
                self._set_instance(instance_id, change)
        for network_id in networks_gone:
            self._set_network(report, network_id, networks.get(network_id), change)
        for network_id, network in networks.items():
            self._set_network(report, network_id, network, change)
        self._imply(report, observation.implied_networks, change)
        self._expire(report, observation.expired, change)
        report.problems = observation.problems
        report.in_sync = observation.in_sync
        for network_id in change.networks:
            for instance_id in self.instances_in(network_id) - change.instances:
                change.instances.add(instance_id)
                change.addresses |= self.addresses_of(instance_id)
        change.in_sync = self.in_sync != in_sync
        change.gone = change.instances - self._instances.keys() - self._instance_conflicts.keys()
        return change

    def _report(self, source: SourceName) -> Report:
        if source not in self._reports:
            self._reports = dict(sorted({**self._reports, source: Report()}.items()))
        return self._reports[source]

    def _expire(self, report: Report, expired: bool, change: Affected) -> None:  # noqa: FBT001 - of the observation
        if report.expired == expired:
            return
        report.expired = expired
        self._expired = any(one.expired for one in self._reports.values())
        for instance in report.instances:
            change.instances.add(instance)
            change.addresses |= self.addresses_of(instance)

    def _imply(self, report: Report, implied: frozenset[NetworkId], change: Affected) -> None:
        differing = report.implied ^ implied
        before = {network for network in differing if self.knows(network)}
        report.implied = implied
        for network in differing:
            if self.knows(network) != (network in before):
                for instance in self.instances_in(network):
                    change.addresses |= self.addresses_of(instance)

    def _set_network(
        self, report: Report, network_id: NetworkId, network: Network | None, change: Affected
    ) -> None:
        if report.networks.get(network_id) == network:
            return
        _put(report.networks, network_id, network)
        versions = _distinct(r.networks.get(network_id) for r in self._reports.values())
        in_force = _agreed(versions)
        before = self._networks.get(network_id), network_id in self._network_conflicts
        if before != (in_force, len(versions) > 1):
            _put(self._networks, network_id, in_force)
            self._network_conflicts.discard(network_id)
            if len(versions) > 1:
                self._network_conflicts.add(network_id)
            change.networks.add(network_id)

    def _set_instance(self, instance: InstanceId, change: Affected) -> None:
        ports_before = self._ports(instance)
        if not self._put_versions(instance):
            return
        ports = self._ports(instance)
        for network, mac, addresses in ports_before:
            if mac is not None:
                self._macs[network] -= 1
            elif not addresses:
                self._idle[network].discard(instance)
        for network, mac, addresses in ports:
            if mac is not None:
                self._macs[network] += 1
            elif not addresses:
                self._idle[network].add(instance)
        before, after = claimed_keys(ports_before), claimed_keys(ports)
        for key in before - after:
            self._addresses.remove(instance, key)
        for key in after - before:
            self._addresses.add(instance, key)
        change.instances.add(instance)
        change.addresses |= before | after

    def _put_versions(self, instance: InstanceId) -> bool:
        """Store the instance's versions that count; return whether they differ from the previous ones."""
        counting = [report.instances for _, report in self._counting(instance)]
        contested = self._instance_conflicts.pop(instance, ())
        if len(counting) == 1:
            return self._instances.take(instance, counting[0])
        versions = _without_vaguer(_distinct(one[instance] for one in counting))
        if len(versions) > 1:
            self._instance_conflicts[instance] = versions
        before = self._instances.get(instance)
        _put(self._instances, instance, versions[0] if len(versions) == 1 else None)
        return versions != (contested if before is None else (before,))

    def _ports(self, instance: InstanceId) -> list[ClaimingPort]:
        """Return the instance's ports; if the instance is contested, the ports of each version."""
        versions = self._instance_conflicts.get(instance)
        if versions is None:
            return self._instances.ports(instance)
        return [(one.network, one.mac, one.addresses) for each in versions for one in each.ports]

    def _counting(self, instance_id: InstanceId) -> Collection[tuple[SourceName, Report]]:
        """Return the reports that define an id: a deferring source counts only if no other has the id."""
        having = [
            (name, report)
            for name, report in self._reports.items()
            if instance_id in report.instances
        ]
        return [(name, report) for name, report in having if not report.defers] or having

    def _network_conflict(self, network: NetworkId) -> Conflict:
        claimants = tuple(Claimant(source) for source in self.sources_of_network(network))
        return Conflict(ConflictKind.NETWORK, network, claimants)

    def _instance_conflict(self, instance: InstanceId) -> Conflict:
        return self._conflict(ConflictKind.INSTANCE, instance, (instance,))

    def _address_conflict(self, key: AddressKey) -> Conflict:
        return self._conflict(ConflictKind.ADDRESS, f"{key[0]}/{key[1]}", self._addresses.of(key))

    def _conflict(
        self, kind: ConflictKind, subject: str, instances: Iterable[InstanceId]
    ) -> Conflict:
        claimants = (
            Claimant(source, one) for one in instances for source in self.sources_of_instance(one)
        )
        return Conflict(kind, subject, tuple(sorted(claimants)))


def _put(mapping: MutableMapping[_K, _V], key: _K, value: _V | None) -> None:
    if value is None:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _distinct(records: Iterable[_V | None]) -> tuple[_V, ...]:
    """Return the distinct records in their order. A list search is enough: there are as many records as sources."""
    found: list[_V] = []
    for record in records:
        if record is not None and record not in found:
            found.append(record)
    return tuple(found)


def _without_vaguer(versions: tuple[Instance, ...]) -> tuple[Instance, ...]:
    """Drop each version without a creation time that equals another version except for that time."""
    dated = [version for version in versions if version.created_at is not None]
    known = [replace(version, created_at=None) for version in dated]
    return tuple(
        version for version in versions if version.created_at is not None or version not in known
    )


def _agreed(versions: tuple[Network, ...]) -> Network | None:
    if len(versions) == 1:
        return versions[0]
    if len({version.listener for version in versions}) == 1:
        checked = any(version.mac_check for version in versions)
        return Network(versions[0].id, versions[0].listener, mac_check=checked)
    return None
