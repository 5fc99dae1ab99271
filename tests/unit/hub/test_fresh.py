"""What a write is planned of, while the hub's copy goes on."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import Meta
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed, KeyValue, Snapshot
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.hub.store.transactions import Transaction
from imdsproxy.hub.store.writes import Fresh, Writes


@dataclass
class _Store:
    sent: list[bytes] = field(default_factory=list)

    async def read(self, key: str, *, keys_only: bool = False) -> Snapshot:
        self.sent.append(b"" if keys_only else b'{"state":"enrolled"}')
        return Snapshot(2, [KeyValue(key, self.sent[-1], 2, 2)])


async def test_what_came_into_the_copy_after_the_plan_counts_as_another_than_was_planned_of() -> (
    None
):
    state, key = FleetState(), "/imds/1/host/a"
    view = Fresh(state)
    assert view(key) is None
    state.apply(2, [Change(key, b'{"state":"enrolled"}', 2)])
    assert await view.refresh(cast("Etcd", _Store()))
    assert view(key) == (b'{"state":"enrolled"}', 2)


async def test_a_value_that_is_known_is_not_read_again_before_it_has_changed() -> None:
    state, key, store = FleetState(), "/imds/1/host/a", _Store()
    for revision, is_known in ((2, True), (1, False)):
        value = b'{"state":"enrolled"}' if is_known else b'{"state":"revoked"}'
        state = FleetState()
        state.apply(revision, [Change(key, value, revision)])
        view = Fresh(state)
        assert view(key) == (value, revision)
        store.sent.clear()
        assert await view.refresh(cast("Etcd", store)) is not is_known
        assert view(key) == (b'{"state":"enrolled"}', 2)
        assert any(store.sent) is not is_known


class _Restored:
    async def commit(self, *_: object) -> Committed:
        return Committed(3)


async def test_a_write_to_a_restored_store_waits_until_the_hub_has_seen_that_it_was_accepted() -> (
    None
):
    def meta(incarnation: int, revision: int) -> Change:
        return Change(layout.META, layout.render_meta(Meta("f", incarnation)), revision)

    state, unused = FleetState(), cast("Any", None)
    state.apply(9, [meta(1, 9)])
    writes = Writes(cast("Etcd", _Restored()), state, unused, unused)
    writing = asyncio.create_task(writes.write(lambda _: Transaction(puts={"/imds/1/x": b"{}"})))
    done, _ = await asyncio.wait([writing], timeout=0.1)
    assert not done
    after = FleetState()
    after.apply(3, [meta(2, 2)])
    state.become(after)
    assert (await writing).revision == 3
