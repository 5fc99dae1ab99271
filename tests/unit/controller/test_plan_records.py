"""Which record HAProxy is to have of an address, how its map writes it, and which binds and links it is to have."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.controller.record_plan import RecordPlanner, record_key
from imdsproxy.errors import HostRefused
from imdsproxy.haproxy.rules.model import Bind
from imdsproxy.host.state import NamespaceRef
from imdsproxy.model import wire
from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import (
    METADATA_IPV4,
    Instance,
    InstanceId,
    MacAddress,
    NetworkId,
    Port,
    Upstream,
)
from imdsproxy.model.identity import Learned
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Observation
from imdsproxy.model.path_rules import PathWord, set_id
from imdsproxy.model.policy import PolicyBook, PolicyRules, rule_set_of
from imdsproxy.network.endpoints import (
    compute_maxconn,
    link_name,
    networks_of,
    plan_binds,
    plan_links,
)
from imdsproxy.network.planned import Endpoint
from imdsproxy.nova.routing import EndpointSet, NovaRouting, sign_instance
from support import record_builders as build
from support.record_strategies import ids

_KEY = _NET, _ADDRESS = build.key("n1", "10.0.0.5")
_MAC = MacAddress("02:00:00:00:00:05")


def _instance(name: str, address: str = "10.0.0.5") -> Instance:
    return build.instance(name, address, mac=_MAC)


def _inventory(*sources: tuple[str, Instance]) -> Inventory:
    inventory = Inventory(name for name, _ in sources)
    for name, instance in sources:
        inventory.observe(build.full(name, [build.network("n1")], [instance]))
    return inventory


def test_haproxy_answers_503_by_itself_for_an_instance_whose_source_has_expired() -> None:
    inventory = _inventory(("fleet", _instance("web")))
    learned = {build.key("n1", "10.0.0.99"): Learned(InstanceId("web"), 0, mac=_MAC)}
    planner = RecordPlanner(inventory, {InstanceId("web"): "r"}, learned, NovaRouting())
    keys = (_KEY, *learned)
    before = planner.plan_records(keys).values
    inventory.observe(Observation("fleet", in_sync=False, expired=True))
    expired = dict.fromkeys(map(record_key, keys), wire.MAP_CONFLICT)
    assert planner.plan_records(keys).values == expired
    inventory.observe(Observation("fleet"))
    assert planner.plan_records(keys).values == before


def test_an_address_of_two_instances_is_a_conflict_and_what_was_learned_counts_only_without_a_record() -> (
    None
):
    revisions = {InstanceId("web"): "r1", InstanceId("db"): "r2"}
    others = (_KEY, build.key("n1", "fe80::1"))
    learned = {key: Learned(InstanceId("db"), 1.0) for key in others}
    inventory = _inventory(("a", _instance("web")), ("b", _instance("db", "10.0.0.6")))
    planned = RecordPlanner(inventory, revisions, learned, NovaRouting()).plan_records(learned)
    assert planned.values == {"n1/10.0.0.5": "web|r1", "n1/fe80::1": "db|r2"}
    contested = _inventory(("a", _instance("web")), ("b", _instance("db")))
    planned = RecordPlanner(contested, revisions, {}, NovaRouting()).plan_records([_KEY])
    assert planned.values == {"n1/10.0.0.5": "!"}


_ROUTER = NetworkId("router-1")
_SECRETS = (b"one", b"two")
_ROUTING = NovaRouting(
    (
        EndpointSet("default", _SECRETS[0]),
        EndpointSet("cell2", _SECRETS[1], b"next", projects=frozenset({"p2"})),
        EndpointSet(
            "edge", _SECRETS[1], networks=frozenset({"router-1"}), projects=frozenset({"p3"})
        ),
    )
)


def _nova(project: str | None = "p1", port_project: str | None = None) -> Instance:
    port = Port(_NET, _MAC, (_ADDRESS,), port_project)
    return replace(_instance("vm"), project=project, ports=(port,), upstream=Upstream.NOVA)


def _record(
    project: str, secrets: tuple[bytes, ...] = (b"one",), endpoint_set: str = "default"
) -> wire.NovaRecord:
    vm = InstanceId("vm")
    return wire.NovaRecord(
        endpoint_set, vm, project, tuple(sign_instance(one, vm) for one in secrets)
    )


_REVISIONS = {InstanceId("web"): "r1"}
_BY_MAC: AddressKey = (_NET, link_local_of(_MAC))
_SECOND = MacAddress("02:00:00:00:00:06")
_TWO_PORTS = replace(_nova("p0"), ports=(Port(_NET, _MAC, (), "p1"), Port(_NET, _SECOND, (), "p9")))


@pytest.mark.parametrize(
    ("instance", "revisions", "routing", "key", "expected"),
    [
        (
            _instance("web"),
            _REVISIONS,
            NovaRouting(),
            _KEY,
            wire.EmbeddedRecord(InstanceId("web"), "r1"),
        ),
        # One that is not compiled is not known yet, and an address without an owner never.
        (_instance("web"), {}, NovaRouting(), _KEY, None),
        (_instance("web"), _REVISIONS, NovaRouting(), build.key("n1", "10.0.0.9"), None),
        # One of Nova's needs no compiled record, but a project and a signature.
        (_nova(), {}, _ROUTING, _KEY, _record("p1")),
        (_nova(None), {}, _ROUTING, _KEY, None),
        (_nova(), {}, NovaRouting(), _KEY, None),
        # A project's endpoint set is asked with both secrets while they change.
        (_nova("p2"), {}, _ROUTING, _KEY, _record("p2", (b"two", b"next"), "cell2")),
        # The port's project and not the instance's; the link-local address of its MAC is the port's too.
        (_nova("p1", "p2"), {}, _ROUTING, _KEY, _record("p2", (b"two", b"next"), "cell2")),
        (_nova("p1", "p2"), {}, _ROUTING, _BY_MAC, _record("p2", (b"two", b"next"), "cell2")),
        # Of an address that was learned with a MAC the port is the one that has that.
        (_TWO_PORTS, {}, _ROUTING, _KEY, _record("p9")),
    ],
)
def test_an_address_has_the_record_of_its_instance(
    instance: Instance,
    revisions: Mapping[InstanceId, str],
    routing: NovaRouting,
    key: AddressKey,
    expected: wire.MapRecord | None,
) -> None:
    learned = {_KEY: Learned(InstanceId("vm"), 1.0, mac=_SECOND)} if instance is _TWO_PORTS else {}
    planner = RecordPlanner(_inventory(("a", instance)), revisions, learned, routing)
    assert planner.plan_record(key) == expected


@pytest.mark.parametrize("instance", [_instance("web"), _nova()])
def test_records_of_ours_and_of_nova_s_have_the_policy(instance: Instance) -> None:
    paths = (("/latest/user-data", PathWord.DENY),)
    policies = PolicyBook(host=PolicyRules(paths=paths))
    inventory = _inventory(("a", instance))
    planner = RecordPlanner(inventory, _REVISIONS, {}, _ROUTING, policies)
    record = planner.plan_record(_KEY)
    assert isinstance(record, wire.EmbeddedRecord | wire.NovaRecord)
    assert (rule_set_of(record.policy), record.beside.paths) == (set_id(paths), paths)
    planned = planner.plan_records([_KEY])
    assert planned.values == {"n1/10.0.0.5": wire.render_map_value(record)}
    assert planned.sets == {set_id(paths): paths}


def test_the_network_s_endpoint_set_wins_over_the_project_s() -> None:
    assert _ROUTING.choose(_ROUTER, "p2") == _ROUTING.sets[2]
    assert _ROUTING.choose(_NET, "p3") == _ROUTING.sets[2]
    assert _ROUTING.choose(_NET, "p1") == _ROUTING.sets[0]


def test_an_address_behind_a_router_lasts_as_long_as_the_one_in_its_network() -> None:
    behind: AddressKey = (_ROUTER, _ADDRESS)
    learned = {behind: Learned(InstanceId("vm"), 1.0, via=_KEY)}
    inventory = _inventory(("a", _nova("p2")))
    record = RecordPlanner(inventory, {}, learned, _ROUTING).plan_record(behind)
    assert isinstance(record, wire.NovaRecord)
    # The router's endpoint set, and the project of the port behind it.
    assert (record.endpoint_set, record.project) == ("edge", "p2")
    moved = replace(_nova("p2"), ports=(Port(_NET, None, (IPv4Address("10.0.0.6"),)),))
    inventory.observe(Observation("a", instances={moved.id: moved}))
    assert RecordPlanner(inventory, {}, learned, _ROUTING).plan_record(behind) is None


def test_a_network_that_a_source_vouches_for_strands_no_port() -> None:
    inventory = Inventory(["a"])
    inventory.observe(Observation("a", instances={InstanceId("vm"): _nova()}))
    assert RecordPlanner(inventory, {}, {}, _ROUTING).plan_record(_KEY) is None
    affected = inventory.observe(Observation("a", implied_networks=frozenset({_NET})))
    assert _KEY in affected.addresses
    assert isinstance(RecordPlanner(inventory, {}, {}, _ROUTING).plan_record(_KEY), wire.NovaRecord)
    gone = inventory.observe(Observation("a"))
    assert _KEY in gone.addresses
    assert inventory.owner(_KEY) is None


def test_the_key_is_what_haproxy_makes_of_bind_and_source() -> None:
    assert record_key(build.key("n1", "FE80:0:0:0:0:FF:FE00:5")) == "n1/fe80::ff:fe00:5"


def test_a_namespace_or_a_device_made_again_has_another_link_and_one_of_unknown_index_none() -> (
    None
):
    for device, one, other, target in (
        (None, (NamespaceRef("red", 1), None), (NamespaceRef("red", 2), None), "/n/red"),
        ("br0", (NamespaceRef("red", 4), 7), (NamespaceRef("red", 4), 9), "/n/red"),
        ("br0", (None, 7), (None, 9), "/proc/self/ns/net"),
    ):
        before, after = (Endpoint(_NET, METADATA_IPV4, 80, device, *at) for at in (one, other))
        assert link_name(before) != link_name(after)
        (link,) = plan_links([before], "/n")
        assert plan_links([before], "/n") == {link: target}
        assert plan_binds([before], "../x") == (
            Bind(_NET, METADATA_IPV4, 80, device, f"../x/{link}"),
        )
    unknown = [Endpoint(_NET, METADATA_IPV4, 80, "virbr0", None)]
    assert plan_links(unknown, "/n") == {}
    assert plan_binds(unknown, "../x") == (Bind(_NET, METADATA_IPV4, 80, "virbr0"),)
    assert networks_of(unknown) == {_NET}


def _binds(count: int, namespaces: int) -> list[Bind]:
    """So many binds, in so many namespaces; with none, in the host's own."""
    places = [f"../x/{number % namespaces}" if namespaces else None for number in range(count)]
    return [Bind(_NET, METADATA_IPV4, 80, None, place) for place in places]


@pytest.mark.parametrize(
    ("wanted", "binds", "namespaces", "hard", "expected"),
    [
        (0, 2, 0, -1, 4096),
        (0, 2, 2, 20_000, 4096),
        (0, 2000, 1000, 20_000, 8372),
        (100, 2, 0, 20_000, 100),
        (20, 2, 2, 20_000, 20),
        # The master needs them for its namespaces.
        (100, 600, 300, -1, 166),
        (50_000, 2, 0, 1024, 383),
        (0, 5000, 5000, 20_000, 4872),
        (0, 10_000, 5000, 20_288, 2516),
    ],
)
def test_maxconn_never_needs_more_descriptors_than_there_are(
    wanted: int, binds: int, namespaces: int, hard: int, expected: int
) -> None:
    assert compute_maxconn(wanted, _binds(binds, namespaces), hard) == expected


@pytest.mark.parametrize(
    ("binds", "namespaces", "hard", "needed"),
    [(0, 0, 100, 384), (10_000, 5000, 20_000, 20_288), (10_000, 5000, 4096, 20_288)],
)
def test_a_limit_on_open_files_that_is_too_low_is_named_with_what_is_needed(
    binds: int, namespaces: int, hard: int, needed: int
) -> None:
    with pytest.raises(HostRefused) as refused:
        compute_maxconn(0, _binds(binds, namespaces), hard)
    assert f"(RLIMIT_NOFILE) is {hard}; HAProxy needs at least {needed} " in refused.value.message
    assert "LimitNOFILE=" in refused.value.hint


def test_many_addresses_have_the_records_that_each_has_alone() -> None:
    blue, mac = NetworkId("blue"), _MAC
    addresses = [IPv4Address(f"10.0.0.{number}") for number in range(4, 8)]
    ports = (
        Port(_NET, mac, (addresses[1],), "p1"),
        Port(_NET, None, tuple(addresses[2:]), "p9"),
        Port(blue, None, (addresses[1],), "p1"),
    )
    inventory = _inventory(("a", replace(_nova(), ports=ports)))
    inventory.observe(Observation("a", networks={blue: build.network("blue")}))
    here = EndpointSet("here", b"one", networks=frozenset({"n1"}))
    at_blue = EndpointSet("blue", b"two", networks=frozenset({"blue"}))
    planner = RecordPlanner(inventory, {}, {}, NovaRouting((here, at_blue)))
    keys: list[AddressKey] = [(_NET, one) for one in addresses]
    keys += [(_NET, link_local_of(mac)), (blue, addresses[1])]
    records = {record_key(key): planner.plan_record(key) for key in keys}
    owned = {
        key: wire.render_map_value(one)
        for key, one in records.items()
        if isinstance(one, wire.NovaRecord)
    }
    assert planner.plan_records(keys).values == {**dict.fromkeys(records), **owned}
    # No address without an owner; two projects in one network, and one project in two.
    assert (len(owned), len(set(owned.values()))) == (5, 3)


_signatures = st.from_regex(r"\A[0-9a-f]{64}\Z")
_nova_records = st.builds(
    wire.NovaRecord,
    st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,31}\Z"),
    ids.map(InstanceId),
    ids,
    st.lists(_signatures, min_size=1, max_size=2).map(tuple),
)
_embedded = st.builds(wire.EmbeddedRecord, ids.map(InstanceId), st.from_regex(r"\A[0-9a-f]{16}\Z"))


@given(_nova_records | _embedded)
def test_a_record_is_one_word_of_a_map_and_comes_back_and_is_shown_without_signatures(
    record: wire.NovaRecord | wire.EmbeddedRecord,
) -> None:
    word = wire.render_map_value(record)
    assert not set(word) & set(" \t\r\n\\\"'#")
    assert wire.parse_map_value(word) == record
    shown = wire.hide_signatures(word)
    assert record.instance in shown
    if isinstance(record, wire.NovaRecord):
        assert not any(signature in shown for signature in record.signatures)


@pytest.mark.parametrize(
    "word", [wire.MAP_TOMBSTONE, wire.MAP_CONFLICT, "", "|", "a|", "|r", "@default", "@d|i|p|x"]
)
def test_what_is_no_record_is_none(word: str) -> None:
    assert wire.parse_map_value(word) is None


def test_the_signature_is_nova_s_none_is_made_of_an_empty_secret_and_no_secret_is_printed() -> None:
    expected = hmac.new(b"s3cret", b"aaaaaaaa-0001-4000", hashlib.sha256).hexdigest()
    assert sign_instance(b"s3cret", InstanceId("aaaaaaaa-0001-4000")) == expected
    with pytest.raises(ValueError, match="empty"):
        sign_instance(b"", InstanceId("a"))
    assert "s3cret" not in repr(EndpointSet("default", b"s3cret", b"s3cret-next"))
