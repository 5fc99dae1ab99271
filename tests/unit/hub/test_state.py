"""What each host gets of a fleet: its own, in every order of changes, and nothing is removed because it is absent."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import (
    HostId,
    Meta,
    StoredInstance,
    StoredNetwork,
    StoredPassword,
    render_password,
)
from imdsproxy.fleet.stream import Batch, Bye, ByeCode, Hello, ItemKey, digest_items
from imdsproxy.hub.store.state import Change, Difference, FleetState
from imdsproxy.model.entities import InstanceId, NetworkId

A, B = HostId("a"), HostId("b")
HOSTS = (A, B, HostId("c"))
WEB, DB = InstanceId("web"), InstanceId("db")


def network(name: str, revision: int) -> Change:
    stored = StoredNetwork({"id": name, "listener": {"bridge": f"br-{name}"}})
    return Change(layout.network_key(NetworkId(name)), layout.render_network(stored), revision)


def instance(
    name: str,
    revision: int,
    *hosts: HostId,
    on: str = "blue",
    mark: int = 0,
    left: Iterable[HostId] = HOSTS,
) -> Change:
    record: Json = {"id": name, "name": f"{name}-{mark}", "ports": [{"network": on}]}
    stored = StoredInstance(
        hosts, {**record, "project": f"of-{name}"}, left=tuple({*left} - {*hosts})
    )
    return Change(layout.instance_key(InstanceId(name)), layout.render_instance(stored), revision)


def fleet(*changes: Change, incarnation: int = 1) -> FleetState:
    state = FleetState()
    meta = layout.render_meta(Meta("a-fleet", incarnation))
    state.apply(1, [Change(layout.META, meta, 1)])
    state.apply(max((one.mod_revision for one in changes), default=1), changes)
    return state


def test_a_restore_is_noticed_whose_lost_write_another_one_has_replaced() -> None:
    def written(revision: int, version: int, created: int = 3, mark: int = 0) -> Change:
        one = instance("web", revision, A, mark=mark)
        return replace(one, create_revision=created, version=version)

    state = fleet(written(5, 2))
    state.apply(9, [written(9, 3, mark=1)])
    assert not state.lost
    # The backup has the second version, and the third was written anew.
    state.apply(1_000_007, [written(1_000_007, 3, mark=2)])
    assert set(state.lost) == {layout.instance_key(WEB)}
    # Made again, after it was deleted, it begins at one.
    other = fleet(written(9, 3))
    other.apply(20, [written(20, 1, created=20)])
    assert not other.lost


def test_records_that_were_removed_are_not_counted() -> None:
    gone = StoredInstance((), {}, removed_at=7)
    key, network_key = layout.instance_key(WEB), layout.network_key(NetworkId("blue"))
    state = fleet(network("blue", 2), instance("web", 3, A), instance("db", 4, B))
    state.apply(5, [Change(key, layout.render_instance(gone), 5)])
    no_network = layout.render_network(StoredNetwork({}, removed_at=7))
    state.apply(6, [Change(network_key, no_network, 6)])
    assert [state.count_records(one) for one in (layout.INSTANCES, layout.NETWORKS)] == [1, 0]
    assert state.removed == {key, network_key}
    # It is added again, and the other removal is forgotten.
    state.apply(8, [instance("web", 7, A), Change(network_key, None, 8)])
    assert [state.count_records(one) for one in (layout.INSTANCES, layout.NETWORKS)] == [2, 0]
    assert state.removed == set()


def everything_of(state: FleetState, host: HostId) -> dict[ItemKey, tuple[int, Json]]:
    found = state.compare(host, Hello())
    assert isinstance(found, Difference)
    return dict(found.batch.put)


def compare(
    state: FleetState, items: dict[ItemKey, int], revision: int = 0, seen: int = 1
) -> Batch:
    found = state.compare(A, Hello("a-fleet", seen, revision, items))
    assert isinstance(found, Difference)
    assert (found.suspicious is None) == (not found.batch.held)
    return found.batch


def test_a_host_gets_its_instances_and_what_they_need_and_nothing_else() -> None:
    others = network("red", 3), instance("db", 5, B, on="red")
    state = fleet(network("blue", 2), *others, instance("web", 4, A))
    assert everything_of(state, A).keys() == {"network/blue", "instance/web"}
    assert everything_of(state, HostId("c")) == {}


def test_policies_reach_the_hosts_of_their_scope() -> None:
    def policy(scope: str, revision: int) -> Change:
        return Change(layout.POLICIES + scope, codec.encode({"tokens": "required"}), revision)

    scopes = ("fleet", "host/b", "project/of-web", "project/of-db")
    policies = [policy(scope, number) for number, scope in enumerate(scopes, 5)]
    state = fleet(instance("web", 2, A), instance("db", 3, B), *policies)
    assert everything_of(state, A).keys() == {
        "instance/web",
        "policy/fleet",
        "policy/project/of-web",
    }
    assert state.apply(9, [policy("host/b", 9)]) == {B: {"policy/host/b"}}
    assert everything_of(state, B)["policy/host/b"][0] == 9


def test_every_host_learns_how_often_stolen_keys_were_replaced_and_no_key() -> None:
    ring = {"format": 1, "sequence": 3, "keys": [{"id": "k", "state": "signing", "since": 1}]}
    stored = layout.StoredIssuer(ring, {"k": {"kty": "RSA"}}, {"k": "c2VhbGVk"}, replaced=2)
    state = fleet(instance("web", 2, A))
    issuer = Change(layout.ISSUER, layout.render_issuer(stored), 5)
    assert state.apply(5, [issuer]) == {HostId("*"): {"issuer/keys"}}
    assert everything_of(state, A)["issuer/keys"] == (5, {"replaced": 2})
    assert everything_of(state, HostId("c")).keys() == {"issuer/keys"}


def test_nothing_of_another_host_is_in_an_item() -> None:
    put = everything_of(fleet(instance("web", 2, A, HostId("a-secret-name"))), A)
    assert "a-secret-name" not in str(put)


def test_a_record_that_says_that_it_went_is_removed() -> None:
    state = fleet(network("blue", 2), instance("web", 4, B), instance("db", 5))
    have = {"instance/web": 3, "instance/db": 3, "override/db": 3, "network/blue": 2}
    batch = compare(state, have, revision=3)
    assert set(batch.remove) == have.keys()
    assert not batch.held


def test_what_etcd_lacks_is_held_and_not_removed() -> None:
    have = {"instance/web": 1, "keys/web": 1, "network/blue": 1, "policy/project/p": 1}
    batch = compare(fleet(), have, revision=1)
    assert batch.held.keys() == have.keys()
    assert not batch.remove


def test_a_host_that_asks_for_what_it_never_had_learns_nothing() -> None:
    state = fleet(network("red", 2), instance("db", 30, B, on="red", left=()))
    state.apply(90, [])
    answers = []
    for kind in ("instance", "override", "keys", "network", "policy/project"):
        for revision in (0, 7, 30, 80):
            there, absent = ("red", "none") if kind == "network" else ("db", "none")
            found = [compare(state, {f"{kind}/{one}": revision}) for one in (there, absent)]
            answers.append(
                [
                    (len(one.put), len(one.remove), [*one.held.values()], one.revision)
                    for one in found
                ]
            )
    assert all(known == unknown for known, unknown in answers)


def test_what_etcd_has_of_an_older_revision_is_held_whether_placed_here_or_not() -> None:
    state = fleet(network("blue", 2), instance("web", 3, A), instance("db", 4, B))
    state.apply(90, [])
    have = {
        "instance/web": 50,
        "keys/web": 50,
        "instance/db": 50,
        "override/db": 50,
        "network/blue": 2,
    }
    batch = compare(state, have, revision=60)
    assert batch.held.keys() == have.keys() - {"network/blue"}
    assert not batch.put
    assert not batch.remove


def test_the_network_of_an_instance_that_is_held_stays() -> None:
    batch = compare(fleet(network("blue", 2)), {"instance/web": 2, "network/blue": 2}, revision=2)
    assert not batch.remove


def test_a_higher_incarnation_is_taken_at_its_word() -> None:
    state = fleet(network("blue", 2), instance("web", 3, A), incarnation=2)
    have = {"instance/web": 50, "instance/gone": 50, "network/blue": 2}
    batch = compare(state, have, revision=60, seen=1)
    assert batch.put["instance/web"][0] == 3
    # A restored store gives revisions again: the same one may be of another value.
    assert "network/blue" in batch.put
    assert set(batch.remove) == {"instance/gone"}
    assert not batch.held


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        (Hello("a-fleet", 1, 9), ByeCode.BEHIND),
        (Hello("a-fleet", 2, 0), ByeCode.AHEAD),
        (Hello("another", 1, 0), ByeCode.OTHER_FLEET),
    ],
)
def test_a_host_that_knows_more_or_another_fleet_goes_elsewhere(
    hello: Hello, code: ByeCode
) -> None:
    found = fleet(instance("web", 3, A)).compare(A, hello)
    assert isinstance(found, Bye)
    assert found.code is code


def test_a_value_that_another_program_wrote_or_deleted_changes_nothing() -> None:
    state = fleet(network("blue", 2), instance("web", 3, A))
    before, key = everything_of(state, A), layout.instance_key(WEB)
    for value in (b"", b"[]", b'{"hosts":"a"}', b'{"hosts":[],"record":{"ports":7}}', None):
        assert state.apply(9, [Change(key, value, 9)]) == {}
        assert everything_of(state, A) == before
        assert key in (state.lost if value is None else state.unreadable)
    state.apply(10, [instance("web", 10, A)])
    assert not state.problems
    assert not state.lost


def test_a_value_of_an_older_revision_is_not_taken() -> None:
    state = fleet(instance("web", 30, A))
    assert state.apply(31, [instance("web", 7, B)]) == {}
    assert everything_of(state, A)["instance/web"][0] == 30


def test_an_old_removal_may_be_deleted_and_nothing_else() -> None:
    removed = StoredInstance((), {}, removed_at=7)
    key = layout.instance_key(WEB)
    state = fleet(Change(key, layout.render_instance(removed), 3), instance("db", 4))
    state.apply(9, [Change(key, None, 9), Change(layout.instance_key(DB), None, 9)])
    assert set(state.lost) == {layout.instance_key(DB)}
    assert state.value(key) is None


def beat(count: int, revision: int) -> Change:
    return Change(layout.BEAT, codec.encode({"count": count, "hub": "hub-1"}), revision, 1, count)


@pytest.mark.parametrize("change", [beat(9, 12), beat(8, 13), beat(9, 11), beat(11, 10)])
def test_a_beat_that_is_no_later_than_the_one_before_shows_a_restore(change: Change) -> None:
    state = fleet(beat(9, 11))
    state.apply(11, [beat(10, 12)])
    state.apply(change.mod_revision, [change])
    assert set(state.lost) == {layout.BEAT}


def test_a_beat_that_is_read_again_shows_nothing() -> None:
    state = fleet(beat(9, 11))
    state.apply(11, [beat(9, 11)])
    assert not state.lost


def test_token_keys_are_sent_to_the_hosts_of_their_instances_when_the_fleet_has_others() -> None:
    state = fleet(instance("web", 2, A), instance("db", 3, B))
    state.keys_of = lambda _, one: (4, {"current": one})
    touched = state.apply(4, [Change(layout.TOKEN_KEYS, codec.encode({"sealed": "AAAA"}), 4)])
    assert touched == {A: {"keys/web"}, B: {"keys/db"}}
    assert state.item("keys/db") == (4, {"current": "db"})


@dataclass
class Follower:
    """A host that applies batches."""

    items: dict[ItemKey, tuple[int, Json]] = field(default_factory=dict)

    def take(self, batch: Batch) -> None:
        for item in batch.remove:
            self.items.pop(item, None)
        self.items.update(batch.put)


_MOVES = st.tuples(
    st.sampled_from(["web", "db", "mail"]),
    st.sets(st.sampled_from(HOSTS), max_size=2),
    st.sampled_from(["blue", "red"]),
)


@given(st.lists(_MOVES, min_size=1, max_size=12), st.data())
def test_a_stream_that_breaks_anywhere_leaves_each_host_with_exactly_its_own(
    moves: list[tuple[str, set[HostId], str]], data: st.DataObject
) -> None:
    state = fleet(network("blue", 2), network("red", 3))
    followers = {host: Follower() for host in HOSTS}
    left: dict[HostId, set[ItemKey]] = {}
    for revision, (name, hosts, on) in enumerate(moves, start=10):
        change = instance(name, revision, *sorted(hosts), on=on, mark=revision)
        for host, items in state.apply(revision, [change]).items():
            left.setdefault(host, set()).update(items)
        for host in HOSTS:
            match data.draw(st.sampled_from(["reads", "waits", "comes again"])):
                case "reads":
                    followers[host].take(state.changes_for(host, left.pop(host, set())))
                case "comes again":
                    have = {item: one[0] for item, one in followers[host].items.items()}
                    found = state.compare(host, Hello("a-fleet", 1, 0, have))
                    assert isinstance(found, Difference)
                    assert not found.batch.held
                    followers[host].take(found.batch)
                    left.pop(host, None)
                case _:
                    pass
    for host in HOSTS:
        followers[host].take(state.changes_for(host, left.pop(host, set())))
        assert followers[host].items == everything_of(state, host)


def test_keys_are_listed_by_what_they_begin_with() -> None:
    state = fleet(network("blue", 2), instance("web", 3, A), instance("webmail", 4, A))
    assert set(state.keys(layout.INSTANCES)) == {
        layout.instance_key(WEB),
        layout.instance_key(InstanceId("webmail")),
    }
    assert len(set(state.keys(f"{layout.INSTANCES}webm"))) == 1
    assert len(set(state.keys(layout.PREFIX))) == 4


def test_a_digest_is_that_of_what_a_host_gets_and_of_nothing_else() -> None:
    state = fleet(
        network("blue", 2), network("red", 3), instance("web", 4, A), instance("db", 5, A, B)
    )
    state.keys_of = lambda _, instance: (6, {"current": "k", "keys": {"k": instance}})
    state.apply(6, [Change(layout.TOKEN_KEYS, codec.encode({"sealed": "AAAA"}), 6)])
    for host in HOSTS:
        items = {item: revision for item, (revision, _) in everything_of(state, host).items()}
        assert state.digest(host, ()) == digest_items(items)
        assert state.digest(host, ()) == digest_items(dict(reversed(items.items())))
    others = {item: revision for item, revision in items.items() if item != "instance/web"}
    assert state.digest(A, {"instance/web"}) != state.digest(A, ())
    assert state.digest(HostId("c"), {"instance/web"}) == digest_items(others)
    assert len({state.digest(host, ()) for host in HOSTS}) == len(HOSTS)


# What cannot be read

_HAS = {
    "instance/web": 3, "override/web": 4, "keys/web": 5, "network/blue": 2, "policy/project/of-web": 2,
}  # fmt: skip


def test_a_password_reaches_the_hosts_of_its_instance_and_stays_where_this_hub_cannot_open_it() -> (
    None
):
    state = fleet(network("blue", 2), instance("web", 3, A), instance("db", 4, B))
    state.open_password = lambda _, sealed: None if sealed == b"other" else sealed.decode()
    key, item = layout.password_key(WEB), "password/web"
    posted = Change(key, render_password(StoredPassword(b"secret")), 5)
    assert state.apply(5, [posted]) == {A: {item}}
    assert everything_of(state, A)[item] == (5, {"password": "secret"})
    assert item not in everything_of(state, B)
    has = {one: revision for one, (revision, _) in everything_of(state, A).items()}
    state.apply(6, [Change(key, render_password(StoredPassword(b"other")), 6)])
    assert item not in everything_of(state, A)
    found = compare(state, has, 5)
    assert set(found.unreadable) == {item}
    assert (found.remove, found.held) == ((), {})
    # Cleared, and then gone with its instance.
    state.apply(7, [Change(key, render_password(StoredPassword(None, "", 9)), 7)])
    assert everything_of(state, A)[item] == (7, {"password": None})
    assert key in state.removed
    state.apply(8, [instance("web", 8, B)])
    assert item in compare(state, has | {item: 7}, 7).remove


def garbage(key: str, revision: int) -> Change:
    return Change(key, b"garbage", revision)


@pytest.mark.parametrize("seen", [1, 2])
def test_a_host_keeps_what_a_hub_that_starts_afresh_cannot_read_and_nothing_is_suspected(
    seen: int,
) -> None:
    state = fleet(network("blue", 2), garbage(layout.instance_key(WEB), 7), incarnation=2)
    found = state.compare(A, Hello("a-fleet", seen, 7, _HAS))
    assert isinstance(found, Difference)
    assert found.suspicious is None
    # Also where a restore was accepted, which takes the rest at its word.
    assert found.batch.unreadable.keys() == _HAS.keys()
    assert (found.batch.remove, found.batch.held, found.batch.put) == ((), {}, {})
    assert "the value is no JSON" in found.batch.unreadable["instance/web"]


@pytest.mark.parametrize(
    ("key", "item"),
    [
        (layout.network_key(NetworkId("blue")), "network/blue"),
        (layout.override_key(WEB), "override/web"),
        (f"{layout.POLICIES}project/of-web", "policy/project/of-web"),
    ],
)
def test_what_an_instance_needs_and_cannot_be_read_stays_where_it_is(key: str, item: str) -> None:
    state = fleet(instance("web", 3, A), garbage(key, 7), incarnation=2)
    for seen in (1, 2):
        found = state.compare(A, Hello("a-fleet", seen, 7, {"instance/web": 3, item: 4}))
        assert isinstance(found, Difference)
        assert found.suspicious is None
        assert found.batch.unreadable.keys() == {item}
        assert found.batch.remove == ()


def test_keys_that_a_hub_cannot_open_are_not_keys_that_etcd_lacks() -> None:
    state = fleet(instance("web", 3, A))
    state.keys_problem = lambda _: "sealed with a key that this hub does not have"
    found = state.compare(A, Hello("a-fleet", 1, 3, {"instance/web": 3, "keys/web": 9}))
    assert isinstance(found, Difference)
    assert found.suspicious is None
    assert set(found.batch.unreadable) == {"keys/web"}


def test_a_hub_that_runs_sends_the_last_good_value_and_says_that_a_newer_one_is_unreadable() -> (
    None
):
    state, key = fleet(network("blue", 2), instance("web", 3, A)), layout.instance_key(WEB)
    before = everything_of(state, A)
    state.apply(9, [garbage(key, 9)])
    assert everything_of(state, A) == before
    assert state.problems.keys() == {key}
    assert state.held_back(A, None) == f"instance/web is {state.problems[key]}"
    assert state.value(key) != state.stored(key) == (b"garbage", 9)
    # Another hub has sent a newer good one before that.
    found = state.compare(A, Hello("a-fleet", 1, 9, {"instance/web": 8}))
    assert isinstance(found, Difference)
    assert found.suspicious is None
    assert found.batch.unreadable.keys() == {"instance/web"}


def test_an_instance_that_is_written_over_garbage_elsewhere_leaves_the_host_that_kept_it() -> None:
    state = fleet(network("blue", 2), garbage(layout.instance_key(WEB), 7))
    assert state.unread_instances(_HAS) == {"instance/web"}
    state.apply(8, [instance("web", 8, B, left=[layout.ANYWHERE])])
    assert not state.unread_instances(_HAS)
    assert set(compare(state, _HAS, revision=7).remove) == _HAS.keys()


def test_nothing_is_left_of_an_instance_whose_removal_was_swept() -> None:
    state, key = fleet(instance("web", 3, A)), layout.instance_key(WEB)
    removed = layout.render_instance(StoredInstance((), {}, removed_at=7))
    state.apply(4, [Change(key, removed, 4)])
    state.apply(5, [Change(key, None, 5)])
    assert (state.value(key), state._placements, state.count_placed()) == (None, {}, 0)


def test_garbage_that_is_deleted_was_nothing() -> None:
    state, key = fleet(network("blue", 2)), layout.instance_key(WEB)
    change = garbage(key, 7)
    state.apply(7, [change])
    assert not state.differs(change, 7)
    assert state.keys_beyond({layout.META, layout.network_key(NetworkId("blue"))}) == [key]
    state.apply(8, [Change(key, None, 8)])
    assert not state.problems
