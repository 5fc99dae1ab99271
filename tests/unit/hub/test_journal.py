"""A hub's journal: what was written is there after a restart, and a disk that fails is reported."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from imdsproxy.errors import ConfigInvalid, SourceUnavailable
from imdsproxy.fleet.layout import HOSTS, HostState, StoredHost, render_host
from imdsproxy.hub.store.journal import FILE, Journal, Position, find_host
from support.tasks import background, until

A, B = f"{HOSTS}a", f"{HOSTS}b"
FIRST = render_host(StoredHost(HostState.ENROLLED, ("1",), version=1))
SECOND = render_host(StoredHost(HostState.REVOKED, revocations=1, version=2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / FILE


async def _reopened(path: Path) -> tuple[dict[str, bytes], Journal]:
    journal = Journal(path)
    values = await journal.open()
    await journal.close()
    return values, journal


async def test_what_is_kept_is_on_the_disk_before_it_returns(path: Path) -> None:
    journal = Journal(path)
    assert await journal.open() == {}
    journal.advance(Position("f", 2, 50, 7))
    await journal.keep({A: FIRST})
    # As a process that is killed leaves it.
    values, again = await _reopened(path)
    assert values == {A: FIRST}
    assert again.position == Position("f", 2, 50, 7)
    await journal.close()


async def test_what_is_noted_is_written_soon(path: Path) -> None:
    journal = Journal(path)
    await journal.open()
    async with background(journal.run()):
        journal.note({A: FIRST})
        journal.note({A: SECOND})
        journal.note_name("anna", "an operator")
        await until(lambda: find_host(path, "a"))
    assert not find_host(path, "b")
    await journal.close()
    values, again = await _reopened(path)
    assert values == {A: SECOND}
    assert again.names == {"anna": "an operator"}


def test_a_machine_without_a_journal_knows_no_host(path: Path) -> None:
    assert not find_host(path, "a")


async def test_a_value_that_could_not_be_written_is_reported_and_written_later(path: Path) -> None:
    journal = Journal(path)
    await journal.open()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(
            "CREATE TRIGGER full BEFORE INSERT ON lasting BEGIN SELECT RAISE(FAIL, 'full'); END"
        )
    await journal.keep({A: FIRST})
    assert "full" in str(journal.problem)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("DROP TRIGGER full")
    await journal.flush()
    assert journal.problem is None
    await journal.close()
    assert (await _reopened(path))[0] == {A: FIRST}


async def test_a_value_that_cannot_be_read_is_reported_and_takes_no_other_with_it(
    path: Path,
) -> None:
    journal = Journal(path)
    await journal.open()
    await journal.keep({A: FIRST})
    await journal.close()
    with closing(sqlite3.connect(path)) as other, other:
        for key in (B, "/imds/1/inst/web"):
            other.execute("INSERT INTO lasting VALUES (?, ?)", (key, b'{"old": 1}'))
    journal = Journal(path)
    assert await journal.open() == {A: FIRST}
    assert journal.unreadable.keys() == {B, "/imds/1/inst/web"}
    # The row stays until etcd has a value that can be read.
    await journal.keep({B: SECOND})
    assert journal.unreadable.keys() == {"/imds/1/inst/web"}
    await journal.close()
    assert (await _reopened(path))[0] == {A: FIRST, B: SECOND}


async def test_what_a_write_that_was_cancelled_had_is_written_with_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    await journal.open()

    def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_write", cancelled)
        with pytest.raises(asyncio.CancelledError):
            await journal.keep({A: FIRST})
    await journal.close()
    assert (await _reopened(path))[0] == {A: FIRST}


def test_a_disk_that_fails_at_the_start_is_no_fault_of_the_settings(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(SourceUnavailable):
        asyncio.run(Journal(path).open())


def test_a_damaged_journal_is_refused_and_says_what_to_do(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(ConfigInvalid, match="journal") as refused:
        asyncio.run(Journal(path).open())
    assert "move the file away" in refused.value.hint


def test_a_position_only_grows_and_an_incarnation_counts_its_revisions_anew() -> None:
    at = Position("f", 2, 50, 7)
    assert at.advance(Position("f", 2, 40, 9)) == Position("f", 2, 50, 9)
    assert at.advance(Position("f", 1, 99, 99)) == at
    assert at.advance(Position("f", 3, 10, 1)) == Position("f", 3, 10, 1)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (Position("f", 2, 50, 7), None),
        (Position("f", 2, 60, 8), None),
        (Position("f", 3, 1, 0), None),
        (Position("f", 1, 99, 99), "etcd has incarnation 1 of the fleet, and this hub has seen 2"),
        (Position("f", 2, 49, 7), "etcd is at revision 49, and this hub has seen 50"),
        # A backup whose revisions were raised.
        (Position("f", 2, 1_000_049, 6), "etcd has beat 6, and this hub has seen 7"),
    ],
)
def test_an_etcd_that_is_not_as_far_as_the_journal_was_restored(
    found: Position, why: str | None
) -> None:
    assert Position("f", 2, 50, 7).lacks(found) == why
