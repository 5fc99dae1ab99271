"""Compiled records on disk, and what each was compiled of."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from imdsproxy.core.compiled import CompiledRecord, compiled_path
from imdsproxy.core.model import InstanceId
from imdsproxy.errors import SourceError
from imdsproxy.serving.store import DiskFiles, list_records
from imdsproxy.sources.sqlite_file import open_store, store_failures

_SCHEMA: Final = (
    """
CREATE TABLE compiled (
    instance TEXT PRIMARY KEY NOT NULL,
    compiled_of BLOB NOT NULL,
    revision TEXT NOT NULL,
    file TEXT NOT NULL
) STRICT, WITHOUT ROWID
""",
)
_TOGETHER: Final = 1000
"""Rows that are written at once: some milliseconds. What a killed controller has not written is compiled again."""

_MOST_VARIABLES: Final = 500
"""Of one statement; SQLite takes 999 at least."""


@dataclass(slots=True)
class CompiledIndex:
    """What each compiled record was made of, so that a start reads and compiles only those that differ.

    A row counts only while the file is the one that was written for it. It may be deleted at any time: all records are
    compiled at the next start then.

    Args:
        path: An SQLite file. It is not synced: after a power cut it may be damaged, and is made again.
    """

    path: Path
    _connection: sqlite3.Connection | None = None
    _broken: bool = False
    _unsaved: dict[InstanceId, tuple[bytes, str, str] | None] = field(default_factory=dict)

    def find(self, instances: Iterable[InstanceId]) -> Mapping[InstanceId, tuple[bytes, str, str]]:
        """What they were compiled of, their revision, and the file's signature then."""
        found: dict[InstanceId, tuple[bytes, str, str]] = {}
        wanted = list(instances)
        if self._broken:
            return found
        try:
            with store_failures(self.path):
                connection = self._open()
                for start in range(0, len(wanted), _MOST_VARIABLES):
                    some = wanted[start : start + _MOST_VARIABLES]
                    marks = ",".join("?" * len(some))
                    query = f"SELECT * FROM compiled WHERE instance IN ({marks})"  # noqa: S608 - question marks
                    for instance, *row in connection.execute(query, some):
                        found[InstanceId(instance)] = row[0], row[1], row[2]
        except SourceError as error:
            self._give_up(error)
        # What is not written yet is newer.
        for one in self._unsaved.keys() & set(wanted):
            found.pop(one, None)
            row = self._unsaved[one]
            if row is not None:
                found[one] = row
        return found

    def note(self, instance: InstanceId, row: tuple[bytes, str, str] | None) -> None:
        """Have this row, or none."""
        self._unsaved[instance] = row
        if len(self._unsaved) >= _TOGETHER:
            self.save()

    def save(self) -> None:
        """Write what is not written yet. What fails here costs a start its time, and nothing else."""
        unsaved, self._unsaved = self._unsaved, {}
        if not unsaved or self._broken:
            return
        try:
            with store_failures(self.path):
                connection = self._open()
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(
                    "DELETE FROM compiled WHERE instance = ?",
                    [(one,) for one, row in unsaved.items() if row is None],
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO compiled VALUES (?, ?, ?, ?)",
                    [(one, *row) for one, row in unsaved.items() if row is not None],
                )
                connection.execute("COMMIT")
        except SourceError as error:
            self._give_up(error)

    def close(self) -> None:
        """Let go of the file until it is needed again, and of the memory that SQLite has for it."""
        self.save()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = open_store(self.path, _SCHEMA)
            self._connection.execute("PRAGMA synchronous = OFF")
        return self._connection

    def _give_up(self, error: SourceError) -> None:
        self._broken = True
        structlog.get_logger().warning(
            "the next start compiles all records", reason=error.message, file=str(self.path)
        )
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.path.unlink(missing_ok=True)


@dataclass(slots=True)
class IndexedFiles:
    """Compiled records and passwords on disk, with an index; see `imdsproxy.app.record_loop.CompiledFiles`."""

    files: DiskFiles
    index: CompiledIndex

    def unchanged(self, compiled_of: Mapping[InstanceId, bytes]) -> Mapping[InstanceId, str]:
        """The revisions of those whose records on disk were compiled of just this."""
        return {
            instance: revision
            for instance, (before, revision, file) in self.index.find(compiled_of).items()
            if before == compiled_of[instance] and file == self._signature(instance)
        }

    def apply(self, instance: InstanceId, record: CompiledRecord, compiled_of: bytes) -> None:
        """Have exactly this record on disk."""
        self.files.apply(instance, record)
        self.index.note(instance, (compiled_of, record.revision, self._signature(instance)))

    def remove(self, instance: InstanceId) -> None:
        """Have no record and no password of the instance."""
        self.files.remove(instance)
        self.index.note(instance, None)

    def instances(self) -> Iterable[InstanceId]:
        """Every instance that has a record on disk."""
        return list_records(self.files.directory)

    def settle(self) -> None:
        """Everything has been looked at."""
        self.index.close()

    def _signature(self, instance: InstanceId) -> str:
        path = f"{self.files.directory}/{compiled_path(instance)}"
        try:
            status = os.stat(path)  # noqa: PTH116 - a start asks for all records
        except OSError:
            return ""
        return f"{status.st_mtime_ns} {status.st_ino} {status.st_size}"
