"""Records reach the disk, then every worker; whatever breaks half-way, no guest gets another's."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.errors import HostRefused, RuntimeUnavailable
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.haproxy.rules.maps import (
    MapChanges,
    MapState,
    parse_base_map,
    parse_map,
    render_map,
    split_payload,
)
from support.fake_haproxy import FakeHaproxy
from support.full_disk import full_disk

_KEYS = [f"n/{number}" for number in range(8)]
_VALUES = ["a|1", "a|2", "b|1", "!"]
_SOME_KEY, _SOME_VALUE = st.sampled_from(_KEYS), st.sampled_from(_VALUES)
_ENTRIES = st.dictionaries(_SOME_KEY, _SOME_VALUE)
_WANTED = st.dictionaries(_SOME_KEY, st.none() | _SOME_VALUE, min_size=1)


class Rig:
    """An applier, a fake HAProxy and the files between them."""

    def __init__(self, directory: Path, *, compact_above: int = 1024) -> None:
        self.layout = Layout(directory, directory)
        self.base, self.overlay = self.layout.base_map, self.layout.overlay_map
        self.applier = RecordApplier(self.layout, compact_above=compact_above)
        self.haproxy = FakeHaproxy(self.layout.master_socket, (self.base, self.overlay))

    async def start(self, records: dict[str, str]) -> None:
        self.applier.write_all(records)
        await self.haproxy.start()
        self.applier.trust(await self.applier.master.read_processes())

    def answers(self, key: str) -> set[str | None]:
        """What the workers would answer with, draining ones included."""
        return {worker.lookup(self.overlay, self.base, key) for worker in self.haproxy.all()}

    def on_disk(self, key: str) -> str | None:
        """What a worker that starts now would answer with."""
        return self.haproxy.fork().lookup(self.overlay, self.base, key)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path)
    yield found
    await found.haproxy.close()


async def test_when_an_instance_moves_no_two_addresses_lead_to_it_at_any_moment(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.start({"n/1": "a|1", "n/9": "b|1"})
    await rig.applier.apply({"n/3": "a|1"})
    await rig.applier.master.send_reload()
    rig.applier.trust(await rig.applier.master.read_processes())
    seen: list[list[str]] = []
    answer = FakeHaproxy._answer

    def look(haproxy: FakeHaproxy, text: str) -> str | None:
        found = answer(haproxy, text)
        seen.append([key for key in _KEYS if "a|1" in rig.answers(key)])
        return found

    monkeypatch.setattr(FakeHaproxy, "_answer", look)
    # Of these the base has one, the overlay the other.
    await rig.applier.apply({"n/1": None, "n/3": None, "n/0": "a|1"})
    gone = seen.index([])
    assert all("n/0" not in keys for keys in seen[:gone])
    assert seen[-1] == ["n/0"]


async def test_a_worker_with_an_older_base_gets_the_whole_base(rig: Rig) -> None:
    await rig.start({"n/1": "a|1"})
    stale = rig.haproxy.fork()
    rig.applier.write_all({"n/2": "b|1"})
    rig.haproxy.workers = [stale]
    await rig.applier.adopt()
    assert rig.answers("n/1") == {None}
    assert rig.answers("n/2") == {"b|1"}


async def test_a_full_disk_changes_nothing_anywhere(rig: Rig) -> None:
    await rig.start({"n/1": "a|1"})
    with full_disk(), pytest.raises(HostRefused):
        await rig.applier.apply({"n/1": None, "n/2": "b|1"})
    assert rig.answers("n/1") == {"a|1"}
    assert rig.answers("n/2") == {None}
    await rig.applier.apply({"n/1": None, "n/2": "b|1"})
    assert rig.answers("n/1") == {None}
    assert rig.answers("n/2") == {"b|1"}


async def test_files_of_an_earlier_controller_are_taken_over(rig: Rig) -> None:
    await rig.start({"n/1": "a|1"})
    await rig.applier.apply({"n/2": "b|1", "n/1": None})
    successor = RecordApplier(rig.layout)
    assert successor.load()
    assert successor.state.effective() == {"n/2": "b|1"}
    assert successor.state.lookup("n/1") is None


async def test_an_overlay_of_an_earlier_base_is_in_that_base_already(rig: Rig) -> None:
    assert not rig.applier.load()
    rig.overlay.write_text("")
    rig.base.write_text("n/1 a|1\n")
    assert not rig.applier.load()
    rig.base.write_text(render_map({"n/1": "b|1"}, "8"))
    rig.overlay.write_text(render_map({"n/1": "b|1", "n/2": "-"}, "7"))
    assert rig.applier.load()
    assert rig.applier.state.effective() == {"n/1": "b|1"}


@settings(max_examples=60, deadline=None)
@given(
    _ENTRIES,
    st.lists(st.tuples(_WANTED, st.sampled_from(["", "reload", "stranger", "silent"])), max_size=6),
    st.integers(0, 4),
)
def test_after_any_history_all_workers_and_the_disk_say_what_was_wanted_last(
    first: dict[str, str], steps: list[tuple[dict[str, str | None], str]], compact_above: int
) -> None:
    async def work(directory: Path) -> None:
        rig = Rig(directory, compact_above=compact_above)
        await rig.start(first)
        expected: dict[str, str | None] = dict(first)
        for number, (wanted, event) in enumerate(steps):
            if event == "reload":
                await rig.applier.master.send_reload()
                rig.applier.trust(await rig.applier.master.read_processes())
            elif event == "stranger":
                rig.haproxy.workers = [rig.haproxy.fork()]
            elif event == "silent":
                rig.haproxy.stop_answering_after = number
            expected.update(wanted)
            try:
                await rig.applier.apply(wanted)
            except RuntimeUnavailable:
                assert event == "silent"
            if event == "silent":
                rig.haproxy.stop_answering_after = None
                await rig.applier.apply(wanted)
            for key in _KEYS:
                assert rig.answers(key) == {expected.get(key)}, (key, event)
                assert rig.on_disk(key) == expected.get(key)
        await rig.haproxy.close()

    with tempfile.TemporaryDirectory() as name:
        asyncio.run(work(Path(name)))


# Tables


class TableRig(Rig):
    """The same with a table."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = self.layout.token_keys_map
        self.path.touch()
        self.haproxy.maps = (*self.haproxy.maps, self.path)

    async def put(self, entries: dict[str, str]) -> list[str]:
        """Have exactly these entries; the commands that it took, without `show proc`."""
        before = len(self.haproxy.commands)
        await self.applier.apply_table(self.path, entries, secret=True, single=True)
        return [command for _, command in self.haproxy.commands[before:]]

    def has(self, entries: dict[str, str]) -> bool:
        """Every worker has them, and one that starts now."""
        workers = [*self.haproxy.all(), self.haproxy.fork()]
        return all(sorted(one.maps[str(self.path)]) == sorted(entries.items()) for one in workers)


async def test_of_a_table_that_workers_have_only_what_differs_is_sent(tmp_path: Path) -> None:
    rig = TableRig(tmp_path)
    await rig.start({})
    table = {f"n/{number}": "a" for number in range(1000)}
    await rig.put(table)
    del table["n/5"]
    table |= {"n/7": "b", "m/1": "a", "m/2": "a"}
    path = rig.path
    expected = [f"add map {path} <<", f"set map {path} n/7 b", f"del map {path} n/5"]
    assert await rig.put(table) == expected
    assert rig.has(table)
    # Beyond some hundred changes all of it is replaced at once.
    others = {f"o/{number}": "a" for number in range(300)}
    assert (await rig.put(others))[0] == f"prepare map {path}"
    assert rig.has(others)
    await rig.haproxy.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(_ENTRIES, st.sampled_from(["", "reload", "stranger", "silent"])), max_size=6)
)
def test_after_any_history_all_workers_and_the_disk_have_the_table_that_was_wanted_last(
    steps: list[tuple[dict[str, str], str]],
) -> None:
    async def work(directory: Path) -> None:
        rig = TableRig(directory)
        await rig.start({})
        for number, (wanted, event) in enumerate(steps):
            if event == "reload":
                await rig.applier.master.send_reload()
                rig.applier.trust(await rig.applier.master.read_processes())
            elif event == "stranger":
                rig.haproxy.workers = [rig.haproxy.fork()]
            elif event == "silent":
                rig.haproxy.stop_answering_after = number
            try:
                await rig.put(wanted)
            except RuntimeUnavailable:
                assert event == "silent"
                rig.haproxy.stop_answering_after = None
                await rig.put(wanted)
            rig.haproxy.stop_answering_after = None
            assert rig.has(wanted), event
        await rig.haproxy.close()

    with tempfile.TemporaryDirectory() as name:
        asyncio.run(work(Path(name)))


# The files and what is sent of them


def test_a_removal_of_what_only_the_overlay_has_leaves_no_tombstone() -> None:
    state = MapState("1", overlay={"n/1": "a|1"})
    assert state.overlay_changes({"n/1": None}) == MapChanges(removed=("n/1",))


@given(_ENTRIES)
def test_a_map_file_is_read_as_it_was_written(entries: dict[str, str]) -> None:
    text = render_map(entries, "7")
    assert parse_map(text) == ("7", entries)
    generation, base = parse_base_map(StringIO(text))
    assert (generation, dict(base)) == ("7", entries)
    assert all(base[key] == value for key, value in entries.items())


def test_a_file_may_have_no_generation_and_of_a_key_that_is_there_twice_the_first_counts() -> None:
    text = "n/1 a|1\n# a remark\nbroken\nn/1 b|1\n"
    assert parse_map(text) == (None, {"n/1": "a|1"})


@given(st.lists(st.tuples(_SOME_KEY, _SOME_VALUE)), st.integers(10, 60))
def test_payloads_hold_all_entries_in_order_within_the_limit(
    entries: list[tuple[str, str]], limit: int
) -> None:
    payloads = split_payload(entries, limit)
    assert "".join(payloads) == "".join(f"{key} {value}\n" for key, value in entries)
    assert all(len(payload) <= limit or payload.count("\n") == 1 for payload in payloads)
