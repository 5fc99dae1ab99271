"""The source `neutron`: ports of OpenStack's network service, looked up when their guests ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeAlias

import structlog

from imdsproxy.core.addresses import normalise_address
from imdsproxy.core.model import InstanceId, IpAddress, NetworkId, Scope
from imdsproxy.core.observation import AddressKey, RecordSet
from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.host.clock import Clock
from imdsproxy.sources.api import (
    Confirmation,
    LookUp,
    LookUpUnavailable,
    Origin,
    PortFound,
    Publish,
    Reports,
)
from imdsproxy.sources.neutron.client import NeutronClient
from imdsproxy.sources.neutron.known import KnownPorts, Route
from imdsproxy.sources.neutron.look_ups import LookUpResult, LookUps
from imdsproxy.sources.neutron.ports import NeutronPort, PortQuery, parse_ports, render_port
from imdsproxy.sources.neutron.queries import Queries, QueryResult
from imdsproxy.sources.settings import NeutronSourceSettings
from imdsproxy.sources.sqlite_file import SideCache

_TICK_S: Final = 1.0
_SAVE_S: Final = 60.0
"""How often it is stored that Neutron still answers, where nothing else is to be stored."""
_LIST_AGAIN_S: Final = 10.0
_PROBE: Final = ("probe",)

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
class NeutronFigures:
    """What `/metrics` shows of the source.

    Attributes:
        queries: By result.
        look_ups: By result.
        ports: Known now, in force or aside.
        stale_s: Seconds since Neutron last answered (if it ever did), while it does not; else 0.
        backoff_s: Seconds until it is asked again, while it does not answer; else 0.
    """

    queries: Mapping[QueryResult, int] = field(default_factory=dict)
    look_ups: Mapping[LookUpResult, int] = field(default_factory=dict)
    ports: int = 0
    stale_s: float = 0.0
    backoff_s: float = 0.0


class NeutronSource:
    """Ports as instances whose documents Nova has; see `api.LookUpSource`. It can run once.

    Args:
        client: Neutron; closed when the run ends.
        cache: A file of ours that keeps what is known over a restart.
        settings: How Neutron is asked.
        clock: Time.
        random: Numbers from 0 to 1.
        sleep: Lets seconds pass.
        begin: Waited for before Neutron is asked for anything but a guest's look-up, because the first query loads
            libraries. A list without which the source knows nothing is read at once.
    """

    name: Final = "neutron"

    def __init__(
        self,
        client: NeutronClient,
        cache: Path,
        settings: NeutronSourceSettings,
        *,
        clock: Clock,
        random: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        begin: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._random = random
        self._sleep = sleep
        self._begin = begin
        self._cache = open_cache(cache)
        self._publish: Publish | None = None
        self._reports = Reports(self.name, defers=True)
        self._complete = False
        self._probed = False
        self._down = False
        self._list_failure: SourceUnavailable | None = None
        self._saved = clock.monotonic()
        self._known = KnownPorts()
        self._queries = Queries(
            client,
            clock,
            random,
            settings.max_queries,
            settings.refresh_s / 2,
            self._outage_changed,
        )
        self._look_ups = LookUps(self._known, self._queries, settings, clock, random, self._report)

    async def run(self, publish: Publish) -> None:
        """Report what is known, and keep it up to date, until cancelled.

        While Neutron does not answer, what was reported stays, and the source reports a problem. It stays in sync:
        what it does not know it learns when a guest asks, not with time.
        """
        try:
            await self._load()
            self._publish = publish
            self._report()
            if self._begin is not None and self._complete:
                await self._begin()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_fresh())
                if self._settings.list_every_s:
                    group.create_task(self._keep_listed())
        finally:
            self._publish = None
            await self._look_ups.close()
            await self._queries.close()
            await self._save()

    # Questions

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        """The instance that has the address; asks Neutron unless it is known."""
        if self._publish is None:
            return LookUpUnavailable("the source has not started yet")
        return await self._look_ups.look_up((scope, network, normalise_address(address)))

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:
        """The port's id in Neutron."""
        ports = self._known.of(instance)
        return Origin(f"ports.{ports[number].port.id}") if number < len(ports) else None

    def routes(self) -> Mapping[AddressKey, PortFound]:
        """Every address behind a router that was looked up and holds now."""
        return {
            key: PortFound(known.port.network, known.port.instance)
            for key, known in self._known.routes.in_force()
        }

    def confirmation(self, network: NetworkId, address: IpAddress) -> Confirmation | None:
        """How fresh the information about an address is."""
        known = self._known.at(network, normalise_address(address))
        if known is None:
            return None
        age = self._clock.monotonic() - known.confirmed
        return Confirmation(known.port.id, age, self._queries.outage is not None)

    @property
    def figures(self) -> NeutronFigures:
        """The figures at this moment."""
        queries, outage, now = self._queries, self._queries.outage, self._clock.monotonic()
        stale_s = backoff_s = 0.0
        if outage is not None:
            stale_s = now - (outage.since if queries.answered is None else queries.answered)
            backoff_s = max(0.0, outage.until - now)
        return NeutronFigures(
            dict(queries.results),
            dict(self._look_ups.results),
            len(self._known),
            stale_s,
            backoff_s,
        )

    # Rounds

    async def _keep_fresh(self) -> None:
        while True:
            await self._round()
            await self._sleep(_TICK_S)

    async def _round(self) -> None:
        # Before Neutron is asked: an answer may take long, and the controller may be killed meanwhile.
        await self._save()
        if self._queries.outage is None:
            # During an outage Neutron's last answers stay in force.
            self._known.expire(self._clock.monotonic(), self._settings.aside_s)
            self._known.routes.prune()
        self._look_ups.forget_old()
        self._queries.forget_old()
        if self._queries.may_ask:
            asked = await self._look_ups.refresh(max(0.0, self._settings.refresh_s - _TICK_S))
            if not asked and (self._queries.outage is not None or not self._probed):
                # Only to find out whether Neutron answers: an outage notes itself.
                with contextlib.suppress(SourceUnavailable):
                    await self._queries.ask(PortQuery(limit=1), share=_PROBE)
            self._probed = True
        self._report()

    async def _keep_listed(self) -> None:
        settings = self._settings
        while True:
            try:
                await self._look_ups.list_all()
            except SourceUnavailable as error:
                self._list_failure = error
                pause = min(settings.list_every_s, _LIST_AGAIN_S) * self._random()
            else:
                self._list_failure = None
                self._complete = True
                pause = settings.list_every_s
            self._report()
            await self._sleep(max(pause, _TICK_S))

    # Reports

    def _outage_changed(self) -> None:
        log = structlog.get_logger()
        outage = self._queries.outage
        if outage is None:
            log.info("neutron answers again")
        elif not self._down:
            failure = outage.failure
            log.warning("neutron does not answer", code=failure.code, error=failure.message)
        self._down = outage is not None
        self._report()

    def _report(self) -> None:
        """Publish what has changed."""
        if self._publish is None:
            return
        observation = self._reports.next(
            self._known.changes(),
            lambda: RecordSet(instances=dict(self._known.published)),
            # Whether Neutron answers does not count: what is known is published, the rest is looked up.
            in_sync=self._complete,
            problems=tuple(self._problems()),
            implied=self._known.networks,
        )
        if observation is not None:
            self._publish(observation)

    def _problems(self) -> Iterator[Problem]:
        outage, listing = self._queries.outage, self._list_failure
        if outage is not None:
            yield Problem("neutron", outage.failure.message, outage.failure.hint)
        elif listing is not None:
            yield Problem("list", f"not read: {listing.message}", listing.hint)
        if self._cache.problem is not None:
            yield self._cache.problem
        yield from self._known.problems

    # The cache

    async def _load(self) -> None:
        """Take over what the process before knew."""
        kept = await asyncio.to_thread(load_cache, self._cache)
        now = self._clock.monotonic()
        # Old enough that all of it is asked for at once.
        age = self._settings.refresh_s
        if kept.answered is not None:
            age = max(age, self._clock.now().timestamp() - kept.answered)
            self._queries.answered = now - age
        for port in kept.ports:
            known = self._known.put(port, now - age)
            if known is None:
                continue
            lifetime = self._settings.lifetime_s * (0.5 + 0.5 * self._random())
            self._known.keep(known, now + lifetime)
            if self._settings.list_every_s:
                self._known.keep(known)
        for route in kept.routes:
            self._known.routes.put(route)
        self._known.unsaved.clear()
        self._known.routes.unsaved.clear()
        self._complete = bool(kept.ports) or not self._settings.list_every_s

    async def _save(self) -> None:
        known, routes, now = self._known, self._known.routes, self._clock.monotonic()
        late = now - self._saved >= _SAVE_S
        if not (known.unsaved or routes.unsaved or (late and len(known) > 0)):
            return
        for key in known.unsaved:
            port = known.get(key)
            self._cache.keep({key: None if port is None else port.port})
        self._cache.keep({key: routes.get(key) for key in routes.unsaved})
        if self._queries.answered is not None:
            self._cache.keep({None: self._clock.now().timestamp() - (now - self._queries.answered)})
        known.unsaved.clear()
        routes.unsaved.clear()
        self._saved = now
        await asyncio.to_thread(self._cache.save)


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
    return cache.load(_read) or Kept()


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
