"""A file of ours that keeps over a restart what a source has learned."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from imdsproxy.errors import Problem, SourceError
from imdsproxy.sources.sqlite_failure import store_failures
from imdsproxy.sources.sqlite_schema import open_store

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_T = TypeVar("_T")


@dataclass(slots=True)
class SideCache(Generic[_Key, _Value]):
    """An SQLite file that may be deleted at any time: it is made again.

    Attributes:
        path: The file; made when there is something to keep.
        schema: Statements that make its tables.
        write: Stores a value under its key; deletes what is there for `None`.
        subject: The field of `problem`.
        lost: What `problem` says, as "records in force are not kept".
        problem: Why the file cannot be used, while that is so.
    """

    path: Path
    schema: str
    write: Callable[[sqlite3.Connection, _Key, _Value | None], None]
    subject: str
    lost: str
    problem: Problem | None = None
    _unsaved: dict[_Key, _Value | None] = field(default_factory=dict)

    def load(self, read: Callable[[sqlite3.Connection], _T], default: _T) -> _T:
        """What `read` makes of the file; `default` where there is none or it cannot be used. Blocks."""
        try:
            with store_failures(self.path):
                if not self.path.exists():
                    return default
                with closing(open_store(self.path, (self.schema,))) as connection:
                    return read(connection)
        except SourceError as error:
            self._note(error)
            return default

    def keep(self, changes: Mapping[_Key, _Value | None]) -> None:
        """Have `save` write these; `None` for what is gone."""
        self._unsaved.update(changes)

    def save(self) -> None:
        """Write what is to be kept; what cannot be written now is written the next time. Blocks."""
        pending, self._unsaved = self._unsaved, {}
        if not pending:
            return
        try:
            with (
                store_failures(self.path),
                closing(open_store(self.path, (self.schema,))) as connection,
            ):
                connection.execute("BEGIN IMMEDIATE")
                for key, value in pending.items():
                    self.write(connection, key, value)
                connection.execute("COMMIT")
        except SourceError as error:
            self._unsaved = {**pending, **self._unsaved}
            self._note(error)
        else:
            self.problem = None

    def _note(self, error: SourceError) -> None:
        self.problem = Problem(
            self.subject,
            f"{self.lost} over a restart: {error.message}",
            f"{error.hint}; it may be deleted, it is made again",
            str(self.path),
        )
