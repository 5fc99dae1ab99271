"""What is known of Neutron's ports, kept over a restart: guests are answered while Neutron is down."""

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
from imdsproxy.sources.neutron.known import Route
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

NeutronCache: TypeAlias = "SideCache[str | AddressKey | None, NeutronPort | Route | float]"
"""Ports by id, routes by router and address, and by `None` when Neutron last answered, in Unix time."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the cache holds.

    Attributes:
        routes: With `confirmed` 0.
        answered: When Neutron answered last, in Unix time; it may be a minute later than that.
    """

    ports: tuple[NeutronPort, ...] = ()
    routes: tuple[Route, ...] = ()
    answered: float | None = None


def open_cache(path: Path) -> NeutronCache:
    """The cache in the file at `path`."""
    return SideCache(path, _SCHEMA, _write, "kept", "what is known of Neutron's ports is not kept")


def load_cache(cache: NeutronCache) -> Kept:
    """Everything kept; nothing where there is no such file or it cannot be used. Blocks."""
    return cache.load(_read, Kept())


def _read(connection: sqlite3.Connection) -> Kept:
    ports = tuple(_ports(connection.execute("SELECT port FROM ports")))
    routes = tuple(_routes(connection.execute("SELECT router, network, address, port FROM routes")))
    row = connection.execute("SELECT at FROM answered").fetchone()
    return Kept(ports, routes, None if row is None else float(row[0]))


def _ports(rows: sqlite3.Cursor) -> Iterator[NeutronPort]:
    for (text,) in rows:
        # By the same rules as Neutron's own answer, because others may have written to the file.
        try:
            yield from parse_ports({"ports": [json.loads(text)]})
        except ValueError:
            continue


def _routes(rows: sqlite3.Cursor) -> Iterator[Route]:
    for router, network, address, port in rows:
        try:
            key = NetworkId(network), ip_address(address)
        except ValueError:
            continue
        yield Route(NetworkId(router), key, port, confirmed=0.0)


def _write(
    connection: sqlite3.Connection,
    key: str | AddressKey | None,
    value: NeutronPort | Route | float | None,
) -> None:
    match key, value:
        case _, NeutronPort() as port:
            row: tuple[object, ...] = (port.id, json.dumps(render_port(port)))
            connection.execute("INSERT OR REPLACE INTO ports (id, port) VALUES (?, ?)", row)
        case _, Route(router=router, key=(network, address), port=port_id):
            row = (router, network, str(address), port_id)
            connection.execute(
                "INSERT OR REPLACE INTO routes (router, network, address, port) VALUES (?, ?, ?, ?)",
                row,
            )
        case None, answered:
            connection.execute(
                "INSERT OR REPLACE INTO answered (one, at) VALUES (1, ?)", (answered,)
            )
        case str(), _:
            connection.execute("DELETE FROM ports WHERE id = ?", (key,))
        case (router, address), _:
            connection.execute(
                "DELETE FROM routes WHERE router = ? AND address = ?", (router, str(address))
            )
