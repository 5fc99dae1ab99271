"""The embedded store's records while nobody may have the store: nothing is made, locked, mended or changed."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from imdsproxy.core.records.document import Records, parse_records
from imdsproxy.errors import SourceUnavailable

__all__ = ["read_store"]


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
