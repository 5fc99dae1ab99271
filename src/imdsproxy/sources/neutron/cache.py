"""Cache of Neutron's known ports in a file that survives a restart."""

import json
import sqlite3
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.host.sqlite_file import SideCache
from imdsproxy.model.entities import NetworkId
from imdsproxy.sources.neutron.known import EntryKey, Route
from imdsproxy.sources.neutron.ports import NeutronPort, parse_ports, render_port

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

_Key: TypeAlias = EntryKey | None
_Value: TypeAlias = NeutronPort | Route | float


def open_cache(path: Path) -> SideCache[_Key, _Value]:
    """Return the cache in the file at `path`.

    Its keys are port ids for ports, router and address for routes (with `confirmed` 0), and `None` for the Unix time of
    Neutron's last answer. The real time may be up to a minute later than the stored time.
    """
    lost = "what is known of Neutron's ports is not kept"
    return SideCache(path, _SCHEMA, _read, _write, "kept", lost)


def _read(connection: sqlite3.Connection) -> Iterator[tuple[_Key, _Value]]:
    # The time of the last answer comes first: the ports' age depends on it.
    for (at,) in connection.execute("SELECT at FROM answered"):
        yield None, float(at)
    for (text,) in connection.execute("SELECT port FROM ports"):
        # Apply the same rules as for Neutron's answers, because other programs may have written to the file.
        try:
            (port,) = parse_ports({"ports": [json.loads(text)]})
        except (ValueError, RecursionError):
            continue
        yield port.id, port
    for router, address, network, port_id in connection.execute(
        "SELECT router, address, network, port FROM routes"
    ):
        try:
            key = NetworkId(router), ip_address(address)
        except ValueError:
            continue
        yield key, Route(NetworkId(network), port_id, confirmed=0.0)


def _write(connection: sqlite3.Connection, key: _Key, value: _Value | None) -> None:
    if key is None:
        connection.execute("INSERT OR REPLACE INTO answered (one, at) VALUES (1, ?)", (value,))
    elif isinstance(key, str):
        connection.execute("DELETE FROM ports WHERE id = ?", (key,))
        if isinstance(value, NeutronPort):
            port = json.dumps(render_port(value))
            connection.execute("INSERT INTO ports (id, port) VALUES (?, ?)", (key, port))
    else:
        at = key[0], str(key[1])
        connection.execute("DELETE FROM routes WHERE router = ? AND address = ?", at)
        if isinstance(value, Route):
            insert = "INSERT INTO routes (router, address, network, port) VALUES (?, ?, ?, ?)"
            connection.execute(insert, (*at, value.network, value.port))
