"""Instances as `instance list` and `show` report them: where each comes from, and why guests do not get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imdsproxy.admin.operations import InstanceReport
from imdsproxy.app.listener_loop import ListenerLoop
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, NetworkId, Upstream
from imdsproxy.core.observation import Conflict
from imdsproxy.core.plan import networks_of
from imdsproxy.errors import NotFound

__all__ = ["InstanceReports"]


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
class InstanceReports:
    """Reports of instances, as of now."""

    inventory: Inventory
    records: RecordLoop
    listeners: ListenerLoop
    documents_needed: bool

    def all(self, network: NetworkId | None = None) -> Sequence[InstanceReport]:
        """See `Operations.list_instances`; of a contested instance the first version."""
        contested = self.inventory.contested_instances
        known = {**self.inventory.instances, **{key: one[0] for key, one in contested.items()}}
        ids = known.keys() if network is None else self.inventory.instances_in(network)
        moment = self._moment()
        return [self._report(known[one], moment) for one in sorted(ids)]

    def get(self, instance: InstanceId) -> InstanceReport:
        """See `Operations.get_instance`."""
        found = self.inventory.instances.get(instance)
        if found is None and instance in self.inventory.contested_instances:
            sources = " and ".join(self.inventory.sources_of_instance(instance))
            raise NotFound(
                f"instance {instance} has no record in force: {sources} describe it differently",
                hint="leave it in one source only, or make its records equal",
            )
        if found is None:
            raise NotFound(f"there is no instance {instance}", hint="imdsproxy instance list")
        return self._report(found, self._moment())

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

    def _report(self, instance: Instance, moment: _Moment) -> InstanceReport:
        return InstanceReport(
            instance,
            ", ".join(self.inventory.sources_of_instance(instance.id)),
            self.records.revisions.get(instance.id, ""),
            tuple(
                conflict
                for conflict in moment.conflicts
                if any(claimant.instance == instance.id for claimant in conflict.claimants)
            ),
            tuple(self._pending(instance, moment)),
        )

    def _pending(self, instance: Instance, moment: _Moment) -> list[str]:
        found = [
            self.records.failures[name].reason
            for name in (f"instances.{instance.id}", "records")
            if name in self.records.failures
        ]
        embedded = instance.upstream is Upstream.EMBEDDED
        if embedded and not self.documents_needed:
            found.append("documents.enabled is off, and it has documents of ours")
        elif embedded and not found and instance.id not in self.records.revisions:
            found.append("it is not compiled yet")
        for network in dict.fromkeys(port.network for port in instance.ports):
            if not self.inventory.knows(network):
                found.append(f"there is no network {network}")
            elif network in moment.unserved:
                found.append(f"network {network} is not served: {moment.unserved[network]}")
        if instance.id in moment.refused:
            found.append(f"a newer version is refused: {moment.refused[instance.id]}")
        return found
