"""Requests of an instance, and its limits."""

from imdsproxy.api.records import find_record, no_such
from imdsproxy.controller.controller import Controller
from imdsproxy.controller.record_plan import policy_place
from imdsproxy.errors import DataplaneError
from imdsproxy.haproxy.master import WorkerEnded
from imdsproxy.haproxy.rules.limits import COUNTERS, POLICY_COUNTERS, Usage, read_usage
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import DEFAULT


async def report_usage(controller: Controller, instance: InstanceId) -> Usage | None:
    """Read the counters of the worker that takes connections; `None` if limits are disabled or HAProxy does not answer.

    A policy's limits are those in the network of the first port.

    Raises:
        NotFound: The instance does not exist.
    """
    record = find_record(controller.inventory, instance)
    if record is None:
        raise no_such("instance", instance)
    allowed, haproxy = controller.holder.settings.limits, controller.haproxy
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
        place = policy_place(controller.inventory, port.network, project, record)
        policy = controller.records.policies().fold(place).policy
    return read_usage(
        usual,
        own,
        requests_per_s=allowed.requests_per_s,
        burst=allowed.burst,
        policy=policy,
        connections=allowed.connections,
        now=controller.clock.now().timestamp(),
    )
