"""A hub that sweeps etcd: what etcd refuses, or has compacted, ends no sweep."""

import asyncio
from dataclasses import dataclass, field
from typing import cast

import pytest

from imdsproxy.errors import EtcdUnavailable, SourceRefused
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import StoredInstance
from imdsproxy.hub.store import upkeep as module
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed, Compacted, Snapshot
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.hub.store.upkeep import Sweep
from imdsproxy.model.entities import InstanceId
from support.hand_clock import HandClock
from support.tasks import background, until


@dataclass
class _Etcd:
    """An etcd without user data, whose first answers are errors."""

    errors: list[Exception]
    deleted: list[str] = field(default_factory=list)

    async def read(self, *_range: str, keys_only: bool) -> Snapshot:
        assert keys_only
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop()
        return Snapshot(9, [])

    async def commit(self, _compares: object, _puts: object, deletes: list[str]) -> Committed:
        self.deleted += deletes
        return Committed(9)


async def test_a_sweep_goes_on_whatever_etcd_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 0.001)
    state, key = FleetState(), layout.instance_key(InstanceId("web"))
    removed = layout.render_instance(StoredInstance((), {}, removed_at=1))
    state.apply(3, [Change(key, removed, 3)])
    etcd = _Etcd([Compacted(7), SourceRefused("too large"), EtcdUnavailable("no member")])
    async with background(Sweep(cast("Etcd", etcd), state, HandClock()).run()):
        await until(lambda: etcd.deleted)
    assert not etcd.errors
    assert set(etcd.deleted) == {key}
