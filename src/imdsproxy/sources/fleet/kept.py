"""Copy of a host's items on disk: written before the items come into force, and served without a hub.

Unlike a cache, it must not be deleted: it also keeps a host from returning to older revisions. Each read is compared
with a digest, and deleted data is overwritten.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from hashlib import sha256 as sha256_of
from pathlib import Path
from threading import Lock
from typing import Final

from imdsproxy.errors import SourceCorrupt, SourceUnavailable
from imdsproxy.fleet.layout import UserData
from imdsproxy.fleet.stream import ItemKey
from imdsproxy.host.clock import Moment
from imdsproxy.host.sqlite_file import open_store, store_failures, transaction
from imdsproxy.model.entities import InstanceId, StoredBytes, digest_of
from imdsproxy.sources.fleet.known import Item, Position

_SCHEMA: Final = """
CREATE TABLE items (
    key TEXT PRIMARY KEY NOT NULL,
    revision INTEGER NOT NULL,
    value TEXT NOT NULL,
    key_digest TEXT NOT NULL,
    digest TEXT NOT NULL
) STRICT;
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
    up_s REAL,
    digest TEXT NOT NULL
) STRICT
"""
_SECRET: Final = ("keys/", "password/")
"""Key prefixes of items whose old values are secrets too."""

_REFILL: Final = "start it while a hub can be reached: the hub sends everything again"
_UNUSED: Final = """
DELETE FROM user_data WHERE sha256 NOT IN (
    SELECT json_extract(value, '$.user_data.sha256') FROM items WHERE json_extract(value, '$.user_data') IS NOT NULL
) AND sha256 NOT IN (SELECT value FROM json_each(?)) RETURNING sha256
"""


@dataclass(frozen=True, slots=True)
class Kept:
    """Content of the file: intact items, and the keys of damaged items, with whether the key itself is intact."""

    position: Position
    items: Mapping[ItemKey, Item]
    damaged: Mapping[ItemKey, bool] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class KeptItems:
    """The file at `path`. All methods block; `fetch` may be called in any thread, the others in one thread only.

    All raise `SourceError` if the file cannot be used. `vouched` is the last moment at which a hub knew the fleet's
    state and this host had the same.
    """

    path: Path
    vouched: Moment | None = None
    _connection: sqlite3.Connection | None = None
    _reader: sqlite3.Connection | None = None
    _reading: Lock = field(default_factory=Lock)
    _stored: dict[str, tuple[int, str]] = field(default_factory=dict)
    _damaged: set[str] = field(default_factory=set)
    _has_deleted: bool = True

    def open(self) -> Kept:
        """Open the file, creating a missing one, and return its content."""
        with self._failures():
            self._connection = open_store(self.path, (_SCHEMA,))
            self._connection.execute("PRAGMA secure_delete = ON").fetchall()
            # An acknowledged revision must survive a power cut, and so must data that a guest has read.
            self._connection.execute("PRAGMA synchronous = FULL")
            execute = self._connection.execute
            uri = f"{self.path.as_uri()}?mode=ro"
            self._reader = sqlite3.connect(uri, uri=True, check_same_thread=False)
            row = execute(
                "SELECT fleet, incarnation, revision, at, boot, up_s, digest FROM position"
            ).fetchone()
            if row is not None and row[6] != _digest(*row[:6]):
                raise SourceCorrupt(
                    f"{self.path} has another revision than imdsproxy wrote",
                    hint=f"stop imdsproxy; move the file aside; {_REFILL}",
                )
            position = Position() if row is None else Position(*row[:3])
            self.vouched = None if row is None or row[3] is None else Moment(*row[3:6])
            rows = execute("SELECT sha256, digest, length FROM user_data")
            self._stored = {sha256: (length, digest) for sha256, digest, length in rows}
            items: dict[ItemKey, Item] = {}
            damaged: dict[ItemKey, bool] = {}
            for key, revision, value, key_digest, digest in execute("SELECT * FROM items"):
                if digest == _digest(key, revision, value):
                    items[key] = revision, json.loads(value)
                else:
                    damaged[key] = key_digest == _digest(key)
            return Kept(position, items, damaged)

    def close(self) -> None:
        with self._reading:
            for connection in (self._reader, self._connection):
                if connection is not None:
                    connection.close()
            self._reader = self._connection = None

    def stored(self, instance: InstanceId, sha256: str) -> StoredBytes | None:
        """Return a reference to stored user data; `None` if the file does not have it."""
        found = self._stored.get(sha256)
        if found is None:
            return None
        return StoredBytes(*found, instance, UserDataFile(self, sha256))

    def keep_user_data(self, data: bytes) -> None:
        """Store user data before the items that name it."""
        sha256, digest = sha256_of(data).hexdigest(), digest_of(data)
        with self._failures(), closing(self._open().cursor()) as cursor:
            insert = "INSERT OR REPLACE INTO user_data VALUES (?, ?, ?, ?)"
            cursor.execute(insert, (sha256, digest, len(data), data))
        self._stored[sha256] = len(data), digest
        self._damaged.discard(sha256)

    def damaged_user_data(self) -> frozenset[UserData]:
        """Return user data that was damaged when read, and has not been fetched again."""
        found = ((sha256, self._stored.get(sha256)) for sha256 in tuple(self._damaged))
        return frozenset(UserData(sha256, one[0]) for sha256, one in found if one is not None)

    def keep(
        self,
        position: Position,
        items: Mapping[ItemKey, Item | None],
        vouched: Moment | None,
        renumbered: Iterable[ItemKey] = (),
    ) -> None:
        """Store a set of changes atomically (`Applied`)."""
        with self._failures(), transaction(connection := self._open()):
            for key, item in items.items():
                if item is None:
                    connection.execute("DELETE FROM items WHERE key = ?", (key,))
                    self._has_deleted = True
                    continue
                revision, value = item
                self._has_deleted = self._has_deleted or key.startswith(_SECRET)
                _put(connection, key, revision, json.dumps(value, separators=(",", ":")))
            for key in renumbered:
                query = "SELECT value FROM items WHERE key = ?"
                for (text,) in connection.execute(query, (key,)).fetchall():
                    _put(connection, key, 0, text)
            row = position.fleet, position.incarnation, position.revision, *_row_of(vouched)
            insert = "INSERT OR REPLACE INTO position VALUES (1, ?, ?, ?, ?, ?, ?, ?)"
            connection.execute(insert, (*row, _digest(*row)))
        self.vouched = vouched

    def note(self, vouched: Moment) -> None:
        """Store the moment at which a hub last vouched for the stored items."""
        with self._failures(), transaction(connection := self._open()):
            query = "SELECT fleet, incarnation, revision FROM position"
            for at in connection.execute(query).fetchall():
                row = *at, *_row_of(vouched)
                update = "UPDATE position SET at = ?, boot = ?, up_s = ?, digest = ?"
                connection.execute(update, (*row[3:], _digest(*row)))
        self.vouched = vouched

    def sweep(self, needed: Collection[str] = ()) -> None:
        """Delete user data that neither an item nor `needed` names, and overwrite the last copies of deleted data."""
        with self._failures():
            connection = self._open()
            for (sha256,) in connection.execute(_UNUSED, [json.dumps([*needed])]).fetchall():
                self._stored.pop(sha256, None)
                self._damaged.discard(sha256)
                self._has_deleted = True
            if self._has_deleted:
                # The write-ahead log still contains deleted data until other pages overwrite it.
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                self._has_deleted = bool(busy)

    def fetch(self, sha256: str) -> bytes:
        """Return user data after comparing it with its SHA-256."""
        with self._reading, self._failures():
            if self._reader is None:
                raise SourceUnavailable(f"{self.path} is not open")
            query = "SELECT data FROM user_data WHERE sha256 = ?"
            row = self._reader.execute(query, (sha256,)).fetchone()
        if row is None or sha256_of(row[0]).hexdigest() != sha256:
            self._damaged.add(sha256)
            raise SourceCorrupt(
                f"user data {sha256} in {self.path} is damaged",
                hint="the host fetches the user data again from a hub; check the disk",
            )
        return bytes(row[0])

    def _failures(self) -> AbstractContextManager[None]:
        return store_failures(self.path, refill=_REFILL)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise SourceUnavailable(f"{self.path} is not open")
        return self._connection


def _put(connection: sqlite3.Connection, key: ItemKey, revision: int, text: str) -> None:
    insert = "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?)"
    connection.execute(insert, (key, revision, text, _digest(key), _digest(key, revision, text)))


def _digest(*parts: object) -> str:
    return digest_of(json.dumps(parts).encode())


def _row_of(moment: Moment | None) -> tuple[float, str, float] | tuple[None, None, None]:
    return (None, None, None) if moment is None else (moment.at, moment.boot, moment.up_s)


@dataclass(frozen=True, slots=True)
class UserDataFile:
    """Reader of user data in a file. Readers of the same file and data are equal."""

    kept: KeptItems = field(repr=False)
    sha256: str

    def __call__(self, _: InstanceId) -> bytes:
        return self.kept.fetch(self.sha256)
