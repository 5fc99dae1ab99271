"""What a hub's copy makes of an etcd that has lost memberships, revocations and overrides."""

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import (
    HostId,
    HostState,
    Meta,
    StoredHost,
    StoredInstance,
    host_key,
    render_host,
)
from imdsproxy.fleet.restores import EPOCHS
from imdsproxy.fleet.stream import Batch, Hello
from imdsproxy.hub.store.state import Change, Difference, FleetState
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import OperatorOverride

A, B = HostId("a"), HostId("b")
WEB = InstanceId("web")
KEY, OVERRIDE = host_key(A), layout.override_key(WEB)
MEMBER = render_host(StoredHost(HostState.ENROLLED, ("1",), version=2))
REVOKED = render_host(StoredHost(HostState.REVOKED, revocations=1, version=3))
NOW = 1_000_000.0


def _override(epoch: int, reopened_at: int = 0) -> bytes:
    return layout.render_override(OperatorOverride(epoch, reopened_at))


def _fleet(*changes: Change) -> FleetState:
    state = FleetState()
    web = layout.render_instance(StoredInstance((A,), {"id": "web"}))
    state.apply(
        9,
        [
            Change(layout.META, layout.render_meta(Meta("f", 2)), 1),
            Change(layout.instance_key(WEB), web, 2),
            *changes,
        ],
    )
    return state


def test_a_copy_keeps_the_newest_membership_whatever_revision_etcd_has_it_at() -> None:
    state = _fleet(Change(KEY, REVOKED, 7))
    for older in (Change(KEY, MEMBER, 3), Change(KEY, MEMBER, 1_000_000)):
        state.apply(10, [older])
        assert state.value(KEY) == (REVOKED, max(7, older.mod_revision))
        assert state.ahead == {KEY: older.mod_revision}
    state.apply(10, [Change(KEY, None, 11)])
    assert state.ahead == {KEY: 0}
    # As it is put back.
    state.apply(12, [Change(KEY, REVOKED, 12)])
    assert not state.ahead
    assert not state.lost
    assert state.enrolled() == []


def test_a_newer_membership_counts_though_etcd_has_it_at_a_lower_revision() -> None:
    state = _fleet(Change(KEY, MEMBER, 1_000_000))
    state.apply(9, [Change(KEY, REVOKED, 9)])
    assert state.value(KEY) == (REVOKED, 9)
    assert not state.ahead


def test_what_a_journal_remembers_is_in_force_before_etcd_is_read_and_what_etcd_has_newer_after() -> (
    None
):
    state = FleetState()
    state.remember({KEY: REVOKED, host_key(B): MEMBER, OVERRIDE: _override(7)})
    assert state.enrolled() == [B]
    newer = render_host(StoredHost(HostState.REVOKED, revocations=1, version=3))
    state.apply(9, [Change(KEY, MEMBER, 3), Change(host_key(B), newer, 4)])
    assert state.enrolled() == []
    assert state.ahead == {KEY: 3, OVERRIDE: 0}


def test_an_acceptance_takes_back_no_lasting_value_and_every_other_one() -> None:
    state = _fleet(Change(KEY, REVOKED, 7), Change(OVERRIDE, _override(7, 3), 8))
    after = state.successor()
    after.apply(5, [Change(KEY, MEMBER, 3), Change(OVERRIDE, _override(2, 9), 4)])
    assert after.value(layout.instance_key(WEB)) is None
    assert after.value(KEY) == (REVOKED, 3)
    assert after.value(OVERRIDE) == (_override(7, 9), 4)
    assert after.ahead == {KEY: 3, OVERRIDE: 4}


def test_an_override_that_is_put_back_at_a_lower_revision_reaches_hosts_with_the_acceptance_only() -> (
    None
):
    state = _fleet(Change(OVERRIDE, _override(7), 8))
    state.apply(9, [Change(OVERRIDE, _override(2), 4)])
    state.apply(9, [Change(OVERRIDE, _override(7), 6)])
    assert not state.ahead
    # Hosts have revision 8, and would refuse 6 as older.
    assert state.item(f"override/{WEB}") == (8, {"epoch": 7, "reopened_at": 0})
    after = state.successor()
    after.apply(9, [Change(OVERRIDE, _override(7), 6)])
    assert after.item(f"override/{WEB}") == (6, {"epoch": 7, "reopened_at": 0})


def test_an_override_that_is_put_back_comes_to_each_host_of_its_instance_with_its_new_revision() -> (
    None
):
    state = _fleet(Change(OVERRIDE, _override(5), 8))
    assert state.raise_overrides(A, {WEB: OperatorOverride(7)}, NOW) == [OVERRIDE]
    assert state.apply(20, [Change(OVERRIDE, _override(7), 20)]) == {A: {f"override/{WEB}"}}
    assert state.item(f"override/{WEB}") == (20, {"epoch": 7, "reopened_at": 0})


def test_a_state_that_takes_the_place_of_another_has_what_that_learned_meanwhile() -> None:
    state = _fleet(Change(OVERRIDE, _override(5), 8), Change(KEY, MEMBER, 7))
    draft = state.successor()
    draft.apply(9, [Change(OVERRIDE, _override(5), 8), Change(KEY, MEMBER, 7)])
    assert not draft.ahead
    state.raise_overrides(A, {WEB: OperatorOverride(7)}, NOW)
    state.apply(9, [Change(host_key(B), REVOKED, 9)])
    draft.regain(state)
    assert draft.value(OVERRIDE) == (_override(7), 8)
    assert draft.value(KEY) == (MEMBER, 7)
    assert draft.ahead == {OVERRIDE: 8, host_key(B): 0}


def test_a_host_raises_overrides_of_its_own_instances_as_far_as_numbers_have_room() -> None:
    state = _fleet(Change(OVERRIDE, _override(5, 5), 8))
    for host, override in (
        (B, OperatorOverride(7, 7)),
        (A, OperatorOverride(5, 5)),
        (A, OperatorOverride(2**62, 7)),
        (A, OperatorOverride(1002 * EPOCHS + 1, 7)),
        (A, OperatorOverride(7, int(NOW) + 86_401)),
    ):
        assert state.raise_overrides(host, {WEB: override}, NOW) == []
    assert state.raise_overrides(A, {InstanceId("other"): OperatorOverride(7, 7)}, NOW) == []
    assert not state.ahead
    assert state.raise_overrides(A, {WEB: OperatorOverride(7, 3)}, NOW) == [OVERRIDE]
    assert state.value(OVERRIDE) == (_override(7, 5), 8)
    assert state.ahead == {OVERRIDE: 8}


def test_a_hub_without_the_fleets_own_key_tells_no_host_that_a_restore_was_accepted() -> None:
    state = FleetState()
    state.meta = Meta("f", 0)
    found = state.compare(A, Hello(None, 0, 0, {}))
    assert isinstance(found, Difference)
    assert found.batch == Batch(0, "f", 0)
    assert not isinstance(state.compare(A, Hello("f", 1, 5, {"instance/web": 3})), Difference)


def test_what_a_host_gave_up_since_the_backup_does_not_come_back_before_that_is_accepted() -> None:
    state = _fleet()
    hello = Hello("f", 2, 9, {})
    normal = state.compare(A, hello)
    assert isinstance(normal, Difference)
    assert "instance/web" in normal.batch.put, "as of an item that was refused there"
    state.doubted = True
    doubted = state.compare(A, hello)
    assert isinstance(doubted, Difference)
    assert not doubted.batch.put
    # What came after the revision that the host knows is new to it, and so is everything to another host.
    newer = state.compare(A, Hello("f", 2, 1, {}))
    assert isinstance(newer, Difference)
    assert "instance/web" in newer.batch.put
    assert not state.successor().is_doubted()


def test_what_cannot_be_read_is_not_lost_and_what_was_before_counts() -> None:
    state = FleetState()
    state.remember({KEY: REVOKED})
    state.apply(9, [Change(KEY, b"[", 4)])
    assert not state.ahead
    assert state.unreadable.keys() == {KEY}
    assert state.enrolled() == []
    # As it is written over.
    state.apply(10, [Change(KEY, REVOKED, 10)])
    assert not state.problems
