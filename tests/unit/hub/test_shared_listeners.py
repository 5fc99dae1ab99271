"""No write gives two networks of one host the same listener; on different hosts they may have it."""

from collections.abc import Mapping

import pytest

from imdsproxy.errors import AlreadyExists, SourceRefused
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId, StoredInstance, StoredNetwork
from imdsproxy.host import names
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.hub.store.transactions import Transaction
from imdsproxy.hub.store.write_checks import refuse_shared
from imdsproxy.model.entities import InstanceId, NetworkId

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
    why = (
        "hosts: network red has the same listener on host a as network blue, which has instance web"
    )
    assert refused(state, instance("new", "a", on="red")) == [why]
    # A move as well.
    assert refused(state, instance("db", "b", "a", on="red")) == [why]
    assert refused(state, instance("new", "b", on="red")) == []
    assert refused(state, instance("new", "c", on="red"), instance("other", "c", on="blue")) == [
        "hosts: network blue has the same listener on host c as network red"
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
        "listener: network red has the same listener on host a as network blue, which has instance web"
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
        "hosts: network red has the same listener on host a as another network"
    ]


def granted(project: str, *hosts: str) -> dict[str, bytes]:
    return {layout.grant_key(project): codec.encode({"hosts": list(hosts)})}


@pytest.mark.parametrize(
    ("other", "grant", "is_refused"),
    [
        # `red` may come to any host as long as no hosts were given to its project.
        ("p1", None, True),
        ("p1", ("b", "a"), True),
        ("p1", ("*",), True),
        ("p1", ("b",), False),
        # A shared network as well.
        (None, None, True),
        # Of two networks of one project the first has the listener.
        ("p2", None, False),
    ],
)
def test_an_operator_of_one_project_takes_no_listener_that_another_project_may_need_on_the_host(
    other: str | None, grant: tuple[str, ...] | None, *, is_refused: bool
) -> None:
    grants = {} if grant is None else granted("p1", *grant)
    state = fleet(network("red", project=other), network("mine", project="p2"), grants)
    why = "hosts: network mine has the same listener on host a as another network"
    new = instance("new", "a", on="mine")
    assert refused(state, new, scope="p2") == ([why] if is_refused else [])
    # An operator of all projects decides for both.
    assert refused(state, new) == []
    # Where the network is already, no further instance takes anything.
    state.apply(9, [Change(key, value, 9) for key, value in new.items()])
    assert refused(state, instance("more", "a", on="mine"), scope="p2") == []


def test_an_operator_of_one_project_makes_no_network_whose_names_on_hosts_another_one_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = fleet(network("red", project="p1"))
    monkeypatch.setattr(names, "_DIGITS", 1)
    naming = names.Naming()
    alike = next(
        name
        for name in map("n{}".format, range(1000))
        if naming.link(NetworkId(name)) == naming.link(NetworkId("red"))
    )
    written = network(alike, {"bridge": "br9"}, "p2")
    with pytest.raises(AlreadyExists, match=f"the id {alike} is taken"):
        refused(state, written, scope="p2")
    assert refused(state, written) == []
    state.apply(9, [Change(key, value, 9) for key, value in written.items()])
    assert refused(state, written, scope="p2") == [], "it is there already"
