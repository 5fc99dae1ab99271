"""What a write is planned of, while the hub's copy goes on."""

from typing import cast

from imdsproxy.hub.etcd import Etcd, Snapshot
from imdsproxy.hub.etcd_messages import KeyValue
from imdsproxy.hub.state import Change, FleetState
from imdsproxy.hub.writes import Fresh


class _Store:
    async def read(self, key: str) -> Snapshot:
        return Snapshot(2, [KeyValue(key, b'{"state":"enrolled"}', 2, 2)])


async def test_what_came_into_the_copy_after_the_plan_counts_as_another_than_was_planned_of() -> (
    None
):
    state, key = FleetState(), "/imds/1/host/a"
    view = Fresh(state)
    assert view(key) is None
    state.apply(2, [Change(key, b'{"state":"enrolled"}', 2)])
    assert await view.refresh(cast("Etcd", _Store()))
    assert view(key) == (b'{"state":"enrolled"}', 2)
