"""What was known of Neutron's ports, kept over a restart, so that guests are answered while Neutron is not there."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from imdsproxy.core.model import NetworkId
from imdsproxy.errors import Problem, SourceError
from imdsproxy.sources.neutron_api import NeutronPort, parse_ports
from imdsproxy.sources.neutron_routes import Route
from imdsproxy.sources.sqlite_failure import store_failures
from imdsproxy.sources.sqlite_schema import open_store

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

__all__ = ["Kept", "KeptPorts"]

_SCHEMA: Final = (
    """
CREATE TABLE ports (id TEXT PRIMARY KEY NOT NULL, port TEXT NOT NULL) STRICT;
CREATE TABLE routes (
    router TEXT NOT NULL,
    network TEXT NOT NULL,
    address TEXT NOT NULL,
    port TEXT NOT NULL,
    PRIMARY KEY (router, address)
) STRICT;
CREATE TABLE answered (one INTEGER PRIMARY KEY CHECK (one = 1), at REAL NOT NULL) STRICT
""",
)


@dataclass(frozen=True, slots=True)
class Kept:
    """What there was.

    Attributes:
        routes: With `confirmed` 0.
        answered: When Neutron answered last, in Unix time; it may be a minute later than that.
    """

    ports: tuple[NeutronPort, ...] = ()
    routes: tuple[Route, ...] = ()
    answered: float | None = None


@dataclass(slots=True)
class KeptPorts:
    """The file at `path`. Nothing depends on it but a start without Neutron: it may be deleted.

    Attributes:
        path: An SQLite file; made when there is something to keep.
        problem: Why it cannot be used, while that is so.
    """

    path: Path
    problem: Problem | None = None
    _unsaved: dict[str, NeutronPort | None] = field(default_factory=dict)

    def load(self) -> Kept:
        """Everything kept; nothing where there is no such file or it cannot be used."""
        try:
            with store_failures(self.path):
                if not self.path.exists():
                    return Kept()
                with closing(open_store(self.path, _SCHEMA)) as connection:
                    return _load(connection)
        except SourceError as error:
            self._note(error)
            return Kept()

    def save(
        self,
        ports: Mapping[str, NeutronPort | None],
        routes: Iterable[Route] | None,
        answered: float | None,
    ) -> None:
        """Write what has changed; ports that cannot be written now are written the next time.

        Args:
            ports: By id; `None` for one that has gone.
            routes: All of them, or `None` where they are as before.
            answered: As `Kept` has it.
        """
        self._unsaved.update(ports)
        try:
            with store_failures(self.path), closing(open_store(self.path, _SCHEMA)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                _save_ports(connection, self._unsaved)
                if routes is not None:
                    _save_routes(connection, routes)
                if answered is not None:
                    connection.execute(
                        "INSERT OR REPLACE INTO answered (one, at) VALUES (1, ?)", (answered,)
                    )
                connection.execute("COMMIT")
        except SourceError as error:
            self._note(error)
        else:
            self.problem = None
            self._unsaved.clear()

    def _note(self, error: SourceError) -> None:
        self.problem = Problem(
            "kept",
            f"what is known of Neutron's ports is not kept over a restart: {error.message}",
            f"{error.hint}; it may be deleted, it is made again",
            str(self.path),
        )


def _load(connection: sqlite3.Connection) -> Kept:
    ports = tuple(_ports(connection.execute("SELECT port FROM ports")))
    routes = tuple(_routes(connection.execute("SELECT router, network, address, port FROM routes")))
    row = connection.execute("SELECT at FROM answered").fetchone()
    return Kept(ports, routes, None if row is None else float(row[0]))


def _ports(rows: sqlite3.Cursor) -> Iterator[NeutronPort]:
    for (text,) in rows:
        # By the same rules as Neutron's own answer: who can write here could else put in anything.
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


def _save_ports(connection: sqlite3.Connection, ports: Mapping[str, NeutronPort | None]) -> None:
    for port_id, port in ports.items():
        if port is None:
            connection.execute("DELETE FROM ports WHERE id = ?", (port_id,))
        else:
            connection.execute(
                "INSERT OR REPLACE INTO ports (id, port) VALUES (?, ?)", (port_id, _render(port))
            )


def _save_routes(connection: sqlite3.Connection, routes: Iterable[Route]) -> None:
    connection.execute("DELETE FROM routes")
    connection.executemany(
        "INSERT INTO routes (router, network, address, port) VALUES (?, ?, ?, ?)",
        [(each.router, each.key[0], str(each.key[1]), each.port) for each in routes],
    )


def _render(port: NeutronPort) -> str:
    """In the form of Neutron's own answer."""
    return json.dumps(
        {
            "id": port.id,
            "network_id": port.network,
            "mac_address": port.mac,
            "fixed_ips": [{"ip_address": str(address)} for address in port.addresses],
            "device_id": port.device,
            "device_owner": port.owner,
            "project_id": port.project,
            "created_at": None
            if port.created_at is None
            else datetime.fromtimestamp(port.created_at, UTC).isoformat(),
        }
    )
