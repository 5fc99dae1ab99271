"""What is known of Neutron's ports, in a file that outlives a restart."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.sources.neutron.known import EntryKey, Route
from imdsproxy.sources.neutron.ports import NeutronPort, parse_ports, render_port
from imdsproxy.sources.sqlite_file import SideCache

_SCHEMA: Final = """
CREATE TABLE ports (id TEXT PRIMARY KEY NOT NULL, port TEXT NOT NULL) STRICT;
CREATE TABLE routes (
    router TEXT NOT NULL,
    network TEXT NOT NULL,
    address TEXT NOT NULL,
    port TEXT NOT NULL,
    PRIMARY KEY (router, address)
) STRICT;
CREATE TABLE answered (one INTEGER PRIMARY KEY CHECK (one = 1), at REAL NOT NULL) STRICT
"""

NeutronCache: TypeAlias = "SideCache[EntryKey | None, NeutronPort | Route | float]"
"""Ports by id, routes by router and address, and by `None` when Neutron last answered, in Unix time."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the cache holds.

    Attributes:
        routes: With `confirmed` 0.
        answered: When Neutron answered last, in Unix time; it may be a minute later than that.
    """

    ports: tuple[NeutronPort, ...] = ()
    routes: tuple[tuple[AddressKey, Route], ...] = ()
    answered: float | None = None


def open_cache(path: Path) -> NeutronCache:
    """The cache in the file at `path`."""
    return SideCache(path, _SCHEMA, _write, "kept", "what is known of Neutron's ports is not kept")


def load_cache(cache: NeutronCache) -> Kept:
    """Everything kept; nothing where there is no such file or it cannot be used. Blocks."""
    return cache.load(_read) or Kept()


def _read(connection: sqlite3.Connection) -> Kept:
    row = connection.execute("SELECT at FROM answered").fetchone()
    return Kept(
        tuple(_ports(connection.execute("SELECT port FROM ports"))),
        tuple(_routes(connection.execute("SELECT router, address, network, port FROM routes"))),
        None if row is None else float(row[0]),
    )


def _ports(rows: sqlite3.Cursor) -> Iterator[NeutronPort]:
    for (text,) in rows:
        # By the same rules as Neutron's own answer, because others may have written to the file.
        try:
            yield from parse_ports({"ports": [json.loads(text)]})
        except ValueError:
            continue


def _routes(rows: sqlite3.Cursor) -> Iterator[tuple[AddressKey, Route]]:
    for router, address, network, port in rows:
        try:
            key = NetworkId(router), ip_address(address)
        except ValueError:
            continue
        yield key, Route(NetworkId(network), port, confirmed=0.0)


def _write(
    connection: sqlite3.Connection,
    key: EntryKey | None,
    value: NeutronPort | Route | float | None,
) -> None:
    if key is None:
        connection.execute("INSERT OR REPLACE INTO answered (one, at) VALUES (1, ?)", (value,))
    elif isinstance(key, str):
        connection.execute("DELETE FROM ports WHERE id = ?", (key,))
        if isinstance(value, NeutronPort):
            row = key, json.dumps(render_port(value))
            connection.execute("INSERT INTO ports (id, port) VALUES (?, ?)", row)
    else:
        at = key[0], str(key[1])
        connection.execute("DELETE FROM routes WHERE router = ? AND address = ?", at)
        if isinstance(value, Route):
            insert = "INSERT INTO routes (router, address, network, port) VALUES (?, ?, ?, ?)"
            connection.execute(insert, (*at, value.network, value.port))
