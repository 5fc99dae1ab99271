"""Reports of a host's networks and instances: source, reasons why guests do not get a record, requests and limits."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from imdsproxy.api.answers import NotServed
from imdsproxy.api.bodies import choose_named
from imdsproxy.api.record_routes import Report
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.record_plan import policy_place
from imdsproxy.errors import DataplaneError, NotFound
from imdsproxy.haproxy.master import WorkerEnded
from imdsproxy.haproxy.rules.limits import COUNTERS, POLICY_COUNTERS, Usage, read_usage
from imdsproxy.host.turns import in_turns
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId, Upstream
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.matching import matcher
from imdsproxy.model.observation import Conflict
from imdsproxy.model.policy import DEFAULT
from imdsproxy.network.endpoints import networks_of

_Id = TypeVar("_Id", NetworkId, InstanceId)


def no_such(kind: str, subject: str, hint: str = "") -> NotFound:
    """Return the error to raise if no network or instance has this id."""
    return NotFound(f"there is no {kind} {subject}", hint=hint or f"imdsproxy {kind} list")


def refuse_unknown(inventory: Inventory, instance: InstanceId) -> None:
    """Raise `NotFound` if no source has the instance."""
    if not inventory.sources_of_instance(instance):
        raise no_such("instance", instance)


def find_record(inventory: Inventory, instance: InstanceId) -> Instance | None:
    """Return the record of an instance, or the first version of a contested one; `None` if the instance is gone."""
    contested = inventory.contested_instances.get(instance)
    return inventory.instances.get(instance) if contested is None else contested[0]


@dataclass(frozen=True, slots=True)
class HostReports:
    parts: Parts

    def find_network(self, text: str) -> NetworkId:
        inventory, network = self.parts.inventory, NetworkId(text)
        return network if inventory.knows(network) else _find_id(network, inventory.networks)

    def find_instance(self, text: str) -> InstanceId:
        inventory, instance = self.parts.inventory, InstanceId(text)
        known = inventory.sources_of_instance(instance)
        return instance if known else _find_id(instance, inventory.instances)

    async def report_networks(self) -> Iterable[Report]:
        networks = self.parts.inventory.networks
        return _describe_networks(self.parts, [networks[one] for one in sorted(networks)])

    async def report_network(self, network: NetworkId) -> Report:
        found = self.parts.inventory.networks.get(network)
        if found is None:
            raise no_such("network", network)
        return _describe_networks(self.parts, [found])[0]

    async def match_instances(
        self, text: str, network: NetworkId | None, project: str | None = None
    ) -> Sequence[InstanceId]:
        inventory, matches = self.parts.inventory, matcher(text, project)
        every = inventory.instances.keys() | inventory.contested_instances.keys()
        chosen = sorted(every if network is None else inventory.instances_in(network))
        if matches is None:
            return chosen
        found: list[InstanceId] = []
        async for one in in_turns(chosen):
            record = find_record(inventory, one)
            if record is not None and matches(record):
                found.append(one)
        return found

    def report_instances(self, instances: Iterable[InstanceId]) -> AsyncIterator[Report]:
        """Report these instances as `bodies.InstanceSummary`, except instances that are gone when their turn comes."""
        found = (find_record(self.parts.inventory, one) for one in instances)
        there = (one for one in found if one is not None)
        return in_turns(map(_summarise, _describe_instances(self.parts, there)))

    async def report_page(self, instances: Sequence[InstanceId]) -> Sequence[Report]:
        return [one async for one in self.report_instances(instances)]

    async def report_instance(self, instance: InstanceId) -> Report:
        inventory = self.parts.inventory
        found = inventory.instances.get(instance)
        if found is None and instance in inventory.contested_instances:
            sources = " and ".join(inventory.sources_of_instance(instance))
            raise NotFound(
                f"instance {instance} has no record in force: {sources} describe it differently",
                hint="leave it in one source only, or make its records equal",
            )
        if found is None:
            raise no_such("instance", instance)
        return _complete(next(_describe_instances(self.parts, [found])))


def _describe_networks(parts: Parts, networks: Sequence[Network]) -> list[Report]:
    inventory = parts.inventory
    # The first of several reasons wins.
    not_served = {one.network: NotServed.of(one) for one in reversed(parts.listeners.degraded())}
    return [
        {
            "record": network,
            "source": ", ".join(inventory.sources_of_network(network.id)),
            "instances": len(inventory.instances_in(network.id)),
            "serving": network.id not in not_served,
            "not_served": not_served.get(network.id),
        }
        for network in networks
    ]


def _describe_instances(parts: Parts, instances: Iterable[Instance]) -> Iterator[Report]:
    inventory, listeners = parts.inventory, parts.listeners
    contested: dict[str, list[Conflict]] = {}
    for conflict in inventory.conflicts():
        for claimant in {one.instance for one in conflict.claimants}:
            contested.setdefault(claimant, []).append(conflict)
    serving = networks_of(listeners.last_plan.endpoints)
    degraded = [one for one in reversed(listeners.degraded()) if one.network not in serving]
    unserved = {one.network: one.reason for one in degraded}
    refused = {
        problem.record: str(problem)
        for report in inventory.reports.values()
        for problem in report.problems
        if problem.record is not None and problem.field.startswith("instance")
    }
    for instance in instances:
        yield {
            "record": instance,
            "source": ", ".join(inventory.sources_of_instance(instance.id)),
            "revision": parts.records.compiler.revisions.get(instance.id, ""),
            "conflicts": contested.get(instance.id, []),
            "pending": _list_reasons(parts, instance, unserved, refused),
        }


def _list_reasons(
    parts: Parts,
    instance: Instance,
    unserved: Mapping[NetworkId, str],
    refused: Mapping[str, str],
) -> list[str]:
    """List why guests do not get the record, or not its newest version."""
    records = parts.records
    failures = records.compiler.failures.get(instance.id), records.failure
    found = [one.reason for one in failures if one is not None]
    embedded = instance.upstream is Upstream.EMBEDDED
    if embedded and not parts.companion.needed:
        found.append("documents.enabled is off, so imdsproxy serves no documents of this instance")
    elif embedded and not found and instance.id not in records.compiler.revisions:
        found.append("the documents are not compiled yet")
    for network in dict.fromkeys(port.network for port in instance.ports):
        if not parts.inventory.knows(network):
            found.append(f"there is no network {network}")
        elif network in unserved:
            found.append(f"network {network} is not served: {unserved[network]}")
    if instance.id in refused:
        found.append(f"a newer version is refused: {refused[instance.id]}")
    return found


def _summarise(report: Report) -> Report:
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
    found = [one for one, record in records.items() if record.name == text]
    return cast("_Id", choose_named(text, found))


async def report_usage(parts: Parts, instance: InstanceId) -> Usage | None:
    """Read the counters of the worker that takes connections; `None` if limits are disabled or HAProxy does not answer.

    A policy's limits are those in the network of the first port. Raise `NotFound` if there is no such instance.
    """
    record = find_record(parts.inventory, instance)
    if record is None:
        raise no_such("instance", instance)
    allowed, haproxy = parts.holder.settings.limits, parts.haproxy
    if not allowed.enabled or (worker := haproxy.worker) is None:
        return None
    tables = (f"show table {name} key {instance}" for name in (COUNTERS, POLICY_COUNTERS))
    try:
        usual, own = [await haproxy.master.send(worker, command) for command in tables]
    except (DataplaneError, WorkerEnded):
        return None
    policy = DEFAULT
    for port in record.ports[:1]:
        project = port.project or record.project
        place = policy_place(parts.inventory, port.network, project, record)
        policy = parts.records.policies().fold(place).policy
    return read_usage(
        usual,
        own,
        requests_per_s=allowed.requests_per_s,
        burst=allowed.burst,
        policy=policy,
        connections=allowed.connections,
        now=parts.clock.now().timestamp(),
    )
