"""Journal of a hub on its own disk, which outlives a restore of etcd from a backup.

The journal has the fleet's lasting values (`fleet.restores`), etcd's position, and names of hubs and operators.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import structlog

from imdsproxy.errors import ConfigInvalid, SourceError, SourceUnavailable
from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import HOSTS, parse_value
from imdsproxy.fleet.restores import is_lasting
from imdsproxy.host.sqlite_file import open_store, store_failures, transaction

FILE: Final = "journal.sqlite"

_SCHEMA: Final = """
CREATE TABLE lasting (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL) STRICT;
CREATE TABLE names (name TEXT PRIMARY KEY NOT NULL, holder TEXT NOT NULL) STRICT;
CREATE TABLE position (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    fleet TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    beats INTEGER NOT NULL
) STRICT
"""
_NOTE_EVERY_S: Final = 5.0
_AGAIN_S: Final = 5.0

Keep: TypeAlias = Callable[[Mapping[str, bytes]], Awaitable[None]]
"""Function that returns once lasting values are on the disk."""

_T = TypeVar("_T")

_log = structlog.get_logger()


async def keep_nothing(_: Mapping[str, bytes]) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Position:
    """Position up to which a hub has followed its fleet; `fleet` is empty before the hub knows a fleet.

    The incarnation is the highest that the hub has seen; revision and count of the hubs' beats are the highest in it.
    """

    fleet: str = ""
    incarnation: int = 0
    revision: int = 0
    beats: int = 0

    def advance(self, other: Position) -> Position:
        """Return the further one of two positions: a restored etcd takes neither back."""
        if other.incarnation < self.incarnation:
            return self
        if other.incarnation > self.incarnation:
            return other
        revision, beats = max(self.revision, other.revision), max(self.beats, other.beats)
        return Position(other.fleet, other.incarnation, revision, beats)

    def lacks(self, found: Position) -> str | None:
        """Return the reason why an etcd at `found` is older than this position; `None` if it is not."""
        if found.incarnation < self.incarnation:
            return f"etcd has incarnation {found.incarnation} of the fleet, and this hub has seen {self.incarnation}"
        if found.incarnation > self.incarnation:
            return None
        if found.revision < self.revision:
            return f"etcd is at revision {found.revision}, and this hub has seen {self.revision}"
        if found.beats < self.beats:
            return f"etcd has beat {found.beats}, and this hub has seen {self.beats}"
        return None


@dataclass(slots=True, eq=False)
class Journal:
    """Journal at `path`.

    Attributes:
        names: Descriptions of the holders, by name, for names that no host may have.
        problem: Reason why the file cannot be written.
        unreadable: Reasons by key for values that are not in force: damaged, or of another version.
    """

    path: Path
    position: Position = Position()
    names: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    _values: dict[str, bytes] = field(default_factory=dict)
    _hashes: dict[str, int] = field(default_factory=dict)
    _new_names: dict[str, str] = field(default_factory=dict)
    _written: Position = Position()
    _connection: sqlite3.Connection | None = None
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="imdsproxy-journal")
    )
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def open(self) -> dict[str, bytes]:
        """Open or make the file; return its lasting values that can be read.

        Raises `ConfigInvalid` if the file is damaged or another program's, and `SourceUnavailable` if it cannot be used
        now.
        """
        try:
            return await self._in_thread(self._open)
        except SourceUnavailable:
            raise
        except SourceError as error:
            raise ConfigInvalid(
                f"the journal of this hub cannot be used: {error.message}",
                hint=f"look at {self.path.parent}. A hub that begins without its journal goes by etcd and by the "
                "journals of other hubs: move the file away if it is damaged",
            ) from error

    def _open(self) -> dict[str, bytes]:
        with store_failures(self.path):
            self._connection = open_store(self.path, (_SCHEMA,))
            # An operator relies on an answered write, even if the machine crashes.
            self._connection.execute("PRAGMA synchronous = FULL")
            execute = self._connection.execute
            row = execute("SELECT fleet, incarnation, revision, beats FROM position").fetchone()
            if row is not None:
                self.position = self._written = Position(*row)
            self.names = dict(execute("SELECT name, holder FROM names").fetchall())
            found = dict(execute("SELECT key, value FROM lasting").fetchall())
        readable: dict[str, bytes] = {}
        for key, value in found.items():
            why = _why_unreadable(key, value)
            if why is None:
                readable[key] = value
            else:
                # The row stays until etcd has a value that replaces it.
                self.unreadable[key] = why
                _log.error("value in the journal ignored", key=key, reason=why)
        self._hashes = {key: hash(value) for key, value in readable.items()}
        return readable

    async def close(self) -> None:
        try:
            await self.flush()
        finally:
            connection, self._connection = self._connection, None
            if connection is not None:
                await self._in_thread(connection.close)
            self._thread.shutdown(wait=False)

    def advance(self, position: Position) -> None:
        """Record etcd's position; `run` or the next values write it to the disk."""
        self.position = self.position.advance(position)

    def note(self, values: Mapping[str, bytes]) -> None:
        for key, value in values.items():
            # Each start passes all values, and almost none has changed.
            if self._hashes.get(key) != hash(value):
                self._hashes[key], self._values[key] = hash(value), value
                self._changed.set()

    def note_name(self, name: str, holder: str) -> None:
        if self.names.get(name) != holder:
            self.names[name] = self._new_names[name] = holder
            self._changed.set()

    async def keep(self, values: Mapping[str, bytes]) -> None:
        """Write values to the disk; a failure is logged and reported, and the values stay pending."""
        self.note(values)
        await self.flush()

    async def run(self) -> None:
        """Write queued values until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_NOTE_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            await self.flush()
            if self.problem is not None:
                await asyncio.sleep(_AGAIN_S)

    async def flush(self) -> None:
        async with self._writing:
            self._changed.clear()
            values, names, position = self._values, self._new_names, self.position
            if not (values or names) and position == self._written:
                return
            self._values, self._new_names = {}, {}
            written = False
            try:
                await self._in_thread(partial(self._write, values, names, position))
                written = True
            except SourceError as error:
                if self.problem is None:
                    _log.error("journal not written", error=error.message, hint=error.hint)
                self.problem = error.message
                return
            finally:
                if not written:
                    # Values queued meanwhile are newer.
                    self._values, self._new_names = values | self._values, names | self._new_names
            self._written, self.problem = position, None
            for key in values:
                self.unreadable.pop(key, None)

    def _write(
        self, values: Mapping[str, bytes], names: Mapping[str, str], position: Position
    ) -> None:
        connection = self._connection
        if connection is None:
            return
        with store_failures(self.path), transaction(connection):
            connection.executemany("INSERT OR REPLACE INTO lasting VALUES (?, ?)", values.items())
            connection.executemany("INSERT OR REPLACE INTO names VALUES (?, ?)", names.items())
            row = position.fleet, position.incarnation, position.revision, position.beats
            connection.execute("INSERT OR REPLACE INTO position VALUES (1, ?, ?, ?, ?)", row)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _why_unreadable(key: str, value: bytes) -> str | None:
    """Return the reason why a row of the file is unusable; `None` if the row is usable."""
    try:
        parse_value(key, value)
    except Unreadable as error:
        return str(error)
    return None if is_lasting(key) else "no lasting value has such a key"


def find_host(path: Path, name: str) -> bool:
    """Return whether the journal at `path` exists and has a host; for commands on a hub's machine."""
    if not path.exists():
        return False
    with (
        store_failures(path),
        closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection,
    ):
        query = "SELECT 1 FROM lasting WHERE key = ?"
        return connection.execute(query, (HOSTS + name,)).fetchone() is not None
