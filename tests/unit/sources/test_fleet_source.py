"""What a host makes of its fleet: never older, never less because a store has less, and only what is in force."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest

from imdsproxy.errors import AccessDenied, SourceUnavailable
from imdsproxy.fleet import layout
from imdsproxy.fleet.guests import FleetPolicies
from imdsproxy.fleet.layout import Meta
from imdsproxy.fleet.stream import Ask, Batch, ItemKey
from imdsproxy.host.clock import Clock, Moment
from imdsproxy.model.entities import Instance, InstanceId, StoredBytes
from imdsproxy.model.observation import Expired
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.sources.fleet import source as source_module
from imdsproxy.sources.fleet.client import HubClient
from imdsproxy.sources.fleet.kept import KeptItems
from imdsproxy.sources.fleet.known import merge
from imdsproxy.sources.fleet.source import FleetSource
from support.fleet_backing import fleet_source
from support.fleet_hub import FLEET, HOST, FleetHub, FleetStore
from support.patience import patience
from support.record_builders import instance, key, network
from support.source_runs import DEADLINE_S, Heard, running, until

N1: Final = network("n1")
A: Final = instance("a", "10.0.0.5", text="of a")
B: Final = instance("b", "10.0.0.6")
NEWER: Final = replace(A, hostname="newer")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_AGAIN_S", 0.05)
    monkeypatch.setattr(source_module, "_LOOK_EVERY_S", 0.05)


@pytest.fixture
def hubs() -> Iterator[Callable[..., FleetHub]]:
    """Makes hubs that are ended after the test."""
    with contextlib.ExitStack() as stack:

        def make(store: FleetStore | None = None) -> FleetHub:
            hub = FleetHub(store)
            stack.callback(hub.close)
            return hub

        yield make


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "fleet.sqlite"


async def refusal(hub: FleetHub, revision: int) -> str:
    """Why a revision is not in force, once the host has acknowledged it."""
    await until(lambda: hub.streams.hosts[HOST].acked == revision)
    return hub.wait(revision, 0.0)[HOST]


def names(heard: Heard) -> dict[str, str]:
    return {key: one.hostname for key, one in heard.inventory.instances.items()}


def reasons(heard: Heard) -> str:
    return "\n".join(map(str, heard.last.problems))


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _replace(path: Path, data: bytes) -> bytes:
    before = path.read_bytes()
    path.write_bytes(data)
    return before


async def fill(hub: FleetHub, kept: Path, *instances: Instance) -> None:
    """Have a host know what is in force now."""
    hub.put([N1], instances)
    async with running(fleet_source(kept, hub)) as heard:
        assert heard.last.in_sync


def restored(store: FleetStore, *, incarnation: int = 1, without: str = "") -> FleetStore:
    """A store as it was, under revisions that go on from later ones."""
    older = deepcopy(store)
    older.revision += 1000
    older.entries.pop(without, None)
    if incarnation > 1:
        meta = layout.render_meta(Meta(FLEET, incarnation))
        older.entries[layout.META] = older.revision, meta
    return older


async def test_records_and_user_data_are_served_from_disk_without_a_hub(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    await fill(hubs(), kept, A, B)
    async with running(fleet_source(kept)) as heard:
        assert not heard.last.in_sync
        assert names(heard) == {"a": "a", "b": "b"}
        data = heard.inventory.instances[A.id].user_data
        assert data is not None
        assert bytes(data) == b"of a"
    assert _mode(kept) == 0o600


async def test_user_data_is_fetched_once_and_deleted_when_no_instance_has_it(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    await fill(hub, kept, A, instance("b", "10.0.0.6", text="of a"))
    assert len(hub.blob_requests) == 1
    source = fleet_source(kept, hub)
    async with running(source):
        hub.put([], [replace(A, user_data=b"other"), B])
        await until(lambda: [*source.kept._stored] == [sha256(b"other").hexdigest()])
        assert len(hub.blob_requests) == 2
    with contextlib.closing(sqlite3.connect(kept)) as connection:
        assert connection.execute("SELECT data FROM user_data").fetchall() == [(b"other",)]


async def test_another_hub_is_followed_when_one_goes_and_nothing_is_out_of_sync(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    first = hubs()
    first.put([N1], [A])
    second = hubs(first.store)
    source = fleet_source(kept, first, second)
    async with running(source) as heard:
        used, left = (first, second) if source.hub == first.url else (second, first)
        used.away()
        await until(lambda: source.hub == left.url)
        left.put([], [NEWER])
        await heard.until(lambda each: names(each) == {"a": "newer"})
        assert all(one.in_sync for one in heard.observations)


async def test_a_hub_that_is_silent_is_left(hubs: Callable[..., FleetHub], kept: Path) -> None:
    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        await reader.read()
        writer.close()

    hub = hubs()
    hub.put([N1], [A])
    silent = await asyncio.start_server(be_silent, "127.0.0.1")
    port = silent.sockets[0].getsockname()[1]
    source = fleet_source(kept, hub)
    urls = iter([(f"http://127.0.0.1:{port}",)])
    source.hubs = lambda: next(urls, (hub.url,))
    source.silent_s = 0.2
    async with silent, running(source) as heard:
        await heard.until(lambda each: each.last.in_sync)
        assert "sent nothing" in str(heard.observations[0].problems[0])


async def test_a_host_that_hears_nothing_of_its_hub_is_not_in_sync(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    hub.put([N1], [A])
    source = fleet_source(kept, hub)
    source.silent_s = 0.2
    async with running(source) as heard:
        await heard.until(lambda each: not each.last.in_sync and names(each) == {"a": "a"})
        assert "sent nothing" in reasons(heard)


async def test_a_hub_that_hangs_costs_two_seconds_and_twice_as_long_where_no_other_is_there(
    hubs: Callable[..., FleetHub], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, float]] = []

    def hang(_: HubClient, url: str, within_s: float) -> NoReturn:
        tried.append((url, within_s))
        raise SourceUnavailable("it hangs")

    monkeypatch.setattr(HubClient, "stream", hang)
    first, second = hubs(), hubs()
    async with running(fleet_source(kept, first, second)):
        await until(lambda: len(tried) >= 10)
    assert [within_s for _, within_s in tried[:10]] == [2, 2, 4, 4, 8, 8, 10, 10, 10, 10]
    assert {url for url, _ in tried[:2]} == {first.url, second.url}


class _Machine(Clock):
    """A host's clocks, which a test moves.

    Attributes:
        passed_s: How much later it is.
        wall_s: By how much more the wall clock is ahead.
        boots: How often the host was rebooted.
    """

    def __init__(self) -> None:
        self.passed_s, self.wall_s, self.boots = 0.0, 0.0, 0

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.passed_s + self.wall_s)

    def moment(self) -> Moment:
        found = super().moment()
        up_s = found.up_s + self.passed_s if self.boots == 0 else 10.0
        return replace(found, boot=str(self.boots), up_s=up_s)


async def test_instances_are_withheld_once_no_hub_has_vouched_for_them_for_too_long(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub, machine = hubs(), _Machine()
    hub.put([N1], [A, B])
    source = fleet_source(kept, hub)
    source.clock, source.serve_s = machine, 60.0
    async with running(source) as heard:
        await heard.until(lambda each: each.last.in_sync)
        hub.away()
        await heard.until(lambda each: each.last.problems)
        machine.passed_s += 50
        assert 0 < (source.serves_for_s or 0) < 15
        assert not any(one.expired for one in heard.observations)
        # Whatever is done to the wall clock.
        machine.wall_s = -3600
        machine.passed_s += 20
        await heard.until(lambda each: each.last.expired)
        assert isinstance(heard.inventory.owner(key("n1", "10.0.0.5")), Expired)
        assert "60 s" in reasons(heard)
        # Not before what was removed meanwhile has gone.
        hub.remove_instance("b")
        begun = len(heard.observations)
        hub.back()
        await heard.until(lambda each: not each.last.expired)
        before = list(itertools.takewhile(lambda one: one.expired, heard.observations[begun:]))
        assert any(B.id in one.instances_removed for one in before)
        assert names(heard) == {"a": "a"}
        assert heard.inventory.owner(key("n1", "10.0.0.5")) == "a"


@pytest.mark.parametrize(
    "later",
    [
        (30, 0, 0, False),
        (90, 0, 0, True),
        (30, 7200, 0, False),
        (90, -7200, 0, True),
        (30, 0, 1, False),
        (90, 0, 1, True),
        (30, 7200, 1, True),
        # A clock that was set back before a reboot proves nothing.
        (30, -7200, 1, True),
    ],
)
async def test_how_long_no_hub_has_vouched_is_known_after_a_restart_and_a_reboot(
    hubs: Callable[..., FleetHub], kept: Path, later: tuple[float, float, int, bool]
) -> None:
    passed_s, wall_s, boots, expired = later
    await fill(hubs(), kept, A)
    source, machine = fleet_source(kept), _Machine()
    with contextlib.closing(KeptItems(kept)) as items:
        items.open()
        assert items.vouched is not None
        items.note(replace(items.vouched, boot="0"))
    machine.passed_s, machine.wall_s, machine.boots = passed_s, wall_s, boots
    source.clock, source.serve_s = machine, 60.0
    async with running(source) as heard:
        # From the first report on.
        assert heard.observations[0].expired == expired
        assert names(heard) == {"a": "a"}


async def test_a_hub_that_has_lost_etcd_vouches_for_nothing(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    hub.put([N1], [A])
    hub.age_s = 90.0
    source = fleet_source(kept, hub)
    source.serve_s = 60.0
    async with running(source) as heard:
        await heard.until(lambda each: each.last.expired and not each.last.in_sync)
        hub.age_s = 0.0
        hub.ping()
        await heard.until(lambda each: each.last.in_sync and not each.last.expired)


async def test_a_hub_that_is_behind_is_not_followed(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    hub.put([N1], [A])
    behind = hubs(deepcopy(hub.store))
    await fill(hub, kept, NEWER)
    async with running(fleet_source(kept, behind)) as heard:
        await heard.until(lambda each: "revision" in reasons(each))
        assert names(heard) == {"a": "newer"}
        assert not heard.last.in_sync


@pytest.mark.parametrize("lost", ["older", "absent"])
async def test_what_a_restored_store_lacks_is_held_until_the_restore_is_accepted(
    hubs: Callable[..., FleetHub], kept: Path, lost: str
) -> None:
    hub = hubs()
    hub.put([N1], [A, B])
    backup = deepcopy(hub.store)
    await fill(hub, kept, NEWER)
    without = layout.instance_key(A.id) if lost == "absent" else ""
    backup = restored(backup, without=without)
    async with running(fleet_source(kept, hubs(backup))) as heard:
        await heard.until(lambda each: each.last.in_sync)
        assert names(heard) == {"a": "newer", "b": "b"}
        assert "held" in reasons(heard)
        assert "accept-restore" in reasons(heard)
    accepted = restored(backup, incarnation=2)
    async with running(fleet_source(kept, hubs(accepted))) as heard:
        await heard.until(lambda each: each.last.in_sync)
        assert names(heard) == ({"b": "b"} if lost == "absent" else {"a": "a", "b": "b"})
        assert not heard.last.problems


async def test_what_a_hub_cannot_read_is_kept_also_when_a_restore_is_accepted_until_it_is_mended(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub, key = hubs(), layout.instance_key(A.id)
    hub.put([N1], [A, B])
    backup = restored(hub.store, incarnation=2)
    for _ in range(2000):
        hub.store.write({})
    await fill(hub, kept, NEWER)
    assert hub.store.revision > backup.revision + 500
    damaged = deepcopy(hub.store)
    for store in (damaged, backup):
        store.write({key: b"garbage"})
        async with running(fleet_source(kept, hubs(store))) as heard:
            await heard.until(lambda each: each.last.in_sync and each.last.problems)
            assert names(heard) == {"a": "newer", "b": "b"}
            assert "unreadable" in reasons(heard)
            assert "write the whole record again" in reasons(heard)
            assert "accept-restore" not in reasons(heard)
    # Whatever revision it has been of: there is a good one of this incarnation.
    mended = hubs(backup)
    mended.put(instances=[replace(A, hostname="mended")])
    async with running(fleet_source(kept, mended)) as heard:
        await heard.until(lambda each: each.last.in_sync and not each.last.problems)
        assert names(heard) == {"a": "mended", "b": "b"}


async def test_what_was_held_is_not_any_more_once_a_hub_has_it(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    hub.put([N1], [A])
    backup = deepcopy(hub.store)
    await fill(hub, kept, NEWER)
    doubtful, mended = hubs(restored(backup)), hubs(restored(hub.store))
    source = fleet_source(kept, doubtful)
    async with running(source) as heard:
        await heard.until(lambda each: "held" in reasons(each))
        source.hubs = lambda: (mended.url,)
        doubtful.away()
        await heard.until(lambda each: each.last.in_sync and not each.last.problems)
        assert names(heard) == {"a": "newer"}


async def test_a_host_answers_pings(hubs: Callable[..., FleetHub], kept: Path) -> None:
    hub = hubs()
    revision = hub.put([N1], [A])
    async with running(fleet_source(kept, hub)):
        assert await asyncio.to_thread(hub.wait, revision) == {}
        stream = hub.streams.hosts[HOST]
        hub.ping()
        await until(lambda: stream._unanswered_at is None)


async def test_a_refused_record_leaves_the_last_good_one_in_force_and_is_acknowledged_as_failed(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    hub.put([N1], [A, B])
    async with running(fleet_source(kept, hub)) as heard:
        key = layout.instance_key(A.id)
        value = {"hosts": [HOST], "record": {"id": "a", "name": 7}, "user_data": None}
        revision = hub.write(
            {key: json.dumps(value).encode(), **_put(hub, replace(B, hostname="x"))}
        )
        await heard.until(lambda each: names(each) == {"a": "a", "b": "x"})
        why = await refusal(hub, revision)
        assert f"instance/a at revision {revision}" in reasons(heard)
        assert why.startswith("instance/a: ")
        revision = hub.put([], [NEWER])
        assert await asyncio.to_thread(hub.wait, revision) == {}
        assert names(heard) == {"a": "newer", "b": "x"}
        assert not heard.last.problems


def _put(hub: FleetHub, one: Instance) -> dict[str, bytes]:
    return dict([hub.store.instance(one)])


async def test_a_field_of_a_newer_version_refuses_its_record_alone(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    hub.put([N1], [A])
    async with running(fleet_source(kept, hub)) as heard:
        record = {"id": "b", "name": "b", "quantum": True}
        value = {"hosts": [HOST], "record": record, "user_data": None}
        hub.write({layout.instance_key(B.id): json.dumps(value).encode()})
        await heard.until(lambda each: "quantum" in reasons(each))
        assert names(heard) == {"a": "a"}


async def test_user_data_that_the_hub_does_not_have_refuses_its_record_alone(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    values = _put(hub, A)
    hub.store.blobs.clear()
    hub.put([N1], [B])
    hub.write(values)
    async with running(fleet_source(kept, hub)) as heard:
        assert names(heard) == {"b": "b"}
        assert "not-found" in reasons(heard)
        hub.put([], [A])
        await heard.until(lambda each: names(each) == {"a": "a", "b": "b"})
        assert not heard.last.problems


async def test_user_data_that_comes_late_delays_neither_a_revocation_nor_another_instance(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub, taken = hubs(), list[FleetPolicies]()
    hub.put([N1], [replace(A, user_data=None)])
    source = fleet_source(kept, hub)
    source.take_policies, source.fetch_s = taken.append, 0.5
    async with running(source) as heard:
        hub.gives_blobs.clear()
        revoked = {layout.OVERRIDES + "a": b'{"epoch": 1, "reopened_at": 0}'}
        late = instance("c", "10.0.0.7", text="late")
        revision = hub.write({**revoked, **_put(hub, B), **_put(hub, late)})
        await heard.until(lambda each: names(each).keys() == {"a", "b"})
        assert taken[-1].overrides == {"a": OperatorOverride(1, 0)}
        assert "instance/c: its user data has not arrived yet" in await refusal(hub, revision)
        # An address that is not known may be the one that is late.
        await heard.until(lambda each: not each.last.in_sync)
        hub.gives_blobs.set()
        assert await asyncio.to_thread(hub.wait, revision) == {}
        await heard.until(lambda each: each.last.in_sync and not each.last.problems)
        assert names(heard).keys() == {"a", "b", "c"}


async def test_user_data_that_is_deleted_while_it_is_looked_for_is_asked_for_again(
    hubs: Callable[..., FleetHub], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hubs()
    hub.put([N1], [A])
    source = fleet_source(kept, hub)
    sweep, swept = KeptItems.sweep, threading.Event()

    def sweep_while_it_comes_back(self: KeptItems, needed: Collection[str] = ()) -> None:
        if not swept.is_set():
            hub.put([], [instance("b", "10.0.0.6", text="of a")])
            deadline = time.monotonic() + DEADLINE_S * patience()
            while not (source._pending or source._applying):
                assert time.monotonic() < deadline
                threading.Event().wait(0.01)
        sweep(self, needed)
        swept.set()

    async with running(source) as heard:
        await until(lambda: not source._sweepable)
        monkeypatch.setattr(KeptItems, "sweep", sweep_while_it_comes_back)
        hub.put([], [replace(A, user_data=None)])
        await until(swept.is_set)
        await heard.until(lambda each: names(each).keys() == {"a", "b"})
        data = heard.inventory.instances[B.id].user_data
        assert data is not None
        assert bytes(data) == b"of a"


async def test_the_failure_of_an_item_ends_with_the_item_also_while_no_hub_is_followed(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    value = {"hosts": [HOST], "record": {"id": "a", "name": 7}, "user_data": None}
    lost = _put(hub, instance("c", "10.0.0.7", text="lost"))
    hub.store.blobs.clear()
    hub.put([N1], [B])
    hub.write({**lost, layout.instance_key(A.id): json.dumps(value).encode()})
    async with running(fleet_source(kept, hub)) as heard:
        assert {one.record for one in heard.last.problems} == {"a", "c"}
        hub.away()
        hub.remove_instance("a")
        revision = hub.remove_instance("c")
        hub.back()
        await heard.until(lambda each: each.last.in_sync and not each.last.problems)
        assert await asyncio.to_thread(hub.wait, revision) == {}
        assert names(heard) == {"b": "b"}


@pytest.mark.parametrize("moment", ["before", "amid"])
async def test_a_hub_is_told_of_no_half_of_a_change(
    hubs: Callable[..., FleetHub], kept: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    hub = hubs()
    hub.put([N1], [A])
    source = fleet_source(kept, hub)
    keep, look = KeptItems.keep_user_data, source.known.user_data
    blocked, go_on = threading.Event(), threading.Event()

    def keep_late(self: KeptItems, data: bytes) -> None:
        if moment == "before":
            blocked.set()
            go_on.wait()
        keep(self, data)

    def look_late(owner: InstanceId, sha256: str) -> StoredBytes | None:
        if moment == "amid" and threading.current_thread() is not threading.main_thread():
            blocked.set()
            go_on.wait()
        return look(owner, sha256)

    async with running(source) as heard:
        monkeypatch.setattr(KeptItems, "keep_user_data", keep_late)
        source.known.user_data = look_late
        hub.put([], [instance("b", "10.0.0.6", text="of b")])
        try:
            await until(blocked.is_set)
            hub.away()
            await until(lambda: not hub.connected())
            # As it went while no hub was followed, it is removed only if the host says that it has it.
            hub.remove_instance("b")
            hub.back()
            await until(lambda: hub.connected() or source._publishing.locked())
        finally:
            go_on.set()
        await until(lambda: hub.connected() and source._complete)
        assert names(heard) == {"a": "a"}
        assert source.known.items.keys() == {"network/n1", "instance/a"}


async def test_a_revision_is_acknowledged_with_reasons_until_it_is_in_force(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub, blocked, confirmed = hubs(), True, dict[str, set[ItemKey]]()

    async def confirm(
        items: Collection[ItemKey], gone: Collection[ItemKey]
    ) -> Mapping[ItemKey, str]:
        confirmed.update({"here": {*items}, "gone": {*gone}})
        return dict.fromkeys(items, "no room") if blocked else {}

    source = fleet_source(kept, hub)
    source.confirm = confirm
    revision = hub.put([N1], [A, B])
    async with running(source):
        why = await refusal(hub, revision)
        assert "instance/a: no room" in why
        revision = hub.remove_instance("a")
        # What is gone fails no more, and the rest goes on failing.
        await until(lambda: "instance/a" in confirmed.get("gone", ()))
        await until(lambda: "instance/a" not in source.failing)
        why = await refusal(hub, revision)
        assert "instance/b: no room" in why
        assert "instance/a" not in why
        blocked = False
        assert await asyncio.to_thread(hub.wait, revision) == {}


async def test_what_the_disk_does_not_take_is_neither_in_force_nor_acknowledged_as_such(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    source = fleet_source(kept, hub)
    hub.put([N1], [A])
    async with running(source) as heard:
        await _limit_pages(source, 1)
        revision = hub.put([], [replace(NEWER, user_data=bytes(300_000))])
        await heard.until(lambda each: "full" in reasons(each))
        assert names(heard) == {"a": "a"}
        why = await refusal(hub, revision)
        assert "instance/a" in why
        assert "full" in why
        await _limit_pages(source, 1_000_000)
        assert await asyncio.to_thread(hub.wait, revision) == {}
        assert names(heard) == {"a": "newer"}
        assert not heard.last.problems


async def _limit_pages(source: FleetSource, most: int) -> None:
    """Have SQLite refuse to let the file grow, as on a full disk."""
    connection = source.kept._connection
    assert connection is not None
    await source._in_thread(
        lambda: connection.execute(f"PRAGMA max_page_count = {most}").fetchall()
    )


async def test_overrides_never_go_back_whatever_a_store_says(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub, taken = hubs(), list[FleetPolicies]()
    key, keys = (
        layout.OVERRIDES + "a",
        {"current": "k", "keys": {"k": base64.b64encode(bytes(32)).decode()}},
    )
    hub.write({key: b'{"epoch": 2, "reopened_at": 7}', **_put(hub, A)})
    hub.state.keys_of = lambda *_: (1, keys)
    source = fleet_source(kept, hub)
    source.take_policies = taken.append
    hub.write({layout.POLICIES + "fleet": b'{"tokens": "required"}'})
    async with running(source):
        (policies,) = taken
        assert policies.overrides == {"a": OperatorOverride(2, 7)}
        assert policies.rules.everywhere.tokens == "required"
        assert [one.secret for one in policies.keys[A.id]] == [bytes(32)]
        assert "AAAA" not in repr(policies)
    store = restored(hub.store, incarnation=2)
    store.entries[key] = 1, b'{"epoch": 1, "reopened_at": 9}'
    source = fleet_source(kept, hubs(store))
    source.take_policies = taken.append
    async with running(source) as heard:
        await heard.until(lambda each: each.last.in_sync)
    assert taken[-1].overrides == {"a": OperatorOverride(2, 9)}


async def test_a_hub_that_does_not_hear_from_etcd_and_one_of_another_time_are_reported(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    hub.put([N1], [A])
    async with running(fleet_source(kept, hub)) as heard:
        hub.age_s, hub.skew_s = 60.0, 5.0
        hub.ping()
        await heard.until(lambda each: not each.last.in_sync and "5 s" in reasons(each))
        hub.age_s, hub.skew_s = 0.0, 0.0
        hub.ping()
        await heard.until(lambda each: each.last.in_sync and not each.last.problems)


async def test_a_host_that_is_not_admitted_serves_on_and_says_so(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    await fill(hub, kept, A)
    hub.refuses = True
    async with running(fleet_source(kept, hub)) as heard:
        await heard.until(lambda each: "does not admit this host" in reasons(each))
        assert names(heard) == {"a": "a"}
        hub.refuses = False
        await heard.until(lambda each: each.last.in_sync)


async def test_a_damaged_copy_is_reported_and_used_once_it_is_mended(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    hub = hubs()
    await fill(hub, kept, A)
    whole = _replace(kept, b"no database at all, but long enough to be looked at" * 20)
    async with running(fleet_source(kept, hub)) as heard:
        assert not heard.last.in_sync
        assert "damaged" in reasons(heard)
        assert "the hub sends everything again" in reasons(heard)
        assert "instance add" not in reasons(heard)
        _replace(kept, whole)
        await heard.until(lambda each: each.last.in_sync)
        assert names(heard) == {"a": "a"}


async def test_hubs_are_answered_what_the_admin_api_says(
    hubs: Callable[..., FleetHub], kept: Path
) -> None:
    async def answer(ask: Ask) -> tuple[int, Any]:
        return 200, {"asked": f"{ask.method} {ask.path}"}

    hub = hubs()
    source = fleet_source(kept, hub)
    source.answer = answer
    async with running(source):
        assert await asyncio.to_thread(hub.ask, "/v1/x") == (200, {"asked": "GET /v1/x"})


def test_two_sets_that_are_merged_are_the_later_one_where_they_differ() -> None:
    first = Batch(5, put={"a": (5, {}), "b": (5, {})}, remove=("c", "d"), held={"e": "", "f": ""})
    first = replace(first, unreadable={"c": "", "d": ""})
    then = Batch(6, put={"c": (6, {}), "e": (6, {})}, remove=("b",), held={"g": ""})
    assert merge(first, then) == Batch(
        6,
        put={"a": (5, {}), "c": (6, {}), "e": (6, {})},
        remove=("d", "b"),
        held={"f": "", "g": ""},
        unreadable={"d": ""},
    )


async def test_that_the_certificate_is_not_renewed_is_reported_until_it_is(
    hubs: Callable[..., FleetHub], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_RENEW_EVERY_S", 0.02)
    failing = [AccessDenied("this certificate is revoked")]

    async def renew() -> None:
        for error in failing:
            raise error

    source = fleet_source(kept, hubs())
    source.renew = renew
    async with running(source) as heard:
        await until(lambda: "certificate: fleet: this certificate is revoked" in reasons(heard))
        failing.clear()
        await until(lambda: "certificate" not in reasons(heard))


async def test_a_host_whose_items_differ_without_a_reason_is_found_and_healed(
    hubs: Callable[..., FleetHub], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_COMPARE_EVERY_S", 0.0)
    hub = hubs()
    hub.put([N1], [A, B])
    source = fleet_source(kept, hub)
    async with running(source) as heard:
        await heard.until(lambda one: names(one).keys() == {"a", "b"})
        right = dict(source.known.items)

        async def compared(count: int) -> None:
            """Pings, and so digests, until the host has what it is to have and has shown it."""
            async with asyncio.timeout(DEADLINE_S * patience()):
                while hub.streams.differed != count or hub.streams.differing():
                    hub.ping()
                    await asyncio.sleep(0.01)

        hub.ping()
        await compared(0)
        del source.known.items["instance/a"]
        await compared(1)
        assert source.known.items == right
        source.known.items["instance/b"] -= 1
        await compared(2)
        assert source.known.items == right
        assert names(heard).keys() == {"a", "b"}
