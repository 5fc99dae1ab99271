"""No write gives two networks of one host the same listener; on different hosts they may have it."""

from collections.abc import Mapping

import pytest

from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.layout import HostId, Json, StoredInstance, StoredNetwork
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.errors import SourceRefused
from imdsproxy.hub.plan_writes import Transaction
from imdsproxy.hub.shared_listeners import refuse_shared
from imdsproxy.hub.state import Change, FleetState

_Listener = Mapping[str, str]
_BRIDGE = {"bridge": "br0"}


def network(
    name: str, listener: _Listener = _BRIDGE, project: str | None = None
) -> dict[str, bytes]:
    record: Json = {"id": name, "listener": dict(listener)}
    if project is not None:
        record["project"] = project
    return {layout.network_key(NetworkId(name)): layout.render_network(StoredNetwork(record))}


def instance(name: str, *hosts: str, on: str) -> dict[str, bytes]:
    record: Json = {"id": name, "name": name, "ports": [{"network": on}]}
    stored = StoredInstance(tuple(map(HostId, hosts)), record)
    return {layout.instance_key(InstanceId(name)): layout.render_instance(stored)}


def gone(name: str) -> dict[str, bytes]:
    stored = StoredInstance((), {}, removed_at=1)
    return {layout.instance_key(InstanceId(name)): layout.render_instance(stored)}


def fleet(*stored: Mapping[str, bytes]) -> FleetState:
    state = FleetState()
    for number, values in enumerate(stored, 1):
        state.apply(number, [Change(key, value, number) for key, value in values.items()])
    return state


STORED = (
    network("blue"),
    network("red"),
    instance("web", "a", on="blue"),
    instance("db", "b", on="red"),
)


def refused(state: FleetState, *puts: Mapping[str, bytes], scope: str | None = None) -> list[str]:
    written = {key: value for one in puts for key, value in one.items()}
    try:
        refuse_shared(state, Transaction(puts=written, scope=scope))
    except SourceRefused as error:
        return [f"{one.field}: {one.reason}" for one in error.problems]
    return []


def test_an_instance_is_refused_on_a_host_that_has_its_networks_listener_for_another_one() -> None:
    state = fleet(*STORED)
    why = "hosts: network red has on host a the listener of network blue, in which instance web is"
    assert refused(state, instance("new", "a", on="red")) == [why]
    # A move as well.
    assert refused(state, instance("db", "b", "a", on="red")) == [why]
    assert refused(state, instance("new", "b", on="red")) == []
    assert refused(state, instance("new", "c", on="red"), instance("other", "c", on="blue")) == [
        "hosts: network blue has on host c the listener of network red"
    ]


def test_what_leaves_by_the_same_write_is_no_reason() -> None:
    state = fleet(*STORED)
    assert refused(state, gone("web"), instance("new", "a", on="red")) == []
    assert refused(state, instance("web", "a", on="red")) == []
    state.apply(9, [Change(key, value, 9) for key, value in gone("web").items()])
    assert refused(state, instance("new", "a", on="red")) == []


def test_a_network_does_not_get_the_listener_of_another_one_on_its_hosts() -> None:
    apart = (network("blue"), network("red", {"bridge": "br1"}))
    state = fleet(*apart, instance("web", "a", on="blue"), instance("db", "a", on="red"))
    assert refused(state, network("red")) == [
        "listener: network red has on host a the listener of network blue, in which instance web is"
    ]
    # An exchange of both is none.
    assert refused(state, network("red"), network("blue", {"bridge": "br1"})) == []
    # What is so already does not keep other changes from being written.
    both = fleet(*STORED, instance("late", "a", on="red"))
    assert refused(both, network("red"), instance("late", "a", on="red")) == []


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ({"interface": "eth1"}, {"bridge": "eth1"}, True),
        ({"namespace": "ns1"}, {"namespace": "ns1", "device": "eth0"}, True),
        ({"namespace": "ns1", "device": "eth1"}, {"namespace": "ns1", "device": "eth0"}, False),
        ({"namespace": "ns1"}, {"namespace": "ns2"}, False),
    ],
)
def test_listeners_are_compared_as_a_host_compares_them(
    first: _Listener, second: _Listener, *, shared: bool
) -> None:
    state = fleet(network("blue", first), network("red", second), instance("web", "a", on="blue"))
    assert bool(refused(state, instance("db", "a", on="red"))) == shared


def test_an_operator_of_one_project_learns_of_no_other_projects_network() -> None:
    state = fleet(network("blue", project="p1"), *STORED[1:])
    assert refused(state, instance("new", "a", on="red"), scope="p2") == [
        "hosts: network red has on host a the listener of another network"
    ]
