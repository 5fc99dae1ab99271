"""The embedded store's tables, its lock, and how to read it while another process has it."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import quote

from imdsproxy.core.records import Records, parse_records
from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.files import open_locked

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


def read_store(path: Path) -> Records:
    """What the file holds; none holds nothing. User-data is not read: a byte stands for what there is of it.

    Raises:
        SourceUnavailable: It cannot be read, or is no store.
    """
    if not path.exists():
        return Records()
    # Without a log the file is whole, and SQLite need not make files beside it to read it.
    whole = "" if path.with_name(f"{path.name}-wal").exists() else "&immutable=1"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro{whole}", uri=True)) as store:
            networks = [
                json.loads(text) for (text,) in store.execute("SELECT record FROM networks")
            ]
            instances = [
                {**json.loads(text), **({"user_data": "?"} if filled else {})}
                for text, filled in store.execute(
                    "SELECT record, user_data IS NOT NULL FROM instances"
                )
            ]
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise SourceUnavailable(f"cannot read {path}: {error}") from error
    return parse_records({"networks": networks, "instances": instances}, file=str(path))
