"""What was in force of a directory of records, kept over a restart.

A file that is broken when the controller starts must not cost guests their documents: the records that
were in force when the process before ended are taken as in force, and the files read then change them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from imdsproxy.core.model import Instance, Network
from imdsproxy.core.packed import PackedInstance
from imdsproxy.core.records import parse_instance, parse_network, render_record
from imdsproxy.errors import Problem, SourceError
from imdsproxy.sources.sqlite_failure import store_failures
from imdsproxy.sources.sqlite_schema import open_store

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

__all__ = ["Kept", "LastGood"]

_SCHEMA: Final = (
    """
CREATE TABLE last_good (
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    file TEXT NOT NULL,
    record TEXT NOT NULL,
    user_data BLOB,
    PRIMARY KEY (kind, id)
) STRICT
""",
)


@dataclass(frozen=True, slots=True)
class Kept:
    """A record in force, and the name of the file that it is from."""

    file: str
    record: Network | PackedInstance


@dataclass(slots=True)
class LastGood:
    """The file at `path`. Nothing depends on it but a start with broken files: it may be deleted.

    Attributes:
        path: An SQLite file; made when there is something to keep.
        problem: Why it cannot be used, while that is so.
    """

    path: Path
    problem: Problem | None = None
    _unsaved: dict[tuple[str, str], Kept | None] = field(default_factory=dict)

    def load(self) -> tuple[Kept, ...]:
        """Everything kept; nothing where there is no such file or it cannot be used."""
        try:
            with store_failures(self.path):
                if not self.path.exists():
                    return ()
                with closing(open_store(self.path, _SCHEMA)) as connection:
                    rows = connection.execute("SELECT kind, file, record, user_data FROM last_good")
                    return tuple(_read(rows))
        except SourceError as error:
            self._note(error)
            return ()

    def keep(self, kind: str, changes: Mapping[str, Kept | None]) -> None:
        """Have `save` write what has changed; `None` for what is no longer in force."""
        self._unsaved.update({(kind, key): kept for key, kept in changes.items()})

    def save(self) -> None:
        """Write what is to be kept; what cannot be written now is tried again the next time."""
        if not self._unsaved:
            return
        try:
            with store_failures(self.path), closing(open_store(self.path, _SCHEMA)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                for (kind, key), kept in self._unsaved.items():
                    _write(connection, kind, key, kept)
                connection.execute("COMMIT")
        except SourceError as error:
            self._note(error)
        else:
            self.problem = None
            self._unsaved.clear()

    def _note(self, error: SourceError) -> None:
        self.problem = Problem(
            "last-good",
            f"records in force are not kept over a restart: {error.message}",
            f"{error.hint}; it may be deleted, it is made again",
            str(self.path),
        )


def _read(rows: sqlite3.Cursor) -> Iterator[Kept]:
    for kind, file, text, user_data in rows:
        try:
            mapping = json.loads(text)
        except ValueError:
            continue
        record = parse_network(mapping) if kind == "networks" else parse_instance(mapping)
        if isinstance(record, Network):
            yield Kept(file, record)
        elif isinstance(record, Instance):
            yield Kept(file, PackedInstance.of(replace(record, user_data=user_data)))


def _write(connection: sqlite3.Connection, kind: str, key: str, kept: Kept | None) -> None:
    if kept is None:
        connection.execute("DELETE FROM last_good WHERE kind = ? AND id = ?", (kind, key))
        return
    record: Network | Instance
    if isinstance(kept.record, PackedInstance):
        instance = kept.record.open()
        record, user_data = replace(instance, user_data=None), instance.user_data
    else:
        record, user_data = kept.record, None
    connection.execute(
        "INSERT OR REPLACE INTO last_good (kind, id, file, record, user_data)"
        " VALUES (?, ?, ?, ?, ?)",
        (kind, key, kept.file, json.dumps(render_record(record)), user_data),
    )
