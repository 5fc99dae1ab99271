"""A hub's journal: what was written is there after a restart, and a disk that fails is reported."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from imdsproxy.core.fleet.layout import HOSTS
from imdsproxy.errors import ConfigInvalid
from imdsproxy.hub.journal import FILE, Journal, Position, find_host
from support.tasks import background, until

A = f"{HOSTS}a"


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
    await journal.keep({A: b"1"})
    # As a process that is killed leaves it.
    values, again = await _reopened(path)
    assert values == {A: b"1"}
    assert again.position == Position("f", 2, 50, 7)
    await journal.close()


async def test_what_is_noted_is_written_soon(path: Path) -> None:
    journal = Journal(path)
    await journal.open()
    async with background(journal.run()):
        journal.note({A: b"1"})
        journal.note({A: b"2"})
        journal.note_name("anna", "an operator")
        await until(lambda: find_host(path, "a"))
    assert not find_host(path, "b")
    await journal.close()
    values, again = await _reopened(path)
    assert values == {A: b"2"}
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
    await journal.keep({A: b"1"})
    assert "full" in str(journal.problem)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("DROP TRIGGER full")
    await journal.flush()
    assert journal.problem is None
    await journal.close()
    assert (await _reopened(path))[0] == {A: b"1"}


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
