"""Two hubs that write at the same time, with any interleaving, never give one address to two instances."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.errors import (
    ImdsproxyError,
    NotFound,
    RequestRefused,
    SourceCorrupt,
    SourceRefused,
)
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import (
    Claim,
    HostId,
    HostState,
    Meta,
    StoredHost,
    Suspicion,
    host_key,
    render_host,
    render_suspicion,
)
from imdsproxy.fleet.restores import MOST_AHEAD
from imdsproxy.hub.store.etcd_messages import Compare
from imdsproxy.hub.store.plan_changes import plan_acceptance, plan_hosts, plan_override, plan_policy
from imdsproxy.hub.store.plan_records import (
    InstancePut,
    claims_of,
    plan_network_removal,
    plan_put,
    plan_removal,
)
from imdsproxy.hub.store.transactions import (
    Terms,
    Transaction,
    next_epoch,
    read_instance,
    record_of,
)
from imdsproxy.model.entities import InstanceId, Network, NetworkId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import PlacedInstance, parse_network, parse_placed

NETWORKS = ("blue", "red")
ADDRESSES = ("10.0.0.1", "10.0.0.2", "fe80::5054:ff:fe00:1")
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
NAMES = ("one", "two", "three")

Known: TypeAlias = "tuple[bytes, int] | None"


@dataclass
class Store:
    """What etcd does with a transaction."""

    revision: int = 1
    keys: dict[str, tuple[bytes, int]] = field(default_factory=dict)

    def commit(self, planned: Transaction) -> dict[str, Known] | None:
        """Nothing where it is written, else the compared keys as they are."""
        if not all(map(self._holds, planned.compares)):
            return {one.key: self.keys.get(one.key) for one in planned.compares}
        self.revision += 1
        for key, value in planned.puts.items():
            self.keys[key] = value, self.revision
        for key in planned.deletes:
            self.keys.pop(key, None)
        return None

    def _holds(self, compare: Compare) -> bool:
        if compare.range_end:
            return not any(compare.key <= key < compare.range_end for key in self.keys)
        found = self.keys.get(compare.key)
        return (0 if found is None else found[1]) == compare.revision


def placed(name: str, ports: list[dict[str, object]]) -> PlacedInstance:
    found = parse_placed({"id": name, "name": name, "hosts": ["a"], "ports": ports})
    assert isinstance(found, PlacedInstance)
    return found


def network(name: str) -> Network:
    found = parse_network({"id": name, "listener": {"bridge": name}})
    assert isinstance(found, Network)
    return found


def fresh() -> Store:
    store = Store()
    enrolled = render_host(StoredHost(HostState.ENROLLED, ("1",)))
    store.keys[host_key(HostId("a"))] = enrolled, 1
    return store


PORTS = st.lists(
    st.fixed_dictionaries(
        {"network": st.sampled_from(NETWORKS)},
        optional={
            "mac": st.sampled_from(MACS),
            "addresses": st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=2),
        },
    ),
    max_size=2,
)
ONE_PORT = st.sampled_from(ADDRESSES).map(lambda one: [{"network": "blue", "addresses": [one]}])
CHANGES = st.one_of(
    st.tuples(st.just("put"), st.dictionaries(st.sampled_from(NAMES), PORTS, min_size=1)),
    st.tuples(st.just("put"), st.fixed_dictionaries({"one": ONE_PORT})),
    st.tuples(st.just("put"), st.fixed_dictionaries({"two": ONE_PORT})),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("network"), st.sampled_from(NETWORKS)),
    st.tuples(st.just("no network"), st.sampled_from(NETWORKS)),
)


def write(store: Store, change: tuple[str, object], number: int) -> Generator[None, None, None]:
    """A hub's write, which stops wherever another hub may come between."""
    # Hubs do not follow claims.
    seen = {key: one for key, one in store.keys.items() if not key.startswith(layout.CLAIMS)}
    terms = Terms(f"request-{number}", now=1_700_000_000)
    users: tuple[str, ...] = ()
    for _ in range(4):
        yield
        try:
            match change:
                case "put", dict(wanted):
                    try:
                        puts = [InstancePut(placed(name, ports)) for name, ports in wanted.items()]
                    except AssertionError:
                        return  # a record that has an address twice
                    planned = plan_put(seen.get, [], puts, terms)
                case "network", str(name):
                    planned = plan_put(seen.get, [network(name)], [], terms)
                case "no network", str(name):
                    planned = plan_network_removal(seen.get, NetworkId(name), terms, users)
                case _, name:
                    planned = plan_removal(seen.get, InstanceId(str(name)), terms)
        except ImdsproxyError:
            return
        yield
        if not (planned.puts or planned.deletes):
            return
        found = store.commit(planned)
        if found is None:
            return
        seen = {key: one for key, one in (seen | found).items() if one is not None}
        claims = tuple(layout.claims_in(NetworkId(str(change[1]))) for _ in "1")
        users = tuple(v.decode() for k, (v, _) in store.keys.items() if k.startswith(claims[0]))


def check(store: Store) -> None:
    """Claims are those of the records, and of one record each; no port is in a network that was removed."""
    wanted: dict[str, str] = {}
    for name in NAMES:
        known = read_instance(store.keys.get, InstanceId(name))
        if known is None:
            continue
        record = record_of(known[0])
        for key in claims_of(record):
            assert key not in wanted, f"{wanted[key]} and {name} both have {key}"
            wanted[key] = name
        for port in record.ports:
            stored = layout.parse_network(store.keys[layout.network_key(port.network)][0])
            assert stored.removed_at is None, f"{name} is in {port.network}"
    claims = {
        key: value.decode()
        for key, (value, _) in store.keys.items()
        if key.startswith(layout.CLAIMS)
    }
    assert claims == wanted


@given(
    before=st.lists(CHANGES, max_size=4),
    changes=st.tuples(CHANGES, CHANGES, CHANGES),
    order=st.lists(st.integers(0, 2), max_size=24),
)
def test_writers_with_any_interleaving_never_give_one_address_to_two_instances(
    before: list[tuple[str, object]], changes: tuple[tuple[str, object], ...], order: list[int]
) -> None:
    store = fresh()
    for number, one in enumerate([("network", "blue"), *before]):
        for _ in write(store, one, 100 + number):
            pass
        check(store)
    writers = [write(store, one, number) for number, one in enumerate(changes)]
    revision = store.revision
    for turn in [*order, *(0, 1, 2) * 9]:
        next(writers[turn], None)
        if revision != store.revision:
            check(store)
            revision = store.revision


def test_a_revocation_after_a_restore_is_newer_than_all_that_the_backup_lost() -> None:
    assert [next_epoch(epoch, 1) for epoch in (0, 1, 7)] == [1, 2, 8]
    after = next_epoch(3, 2)
    assert after > 100_000
    assert next_epoch(after, 2) == after + 1


def test_an_accepted_backup_gets_an_incarnation_that_no_host_has_yet() -> None:
    store = Store()
    store.keys[layout.META] = layout.render_meta(Meta("f", 2)), 1
    suspicion = Suspicion("why", {"hub-1": 4})
    store.keys[layout.SUSPECT] = render_suspicion(suspicion), 1
    assert store.commit(plan_acceptance(store.keys.get, Meta("f", 5))) is None
    assert layout.parse_meta(store.keys[layout.META][0]).incarnation == 6
    assert layout.SUSPECT not in store.keys


@pytest.mark.parametrize(("claimed", "accepted"), [(7, 8), (10**9, 2 + MOST_AHEAD + 1)])
def test_an_acceptance_is_above_what_a_host_has_seen_and_no_host_makes_it_more_than_a_thousand(
    claimed: int, accepted: int
) -> None:
    store = Store()
    store.keys[layout.META] = layout.render_meta(Meta("f", 2)), 1
    enrolled = render_host(StoredHost(HostState.ENROLLED, ("1",)))
    store.keys[host_key(HostId("a"))] = enrolled, 1
    suspicion = Suspicion("why", {}, {HostId("a"): Claim(claimed)})
    store.keys[layout.SUSPECT] = render_suspicion(suspicion), 1
    assert store.commit(plan_acceptance(store.keys.get, Meta("f", 2))) is None
    assert layout.parse_meta(store.keys[layout.META][0]).incarnation == accepted


def test_an_etcd_that_was_emptied_keeps_its_fleet_when_that_is_accepted_and_gets_no_other() -> None:
    store = Store()
    store.keys[layout.SUSPECT] = render_suspicion(Suspicion("why", {"hub-1": 3})), 1
    assert store.commit(plan_acceptance(store.keys.get, Meta("f", 3))) is None
    assert layout.parse_meta(store.keys[layout.META][0]) == Meta("f", 4)
    store.keys[layout.SUSPECT] = render_suspicion(Suspicion("why", {"hub-1": 3})), 1
    with pytest.raises(SourceRefused, match="etcd has another fleet, f"):
        plan_acceptance(store.keys.get, Meta("g", 3))


# Over what cannot be read

_ALL = Terms("r", now=1_700_000_000)
_OF_SHOP = Terms("r", now=1_700_000_000, scope="shop")
_WEB = InstanceId("web")


def _written(store: Store, *puts: tuple[str, list[dict[str, object]]]) -> Store:
    records = [InstancePut(placed(name, ports)) for name, ports in puts]
    assert store.commit(plan_put(store.keys.get, [], records, _ALL)) is None
    return store


def _damaged(store: Store, key: str) -> Store:
    store.keys[key] = b"garbage", store.revision
    return store


def _blue() -> Store:
    store = fresh()
    assert store.commit(plan_put(store.keys.get, [network("blue")], [], _ALL)) is None
    return store


def test_a_record_that_cannot_be_read_is_written_over_by_an_operator_of_all_projects() -> None:
    port: list[dict[str, object]] = [{"network": "blue", "addresses": ["10.0.0.1"]}]
    store = _damaged(_written(_blue(), ("web", port)), layout.instance_key(_WEB))
    with pytest.raises(ImdsproxyError):
        plan_put(store.keys.get, [], [InstancePut(placed("web", []))], _OF_SHOP)
    with pytest.raises(SourceCorrupt):
        plan_hosts(store.keys.get, _WEB, lambda _: (HostId("a"),), _ALL)
    _written(store, ("web", port))
    stored = layout.parse_instance(store.keys[layout.instance_key(_WEB)][0])
    # Any host may have had it.
    assert stored.left == (layout.ANYWHERE,)
    # An address that it no longer has is free for others.
    _written(_damaged(store, layout.instance_key(_WEB)), ("web", []))
    _written(store, ("mail", port))
    claim = layout.address_claim(NetworkId("blue"), IPv4Address("10.0.0.1"))
    assert store.keys[claim][0] == b"mail"


def test_no_token_of_an_instance_that_was_removed_is_good_for_one_that_comes_under_its_id() -> None:
    def epoch() -> int:
        found = store.keys.get(layout.override_key(_WEB))
        return 0 if found is None else layout.parse_override(found[0]).epoch

    store = _written(_blue(), ("web", []))
    _written(store, ("web", []))
    assert epoch() == 0
    for expected in (1, 2):
        assert store.commit(plan_removal(store.keys.get, _WEB, _ALL)) is None
        _written(store, ("web", []))
        assert epoch() == expected


def test_a_record_that_cannot_be_read_is_removed() -> None:
    store = _damaged(_written(_blue(), ("web", [])), layout.instance_key(_WEB))
    with pytest.raises(NotFound):
        plan_removal(store.keys.get, _WEB, _OF_SHOP)
    assert store.commit(plan_removal(store.keys.get, _WEB, _ALL)) is None
    assert read_instance(store.keys.get, _WEB) is None
    key = layout.network_key(NetworkId("blue"))
    _damaged(store, key)
    planned = plan_network_removal(store.keys.get, NetworkId("blue"), _ALL, ())
    assert store.commit(planned) is None
    assert layout.parse_network(store.keys[key][0]).removed_at is not None


@pytest.mark.parametrize("key", [layout.override_key(_WEB), layout.instance_key(_WEB)])
def test_tokens_are_revoked_though_the_record_or_the_override_cannot_be_read(key: str) -> None:
    store = _written(_blue(), ("web", []))
    store.keys[layout.META] = layout.render_meta(Meta("f", 1)), 1

    def revoke() -> int:
        def change(old: OperatorOverride) -> OperatorOverride:
            return replace(old, epoch=next_epoch(old.epoch, 1))

        planned, epoch = plan_override(store.keys.get, _WEB, change, _ALL)
        assert store.commit(planned) is None
        return epoch

    before = [revoke() for _ in range(3)][-1]
    _damaged(store, key)
    # No host may know a higher one.
    assert revoke() > before
    assert revoke() > before + 1


def test_a_policy_that_cannot_be_read_is_cleared_and_not_changed() -> None:
    store = _damaged(fresh(), f"{layout.POLICIES}fleet")
    with pytest.raises(SourceCorrupt) as caught:
        plan_policy(store.keys.get, "fleet", lambda old: {**old, "tokens": "required"}, _ALL)
    assert "imdsproxy policy clear fleet" in caught.value.hint
    assert store.commit(plan_policy(store.keys.get, "fleet", lambda _: {}, _ALL)) is None
    assert store.keys[f"{layout.POLICIES}fleet"][0] == b"{}"


def test_a_claim_that_cannot_be_read_is_nobodys_to_take() -> None:
    store, key = _blue(), layout.address_claim(NetworkId("blue"), IPv4Address("10.0.0.1"))
    _damaged(store, key).keys[key] = b"\xff", 1
    with pytest.raises(SourceRefused) as caught:
        _written(store, ("web", [{"network": "blue", "addresses": ["10.0.0.1"]}]))
    assert "is not readable in etcd" in caught.value.problems[0].reason


def test_another_programs_value_of_the_suspicion_stops_no_write() -> None:
    store = _damaged(_blue(), layout.SUSPECT)
    _written(store, ("web", []))
    with pytest.raises(RequestRefused):
        plan_acceptance(store.keys.get, Meta("f", 1))
