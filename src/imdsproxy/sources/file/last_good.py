"""What was in force of a directory of records, kept over a restart.

A file that is broken when the controller starts must not cost guests their documents: the records that
were in force when the process before ended are taken as in force, and the files read then change them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.core.model import Instance, Network
from imdsproxy.core.packed import PackedInstance
from imdsproxy.core.records import parse_instance, parse_network, render_record
from imdsproxy.sources.in_force import Entry
from imdsproxy.sources.sqlite_file import SideCache

_SCHEMA: Final = """
CREATE TABLE last_good (
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    file TEXT NOT NULL,
    record TEXT NOT NULL,
    user_data BLOB,
    PRIMARY KEY (kind, id)
) STRICT
"""


_InForce: TypeAlias = "Entry[Network] | Entry[PackedInstance]"

LastGood: TypeAlias = "SideCache[tuple[str, str], _InForce]"
"""By kind (`networks` or `instances`) and id. Of an entry in force, the file and the record are kept."""


def open_last_good(path: Path) -> LastGood:
    """The cache in the file at `path`."""
    return SideCache(path, _SCHEMA, _write, "last-good", "records in force are not kept")


def load_last_good(cache: LastGood) -> tuple[tuple[str, Network | PackedInstance], ...]:
    """Everything kept, each with its file; nothing where there is no such cache or it cannot be used. Blocks."""
    return cache.load(lambda connection: tuple(_read(connection)), ())


def _read(connection: sqlite3.Connection) -> Iterator[tuple[str, Network | PackedInstance]]:
    rows = connection.execute("SELECT kind, file, record, user_data FROM last_good")
    for kind, file, text, user_data in rows:
        try:
            mapping = json.loads(text)
        except ValueError:
            continue
        record = parse_network(mapping) if kind == "networks" else parse_instance(mapping)
        if isinstance(record, Network):
            yield file, record
        elif isinstance(record, Instance):
            yield file, PackedInstance.of(replace(record, user_data=user_data))


def _write(connection: sqlite3.Connection, key: tuple[str, str], kept: _InForce | None) -> None:
    if kept is None or kept.record is None:
        connection.execute("DELETE FROM last_good WHERE kind = ? AND id = ?", key)
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
        (*key, kept.file, json.dumps(render_record(record)), user_data),
    )
