"""Whatever a project's operator writes, it changes nothing of others and uses only what the project was given."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.errors import ImdsproxyError, NotFound, SourceCorrupt
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import HostId, HostState, StoredHost, host_key, parse_grant, render_host
from imdsproxy.hub.api.views import Views
from imdsproxy.hub.store.plan_changes import plan_hosts, plan_override, plan_policy
from imdsproxy.hub.store.plan_records import (
    InstancePut,
    claims_of,
    plan_network_removal,
    plan_put,
    plan_removal,
)
from imdsproxy.hub.store.scopes import read_grant
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.hub.store.transactions import Terms, Transaction, record_of
from imdsproxy.model.entities import InstanceId, Network, NetworkId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import PlacedInstance, Refused, parse_network, parse_placed
from imdsproxy.model.records.grant import GRANT, Grant

_Keys: TypeAlias = dict[str, tuple[bytes, int]]

HOSTS = ("a", "b", "c")
PROJECTS = (None, "shop", "red")
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.65", "10.0.0.66")
MACS = ("52:54:00:00:00:01", "52:54:00:5a:00:01", "52:54:00:5a:00:02")
BRIDGES = ("br-shop", "br-red", "br-new")
NETWORKS = {"shopnet": "shop", "rednet": "red", "public": None, "other": None}
GIVEN: dict[str, Any] = {
    "hosts": ["a", "b"],
    "listeners": [{"bridge": "br-new"}],
    "addresses": [
        {"network": "public", "cidr": "10.0.0.64/26"},
        {"network": "public", "cidr": "fe80::5054:ff:fe5a:0/112"},
    ],
}

# Each write is one that the project may do, or such a one with a single fault.
GOOD_PORTS = st.sampled_from(
    (
        {"network": "shopnet", "addresses": [ADDRESSES[0]]},
        {"network": "shopnet", "mac": MACS[0]},
        {"network": "public", "addresses": [ADDRESSES[2]], "mac": MACS[2]},
        {"network": "public", "addresses": [ADDRESSES[3]]},
    )
)
BAD_PORTS = st.sampled_from(
    (
        {"network": "shopnet", "project": "red"},
        {"network": "shopnet", "project": "shop"},
        {"network": "rednet", "addresses": [ADDRESSES[1]]},
        {"network": "rednet"},
        {"network": "other"},
        {"network": "other", "addresses": [ADDRESSES[2]]},
        {"network": "new", "addresses": [ADDRESSES[2]]},
        {"network": "public", "addresses": [ADDRESSES[1], ADDRESSES[2]]},
        {"network": "public", "mac": MACS[0]},
        {"network": "public", "mac": MACS[1]},
    )
)
HOSTS_OF = st.sampled_from((["c"], ["a"], ["a", "c"], ["a", "b"], ["none"]))
FAULTS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.sampled_from(("red-web", "red-gone", "lent")).map(lambda one: {"id": one}),
    st.sampled_from(PROJECTS).map(lambda one: {"project": one}),
    HOSTS_OF.map(lambda hosts: {"hosts": hosts}),
    BAD_PORTS.map(lambda port: {"ports": [port]}),
    BAD_PORTS.map(lambda port: {"ports": [port], "id": "new"}),
)
INSTANCES = st.builds(
    lambda name, port, host, fault: {
        "id": name,
        "project": "shop",
        "ports": [port],
        "hosts": [host],
        **fault,
    },
    st.sampled_from(("shop-web", "new")),
    GOOD_PORTS,
    st.sampled_from(("a", "b")),
    FAULTS,
)
NEW_NETWORKS = st.builds(
    lambda name, fault: {"id": name, "project": "shop", "listener": {"bridge": "br-new"}, **fault},
    st.sampled_from(("shopnet", "new")),
    st.one_of(
        st.just({}),
        st.sampled_from((*NETWORKS, "red-gone")).map(lambda one: {"id": one}),
        st.sampled_from(PROJECTS).map(lambda one: {"project": one}),
        st.sampled_from(BRIDGES).map(lambda one: {"listener": {"bridge": one}}),
    ),
)
PUTS = st.one_of(
    st.tuples(st.just("put"), st.lists(INSTANCES, min_size=1, max_size=2), st.just([])),
    st.tuples(st.just("put"), st.just([]), NEW_NETWORKS.map(lambda one: [one])),
)
NAMES = st.sampled_from(("shop-web", "lent", "red-web", "red-gone", "new"))
WRITES = st.one_of(
    PUTS,
    PUTS,
    PUTS,
    st.tuples(st.just("remove"), NAMES, st.none()),
    st.tuples(st.just("move"), NAMES, HOSTS_OF),
    st.tuples(st.just("override"), NAMES, st.none()),
    st.tuples(st.just("remove network"), st.sampled_from((*NETWORKS, "new")), st.none()),
    st.tuples(st.just("policy"), st.sampled_from(("fleet", "host/a", "project/red")), st.none()),
)


def _network(name: str, project: str | None, bridge: str) -> Network:
    record = {"id": name, "listener": {"bridge": bridge}}
    found = parse_network(record if project is None else {**record, "project": project})
    assert isinstance(found, Network)
    return found


def _instance(record: dict[str, Any]) -> PlacedInstance:
    found = parse_placed({"name": record["id"], **record})
    assert isinstance(found, PlacedInstance)
    return found


def _commit(keys: _Keys, planned: Transaction) -> None:
    for one in planned.compares:
        found = 0 if one.key not in keys else keys[one.key][1]
        assert one.range_end or found == one.revision
    revision = 1 + max(number for _, number in keys.values())
    keys |= {key: (value, revision) for key, value in planned.puts.items()}
    for key in planned.deletes:
        keys.pop(key, None)


def _fleet() -> _Keys:
    enrolled = render_host(StoredHost(HostState.ENROLLED, ("1",)))
    keys: _Keys = {host_key(HostId(one)): (enrolled, 1) for one in HOSTS}
    keys[layout.grant_key("shop")] = codec.encode(GIVEN), 1
    networks = [_network(name, of, f"br-{name[:5]}") for name, of in NETWORKS.items()]
    placed: list[dict[str, Any]] = [
        {"id": "red-web", "project": "red", "ports": [{"network": "rednet", "mac": MACS[0]}]},
        {"id": "red-pub", "project": "red", "ports": [{"network": "public", "mac": MACS[1]}]},
        {"id": "red-gone", "project": "red"},
        {"id": "shop-web", "project": "shop"},
        # An operator of all projects has placed it where the project was given nothing.
        {"id": "lent", "project": "shop", "ports": [{"network": "rednet", "mac": MACS[2]}]},
    ]
    puts = [InstancePut(_instance({**one, "hosts": ["c"]})) for one in placed]
    anna = Terms("anna", now=1_700_000_000)
    _commit(keys, plan_put(keys.get, networks, puts, anna))
    _commit(keys, plan_put(keys.get, [_network("red-gone", "red", "br-gone")], [], anna))
    _commit(keys, plan_override(keys.get, InstanceId("red-gone"), _reopen, anna)[0])
    _commit(keys, plan_removal(keys.get, InstanceId("red-gone"), anna))
    _commit(keys, plan_network_removal(keys.get, NetworkId("red-gone"), anna, ()))
    return keys


def _reopen(_: OperatorOverride) -> OperatorOverride:
    return OperatorOverride(1, 1)


def _plan(keys: _Keys, write: tuple[str, Any, Any], terms: Terms) -> Transaction:
    kind, first, second = write
    match kind:
        case "put":
            records = [
                one if one["project"] else {k: v for k, v in one.items() if k != "project"}
                for one in first
            ]
            networks = [_network(o["id"], o["project"], o["listener"]["bridge"]) for o in second]
            return plan_put(
                keys.get, networks, [InstancePut(_instance(one)) for one in records], terms
            )
        case "remove":
            return plan_removal(keys.get, InstanceId(first), terms)
        case "move":
            hosts = tuple(map(HostId, second))
            return plan_hosts(keys.get, InstanceId(first), lambda _: hosts, terms)
        case "override":
            return plan_override(keys.get, InstanceId(first), _reopen, terms)[0]
        case "remove network":
            return plan_network_removal(keys.get, NetworkId(first), terms, ())
        case _:
            return plan_policy(keys.get, first, lambda _: {"tokens": "off"}, terms)


def _project_of(value: bytes) -> object:
    return codec.decode(value)["record"].get("project")


def _check(before: _Keys, planned: Transaction, grant: Grant) -> None:
    """A transaction of an operator of `shop` changes nothing of others, and uses nothing that was not given."""
    own = {key for key, (value, _) in before.items() if _is_own(key, value)}
    for key in (*planned.puts, *planned.deletes):
        if key.startswith(layout.CLAIMS):
            holder = InstanceId(before[key][0].decode()) if key in before else None
            assert holder is None or layout.instance_key(holder) in own
        elif key.startswith((layout.INSTANCES, layout.NETWORKS)):
            assert key not in before or key in own
            assert _project_of(planned.puts[key]) == "shop"
        else:
            assert layout.instance_key(InstanceId(key.removeprefix(layout.OVERRIDES))) in own
    for key, value in planned.puts.items():
        if key.startswith(layout.INSTANCES):
            _check_instance(before, key, value, grant)
        elif key.startswith(layout.NETWORKS) and layout.parse_network(value).removed_at is None:
            record = parse_network(layout.parse_network(value).record)
            assert isinstance(record, Network)
            kept = key in before and parse_network(codec.decode(before[key][0])["record"])
            same = isinstance(kept, Network) and kept.listener == record.listener
            assert same or grant.has_listener(record.listener)


def _is_own(key: str, value: bytes) -> bool:
    records = key.startswith((layout.INSTANCES, layout.NETWORKS))
    return records and _project_of(value) == "shop"


def _check_instance(before: _Keys, key: str, value: bytes, grant: Grant) -> None:
    stored = layout.parse_instance(value)
    if stored.removed_at is not None:
        return
    had = layout.parse_instance(before[key][0]) if key in before else None
    known = None if had is None or had.removed_at is not None else had
    assert set(stored.hosts) <= {*grant.hosts, *(() if known is None else known.hosts)}
    record, ports = record_of(stored), () if known is None else record_of(known).ports
    claims = {*claims_of(record)} - {*(() if known is None else claims_of(record_of(known)))}
    for claim in claims:
        network, _, address = claim.removeprefix(layout.CLAIMS).partition("/")
        project = NETWORKS.get(network, "shop")
        shared = project is None and address.startswith("addr/")
        given = shared and grant.has_address(network, ip_address(address.removeprefix("addr/")))
        assert project == "shop" or given or (project is None and grant.has_network(network))
        assert given or not shared
    assert all(one.project in {None, "shop"} for one in record.ports if one not in ports)


@settings(max_examples=settings().max_examples * 5)
@given(st.lists(WRITES, min_size=1, max_size=4))
def test_no_write_of_a_projects_operator_changes_what_others_have_or_uses_what_was_not_given(
    writes: list[tuple[str, Any, Any]],
) -> None:
    keys = _fleet()
    grant = read_grant(keys.get, "shop")[0]
    for number, write in enumerate(writes):
        terms = Terms(f"request-{number}", now=1_700_000_001, scope="shop")
        try:
            planned = _plan(keys, write, terms)
        except (ImdsproxyError, AssertionError):
            continue  # refused, or no record at all
        _check(keys, planned, grant)
        _commit(keys, planned)


@pytest.mark.parametrize(
    "write",
    [("remove", "red-web", None), ("move", "red-web", ["a"]), ("override", "red-web", None)],
)
def test_a_record_of_another_project_is_not_looked_into_however_large_it_is(
    write: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, parsed = _fleet(), list[bytes]()

    def parse(value: bytes) -> layout.StoredInstance:
        parsed.append(value)
        raise AssertionError

    monkeypatch.setattr(layout, "parse_instance", parse)
    with pytest.raises(NotFound):
        _plan(keys, write, Terms("r", now=1, scope="shop"))
    state = FleetState()
    monkeypatch.undo()
    state.apply(9, [Change(key, value, number) for key, (value, number) in keys.items()])
    monkeypatch.setattr(layout, "parse_instance", parse)
    assert Views(state, "shop").find_instance("red-web") == "red-web"
    assert Views(state, "shop").known(InstanceId("red-web")) is None
    assert parsed == []


def test_a_grant_is_read_as_it_was_written_and_garbage_gives_nothing() -> None:
    read = GRANT.read(GIVEN)
    assert isinstance(read, Grant)
    assert parse_grant(codec.encode(GRANT.render(read))) == read
    for value in (b"", b"[]", b"\xff", b'{"hosts": 1}', b'{"hosts": ["a", "a"]}', b'{"more": []}'):
        with pytest.raises(Unreadable):
            parse_grant(value)
        with pytest.raises(SourceCorrupt):
            read_grant({layout.grant_key("p"): (value, 1)}.get, "p")


@pytest.mark.parametrize(
    ("granted", "listener", "covers"),
    [
        ({"bridge": "br0"}, {"bridge": "br0"}, True),
        ({"bridge": "br0"}, {"bridge": "br1"}, False),
        # On the bridge's own device the metadata addresses would be the host's.
        ({"bridge": "br0"}, {"interface": "br0"}, False),
        ({"interface": "br0"}, {"bridge": "br0"}, False),
        ({"namespace": "ns"}, {"namespace": "ns"}, True),
        ({"namespace": "ns"}, {"namespace": "ns", "device": "eth0"}, True),
        ({"namespace": "ns"}, {"namespace": "ns2"}, False),
        ({"namespace": "ns", "device": "eth0"}, {"namespace": "ns", "device": "eth0"}, True),
        ({"namespace": "ns", "device": "eth0"}, {"namespace": "ns"}, False),
        ({"namespace": "ns", "device": "eth0"}, {"namespace": "ns", "device": "eth1"}, False),
    ],
)
def test_a_listener_that_was_given_is_that_one_alone(
    granted: dict[str, str], listener: dict[str, str], *, covers: bool
) -> None:
    grant = GRANT.read({"listeners": [granted]})
    network = parse_network({"id": "n", "listener": listener})
    assert isinstance(grant, Grant)
    assert isinstance(network, Network)
    assert grant.has_listener(network.listener) == covers


@pytest.mark.parametrize(
    "record",
    [
        {"hosts": ["a/b"]},
        {"hosts": ["**"]},
        {"listeners": [{"bridge": "br0", "interface": "br0"}]},
        {"addresses": [{"network": "n"}]},
        {"addresses": [{"network": "n", "cidr": "10.0.0.1/24"}]},
        {"addresses": [{"network": "n", "cidr": "10.0.0.1"}]},
    ],
)
def test_a_grant_that_is_not_acceptable_is_refused(record: dict[str, Any]) -> None:
    assert isinstance(GRANT.read(record), Refused)
