"""Subjects of identity tokens by a fleet's records and policies."""

from imdsproxy.errors import SourceCorrupt
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, parse_override, parse_policy
from imdsproxy.hub.store.state import FleetState
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from imdsproxy.model.policy import (
    NO_RULES,
    UNTOUCHED,
    FleetRules,
    OperatorOverride,
    PolicyBook,
    PolicyPlace,
    PolicyRules,
)
from imdsproxy.model.records import Refused, parse_instance, parse_network
from imdsproxy.model.records.network import POLICY
from imdsproxy.model.subject import Subject, plan_subject


def find_subject(
    state: FleetState, host: HostId, instance: InstanceId, network: NetworkId
) -> Subject | None:
    """Return the subject of an instance in a network, if the fleet has placed the instance on the host.

    Return `None` as well if the instance has no port in the network, or its policy allows no audience.

    Raises:
        SourceCorrupt: A record or policy of the instance is not readable: a limit must not be lost.
    """
    if host not in state.hosts_of(instance):
        return None
    return subject_of(state, host, _instance(state, instance), network)


def is_recorded(state: FleetState, instance: InstanceId) -> bool:
    """Return whether the fleet's records have an instance, so that nobody else is asked where it is."""
    return state.value(layout.instance_key(instance)) is not None


def subject_of(
    state: FleetState, host: HostId, record: Instance, network: NetworkId
) -> Subject | None:
    """Return the subject of an instance on a host by the fleet's policies; `None` and errors as `find_subject`."""
    ports = [port for port in record.ports if port.network == network]
    if not ports:
        return None
    projects = {port.project or record.project for port in ports}
    project = projects.pop() if len(projects) == 1 else record.project
    of_project = {} if project is None else {project: _rules(state, f"project/{project}")}
    book = PolicyBook(
        fleet=FleetRules(_rules(state, "fleet"), _rules(state, f"host/{host}"), of_project)
    )
    place = PolicyPlace(network, project, record.id, _network_rules(state, network), record.policy)
    policy = book.fold(place).policy
    return plan_subject(policy, _override(state, record.id), record, network, project)


def _instance(state: FleetState, instance: InstanceId) -> Instance:
    found = state.value(layout.instance_key(instance))
    if found is None:
        raise SourceCorrupt(f"instance {instance} is placed, and has no record")
    read = parse_instance(layout.parse_instance(found[0]).record)
    if isinstance(read, Refused):
        raise _unreadable(f"instance {instance}", "; ".join(map(str, read.problems)))
    return read


def _network_rules(state: FleetState, network: NetworkId) -> PolicyRules:
    found = state.value(layout.network_key(network))
    if found is None:
        return NO_RULES
    read = parse_network(layout.parse_network(found[0]).record)
    if not isinstance(read, Network):
        raise _unreadable(f"network {network}", "; ".join(map(str, read.problems)))
    return read.policy


def _rules(state: FleetState, place: str) -> PolicyRules:
    found = state.value(layout.POLICIES + place)
    if found is None:
        return NO_RULES
    read = POLICY.read(parse_policy(found[0]).rules)
    if isinstance(read, Refused):
        raise _unreadable(f"the policy of {place}", "; ".join(map(str, read.problems)))
    rules: PolicyRules = read
    return rules


def _override(state: FleetState, instance: InstanceId) -> OperatorOverride:
    found = state.value(layout.override_key(instance))
    return UNTOUCHED if found is None else parse_override(found[0])


def _unreadable(what: str, why: str) -> SourceCorrupt:
    return SourceCorrupt(f"{what} is not readable: {why}", hint="write it again")
