"""Networks and instances as `list` and `show` report them: the source of each, and why guests do not get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core import endpoints
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId, Upstream
from imdsproxy.errors import NotFound, RequestRefused
from imdsproxy.listeners.endpoints import networks_of
from imdsproxy.listeners.loop import ListenerLoop

_Id = TypeVar("_Id", NetworkId, InstanceId)
_SHOWN: Final = 5

Report: TypeAlias = dict[str, Any]
"""As the views in `bodies`, with the core's values in it (see `bodies.RecordResponse`)."""


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

    def networks(self) -> list[Report]:
        """Every network, by id, as `bodies.NetworkView`."""
        networks = self.inventory.networks
        return self._report_networks([networks[one] for one in sorted(networks)])

    def network(self, network: NetworkId) -> Report:
        """One network; `NotFound` otherwise."""
        found = self.inventory.networks.get(network)
        if found is None:
            raise NotFound(f"there is no network {network}", hint="imdsproxy network list")
        return self._report_networks([found])[0]

    def _report_networks(self, networks: Sequence[Network]) -> list[Report]:
        # Of several reasons the first.
        left_out = {
            one.network: report_left_out(one) for one in reversed(self.listeners.degraded())
        }
        return [
            {
                "record": network,
                "source": ", ".join(self.inventory.sources_of_network(network.id)),
                "instances": len(self.inventory.instances_in(network.id)),
                "serving": network.id not in left_out,
                "left_out": left_out.get(network.id),
            }
            for network in networks
        ]

    def instances(self, network: NetworkId | None = None) -> list[Report]:
        """Every instance, or those with a port in `network`, by id, for `summarise`.

        Of a contested one the first version.
        """
        known, contested = self.inventory.instances, self.inventory.contested_instances
        ids = (
            known.keys() | contested.keys()
            if network is None
            else self.inventory.instances_in(network)
        )
        return self._report_instances(
            [contested[one][0] if one in contested else known[one] for one in sorted(ids)]
        )

    def instance(self, instance: InstanceId) -> Report:
        """One instance, as `bodies.InstanceView`; `NotFound` otherwise."""
        found = self.inventory.instances.get(instance)
        if found is None and instance in self.inventory.contested_instances:
            sources = " and ".join(self.inventory.sources_of_instance(instance))
            raise NotFound(
                f"instance {instance} has no record in force: {sources} describe it differently",
                hint="leave it in one source only, or make its records equal",
            )
        if found is None:
            raise NotFound(f"there is no instance {instance}", hint="imdsproxy instance list")
        return _complete(self._report_instances([found])[0])

    def _report_instances(self, instances: Sequence[Instance]) -> list[Report]:
        conflicts = self.inventory.conflicts()
        serving = networks_of(self.listeners.report.endpoints)
        unserved = {
            one.network: one.reason
            for one in reversed(self.listeners.degraded())
            if one.network not in serving
        }
        refused = {
            problem.record: str(problem)
            for source in self.inventory.sources
            for problem in self.inventory.problems_of(source)
            if problem.record is not None and problem.field.startswith("instance")
        }
        return [
            {
                "record": instance,
                "source": ", ".join(self.inventory.sources_of_instance(instance.id)),
                "revision": self.records.compiler.revisions.get(instance.id, ""),
                "conflicts": [
                    conflict
                    for conflict in conflicts
                    if any(claimant.instance == instance.id for claimant in conflict.claimants)
                ],
                "pending": self._pending(instance, unserved, refused),
            }
            for instance in instances
        ]

    def _pending(
        self, instance: Instance, unserved: Mapping[NetworkId, str], refused: Mapping[str, str]
    ) -> list[str]:
        """Why guests do not get the record, or not its newest version."""
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
            elif network in unserved:
                found.append(f"network {network} is not served: {unserved[network]}")
        if instance.id in refused:
            found.append(f"a newer version is refused: {refused[instance.id]}")
        return found


def summarise(report: Report) -> Report:
    """An instance as `bodies.InstanceSummary`; in any thread, which is most of the work for a long list."""
    record: Instance = report["record"]
    return {
        **_complete(report),
        "record": replace(record, user_data=None, vendor_data=None),
        "user_data_bytes": len(record.user_data or b""),
        "vendor_data_bytes": len(record.vendor_data or b""),
    }


def _complete(report: Report) -> Report:
    record: Instance = report["record"]
    return {"record": record, "ec2_id": record.ec2_id, "uuid": record.uuid, **report}


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
