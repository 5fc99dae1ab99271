import asyncio
import os
import sqlite3
import stat
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from imdsproxy.documents.compiled import compile_instance
from imdsproxy.errors import SourceCorrupt, SourceRefused, SourceUnavailable
from imdsproxy.host.sqlite_file import APPLICATION_ID, open_store
from imdsproxy.model.entities import Instance, InstanceId, NetworkId, StoredBytes
from imdsproxy.model.observation import Observation
from imdsproxy.model.policy import PolicyRules
from imdsproxy.reconcile.progress import Progress
from imdsproxy.sources.sqlite import store as sqlite_store
from imdsproxy.sources.sqlite.source import SqliteSource
from imdsproxy.sources.sqlite.store import MIGRATIONS, Store, read_store
from support.record_builders import instance, network, port
from support.source_runs import running
from support.umask import umask

A = replace(instance("a", "10.0.0.5", mac="52:54:00:00:00:05"), created_at=1)
B = replace(instance("b", "10.0.0.6"), created_at=2)
N1 = network("n1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


def source_of(path: Path) -> SqliteSource:
    return SqliteSource(path, retry_s=0.02)


async def refused_fields(
    source: SqliteSource, *instances: Instance, bulk: bool = False
) -> list[str]:
    networks = [N1, N1] if bulk else []
    with pytest.raises(SourceRefused) as caught:
        await source.put(networks, instances, bulk=bulk)
    return [problem.field for problem in caught.value.problems]


async def test_a_write_is_done_as_a_whole_or_refused_with_every_field_that_stands_against_it(
    path: Path,
) -> None:
    source = source_of(path)
    async with running(source) as heard:
        thief = InstanceId("c")
        assert await refused_fields(source, A, B, B, replace(A, id=thief), bulk=True) == [
            "networks[1].id",
            "instances[2].id",
            "instances[3].ports[0].addresses[0]",
            "instances[3].ports[0].mac",
        ]
        assert len(heard.observations) == 1
        await source.put([], [A, B])
        # The link-local address of A's MAC, and that MAC.
        linked = instance("c", "fe80::5054:ff:fe00:5", mac="52:54:00:00:00:05")
        for one in (replace(B, id=thief), linked):
            assert await refused_fields(source, one) == ["ports[0].addresses[0]"]


async def test_what_changes_nothing_publishes_nothing_and_a_network_in_use_stays(
    path: Path,
) -> None:
    source = source_of(path)
    async with running(source) as heard:
        web = replace(A, user_data=b"x")
        for records in ([N1], [A]), ([N1], []), ([], [A]), ([], [web]), ([N1], [web]):
            await source.put(*records)
        with pytest.raises(SourceRefused, match="instance a: a port is in n1"):
            await source.remove_network(NetworkId("n1"))
        assert heard.inventory.networks.keys() == {"n1"}
        await source.remove_instance(A.id)
        for _ in range(2):
            await source.remove_instance(A.id)
            await source.remove_network(NetworkId("n1"))
        assert not heard.inventory.networks
        assert len(heard.observations) == 5


async def test_a_write_is_done_though_its_caller_is_gone_while_the_source_runs(path: Path) -> None:
    source = source_of(path)
    with pytest.raises(SourceUnavailable):
        await source.put([], [B])
    async with running(source) as heard:
        asked = asyncio.create_task(source.put([], [A]))
        await asyncio.sleep(0)
        asked.cancel()
        await heard.until(lambda each: each.inventory.instances.keys() == {"a"})
    with pytest.raises(SourceUnavailable):
        await source.put([], [B])
    async with running(source_of(path)) as again:
        assert again.last.instances == {"a": A}


async def test_later_writes_are_published_after_all_pieces_of_the_one_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So many that the later write is committed in between.
    monkeypatch.setattr("imdsproxy.sources.api._PIECE", 1)
    source = source_of(path)
    many = [instance(f"i{n}", f"10.1.{n // 250}.{n % 250}") for n in range(700)]
    async with running(source) as heard:
        later = replace(many[0], hostname="later")
        await asyncio.gather(source.put([], many), source.put([], [later]))
        assert heard.inventory.instances[later.id].hostname == "later"


def test_the_store_notes_when_an_instance_came_and_keeps_that(path: Path) -> None:
    unsaid = replace(A, created_at=None)

    def put(now: float, instance: Instance) -> int | None:
        """When it came, for a process that starts afterwards."""
        with closing(Store(path, now=lambda: now)) as store:
            store.put([], [instance])
        with closing(Store(path)) as store:
            return store.load().instances[A.id].created_at

    assert put(100.9, unsaid) == 100
    for more in ({}, {"user_data": b"x"}, {"name": "other"}):
        assert put(200, replace(unsaid, **more)) == 100
    assert [put(200, replace(unsaid, created_at=7)), put(200, unsaid)] == [7, 7]
    with closing(Store(path)) as store:
        store.remove_instance(A.id)
    assert put(200, unsaid) == 200


@pytest.mark.parametrize("row", ['{"id":"a","name":"a"}', "garbage", '{"id":"a","created_at":"x"}'])
def test_no_time_is_made_up_for_what_was_there_before(path: Path, row: str) -> None:
    with closing(Store(path, now=lambda: 100)) as store:
        store._connection.execute("INSERT INTO instances VALUES ('a', ?, NULL)", (row,))
        store.put([], [replace(A, created_at=None)])
        assert store.load().instances[A.id].created_at is None


def test_only_its_owner_can_read_the_store(path: Path) -> None:
    with umask(0):
        store = Store(path)
        store.put([], [A])
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
        store.close()
    assert modes
    assert set(modes.values()) == {0o600}, modes


async def test_a_second_writer_is_refused_and_takes_over_when_the_first_ends(path: Path) -> None:
    first = Store(path)
    with pytest.raises(SourceUnavailable, match=f"process {os.getpid()}"):
        Store(path)
    async with running(source_of(path)) as heard:
        assert not heard.last.in_sync
        assert heard.last.problems
        first.close()
        await heard.until(lambda each: each.last.in_sync)


def _damage(path: Path, sound: int) -> bytes:
    """A store of which so many bytes are as they were."""
    with closing(Store(path)) as store:
        store.put([N1], [A, B])
    path.write_bytes(path.read_bytes()[:sound].ljust(16384, b"\xa5"))
    return path.read_bytes()


@pytest.mark.parametrize("sound", [0, 4096])
async def test_a_damaged_store_is_reported_with_what_to_do_and_left_as_it_is(
    path: Path, sound: int
) -> None:
    before = _damage(path, sound)
    source = source_of(path)
    async with running(source) as heard:
        assert (heard.last.full, heard.last.in_sync) == (False, False)
        (problem,) = heard.last.problems
        assert f"{path} is damaged" in problem.reason
        assert "imdsproxy instance add --file" in problem.hint
        await asyncio.sleep(0.1)  # some five tries: that nothing comes cannot be polled for
        assert len(heard.observations) == 1
        with pytest.raises(SourceCorrupt):
            await source.put([], [A])
        assert await asyncio.to_thread(path.read_bytes) == before
        await asyncio.to_thread(path.unlink)
        await heard.until(lambda each: each.last.in_sync)
        await source.put([], [A])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (f"PRAGMA user_version = {len(MIGRATIONS) + 1}", f"version {len(MIGRATIONS) + 1}"),
        ("PRAGMA application_id = 7", "another program"),
    ],
)
def test_a_newer_store_and_another_programs_database_are_refused_and_left_as_they_are(
    path: Path, change: str, reason: str
) -> None:
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(change)
    before = path.read_bytes()
    with pytest.raises(SourceRefused, match=reason):
        Store(path)
    assert path.read_bytes() == before


def test_an_older_store_is_brought_up_to_date_with_its_records_as_a_whole(path: Path) -> None:
    with closing(Store(path)) as store:
        store.put([N1], [A])
    broken = (*MIGRATIONS, "CREATE TABLE more (x); DROP TABLE networks; NONSENSE")
    with pytest.raises(sqlite3.OperationalError):
        open_store(path, broken)
    newer = (*MIGRATIONS, "ALTER TABLE networks ADD COLUMN note TEXT; CREATE TABLE more (x)")
    with closing(open_store(path, newer)) as connection:
        assert connection.execute("SELECT id, note FROM networks").fetchall() == [("n1", None)]
        assert connection.execute("PRAGMA user_version").fetchone() == (len(newer),)
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


async def test_a_full_disk_is_reported_and_what_was_stored_stays(path: Path) -> None:
    source = source_of(path)
    async with running(source) as heard:
        await source.put([N1], [A])
        reported = len(heard.observations)
        connection = source._store._connection  # type: ignore[union-attr]  # it runs
        # SQLite says SQLITE_FULL then.
        await source._in_thread(lambda: connection.execute("PRAGMA max_page_count = 20"))
        with pytest.raises(SourceUnavailable, match="full") as caught:
            await source.put([], [B, replace(A, user_data=bytes(1_000_000))])
        assert caught.value.hint == f"make room on the file system of {path.parent}"
        assert len(heard.observations) == reported
        await source._in_thread(lambda: connection.execute("PRAGMA max_page_count = 100000"))
        await source.put([], [B])
    async with running(source_of(path)) as heard:
        assert heard.last.instances == {"a": A, "b": B}


def test_rows_that_other_programs_wrote_are_mended_or_reported(path: Path) -> None:
    with closing(Store(path)) as store:
        store.put([N1], [A, B])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM instances WHERE id = 'a'")  # its addresses stay
        connection.execute("DELETE FROM addresses WHERE instance = 'b'")
        connection.execute("INSERT INTO instances VALUES ('bad', CAST(x'ff22' AS TEXT), NULL)")
        connection.execute("INSERT INTO instances VALUES ('odd', '{\"id\": \"b\"}', NULL)")
        connection.execute("INSERT INTO networks VALUES ('n9', '[]')")
    with closing(Store(path)) as store:
        assert store.load().instances == {"b": B}
        assert [*store.problems] == [("networks", "n9"), ("instances", "bad"), ("instances", "odd")]
        for problem in (one for problems in store.problems.values() for one in problems):
            assert problem.file == str(path)
            assert str(problem).isprintable()
        with pytest.raises(SourceRefused):
            store.put([], [replace(B, id=InstanceId("c"))])
        store.put([], [replace(A, id=InstanceId("d"))])


async def test_the_disk_has_a_write_before_it_is_acknowledged_and_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync = Store.sync

    def watched(store: Store) -> None:
        sync(store)
        steps.append("disk")
        if steps.count("disk") > 1:
            raise SourceUnavailable("the disk does not answer")

    monkeypatch.setattr(Store, "sync", watched)
    source = source_of(path)
    async with running(source) as heard:
        publish = heard.publish

        def noted(observation: Observation) -> None:
            steps.append("reported")
            publish(observation)

        source._publish = noted
        await source.put([], [A])
        assert steps == ["reported", "disk"]
        with pytest.raises(SourceUnavailable, match="does not answer"):
            await source.put([], [B])


def test_progress_is_shown_while_many_are_stored_and_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Progress, "note", lambda _self, *step: seen.append(step))
    with closing(Store(path)) as store:
        store.put([], [instance(f"i{n}", f"10.1.{n >> 8}.{n & 255}") for n in range(1000)])
        assert seen == [("storing instances", 499, 1000), ("storing instances", 999, 1000)]
        store.load()
    assert seen[-1] == ("reading the store", 999, 1000)


# A start: records are not parsed again, and user-data stays where it is

WEB = Instance(
    InstanceId("web"),
    "web",
    "web",
    ports=(port("blue"),),
    user_data=b"#cloud-config\n" * 1000,
    created_at=1_700_000_000,
)


@pytest.fixture
def filled(path: Path) -> Path:
    with closing(Store(path)) as store:
        store.put([], [WEB])
    return path


def test_a_start_parses_no_record_that_is_as_it_was_written(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sqlite_store, "parse_listed")
    with closing(Store(filled)) as store:
        assert store.load().instances == {"web": WEB}


def test_vendor_data_and_policy_outlive_a_restart(path: Path) -> None:
    written = replace(WEB, vendor_data=b"#cloud-config", policy=PolicyRules(endpoint=False))
    for _ in range(2):
        with closing(Store(path)) as store:
            store.put([], [written])
            assert store.load().instances == {"web": written}


@pytest.mark.parametrize(
    "change",
    [
        """UPDATE instances SET record = replace(record, '"name":"web"', '"name":"mail"')""",
        "UPDATE packed SET stamp = x'00'",
        "DELETE FROM packed",
        "DROP TABLE packed",
    ],
)
def test_what_another_program_changed_is_read_from_the_record(filled: Path, change: str) -> None:
    with closing(sqlite3.connect(filled)) as connection, connection:
        connection.execute(change)
    expected = replace(WEB, name="mail") if "mail" in change else WEB
    for _ in ("read anew", "as it was packed then"):
        with closing(Store(filled)) as store:
            assert store.load().instances == {"web": expected}


def test_user_data_stays_in_the_store_until_it_is_needed(filled: Path) -> None:
    with closing(Store(filled)) as store:
        web = store.load().instances[InstanceId("web")]
        assert isinstance(web.user_data, StoredBytes)
        assert compile_instance(web, {}) == compile_instance(WEB, {})
        changed = replace(WEB, user_data=b"short")
        assert store.put([], [changed]).instances == {"web": changed}
    with pytest.raises(SourceUnavailable, match="closed"):
        compile_instance(web, {})


def test_a_check_reads_a_store_that_is_open_or_not_and_changes_nothing(path: Path) -> None:
    assert read_store(path).instances == []
    assert not path.exists()
    web = replace(A, user_data=b"\xff\x00")
    with closing(Store(path)) as store:
        store.put([N1], [web, B])
        held = read_store(path)
    before = sorted(path.parent.iterdir()), path.read_bytes()
    assert read_store(path) == held
    assert (sorted(path.parent.iterdir()), path.read_bytes()) == before
    assert held.all_problems == ()
    assert held.networks == [N1]
    assert [replace(one, user_data=None) for one in held.instances] == [A, B]
    assert [one.user_data is None for one in held.instances] == [False, True]
    path.write_bytes(b"hello" * 100)
    with pytest.raises(SourceUnavailable, match=str(path)):
        read_store(path)
