"""Networks and instances as `list` and `show` report them: the source of each, and why guests do not get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self, TypeAlias, TypeVar

from imdsproxy.controller.controller import Controller
from imdsproxy.core import endpoints
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId, Upstream
from imdsproxy.errors import NotFound, RequestRefused
from imdsproxy.listeners.endpoints import networks_of

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

    @classmethod
    def of(cls, one: endpoints.LeftOut) -> Self:
        """As reports have it."""
        family = "" if one.family is None else f"IPv{one.family.value}: "
        return cls(one.network, one.code.value, f"{family}{one.reason}", one.hint)


def find_network(inventory: Inventory, text: str) -> NetworkId:
    """The id of the network that has this id or name; the text itself where none has.

    Raises:
        RequestRefused: Several have the name.
    """
    network = NetworkId(text)
    return network if inventory.knows(network) else _find_id(network, inventory.networks)


def find_instance(inventory: Inventory, text: str) -> InstanceId:
    """The same for instances."""
    instance = InstanceId(text)
    known = inventory.sources_of_instance(instance)
    return instance if known else _find_id(instance, inventory.instances)


def networks(controller: Controller) -> list[Report]:
    """Every network, by id, as `bodies.NetworkView`."""
    networks = controller.inventory.networks
    return _report_networks(controller, [networks[one] for one in sorted(networks)])


def network(controller: Controller, network: NetworkId) -> Report:
    """One network; `NotFound` otherwise."""
    found = controller.inventory.networks.get(network)
    if found is None:
        raise NotFound(f"there is no network {network}", hint="imdsproxy network list")
    return _report_networks(controller, [found])[0]


def _report_networks(controller: Controller, networks: Sequence[Network]) -> list[Report]:
    inventory = controller.inventory
    # Of several reasons the first.
    left_out = {one.network: LeftOut.of(one) for one in reversed(controller.listeners.degraded())}
    return [
        {
            "record": network,
            "source": ", ".join(inventory.sources_of_network(network.id)),
            "instances": len(inventory.instances_in(network.id)),
            "serving": network.id not in left_out,
            "left_out": left_out.get(network.id),
        }
        for network in networks
    ]


def instances(controller: Controller, network: NetworkId | None = None) -> list[Report]:
    """Every instance, or those with a port in `network`, by id, for `summarise`.

    Of a contested one the first version.
    """
    inventory = controller.inventory
    known, contested = inventory.instances, inventory.contested_instances
    every = known.keys() | contested.keys()
    ids = every if network is None else inventory.instances_in(network)
    first = [contested[one][0] if one in contested else known[one] for one in sorted(ids)]
    return _report_instances(controller, first)


def instance(controller: Controller, instance: InstanceId) -> Report:
    """One instance, as `bodies.InstanceView`; `NotFound` otherwise."""
    inventory = controller.inventory
    found = inventory.instances.get(instance)
    if found is None and instance in inventory.contested_instances:
        sources = " and ".join(inventory.sources_of_instance(instance))
        raise NotFound(
            f"instance {instance} has no record in force: {sources} describe it differently",
            hint="leave it in one source only, or make its records equal",
        )
    if found is None:
        raise NotFound(f"there is no instance {instance}", hint="imdsproxy instance list")
    return _complete(_report_instances(controller, [found])[0])


def _report_instances(controller: Controller, instances: Sequence[Instance]) -> list[Report]:
    inventory, listeners = controller.inventory, controller.listeners
    conflicts = inventory.conflicts()
    serving = networks_of(listeners.report.endpoints)
    unserved = {
        one.network: one.reason
        for one in reversed(listeners.degraded())
        if one.network not in serving
    }
    refused = {
        problem.record: str(problem)
        for source in inventory.sources
        for problem in inventory.problems_of(source)
        if problem.record is not None and problem.field.startswith("instance")
    }
    return [
        {
            "record": instance,
            "source": ", ".join(inventory.sources_of_instance(instance.id)),
            "revision": controller.records.compiler.revisions.get(instance.id, ""),
            "conflicts": [
                conflict
                for conflict in conflicts
                if any(claimant.instance == instance.id for claimant in conflict.claimants)
            ],
            "pending": _pending(controller, instance, unserved, refused),
        }
        for instance in instances
    ]


def _pending(
    controller: Controller,
    instance: Instance,
    unserved: Mapping[NetworkId, str],
    refused: Mapping[str, str],
) -> list[str]:
    """Why guests do not get the record, or not its newest version."""
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
