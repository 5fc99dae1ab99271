"""The embedded store's file: how it is opened, recognised and brought up to date."""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING, Final

from imdsproxy.errors import SourceRefused, SourceUnavailable
from imdsproxy.host.files import open_locked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["APPLICATION_ID", "MIGRATIONS", "PACKED", "lock_store", "open_store"]

APPLICATION_ID: Final = 0x494D4453
"""`IMDS`: SQLite's `application_id`, by which a store is told from any other database."""

_VERSION_1: Final = """
CREATE TABLE networks (id TEXT PRIMARY KEY NOT NULL, record TEXT NOT NULL) STRICT;
CREATE TABLE instances (id TEXT PRIMARY KEY NOT NULL, record TEXT NOT NULL, user_data BLOB) STRICT;
CREATE TABLE ports (
    network TEXT NOT NULL,
    instance TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    PRIMARY KEY (network, instance)
) STRICT, WITHOUT ROWID;
CREATE INDEX ports_by_instance ON ports (instance);
CREATE TABLE addresses (
    network TEXT NOT NULL,
    address TEXT NOT NULL,
    instance TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    PRIMARY KEY (network, address)
) STRICT, WITHOUT ROWID;
CREATE INDEX addresses_by_instance ON addresses (instance)
"""
# Columns hold what is looked up by; all else is the record as JSON, in the form of `core.records`.
# User data is apart, as it is: up to 16 MiB of any bytes. That no address is there twice holds for
# whatever program writes.

PACKED: Final = """
CREATE TABLE IF NOT EXISTS packed (
    instance TEXT PRIMARY KEY NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    stamp BLOB NOT NULL,
    data BLOB NOT NULL
) STRICT, WITHOUT ROWID
"""
"""Records as `core.packed` has them in memory, so that a start need not parse each one. A row that is missing, or has
another stamp than the rows beside it, is made again: it is no part of what a version of the store promises."""

MIGRATIONS: Final[tuple[str, ...]] = (_VERSION_1,)
"""What takes a store from one version (`user_version`) to the next; statements between
semicolons. Never changed, only added to."""

_BUSY_S: Final = 5.0


def lock_store(path: Path) -> int:
    """Keep others from writing to the store for as long as the descriptor given back is open.

    SQLite's own locks allow several writers in turn; ours would overwrite what they do not know of.

    Raises:
        SourceUnavailable: Another process has it.
        OSError: The lock file cannot be made.
    """
    lock = path.with_name(f"{path.name}.lock")
    descriptor = open_locked(lock, os.O_RDWR | os.O_CREAT)
    if descriptor is None:
        holder = lock.read_text("ascii", "replace").strip() or "unknown"
        raise SourceUnavailable(
            f"the store {path} is in use by another imdsproxy, process {holder}",
            hint="stop that one; a store has one writer",
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def open_store(path: Path, migrations: Sequence[str] = MIGRATIONS) -> sqlite3.Connection:
    """Open the store, making it or bringing it up to date; for the calling thread only.

    A store of a newer version, and a database of another program, are left as they are.

    Raises:
        SourceRefused: It is one of those.
        sqlite3.Error: SQLite refuses.
        OSError: The file or its directory cannot be made.
    """
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    # Made here so that nobody else can read it, whatever the umask is: it holds user data.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    # Another program may have stored what is no UTF-8: that spoils its own row, not the reading of
    # all.
    connection.text_factory = lambda data: data.decode("utf-8", "backslashreplace")
    try:
        _check(connection, path, len(migrations))
        _configure(connection)
        _migrate(connection, migrations)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection, path: Path, newest: int) -> None:
    version = _pragma(connection, "user_version")
    application = _pragma(connection, "application_id")
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application != APPLICATION_ID and (application or version or tables):
        raise SourceRefused(
            f"{path} is a database of another program",
            hint="correct sources.sqlite.path, or move the file away",
        )
    if version > newest:
        raise SourceRefused(
            f"the store {path} has version {version}, this imdsproxy knows up to {newest}",
            hint="run the newer imdsproxy that wrote it, or restore a copy from before the upgrade",
        )


def _configure(connection: sqlite3.Connection) -> None:
    # NORMAL: what is committed outlives a kill -9; `Store.sync` makes it outlive a power cut before
    # it is acknowledged. FULL does the same inside each commit, and guests would wait for the disk
    # (measured: 4 to 10 ms against 0.15 ms).
    for pragma in (
        "journal_mode = WAL",
        "synchronous = NORMAL",
        "foreign_keys = ON",
        "trusted_schema = OFF",
        "cell_size_check = ON",
        "journal_size_limit = 67108864",
    ):
        connection.execute(f"PRAGMA {pragma}").fetchall()


def _migrate(connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
    version = _pragma(connection, "user_version")
    if version == len(migrations):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for migration in migrations[version:]:
            for statement in migration.split(";"):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
