"""The copy of a host's items on its disk: written before anything of it is in force, and served without a hub.

It may not be deleted as a cache may: it is also what keeps a host from going back in time.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256 as sha256_of
from pathlib import Path
from threading import Lock
from typing import Final

from imdsproxy.core.fleet.stream import ItemKey
from imdsproxy.core.model import InstanceId, StoredBytes, digest_of
from imdsproxy.errors import SourceCorrupt, SourceUnavailable
from imdsproxy.host.clock import Moment
from imdsproxy.sources.fleet.known import Item, Position
from imdsproxy.sources.sqlite_file import open_store, store_failures, transaction

_SCHEMA: Final = """
CREATE TABLE items (key TEXT PRIMARY KEY NOT NULL, revision INTEGER NOT NULL, value TEXT NOT NULL) STRICT;
CREATE TABLE user_data (
    sha256 TEXT PRIMARY KEY NOT NULL,
    digest TEXT NOT NULL,
    length INTEGER NOT NULL,
    data BLOB NOT NULL
) STRICT;
CREATE TABLE position (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    fleet TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    at REAL,
    boot TEXT,
    up_s REAL
) STRICT
"""
_UNUSED: Final = """
DELETE FROM user_data WHERE sha256 NOT IN (
    SELECT json_extract(value, '$.user_data.sha256') FROM items WHERE json_extract(value, '$.user_data') IS NOT NULL
) AND sha256 NOT IN (SELECT value FROM json_each(?)) RETURNING sha256
"""


@dataclass(slots=True, eq=False)
class KeptItems:
    """The file at `path`. Everything here blocks; `fetch` may be called in any thread, the rest in one.

    Attributes:
        vouched: When a hub last knew the fleet's state and this host had it; `None` for never.
    """

    path: Path
    vouched: Moment | None = None
    _connection: sqlite3.Connection | None = None
    _reader: sqlite3.Connection | None = None
    _reading: Lock = field(default_factory=Lock)
    _stored: dict[str, tuple[int, str]] = field(default_factory=dict)

    def open(self) -> tuple[Position, dict[ItemKey, Item]]:
        """Everything in the file; it is made where there is none.

        Raises:
            SourceError: It cannot be used.
        """
        with store_failures(self.path):
            self._connection = open_store(self.path, (_SCHEMA,))
            # An acknowledged revision outlives a power cut, and so does what a guest has read.
            self._connection.execute("PRAGMA synchronous = FULL")
            execute = self._connection.execute
            uri = f"{self.path.as_uri()}?mode=ro"
            self._reader = sqlite3.connect(uri, uri=True, check_same_thread=False)
            row = execute(
                "SELECT fleet, incarnation, revision, at, boot, up_s FROM position"
            ).fetchone()
            position = Position() if row is None else Position(*row[:3])
            self.vouched = None if row is None or row[3] is None else Moment(*row[3:])
            rows = execute("SELECT sha256, digest, length FROM user_data")
            self._stored = {sha256: (length, digest) for sha256, digest, length in rows}
            try:
                return position, {
                    key: (revision, dict(json.loads(value)))
                    for key, revision, value in execute("SELECT key, revision, value FROM items")
                }
            except (ValueError, TypeError, RecursionError) as error:
                raise SourceCorrupt(
                    f"{self.path} has an item that is no JSON object",
                    hint="move the file away while a hub is reachable, and restart imdsproxy",
                ) from error

    def close(self) -> None:
        """Close the file."""
        with self._reading:
            for connection in (self._reader, self._connection):
                if connection is not None:
                    connection.close()
            self._reader = self._connection = None

    def stored(self, instance: InstanceId, sha256: str) -> StoredBytes | None:
        """User data that is here."""
        found = self._stored.get(sha256)
        if found is None:
            return None
        return StoredBytes(*found, instance, UserDataFile(self, sha256))

    def keep_user_data(self, data: bytes) -> None:
        """Have user data here before items say that an instance has it.

        Raises:
            SourceError: It cannot be stored.
        """
        sha256, digest = sha256_of(data).hexdigest(), digest_of(data)
        with store_failures(self.path), closing(self._open().cursor()) as cursor:
            insert = "INSERT OR REPLACE INTO user_data VALUES (?, ?, ?, ?)"
            cursor.execute(insert, (sha256, digest, len(data), data))
        self._stored[sha256] = len(data), digest

    def keep(
        self,
        position: Position,
        items: Mapping[ItemKey, Item | None],
        vouched: Moment | None,
        renumbered: Iterable[ItemKey] = (),
    ) -> None:
        """Have the disk keep a set of changes, all or none.

        Args:
            position: How far the host is with them.
            items: See `Applied.stored`.
            vouched: See `KeptItems.vouched`.
            renumbered: See `Applied.renumbered`.

        Raises:
            SourceError: It cannot be stored.
        """
        with store_failures(self.path), transaction(connection := self._open()):
            for key, item in items.items():
                if item is None:
                    connection.execute("DELETE FROM items WHERE key = ?", (key,))
                    continue
                revision, value = item
                insert = "INSERT OR REPLACE INTO items VALUES (?, ?, ?)"
                text = json.dumps(value, separators=(",", ":"))
                connection.execute(insert, (key, revision, text))
            for key in renumbered:
                connection.execute("UPDATE items SET revision = 0 WHERE key = ?", (key,))
            connection.execute(
                "INSERT OR REPLACE INTO position VALUES (1, ?, ?, ?, ?, ?, ?)",
                (position.fleet, position.incarnation, position.revision, *_row_of(vouched)),
            )
        self.vouched = vouched

    def note(self, vouched: Moment) -> None:
        """Have the file say that what it has was still so."""
        with store_failures(self.path):
            update = "UPDATE position SET at = ?, boot = ?, up_s = ?"
            self._open().execute(update, _row_of(vouched))
        self.vouched = vouched

    def sweep(self, needed: Collection[str] = ()) -> None:
        """Delete user data that no item names any more; `needed`, by SHA-256, has come before its item."""
        with store_failures(self.path):
            for (sha256,) in self._open().execute(_UNUSED, [json.dumps([*needed])]).fetchall():
                self._stored.pop(sha256, None)

    def fetch(self, sha256: str) -> bytes:
        """User data.

        Raises:
            SourceError: It is not here, or cannot be read.
        """
        with self._reading, store_failures(self.path):
            row = None
            if self._reader is not None:
                query = "SELECT data FROM user_data WHERE sha256 = ?"
                row = self._reader.execute(query, (sha256,)).fetchone()
        if row is None:
            raise SourceUnavailable(f"{self.path} has no user data {sha256}")
        return bytes(row[0])

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise SourceUnavailable(f"{self.path} is not open")
        return self._connection


def _row_of(moment: Moment | None) -> tuple[float, str, float] | tuple[None, None, None]:
    return (None, None, None) if moment is None else (moment.at, moment.boot, moment.up_s)


@dataclass(frozen=True, slots=True)
class UserDataFile:
    """Gets user data of a file; equal where both are the same."""

    kept: KeptItems = field(repr=False)
    sha256: str

    def __call__(self, _: InstanceId) -> bytes:
        """The bytes."""
        return self.kept.fetch(self.sha256)
