from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from imdsproxy.core.model import Instance, InstanceId, NetworkId
from imdsproxy.core.observation import Observation
from imdsproxy.core.records import parse_instance, render_record
from imdsproxy.errors import SourceCorrupt, SourceError, SourceRefused, SourceUnavailable
from imdsproxy.sources.api import Tally, Written
from imdsproxy.sources.sqlite.source import SqliteSource
from imdsproxy.sources.sqlite.store import MIGRATIONS, Store
from imdsproxy.sources.sqlite_file import APPLICATION_ID, open_store
from support.record_builders import instance, network, port
from support.source_runs import running

A = replace(instance("a", "10.0.0.5", mac="52:54:00:00:00:05"), created_at=1)
B = replace(instance("b", "10.0.0.6"), created_at=2)
N1 = network("n1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


def source_of(path: Path) -> SqliteSource:
    return SqliteSource(path, retry_s=0.02)


async def test_a_write_says_what_it_did(path: Path) -> None:
    source = source_of(path)
    async with running(source):
        assert await source.put_network(N1) is Written.ADDED
        assert await source.put_network(N1) is Written.UNCHANGED
        assert await source.put_network(replace(N1, mtu=1400)) is Written.CHANGED
        assert await source.put_instance(A) is Written.ADDED
        assert await source.put_instance(replace(A, user_data=b"x")) is Written.CHANGED
        assert await source.put_instance(replace(A, user_data=b"x")) is Written.UNCHANGED
        assert await source.put_records([N1], [A, B]) == Tally(added=1, changed=2)


async def test_many_are_written_all_or_none(path: Path) -> None:
    source = source_of(path)
    async with running(source) as heard:
        with pytest.raises(SourceRefused) as caught:
            await source.put_records([N1], [A, B, replace(A, id=InstanceId("c"))])
        assert [problem.field for problem in caught.value.problems] == [
            "instances[2].ports[0].addresses[0]",
            "instances[2].ports[0].mac",
        ]
        assert len(heard.observations) == 1


async def test_a_single_record_is_refused_at_its_own_field(path: Path) -> None:
    source = source_of(path)
    async with running(source):
        await source.put_instance(B)
        with pytest.raises(SourceRefused) as caught:
            await source.put_instance(replace(B, id=InstanceId("c")))
        assert [problem.field for problem in caught.value.problems] == ["ports[0].addresses[0]"]


async def test_the_same_id_twice_in_one_write_is_refused(path: Path) -> None:
    source = source_of(path)
    async with running(source):
        with pytest.raises(SourceRefused) as caught:
            await source.put_records([N1, N1], [B, B])
        assert [problem.field for problem in caught.value.problems] == [
            "networks[1].id",
            "instances[1].id",
        ]


async def test_a_network_in_use_is_removed_only_by_force(path: Path) -> None:
    source = source_of(path)
    async with running(source) as heard:
        await source.put_records([N1], [instance("idle", ports=[port("n1")])])
        with pytest.raises(SourceRefused, match="idle"):
            await source.remove_network(NetworkId("n1"))
        assert N1.id in heard.inventory.networks
        assert await source.remove_network(NetworkId("n1"), force=True)
        assert not heard.inventory.networks
        assert heard.inventory.instances.keys() == {"idle"}
        assert not await source.remove_network(NetworkId("n1"))


async def test_what_is_not_there_is_not_removed(path: Path) -> None:
    source = source_of(path)
    async with running(source) as heard:
        assert not await source.remove_instance(InstanceId("a"))
        assert len(heard.observations) == 1


async def test_a_write_is_published_when_it_returns(path: Path) -> None:
    source = source_of(path)
    async with running(source) as heard:
        await source.put_instance(A)
        assert heard.inventory.instances.keys() == {"a"}
        await source.remove_instance(A.id)
        assert not heard.inventory.instances


async def test_a_write_is_done_and_published_though_its_caller_is_gone(path: Path) -> None:
    source = source_of(path)
    async with running(source) as heard:
        asked = asyncio.create_task(source.put_instance(A))
        await asyncio.sleep(0)
        asked.cancel()
        await heard.until(lambda each: each.inventory.instances.keys() == {"a"})
    async with running(source_of(path)) as again:
        assert again.last.instances == {"a": A}


async def test_many_writes_at_once_all_come_through(path: Path) -> None:
    source = source_of(path)
    many = [instance(f"i{n}", f"10.1.{n}.5") for n in range(60)]
    async with running(source) as heard:
        done = await asyncio.gather(*(source.put_instance(each) for each in many))
        assert set(done) == {Written.ADDED}
        assert len(heard.inventory.instances) == 60


async def test_many_edited_records_are_published_in_pieces_and_later_writes_after_them(
    path: Path,
) -> None:
    source = source_of(path)
    many = [instance(f"i{n}", f"10.1.{n // 250}.{n % 250}") for n in range(700)]
    edited = [replace(each, hostname="edited") for each in many]
    async with running(source) as heard:
        await source.put_records([], many)
        seen = len(heard.observations)
        later = replace(many[0], hostname="later")
        await asyncio.gather(source.put_records([], edited), source.put_instance(later))
        sizes = [len(each.instances) for each in heard.observations[seen:] if each.more]
        assert sizes == [0, 200, 200, 200, 100]
        known = heard.inventory.instances
        assert known[later.id].hostname == "later"
        assert {known[each.id].hostname for each in edited[1:]} == {"edited"}


async def test_many_records_among_which_an_address_moves_are_published_at_once(path: Path) -> None:
    source = source_of(path)
    many = [instance(f"i{n}", f"10.1.{n // 250}.{n % 250}") for n in range(300)]
    async with running(source) as heard:
        await source.put_records([], many)
        seen = len(heard.observations)
        ports = [each.ports for each in many]
        ports[:2] = ports[1], ports[0]
        moved = [replace(one, ports=its) for one, its in zip(many, ports, strict=True)]
        await source.put_records([], [replace(each, hostname="edited") for each in moved])
        assert [len(each.instances) for each in heard.observations[seen:]] == [300]


async def test_before_it_runs_and_after_writes_are_unavailable(path: Path) -> None:
    source = source_of(path)
    with pytest.raises(SourceUnavailable):
        await source.put_instance(A)
    async with running(source):
        await source.put_instance(A)
    with pytest.raises(SourceUnavailable):
        await source.put_instance(B)


def test_the_store_notes_when_an_instance_came_and_keeps_that(path: Path) -> None:
    now = 100.9
    unsaid = replace(A, created_at=None)
    store = Store(path, now=lambda: now)

    def known() -> int | None:
        found = store.load().instances.get(A.id)
        assert found is not None
        return found.created_at

    written = store.put([], [unsaid])
    assert written.instances == {"a": replace(A, created_at=100)}
    now = 200.0
    assert store.put([], [unsaid]).tally == Tally(unchanged=1)
    store.put([], [replace(unsaid, user_data=b"x")])
    assert known() == 100
    store.close()
    store = Store(path, now=lambda: now)
    store.put([], [replace(unsaid, name="other")])
    assert known() == 100
    assert store.load().instances[A.id].created_at == 100
    store.put([], [replace(unsaid, created_at=7)])
    assert known() == 7
    store.put([], [unsaid])
    assert known() == 7
    store.remove_instance(A.id)
    store.put([], [unsaid])
    assert known() == 200
    store.close()


def test_when_an_instance_came_goes_with_its_record_to_another_store(tmp_path: Path) -> None:
    first = Store(tmp_path / "first.sqlite", now=lambda: 100)
    first.put([], [replace(A, created_at=None)])
    exported = [render_record(each) for each in first.load().instances.values()]
    first.close()
    second = Store(tmp_path / "second.sqlite", now=lambda: 200)
    read = parse_instance(exported[0])
    assert isinstance(read, Instance)
    second.put([], [read])
    found = second.load().instances.get(A.id)
    assert found is not None
    assert found.created_at == 100
    second.close()


@pytest.mark.parametrize("row", ['{"id":"a","name":"a"}', "garbage", '{"id":"a","created_at":"x"}'])
def test_no_time_is_made_up_for_what_was_there_before(path: Path, row: str) -> None:
    store = Store(path, now=lambda: 100)
    store._connection.execute("INSERT INTO instances VALUES ('a', ?, NULL)", (row,))
    store.put([], [replace(A, created_at=None)])
    found = store.load().instances.get(A.id)
    assert found is not None
    assert found.created_at is None
    store.close()


def test_only_its_owner_can_read_the_store(path: Path) -> None:
    mask = os.umask(0)
    try:
        store = Store(path)
        store.put([], [A])
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
        store.close()
    finally:
        os.umask(mask)
    assert modes
    assert set(modes.values()) == {0o600}, modes


async def test_a_second_writer_is_refused_with_the_pid_of_the_first(path: Path) -> None:
    async with running(source_of(path)):
        with pytest.raises(SourceUnavailable, match=f"process {os.getpid()}"):
            Store(path)


async def test_the_second_writer_takes_over_when_the_first_ends(path: Path) -> None:
    first = Store(path)
    async with running(source_of(path)) as heard:
        assert not heard.last.in_sync
        assert heard.last.problems
        first.close()
        await heard.until(lambda each: each.last.in_sync)


def _spoil_header(path: Path) -> None:
    path.write_bytes(b"this is no database at all, but long enough to be looked at" * 100)


def _spoil_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)


def _spoilt(path: Path, spoil: Callable[[Path], None]) -> bytes:
    spoil(path)
    return path.read_bytes()


def _taken_away(path: Path) -> bytes:
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.mark.parametrize("spoil", [_spoil_header, _spoil_pages])
async def test_a_damaged_store_is_reported_with_what_to_do_and_left_as_it_is(
    path: Path, spoil: Callable[[Path], None]
) -> None:
    store = Store(path)
    store.put([N1], [A, B])
    store.close()
    before = _spoilt(path, spoil)
    source = source_of(path)
    async with running(source) as heard:
        assert not heard.last.full
        assert not heard.last.in_sync
        (problem,) = heard.last.problems
        assert str(path) in problem.reason
        assert "damaged" in problem.reason
        assert "move" in problem.hint
        assert "imdsproxy instance add --file" in problem.hint
        with pytest.raises(SourceCorrupt):
            await source.put_instance(A)
        assert _taken_away(path) == before
        await heard.until(lambda each: each.last.in_sync)
        assert await source.put_instance(A) is Written.ADDED


async def test_an_unusable_store_is_reported_once_not_at_every_try(path: Path) -> None:
    _spoil_header(path)
    async with running(source_of(path)) as heard:
        await asyncio.sleep(0.2)  # some ten tries: that nothing comes cannot be polled for
        assert len(heard.observations) == 1


def test_a_newer_store_is_refused_and_left_as_it_is(path: Path) -> None:
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    before = path.read_bytes()
    with pytest.raises(SourceRefused, match=f"version {len(MIGRATIONS) + 1}"):
        Store(path)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused_and_left_as_it_is(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(SourceRefused, match="another program"):
        Store(path)
    assert path.read_bytes() == before


def test_an_older_store_is_brought_up_to_date_with_its_records(path: Path) -> None:
    store = Store(path)
    store.put([N1], [A])
    store.close()
    newer = (*MIGRATIONS, "ALTER TABLE networks ADD COLUMN note TEXT; CREATE TABLE more (x)")
    with closing(open_store(path, newer)) as connection:
        assert connection.execute("SELECT id, note FROM networks").fetchall() == [("n1", None)]
        assert connection.execute("PRAGMA user_version").fetchone() == (len(newer),)
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


def test_a_migration_that_fails_half_way_changes_nothing(path: Path) -> None:
    store = Store(path)
    store.put([N1], [A])
    store.close()
    broken = (*MIGRATIONS, "CREATE TABLE more (x); DROP TABLE networks; NONSENSE")
    with pytest.raises(sqlite3.OperationalError):
        open_store(path, broken)
    store = Store(path)
    assert store.load().networks == {"n1": N1}
    store.close()


def test_the_first_schema_is_as_it_was_released() -> None:
    # A store in the field has it: a change belongs into a migration of its own.
    assert len(MIGRATIONS) == 1


@pytest.fixture
def small_disk(path: Path) -> Callable[[int], Store]:
    """A store that may not grow beyond a number of pages: SQLite then says SQLITE_FULL."""

    def make(pages: int) -> Store:
        store = Store(path)
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        return store

    return make


def test_a_full_disk_is_reported_and_what_was_stored_stays(
    small_disk: Callable[[int], Store], path: Path
) -> None:
    store = small_disk(20)
    store.put([N1], [A])
    with pytest.raises(SourceUnavailable, match="full") as caught:
        store.put([], [B, replace(A, user_data=bytes(1_000_000))])
    assert "make room" in caught.value.hint
    assert str(path.parent) in caught.value.hint
    assert store.load().instances == {"a": A}
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.put([], [B])
    assert store.load().instances == {"a": A, "b": B}
    store.close()


async def test_a_write_that_the_store_refuses_is_an_error_and_publishes_nothing(path: Path) -> None:
    source = source_of(path)
    async with running(source) as heard:
        await source.put_instance(A)
        reported = len(heard.observations)
        connection = source._store._connection  # type: ignore[union-attr]  # it runs
        await source._in_thread(lambda: connection.execute("PRAGMA query_only = ON"))
        with pytest.raises(SourceUnavailable) as caught:
            await source.put_instance(B)
        assert "writable" in caught.value.hint
        assert len(heard.observations) == reported
        assert heard.inventory.instances.keys() == {"a"}


async def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with running(source_of(tmp_path / "file" / "store.sqlite")) as heard:
        assert not heard.last.in_sync
        assert "cannot be used" in heard.last.problems[0].reason


def test_rows_that_other_programs_wrote_are_mended_or_reported(path: Path) -> None:
    store = Store(path)
    store.put([N1], [A, B])
    store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM instances WHERE id = 'a'")  # its addresses stay
        connection.execute("DELETE FROM addresses WHERE instance = 'b'")
        connection.execute("INSERT INTO instances VALUES ('bad', CAST(x'ff22' AS TEXT), NULL)")
        connection.execute("INSERT INTO instances VALUES ('odd', '{\"id\": \"b\"}', NULL)")
        connection.execute("INSERT INTO networks VALUES ('n9', '[]')")
    store = Store(path)
    contents = store.load()
    assert contents.instances == {"b": B}
    assert contents.problems.keys() == {
        ("instances", "bad"),
        ("instances", "odd"),
        ("networks", "n9"),
    }
    for problems in contents.problems.values():
        for problem in problems:
            assert problem.file == str(path)
            assert str(problem).isprintable()
    with pytest.raises(SourceRefused):
        store.put([], [replace(B, id=InstanceId("c"))])
    store.put([], [replace(A, id=InstanceId("d"))])
    store.close()


WRITER = """
import sys
from pathlib import Path
from ipaddress import ip_address
from imdsproxy.core.model import Instance, InstanceId, NetworkId, Port
from imdsproxy.sources.sqlite.store import Store

store, turn, number = Store(Path(sys.argv[1])), sys.argv[2], 0
while True:
    number += 1
    name = f"t{turn}-{number}"
    address = ip_address((10 << 24) + (int(turn) << 16) + number)
    made = Instance(InstanceId(name), name, name, ports=(Port(NetworkId("n1"), None, (address,)),),
                    user_data=name.encode() * 500)
    store.put([], [made])
    store.sync()
    print(name, flush=True)
"""


def test_every_acknowledged_write_outlives_kill_9(path: Path) -> None:
    acknowledged: set[str] = set()
    for turn in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(turn)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for count, line in enumerate(writer.stdout):
            acknowledged.add(line.strip())
            if count >= 7 + turn:
                writer.send_signal(signal.SIGKILL)
                break
        # What it acknowledged before the signal reached it counts too.
        rest = writer.stdout.read()
        acknowledged.update(line for line in rest.split("\n")[:-1] if line)
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        store = Store(path)
        contents = store.load()
        store.close()
        assert not contents.problems
        assert acknowledged <= contents.instances.keys()
        for name, stored in contents.instances.items():
            assert stored.user_data == name.encode() * 500
    assert len(acknowledged) > 40


async def test_the_disk_has_a_write_before_it_is_acknowledged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync = Store.sync

    def watched(store: Store) -> None:
        sync(store)
        steps.append("disk")

    monkeypatch.setattr(Store, "sync", watched)
    source = source_of(path)
    async with running(source) as heard:
        publish = heard.publish

        def noted(observation: Observation) -> None:
            steps.append("reported")
            publish(observation)

        source._publish = noted
        await source.put_instance(A)
        steps.append("acknowledged")
    assert steps == ["reported", "disk", "acknowledged"]


async def test_a_disk_that_does_not_confirm_is_no_acknowledgement(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_store: Store) -> None:
        raise SourceUnavailable("the disk does not answer")

    source = source_of(path)
    async with running(source):
        monkeypatch.setattr(Store, "sync", fails)
        with pytest.raises(SourceError, match="does not answer"):
            await source.put_instance(A)
        monkeypatch.undo()
        assert await source.put_instance(B) is Written.ADDED


async def test_ten_thousand_instances_are_loaded_in_seconds(path: Path) -> None:
    many = [instance(f"i{n}", f"10.{n >> 8}.{n & 255}.5", text="x" * 200) for n in range(10_000)]
    store = Store(path)
    store.put([N1], many)
    store.close()
    async with asyncio.timeout(20):
        async with running(source_of(path)) as heard:
            await heard.until(lambda heard: heard.last.in_sync)
            assert len(heard.last.instances) == 10_000
