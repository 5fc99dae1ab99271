"""A hub that reads all of etcd: in slices, seen as a whole, and what differs from what its watch has shown."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, Meta, StoredInstance
from imdsproxy.host.clock import Clock
from imdsproxy.hub import replica as module
from imdsproxy.hub.hosts.streams import HostStream, Streams
from imdsproxy.hub.replica import Replica
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Changes, Compacted, KeyValue, Snapshot
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import OperatorOverride
from support.restores import restores_of
from support.tasks import background, until


class _Etcd:
    """What the hub reads, and what its watch says; `on_read` is called while a read is under way."""

    def __init__(self, *kvs: KeyValue) -> None:
        self.kvs = list(kvs)
        self.changes: asyncio.Queue[Changes] = asyncio.Queue()
        self.on_read: Callable[[], object] = lambda: None
        self.reads = self.compacted = 0
        self.older: list[KeyValue] = []

    @property
    def revision(self) -> int:
        return max(one.mod_revision for one in self.kvs)

    async def read(self, *_range: str, revision: int = 0) -> Snapshot:
        if revision:
            if revision < self.compacted:
                raise Compacted
            history = [one for one in self.older if one.key == _range[0]]
            found = [one for one in history if one.mod_revision <= revision]
            return Snapshot(self.revision, found[-1:])
        self.reads += 1
        snapshot = Snapshot(self.revision, list(self.kvs))
        self.on_read()
        # What was written meanwhile is there by the watch.
        for _ in range(9):
            await asyncio.sleep(0)
        return snapshot

    async def follow(self, *_: object) -> AsyncIterator[Changes]:
        while True:
            yield await self.changes.get()

    def write(self, *kvs: KeyValue, reports: bool = True) -> None:
        keys = {one.key for one in kvs}
        self.kvs = [one for one in self.kvs if one.key not in keys] + [*kvs]
        if reports:
            self.changes.put_nowait(Changes(self.revision, kvs))

    def replica(self) -> Replica:
        state, clock = FleetState(), Clock()
        streams = Streams(state, clock, lambda *_: True)
        return Replica(
            cast("Etcd", self),
            state,
            streams,
            "hub-1",
            "https://hub",
            clock,
            Random(1),  # noqa: S311
            restores_of(cast("Etcd", self), state, clock),
        )


def _meta(revision: int, incarnation: int = 1) -> KeyValue:
    value = layout.render_meta(Meta("a-fleet", incarnation))
    return KeyValue(layout.META, value, revision, 1)


def _instance(number: int, revision: int, host: str = "a") -> KeyValue:
    name = InstanceId(f"i{number}")
    record = {"id": name, "name": f"at-{revision}", "ports": []}
    value = layout.render_instance(StoredInstance((HostId(host),), record))
    return KeyValue(layout.instance_key(name), value, revision, revision)


def _revisions(state: FleetState) -> set[int]:
    found = (state.value(key) for key in state.keys(layout.INSTANCES))
    return {one[1] for one in found if one is not None}


@pytest.mark.parametrize("incarnation", [1, 2])
async def test_a_hub_that_reads_all_again_goes_on_with_other_work_and_shows_all_of_it_at_once(
    monkeypatch: pytest.MonkeyPatch, incarnation: int
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 10)
    etcd = _Etcd(_meta(1), *(_instance(one, 2) for one in range(100)))
    replica, folded, seen = etcd.replica(), list[int](), list[set[int]]()
    apply = FleetState.apply

    def counted(self: FleetState, revision: int, changes: Sequence[Change]) -> Any:
        folded.append(len(changes))
        return apply(self, revision, changes)

    async def look() -> None:
        while True:
            seen.append(_revisions(replica.state))
            await asyncio.sleep(0)

    monkeypatch.setattr(FleetState, "apply", counted)
    await replica._read()
    etcd.write(_meta(1 if incarnation == 1 else 3, incarnation), reports=False)
    etcd.write(*(_instance(one, 3) for one in range(100)), reports=False)
    async with background(look()):
        await replica._read()
    assert _revisions(replica.state) == {3}
    assert replica.state.meta.incarnation == incarnation
    assert max(folded) <= 10
    assert seen.count({2}) >= 10
    assert all(one in ({2}, {3}) for one in seen)


async def test_no_acknowledgement_from_before_an_accepted_restore_counts_for_what_came_after() -> (
    None
):
    etcd = _Etcd(_meta(1), _instance(1, 100, host="b"))
    replica = etcd.replica()
    await replica._read()
    host = HostStream(replica.streams)
    host.host, host.greeted = HostId("b"), True
    host.acked = host._sent = 100
    replica.streams.hosts[host.host] = host
    # As after a restore with newer revisions: the instance is on `a` then.
    etcd.write(_meta(1_000_001, 2), _instance(1, 1_000_002), reports=False)
    waiting = asyncio.create_task(replica.streams.wait([host.host], 1_000_002, 0.2))
    await asyncio.sleep(0)
    await replica._read()
    assert await waiting == {"b": "not connected"}


async def test_an_override_that_a_host_reports_while_an_acceptance_is_read_stays_and_the_journal_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1)
    etcd = _Etcd(_meta(1), *(_instance(one, 900 + one) for one in range(9)))
    replica = etcd.replica()
    await replica._read()
    # As a backup of before, which an operator has accepted.
    etcd.kvs = [_meta(20, 2), *(_instance(one, 10 + one) for one in range(9))]
    reading = asyncio.create_task(replica._read())
    while replica._incarnation != 2:
        await asyncio.sleep(0)
    assert replica.state.meta.incarnation == 1
    override = OperatorOverride(7, 0)
    replica.restores.raise_overrides(HostId("a"), {InstanceId("i1"): override})
    await reading
    found = replica.state.value(layout.override_key(InstanceId("i1")))
    assert found is not None
    assert layout.parse_override(found[0]) == override
    assert replica.restores.journal.position.revision == 20


async def test_what_changes_while_a_hub_compares_is_not_taken_for_a_restored_backup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "COMPARE_S", 0.001)
    etcd = _Etcd(_meta(1), _instance(1, 2))
    replica = etcd.replica()

    def change() -> None:
        number = etcd.revision + 1
        etcd.write(_instance(1, number), _instance(number, number))

    async with background(replica.run()):
        await until(replica.complete.is_set)
        etcd.on_read = change
        async with background(replica.compare()):
            await until(lambda: etcd.reads > 10)
        await until(lambda: replica.state.revision == etcd.revision)
    assert not replica.restores._evidence
    assert not replica.state.lost


async def test_what_a_watch_has_not_shown_is_found_by_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "COMPARE_S", 0.001)
    etcd = _Etcd(_meta(1), _instance(1, 2), _instance(2, 3), _instance(3, 4))
    replica = etcd.replica()
    async with background(replica.run()), background(replica.compare()):
        await until(replica.complete.is_set)
        etcd.kvs = [one for one in etcd.kvs if not one.key.endswith("i1")]
        etcd.write(_instance(2, 5), reports=False)
        await until(lambda: replica._doubtful)
        etcd.write(KeyValue(layout.BEAT, b'{"count":1}', 6, 6))
        await until(lambda: replica.state.lost)
        assert "i1" in replica.restores._evidence[None][0].why
        assert _revisions(replica.state) == {2, 4, 5}


async def test_an_accepted_backup_is_seen_with_its_incarnation_and_not_before() -> None:
    etcd = _Etcd(_meta(1), _instance(1, 2), _instance(2, 3))
    replica, seen = etcd.replica(), list[tuple[int, int]]()

    def look() -> None:
        seen.append(
            (replica.state.meta.incarnation, sum(1 for _ in replica.state.keys(layout.INSTANCES)))
        )

    async with background(replica.run()):
        await until(replica.complete.is_set)
        etcd.on_read = look
        etcd.kvs = [one for one in etcd.kvs if not one.key.endswith("i1")]
        etcd.write(_meta(9, 2))
        await until(lambda: replica.state.meta.incarnation == 2)
        look()
    assert seen == [(1, 2), (2, 1)]


@pytest.mark.parametrize("compacted", [False, True])
async def test_a_hub_that_starts_afresh_finds_the_last_good_values_in_etcds_history(
    *, compacted: bool
) -> None:
    good = [_meta(3), _instance(1, 4)]
    garbage = [KeyValue(one.key, b"garbage", number, 1) for number, one in enumerate(good, 8)]
    etcd = _Etcd(*garbage, _instance(2, 6))
    # Written over twice.
    etcd.older = [*good, *(replace(one, mod_revision=5) for one in garbage)]
    etcd.compacted = 20 if compacted else 0
    replica = etcd.replica()
    await replica._read()
    assert replica.state.unreadable.keys() == {one.key for one in good}
    kept = None if compacted else (good[1].value, 4)
    assert replica.state.value(good[1].key) == kept
    assert replica.state.meta.fleet == ("" if compacted else "a-fleet")
    assert not replica.restores._evidence
    # Nothing is lost where it is mended.
    mended = _instance(1, 10)
    replica.state.apply(10, [Change(mended.key, mended.value, 10)])
    assert replica.state.value(mended.key) == (mended.value, 10)
    assert not replica.state.lost
