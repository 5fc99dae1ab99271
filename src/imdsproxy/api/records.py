"""Networks and instances: reports, and changes that every worker of HAProxy confirms.

A report has the source of a record, and why guests do not get it. A change returns once no worker answers with the
previous state. It raises `SourceRefused` if no writable source is enabled or the record belongs to another source, and
`SourceUnavailable` if the store does not answer.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar, cast

from imdsproxy.api.answers import NotServed, Written
from imdsproxy.api.bodies import choose_named
from imdsproxy.controller.controller import UNCONFIRMED, Controller
from imdsproxy.controller.in_force import find_unserved, wait_confirmed
from imdsproxy.documents.dialects.ec2 import list_warnings, warn_of_names
from imdsproxy.errors import (
    AlreadyExists,
    NotFound,
    Problem,
    RecordConflict,
    SourceRefused,
)
from imdsproxy.model.claims import find_shared
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId, Upstream
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Conflict
from imdsproxy.network.endpoints import networks_of
from imdsproxy.reconcile.part import Impact, list_problems
from imdsproxy.sources.sqlite.source import SqliteSource

_AT_ONCE = 500

_Id = TypeVar("_Id", NetworkId, InstanceId)

Report: TypeAlias = dict[str, Any]
"""A view of `bodies` whose values are still the core's (see `bodies.RecordResponse`)."""


def find_network(inventory: Inventory, text: str) -> NetworkId:
    """Return the id of the network with this id or name; `text` itself if there is none.

    Raises:
        RequestRefused: Several networks have the name.
    """
    network = NetworkId(text)
    return network if inventory.knows(network) else _find_id(network, inventory.networks)


def find_instance(inventory: Inventory, text: str) -> InstanceId:
    """Return the id of the instance with this id or name, as `find_network` does for networks."""
    instance = InstanceId(text)
    known = inventory.sources_of_instance(instance)
    return instance if known else _find_id(instance, inventory.instances)


def no_such(kind: str, subject: str, hint: str = "") -> NotFound:
    """Return the error to raise if no network or instance has this id."""
    return NotFound(f"there is no {kind} {subject}", hint=hint or f"imdsproxy {kind} list")


def report_networks(controller: Controller) -> list[Report]:
    """Report every network, by id, as `bodies.NetworkView`."""
    networks = controller.inventory.networks
    return _describe_networks(controller, [networks[one] for one in sorted(networks)])


def report_network(controller: Controller, network: NetworkId) -> Report:
    """Report one network; raise `NotFound` if there is none."""
    found = controller.inventory.networks.get(network)
    if found is None:
        raise no_such("network", network)
    return _describe_networks(controller, [found])[0]


def _describe_networks(controller: Controller, networks: Sequence[Network]) -> list[Report]:
    inventory = controller.inventory
    # The first of several reasons wins.
    not_served = {
        one.network: NotServed.of(one) for one in reversed(controller.listeners.degraded())
    }
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


def list_ids(inventory: Inventory, network: NetworkId | None = None) -> list[InstanceId]:
    """List the ids of all instances, or of instances with a port in `network`, in order; contested ones included."""
    every = inventory.instances.keys() | inventory.contested_instances.keys()
    return sorted(every if network is None else inventory.instances_in(network))


def find_record(inventory: Inventory, instance: InstanceId) -> Instance | None:
    """Return the record of an instance, or the first version of a contested one; `None` if the instance is gone."""
    contested = inventory.contested_instances.get(instance)
    return inventory.instances.get(instance) if contested is None else contested[0]


def report_instances(controller: Controller, instances: Iterable[InstanceId]) -> Iterator[Report]:
    """Report these instances as `bodies.InstanceSummary`, except instances that are gone when their turn comes."""
    found = (find_record(controller.inventory, one) for one in instances)
    return map(
        _summarise, _describe_instances(controller, (one for one in found if one is not None))
    )


def report_instance(controller: Controller, instance: InstanceId) -> Report:
    """Report one instance as `bodies.InstanceView`; raise `NotFound` if there is none."""
    inventory = controller.inventory
    found = inventory.instances.get(instance)
    if found is None and instance in inventory.contested_instances:
        sources = " and ".join(inventory.sources_of_instance(instance))
        raise NotFound(
            f"instance {instance} has no record in force: {sources} describe it differently",
            hint="leave it in one source only, or make its records equal",
        )
    if found is None:
        raise no_such("instance", instance)
    return _complete(next(_describe_instances(controller, [found])))


def _describe_instances(controller: Controller, instances: Iterable[Instance]) -> Iterator[Report]:
    inventory, listeners = controller.inventory, controller.listeners
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
            "revision": controller.records.compiler.revisions.get(instance.id, ""),
            "conflicts": contested.get(instance.id, []),
            "pending": _list_reasons(controller, instance, unserved, refused),
        }


def _list_reasons(
    controller: Controller,
    instance: Instance,
    unserved: Mapping[NetworkId, str],
    refused: Mapping[str, str],
) -> list[str]:
    """List why guests do not get the record, or not its newest version."""
    records = controller.records
    failures = records.compiler.failures.get(instance.id), records.failure
    found = [one.reason for one in failures if one is not None]
    embedded = instance.upstream is Upstream.EMBEDDED
    if embedded and not controller.companion.needed:
        found.append("documents.enabled is off, and it has documents of ours")
    elif embedded and not found and instance.id not in records.compiler.revisions:
        found.append("it is not compiled yet")
    for network in dict.fromkeys(port.network for port in instance.ports):
        if not controller.inventory.knows(network):
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


async def put_records(
    controller: Controller,
    networks: Sequence[Network],
    instances: Collection[Instance],
    *,
    create: bool = False,
    bulk: bool = False,
) -> Written:
    """Add or replace records: all or none.

    Args:
        controller: The controller of the records.
        networks: Whole records.
        instances: Whole records.
        create: Refuse ids that exist.
        bulk: Begin the field of a problem with the kind and number of its record.

    Raises:
        AlreadyExists: An id exists, with `create`.
        RecordConflict: An address or a listener is taken (`problems` has the fields).
        SourceRefused: A network is unknown.
    """
    store = _store(controller)
    prefix = "{}[{}]." if bulk else ""
    coming = {one.id for one in networks}
    for network in networks:
        _refuse_foreign(controller, "network", network.id, create=create)
    unknown: list[Problem] = []
    async for place, instance in _enumerated(instances):
        _refuse_foreign(controller, "instance", instance.id, create=create)
        unknown += [
            Problem(
                f"{prefix.format('instances', place)}ports[{number}].network",
                f"there is no network {port.network}",
                "imdsproxy network list",
            )
            for number, port in enumerate(instance.ports)
            if port.network not in coming and not controller.inventory.knows(port.network)
        ]
    if unknown:
        raise SourceRefused("a port is in a network that does not exist", problems=unknown)
    async with controller.claiming if networks else contextlib.nullcontext():
        await _refuse_shared(controller, networks, prefix)
        await store.put(networks, instances, bulk=bulk)
    written = await _in_force(controller, [one.id for one in networks], instances=len(instances))
    found: list[Problem] = []
    async for _, instance in _enumerated(instances):
        found += warn_of_names(instance)
    return replace(written, warnings=list_warnings(found))


async def remove_network(controller: Controller, network: NetworkId) -> Written:
    """Remove a network.

    Raises:
        NotFound: The network does not exist.
        RecordConflict: Instances still have ports in it (`problems` names them).
    """
    _require(controller, "network", network)
    await _store(controller).remove_network(network)
    return await _in_force(controller, [network])


async def remove_instance(controller: Controller, instance: InstanceId) -> Written:
    """Remove an instance; raise `NotFound` if there is none."""
    _require(controller, "instance", instance)
    await _store(controller).remove_instance(instance)
    return await _in_force(controller, [], instances=1)


def _store(controller: Controller) -> SqliteSource:
    if (store := controller.sources.writable) is None:
        hint = "set sources.sqlite.enabled: true"
        raise SourceRefused("no source can be written to", hint=hint)
    return store


def _require(controller: Controller, kind: str, subject: str) -> None:
    if not _refuse_foreign(controller, kind, subject):
        raise no_such(kind, subject)


def _refuse_foreign(
    controller: Controller, kind: str, subject: str, *, create: bool = False
) -> bool:
    """Return whether the store has the record; refuse records of other sources, and existing ones with `create`."""
    inventory = controller.inventory
    if kind == "network":
        sources, article = inventory.sources_of_network(NetworkId(subject)), "a"
    else:
        sources, article = inventory.sources_of_instance(InstanceId(subject)), "an"
    if sources and _store(controller).name not in sources:
        message = f"{kind} {subject} belongs to source {', '.join(sources)}"
        raise RecordConflict(message, hint="change it there")
    if sources and create:
        message = f"there is {article} {kind} {subject} already"
        raise AlreadyExists(message, hint="use set to change it")
    return bool(sources)


async def _refuse_shared(controller: Controller, networks: Sequence[Network], prefix: str) -> None:
    """Refuse listeners that another network has, with the field of each."""
    if not networks:
        return
    known, host = controller.inventory.networks, controller.listeners.host
    every = {**known, **{one.id: one for one in networks}}
    shared = find_shared(every.values(), known, host.seen.inode_of)
    if shared:
        # The namespace of an earlier observation may be gone, and another may have its inode now.
        involved = [every[one] for one in shared.keys() | shared.values()]
        observed = await host.look_at(involved)
        shared = find_shared(every.values(), known, observed.inode_of)
    problems = [
        Problem(
            f"{prefix.format('networks', place)}listener",
            f"network {shared[network.id]} has this listener",
            "change one of the two, or remove it",
        )
        for place, network in enumerate(networks)
        if network.id in shared
        and (network.id not in known or known[network.id].listener != network.listener)
    ]
    if problems:
        raise RecordConflict("a listener is in use", problems=problems)


async def _in_force(
    controller: Controller, networks: Sequence[NetworkId], *, instances: int = 0
) -> Written:
    pending: list[str] = []
    if not await wait_confirmed(controller, listeners=bool(networks)):
        pending.append(UNCONFIRMED)
    pending += [problem.reason for problem in list_problems(controller.parts(), Impact.DELAYS)]
    if networks:
        pending += map(str, await find_unserved(controller.listeners, frozenset(networks)))
    reasons = tuple(dict.fromkeys(pending))
    return Written(len(networks), instances, applied=not reasons, pending=reasons)


async def _enumerated(instances: Iterable[Instance]) -> AsyncIterator[tuple[int, Instance]]:
    """Yield instances with their numbers, and let the event loop do other work now and then."""
    for number, instance in enumerate(instances):
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
        yield number, instance
