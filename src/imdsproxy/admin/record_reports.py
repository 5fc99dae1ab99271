"""Networks and instances as `list` and `show` report them: the source of each, and why guests do not get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, TypeVar

from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core import endpoints
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId, Upstream
from imdsproxy.core.observation import Conflict, SourceName
from imdsproxy.core.records import Json, render_record
from imdsproxy.errors import NotFound, RequestRefused
from imdsproxy.listeners.binds import networks_of
from imdsproxy.listeners.loop import ListenerLoop

_Id = TypeVar("_Id", NetworkId, InstanceId)
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A network that is configured and not served now.

    Attributes:
        code: Stable and kebab-case, as `namespace-missing`, `port-busy`, `foreign-listener`.
        reason: What is wrong, with pid and program where another program is in the way.
        hint: What the operator can do.
    """

    network: NetworkId
    code: str
    reason: str
    hint: str = ""


def report_left_out(one: endpoints.LeftOut) -> LeftOut:
    """A network that is not served, as reports have it."""
    family = "" if one.family is None else f"IPv{one.family.value}: "
    return LeftOut(one.network, one.code.value, f"{family}{one.reason}", one.hint)


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """A network, where it comes from, and whether it is served; `left_out` says why not."""

    network: Network
    source: SourceName
    instances: int = 0
    left_out: LeftOut | None = None

    def render(self) -> dict[str, Json]:
        """As JSON (`bodies.NetworkView`)."""
        return {
            "record": render_record(self.network),
            "source": self.source,
            "instances": self.instances,
            "serving": self.left_out is None,
            "left_out": None if self.left_out is None else asdict(self.left_out),
        }


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """An instance, where it comes from, and the revision that guests see.

    Attributes:
        revision: Hash of the compiled record; empty while it is not compiled.
        conflicts: What others claim as well.
        pending: Why guests do not get the record, or not its newest version.
    """

    instance: Instance
    source: SourceName
    revision: str = ""
    conflicts: tuple[Conflict, ...] = ()
    pending: tuple[str, ...] = ()

    def render(self) -> dict[str, Json]:
        """As JSON (`bodies.InstanceView`), with its whole record."""
        return {
            "record": render_record(self.instance),
            "ec2_id": self.instance.ec2_id,
            "uuid": self.instance.uuid,
            "source": self.source,
            "revision": self.revision,
            "conflicts": [asdict(one) for one in self.conflicts],
            "pending": list(self.pending),
        }

    def summarise(self) -> dict[str, Json]:
        """As JSON (`bodies.InstanceSummary`): of payloads only the size in bytes."""
        user_data, vendor_data = self.instance.user_data, self.instance.vendor_data
        bare = replace(self.instance, user_data=None, vendor_data=None)
        return {
            **replace(self, instance=bare).render(),
            "user_data_bytes": len(user_data or b""),
            "vendor_data_bytes": len(vendor_data or b""),
        }


@dataclass(frozen=True, slots=True)
class _Moment:
    """What is the same for all instances of one answer.

    Attributes:
        unserved: Networks that HAProxy does not listen in, with the reason.
        refused: Why a newer version of an instance's record is refused, by its id.
    """

    conflicts: Sequence[Conflict]
    unserved: Mapping[NetworkId, str]
    refused: Mapping[str, str]


@dataclass(slots=True)
class RecordReports:
    """What is known now of networks and instances."""

    inventory: Inventory
    records: RecordLoop
    listeners: ListenerLoop
    documents_needed: bool

    def network_id(self, text: str) -> NetworkId:
        """The id of the network that has this id or name; the text itself where none has.

        Raises:
            RequestRefused: Several have the name.
        """
        network = NetworkId(text)
        known = self.inventory.knows(network)
        return network if known else _find_id(network, self.inventory.networks)

    def instance_id(self, text: str) -> InstanceId:
        """The same for instances."""
        instance = InstanceId(text)
        known = self.inventory.sources_of_instance(instance)
        return instance if known else _find_id(instance, self.inventory.instances)

    def networks(self) -> Sequence[NetworkReport]:
        """Every network, by id."""
        networks, degraded = self.inventory.networks, self._degraded()
        return [self._network(networks[one], degraded) for one in sorted(networks)]

    def network(self, network: NetworkId) -> NetworkReport:
        """One network; `NotFound` otherwise."""
        found = self.inventory.networks.get(network)
        if found is None:
            raise NotFound(f"there is no network {network}", hint="imdsproxy network list")
        return self._network(found, self._degraded())

    def _degraded(self) -> Mapping[NetworkId, LeftOut]:
        """The first reason for each network that is not served."""
        return {one.network: report_left_out(one) for one in reversed(self.listeners.degraded())}

    def _network(self, network: Network, degraded: Mapping[NetworkId, LeftOut]) -> NetworkReport:
        return NetworkReport(
            network,
            ", ".join(self.inventory.sources_of_network(network.id)),
            len(self.inventory.instances_in(network.id)),
            degraded.get(network.id),
        )

    def instances(self, network: NetworkId | None = None) -> Sequence[InstanceReport]:
        """Every instance, or those with a port in `network`, by id; of a contested one the first version."""
        contested = self.inventory.contested_instances
        known = {**self.inventory.instances, **{key: one[0] for key, one in contested.items()}}
        ids = known.keys() if network is None else self.inventory.instances_in(network)
        moment = self._moment()
        return [self._instance(known[one], moment) for one in sorted(ids)]

    def instance(self, instance: InstanceId) -> InstanceReport:
        """One instance; `NotFound` otherwise."""
        found = self.inventory.instances.get(instance)
        if found is None and instance in self.inventory.contested_instances:
            sources = " and ".join(self.inventory.sources_of_instance(instance))
            raise NotFound(
                f"instance {instance} has no record in force: {sources} describe it differently",
                hint="leave it in one source only, or make its records equal",
            )
        if found is None:
            raise NotFound(f"there is no instance {instance}", hint="imdsproxy instance list")
        return self._instance(found, self._moment())

    def _moment(self) -> _Moment:
        serving = networks_of(self.listeners.report.endpoints)
        return _Moment(
            self.inventory.conflicts(),
            {
                one.network: one.reason
                for one in reversed(self.listeners.degraded())
                if one.network not in serving
            },
            {
                problem.record: str(problem)
                for source in self.inventory.sources
                for problem in self.inventory.problems_of(source)
                if problem.record is not None and problem.field.startswith("instance")
            },
        )

    def _instance(self, instance: Instance, moment: _Moment) -> InstanceReport:
        return InstanceReport(
            instance,
            ", ".join(self.inventory.sources_of_instance(instance.id)),
            self.records.compiler.revisions.get(instance.id, ""),
            tuple(
                conflict
                for conflict in moment.conflicts
                if any(claimant.instance == instance.id for claimant in conflict.claimants)
            ),
            tuple(self._pending(instance, moment)),
        )

    def _pending(self, instance: Instance, moment: _Moment) -> list[str]:
        failures = self.records.compiler.failures.get(instance.id), self.records.failure
        found = [one.reason for one in failures if one is not None]
        embedded = instance.upstream is Upstream.EMBEDDED
        if embedded and not self.documents_needed:
            found.append("documents.enabled is off, and it has documents of ours")
        elif embedded and not found and instance.id not in self.records.compiler.revisions:
            found.append("it is not compiled yet")
        for network in dict.fromkeys(port.network for port in instance.ports):
            if not self.inventory.knows(network):
                found.append(f"there is no network {network}")
            elif network in moment.unserved:
                found.append(f"network {network} is not served: {moment.unserved[network]}")
        if instance.id in moment.refused:
            found.append(f"a newer version is refused: {moment.refused[instance.id]}")
        return found


def _find_id(text: _Id, records: Mapping[_Id, Network] | Mapping[_Id, Instance]) -> _Id:
    """The id of the record that has this name; the text itself where none has.

    Raises:
        RequestRefused: Several have the name.
    """
    found = sorted(one for one, record in records.items() if record.name == text)
    if len(found) > 1:
        shown = ", ".join(found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise RequestRefused(f"{len(found)} have the name {text}", hint=f"use an id: {shown}")
    return found[0] if found else text
