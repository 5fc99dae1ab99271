"""Reports of sources on networks and instances, the changes they cause, and their conflicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from imdsproxy.errors import Problem
from imdsproxy.model.entities import Instance, InstanceId, IpAddress, Network, NetworkId
from imdsproxy.model.packed import PackedInstance, PackedInstances

SourceName: TypeAlias = str
AddressKey: TypeAlias = tuple[NetworkId, IpAddress]


@dataclass(frozen=True, slots=True)
class Observation:
    """Report of a source. Sources give the records; `sources.api.Reports` adds the other fields.

    Attributes:
        full: Whether the mappings are all records of the source; records not in them are gone. If false, they hold
            changes only, and `*_removed` the removals (removals apply before additions).
        in_sync: Whether the source has reported all of its records. Before that, the controller sweeps nothing, and an
            unknown address gets 503, not 404.
        problems: All records that are refused now (the whole list, not the change).
        implied_networks: Networks that the source confirms without knowing their listeners (the whole set, not the
            change): ports in them are not stranded.
        defers: Whether its instances give way to instances with the same id in other sources, because a tenant may have
            chosen the id: the owner of a Neutron port can name any instance.
        more: Whether another observation follows at once. The controller handles both together.
        moves: Whether an address moves from one of the instances to another. The controller publishes these instances
            at once, not in pieces.
        expired: Whether instances may have been removed since the source's last contact: guests of instances that no
            other source has get 503.
    """

    source: SourceName = ""
    full: bool = False
    networks: Mapping[NetworkId, Network] = field(default_factory=dict)
    instances: Mapping[InstanceId, Instance] = field(default_factory=dict)
    networks_removed: Collection[NetworkId] = ()
    instances_removed: Collection[InstanceId] = ()
    in_sync: bool = True
    problems: tuple[Problem, ...] = ()
    implied_networks: frozenset[NetworkId] = frozenset()
    defers: bool = False
    more: bool = False
    moves: bool = False
    expired: bool = False

    @classmethod
    def of_changes(
        cls,
        networks: Mapping[NetworkId, Network | None],
        instances: Mapping[InstanceId, Instance | PackedInstance | None],
        *,
        moves: bool = False,
    ) -> Observation:
        """Build an observation from changes by id; `None` stands for a removed record."""
        packed = PackedInstances()
        for key, instance in instances.items():
            if isinstance(instance, PackedInstance):
                packed.put(instance)
            elif instance is not None:
                packed[key] = instance
        return cls(
            networks={key: value for key, value in networks.items() if value is not None},
            instances=packed,
            networks_removed=[key for key, value in networks.items() if value is None],
            instances_removed=[key for key, value in instances.items() if value is None],
            moves=moves,
        )

    @property
    def has_records(self) -> bool:
        return bool(
            self.networks or self.instances or self.networks_removed or self.instances_removed
        )


@dataclass(slots=True)
class Affected:
    """Records whose state may have changed; all others are unchanged.

    Attributes:
        networks: Networks whose listener, content or conflict changed.
        instances: Instances whose documents changed, by their own record or that of one of their networks.
        addresses: Addresses whose owner changed, or whose owner's documents changed.
    """

    networks: set[NetworkId] = field(default_factory=set)
    instances: set[InstanceId] = field(default_factory=set)
    addresses: set[AddressKey] = field(default_factory=set)
    gone: set[InstanceId] = field(default_factory=set)
    in_sync: bool = False

    def __bool__(self) -> bool:
        return bool(self.networks or self.instances or self.addresses or self.in_sync)


class ConflictKind(StrEnum):
    """Subject on which two records disagree."""

    NETWORK = "network"
    INSTANCE = "instance"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True, order=True)
class Claimant:
    """Source of a claim, and the instance whose record claims (empty for a network's own record)."""

    source: SourceName
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Records that contradict each other on an id of a network or instance, or `NETWORK/ADDRESS`: none is in force."""

    kind: ConflictKind
    subject: str
    claimants: tuple[Claimant, ...]

    def __str__(self) -> str:
        who = ", ".join(
            f"{claimant.instance} ({claimant.source})" if claimant.instance else claimant.source
            for claimant in self.claimants
        )
        return f"{self.kind} {self.subject} is claimed differently by {who}"


@dataclass(frozen=True, slots=True)
class Expired:
    """Owner of an address that gets 503, because all of its sources have expired.

    Each source may have removed the instance since its last contact.
    """

    instance: InstanceId
    sources: tuple[SourceName, ...]


@dataclass(frozen=True, slots=True)
class StrandedPort:
    """Port, by its index in the record, that claims nothing until a source reports its network."""

    source: SourceName
    instance: InstanceId
    number: int
    network: NetworkId

    def problem(
        self, *, field: str = "", file: str | None = None, line: int | None = None
    ) -> Problem:
        """Return the problem for operators, with the place in its source if known."""
        return Problem(
            field or f"instances.{self.instance}.ports[{self.number}].network",
            f"there is no network {self.network}",
            "add the network, or correct the port; until then the port has no addresses",
            file,
            line,
        )
