"""What sources say of networks and instances, what that changes, and where they contradict each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from imdsproxy.core.model import Instance, InstanceId, IpAddress, Network, NetworkId
from imdsproxy.core.packed import PackedInstance, PackedInstances
from imdsproxy.errors import Problem

SourceName: TypeAlias = str
AddressKey: TypeAlias = tuple[NetworkId, IpAddress]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a source saw. Sources give records, and `sources.api.Reports` the rest.

    Attributes:
        source: Who saw it.
        full: The mappings are everything that the source has: what is not in them is gone.
            Otherwise they hold changes only, and `*_removed` what went (removals apply before
            additions).
        in_sync: The source has reported all that it knows; before that nothing may be swept, and an
            unknown address is answered 503, not 404.
        problems: Every record refused at this moment (the whole list, not the change).
        implied_networks: Networks that the source vouches for without knowing how they are reached (the
            whole set, not the change): ports in them are not stranded.
        defers: Its instances give way to those of the same id in other sources, because who chose the id may be
            a tenant: a port of Neutron's names any instance that its owner likes.
        more: Another observation follows at once: what these change is looked at together.
        moves: An address goes from one of the instances to another: they are published at once, not in pieces.
        expired: Its instances may have been removed since it last knew: guests of instances that no other source has
            are answered 503.
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
        """What has changed, by id; `None` stands for a record that is gone."""
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
        """Any record came, changed or went."""
        return bool(
            self.networks or self.instances or self.networks_removed or self.instances_removed
        )


@dataclass(slots=True)
class Affected:
    """Whose state may have changed; what is not named here has not.

    Attributes:
        networks: Their listener, content or conflict.
        instances: Their documents: the instance itself, or a network that it has a port in.
        addresses: Who owns them, or the documents of who owns them.
        gone: Instances that no source has any more.
        in_sync: `Inventory.in_sync` changed.
    """

    networks: set[NetworkId] = field(default_factory=set)
    instances: set[InstanceId] = field(default_factory=set)
    addresses: set[AddressKey] = field(default_factory=set)
    gone: set[InstanceId] = field(default_factory=set)
    in_sync: bool = False

    def __bool__(self) -> bool:
        return bool(self.networks or self.instances or self.addresses or self.in_sync)


class ConflictKind(StrEnum):
    """What two records cannot agree on."""

    NETWORK = "network"
    INSTANCE = "instance"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True, order=True)
class Claimant:
    """Who says so: a source, by which instance's record (empty for a network's own record)."""

    source: SourceName
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Records that contradict each other; none of them is in force where they do.

    Attributes:
        kind: What they contradict each other about.
        subject: The network's id, the instance's id, or `NETWORK/ADDRESS`.
        claimants: All of them, in order.
    """

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
    """Owner of an address that is answered 503, because all its sources may have removed it since they last knew."""

    instance: InstanceId
    sources: tuple[SourceName, ...]


@dataclass(frozen=True, slots=True)
class StrandedPort:
    """A port in a network that no source tells of: it claims nothing until the network comes.

    Attributes:
        number: The port's place in the instance's record, from 0.
    """

    source: SourceName
    instance: InstanceId
    number: int
    network: NetworkId

    def problem(
        self, *, field: str = "", file: str | None = None, line: int | None = None
    ) -> Problem:
        """What is wrong, with the place in its source where that is known."""
        return Problem(
            field or f"instances.{self.instance}.ports[{self.number}].network",
            f"there is no network {self.network}",
            "add the network, or mend the port; until then the port has no addresses",
            file,
            line,
        )
