"""Neutron's list of ports in memory, time that goes on when a test says so, and a source over both."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import SourceUnavailable
from imdsproxy.model.entities import MacAddress, NetworkId, Scope
from imdsproxy.sources.api import LookUp
from imdsproxy.sources.neutron.client import NeutronClient, QueryTimedOut
from imdsproxy.sources.neutron.ports import NeutronPort, PortQuery
from imdsproxy.sources.neutron.source import NeutronSource
from support.hand_clock import HandClock
from support.source_runs import Heard, running

DOWN: Final = SourceUnavailable("connection refused", hint="start it")
LATE: Final = QueryTimedOut("no answer within 5 s")
_DEADLINE_S: Final = 10.0


def neutron_port(
    port_id: str,
    network: str,
    *addresses: str,
    device: str = "i-1",
    project: str = "blue",
    mac: str | None = None,
    owner: str = "compute:nova",
    host: str | None = None,
    created_at: int | None = None,
) -> NeutronPort:
    return NeutronPort(
        id=port_id,
        network=NetworkId(network),
        mac=None if mac is None else MacAddress(mac),
        addresses=tuple(ip_address(each) for each in addresses),
        device=device,
        owner=owner,
        project=project,
        host=host,
        created_at=created_at,
    )


def router_port(
    port_id: str, network: str, router: str, owner: str = "network:router_interface"
) -> NeutronPort:
    return neutron_port(port_id, network, "10.255.255.1", device=router, owner=owner)


class FakeTime(HandClock):
    """A clock that stands, and sleepers that wake when it is moved over their time."""

    def __init__(self, start: float = 1000.0) -> None:
        super().__init__(start)
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        entry = (self.time + seconds, future)
        self._sleepers.append(entry)
        try:
            await future
        finally:
            if entry in self._sleepers:
                self._sleepers.remove(entry)

    async def settle(self, sleepers: int = 1) -> None:
        """Wait until so many sleep again: everybody has done what was to be done now."""
        async with asyncio.timeout(_DEADLINE_S):
            while len(self._sleepers) < sleepers:
                await asyncio.sleep(0.001)

    async def advance(self, seconds: float, *, step: float = 1.0, sleepers: int = 1) -> None:
        """Let time pass, in steps, each after everybody has done what the one before made due."""
        ends = self.time + seconds
        await self.settle(sleepers)
        while self.time < ends:
            self.time = min(ends, self.time + step)
            due = [entry for entry in self._sleepers if entry[0] <= self.time]
            for entry in due:
                self._sleepers.remove(entry)
                if not entry[1].done():
                    entry[1].set_result(None)
            await self.settle(sleepers)


@dataclass
class FakeNeutron(NeutronClient):
    """A Neutron whose ports are what `put` and `remove` make them.

    Attributes:
        queries: Every query, in order.
        failure: What it answers instead.
        open: Cleared, answers wait until it is set; what they say is decided then.
        unlisted: Ports that pages leave out.
        ignored: Filters that it does not know, by the name of `PortQuery`'s field.
    """

    ports_by_id: dict[str, NeutronPort] = field(default_factory=dict)
    queries: list[PortQuery] = field(default_factory=list)
    failure: SourceUnavailable | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)
    unlisted: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    closed: bool = False

    def __post_init__(self) -> None:
        self.open.set()

    def put(self, *ports: NeutronPort) -> None:
        self.ports_by_id.update((each.id, each) for each in ports)

    def remove(self, *port_ids: str) -> None:
        for port_id in port_ids:
            del self.ports_by_id[port_id]

    async def ports(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        self.queries.append(query)
        await asyncio.sleep(0)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        return self._answer(query)

    async def close(self) -> None:
        self.closed = True

    def _answer(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        host_told = query.host is not None
        query = _without(query, self.ignored)
        if query.after is not None and query.after not in self.ports_by_id:
            raise SourceUnavailable(f"404: Port {query.after} could not be found.")
        found = [each for each in self.ports_by_id.values() if _matches(each, query)]
        if query.limit is not None:
            found = [each for each in found if each.id not in self.unlisted]
            found.sort(key=lambda each: each.id)
            found = [each for each in found if query.after is None or each.id > query.after]
            found = found[: query.limit]
        if not host_told:
            found = [replace(each, host=None) for each in found]
        return tuple(found)


def _without(query: PortQuery, ignored: frozenset[str]) -> PortQuery:
    values = {each.name: getattr(query, each.name) for each in fields(query)}
    return PortQuery(**{name: value for name, value in values.items() if name not in ignored})


def _matches(port: NeutronPort, query: PortQuery) -> bool:
    return (
        (not query.ids or port.id in query.ids)
        and (not query.networks or port.network in query.networks)
        and (not query.addresses or bool(set(port.addresses) & set(query.addresses)))
        and (not query.macs or port.mac in query.macs)
        and (not query.devices or port.device in query.devices)
        and (not query.owners or port.owner in query.owners)
        and (query.host is None or port.host == query.host)
    )


@dataclass
class Rig:
    """A source that runs, and what it is made of; `random` is what it takes for a random number."""

    neutron: FakeNeutron
    time: FakeTime
    source: NeutronSource
    heard: Heard
    random: list[float]
    sleepers: int

    async def look(self, network: str, address: str, *, router: bool = False) -> LookUp:
        scope = Scope.ROUTER if router else Scope.NETWORK
        return await self.source.look_up(scope, NetworkId(network), ip_address(address))

    async def pass_time(self, seconds: float, step: float = 1.0) -> None:
        await self.time.advance(seconds, step=step, sleepers=self.sleepers)

    @property
    def asked(self) -> int:
        """Queries since the last time that this was read."""
        number = len(self.neutron.queries)
        self.neutron.queries.clear()
        return number

    @property
    def owners(self) -> dict[str, str]:
        return self.heard.owners


@contextlib.asynccontextmanager
async def neutron_rig(
    *ports: NeutronPort,
    settings: NeutronSourceSettings | None = None,
    kept: Path | None = None,
    neutron: FakeNeutron | None = None,
    time: FakeTime | None = None,
    begin: asyncio.Event | None = None,
) -> AsyncIterator[Rig]:
    """A source over these ports, which has begun unless it waits for `begin`; `kept` is what it keeps for a restart."""
    settings, time = settings or NeutronSourceSettings(), time or FakeTime()
    neutron = neutron or FakeNeutron()
    neutron.put(*ports)
    random = [1.0]
    with tempfile.TemporaryDirectory(prefix="imdst-") as directory:
        source = NeutronSource(
            neutron,
            kept or Path(directory, "neutron.sqlite"),
            settings,
            clock=time,
            random=lambda: random[0],
            sleep=time.sleep,
            begin=None if begin is None else begin.wait,
        )
        async with running(source) as heard:
            rig = Rig(neutron, time, source, heard, random, 2 if settings.list_every_s else 1)
            if begin is None:
                await time.settle(rig.sleepers)
                neutron.queries.clear()
            yield rig
