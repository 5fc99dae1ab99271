"""The source `neutron`: ports of OpenStack's network service, looked up when their guests ask.

Ports in use are queried again, many in one query. If configured, the source also lists all ports.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, TypeAlias, get_args

import structlog

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.host.clock import Clock
from imdsproxy.host.sqlite_file import SideCache
from imdsproxy.model.addresses import normalise_address
from imdsproxy.model.entities import IpAddress, NetworkId, Scope
from imdsproxy.model.observation import AddressKey, Observation, StrandedPort
from imdsproxy.reconcile.part import By, Gauge, Part, Times
from imdsproxy.sources import api
from imdsproxy.sources.neutron.cache import open_cache
from imdsproxy.sources.neutron.client import NeutronClient
from imdsproxy.sources.neutron.known import EntryKey, KnownPorts, Route
from imdsproxy.sources.neutron.ports import MAX_VALUES, NeutronPort, PortQuery
from imdsproxy.sources.neutron.queries import Queries, QueryResult, chunks

LookUpResult: TypeAlias = Literal[
    "known", "found", "missing", "ambiguous", "unavailable", "negative-cached", "coalesced"
]
_Key: TypeAlias = tuple[Scope, NetworkId, IpAddress]

_RESULTS: Final[Mapping[type[api.LookUp], LookUpResult]] = {
    api.PortFound: "found",
    api.PortMissing: "missing",
    api.PortAmbiguous: "ambiguous",
    api.LookUpUnavailable: "unavailable",
}
_TICK_S: Final = 1.0
_SAVE_S: Final = 60.0
"""Seconds after which the time of Neutron's last answer is stored if nothing else has changed."""
_LIST_AGAIN_S: Final = 10.0
_MAX_LISTED: Final = 1_000_000
_MAX_NEGATIVE: Final = 10_000
"""Maximum number of cached negative answers: guests that invent addresses must not fill the memory."""
_SPREAD: Final = 0.1
"""Maximum fraction by which a lifetime is shortened at random, so that lifetimes begun together end apart."""


@dataclass(slots=True)
class NeutronSource(Part):
    """Source of ports as instances whose documents Nova has; see `api.LookUpSource`. It can run once.

    Args:
        cache: Our file that keeps the known ports over a restart.
        begin: Awaited before any query except guests' look-ups, because the first query loads libraries. A list without
            which the source knows no ports is read at once.
    """

    name: ClassVar = "neutron"
    client: NeutronClient
    cache: InitVar[Path]
    settings: NeutronSourceSettings
    clock: Clock
    random: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    begin: Callable[[], Awaitable[object]] | None = None
    known: KnownPorts = field(default_factory=KnownPorts)
    queries: Queries = field(init=False)
    look_ups: Counter[LookUpResult] = field(default_factory=Counter)
    _cache: SideCache[EntryKey | None, NeutronPort | Route | float] = field(init=False)
    _publish: api.Publish | None = None
    _reports: api.Reports = field(default_factory=partial(api.Reports, name, defers=True))
    _complete: bool = False
    _list_failure: SourceUnavailable | None = None
    _saved: float = field(init=False)
    _negative: dict[_Key, tuple[api.LookUp, float]] = field(default_factory=dict)
    _pending: dict[_Key, asyncio.Task[api.LookUp]] = field(default_factory=dict)

    def __post_init__(self, cache: Path) -> None:
        self._cache, self._saved = open_cache(cache), self.clock.monotonic()
        asked = self.client, self.settings, self.clock, self.random
        self.queries = Queries(*asked, self._outage_changed)

    @property
    def stale_s(self) -> float:
        """Seconds since Neutron's last answer while Neutron does not answer, else 0."""
        return self.queries.stale_s

    def neutron_queries(self) -> Annotated[By, "counter", "result"]:
        """Queries to Neutron by result: ok, failed or timeout."""
        return {**dict.fromkeys(get_args(QueryResult), 0), **self.queries.results}

    def neutron_look_ups(self) -> Annotated[By, "counter", "result"]:
        """Look-ups of guests that HAProxy did not know, by result.

        The results are found, known (without a query), missing, negative-cached (missing, without a query), coalesced
        (waited for another look-up's query), ambiguous and unavailable.
        """
        return {**dict.fromkeys(get_args(LookUpResult), 0), **self.look_ups}

    def neutron_query_seconds(self) -> Times:
        """Time that Neutron took for the queries that it answered."""
        return self.queries.durations

    def neutron_ports(self) -> Gauge:
        """Neutron's ports that are known and kept up to date."""
        return len(self.known.ports)

    def neutron_stale_seconds(self) -> Gauge:
        """Seconds since Neutron's last answer while Neutron does not answer, else 0. Known guests are still served."""
        return self.stale_s

    def neutron_backoff_seconds(self) -> Gauge:
        """Seconds until the next query while Neutron does not answer, else 0."""
        return self.queries.backoff_s

    async def run(self, publish: api.Publish) -> None:
        """Report the known ports, and keep them up to date, until cancelled.

        While Neutron does not answer, reported records stay, and the source reports a problem. It stays in sync: it
        learns unknown ports when a guest asks, not with time.
        """
        try:
            await self._load()
            self._publish = publish
            self._report()
            if self.begin is not None and self._complete:
                await self.begin()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_fresh())
                if self.settings.list_every_s:
                    group.create_task(self._keep_listed())
        finally:
            self._publish = None
            for task in self._pending.values():
                task.cancel()
            await asyncio.gather(*self._pending.values(), return_exceptions=True)
            await self.client.close()
            await self._save()

    # Look-ups

    def explain_stranded(self, port: StrandedPort) -> Problem:
        ports = self.known.of(port.instance)
        field = f"ports.{ports[port.number].id}" if port.number < len(ports) else ""
        return port.problem(field=field)

    def routes(self) -> Mapping[AddressKey, api.PortFound]:
        return {
            key: api.PortFound(known.port.network, known.port.instance)
            for key in self.known.routes
            if (known := self.known.behind(*key)) is not None and not known.aside
        }

    def explain_freshness(self, network: NetworkId, address: IpAddress) -> str | None:
        """Describe which port has an address, and when Neutron last confirmed that."""
        known = self.known.at(network, normalise_address(address))
        if known is None:
            return None
        age = self.clock.monotonic() - known.confirmed
        stale = f"; stale since, because {self.name} does not answer" if self.queries.outage else ""
        return f"it is port {known.port.id} of {self.name}, confirmed {age:.0f} s ago{stale}"

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> api.LookUp:
        """Look up the instance that has the address.

        One query finds an unknown port, however many callers wait. The instance is published before the answer.
        """
        if self._publish is None:
            return api.LookUpUnavailable("the source has not started yet")
        key = scope, network, normalise_address(address)
        found = self._recall(key)
        if found is not None:
            self.look_ups["known"] += 1
            return found
        answer, until = self._negative.get(key, (None, 0.0))
        if answer is not None and until > self.clock.monotonic():
            self.look_ups["negative-cached"] += 1
            return answer
        task = self._pending.get(key)
        if task is not None:
            self.look_ups["coalesced"] += 1
        else:
            task = self._pending[key] = asyncio.create_task(self._ask(key))
            task.add_done_callback(lambda _: self._pending.pop(key))
        try:
            # A cancelled caller must not cancel the query for the others.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            asker = asyncio.current_task()
            if asker is None or not asker.cancelling():
                return api.LookUpUnavailable("imdsproxy is about to end")
            raise

    def _recall(self, key: _Key) -> api.PortFound | None:
        scope, network, address = key
        find = self.known.at if scope is Scope.NETWORK else self.known.behind
        known = find(network, address)
        if known is None:
            return None
        lifetime = self.settings.lifetime_s * (1 - _SPREAD * self.random())
        self.known.keep(known, self.clock.monotonic() + lifetime)
        self._report()
        return api.PortFound(known.port.network, known.port.instance)

    async def _ask(self, key: _Key) -> api.LookUp:
        scope, network, address = key
        try:
            networks = [network]
            if scope is Scope.ROUTER:
                networks, _ = await self.queries.networks_of(network, network)
            found, asked = await self.queries.find(networks, (address,), network)
            answer = self._judge(key, found[address], asked)
        except SourceUnavailable as error:
            answer = api.LookUpUnavailable(error.message)
        self.look_ups[_RESULTS[type(answer)]] += 1
        if isinstance(answer, api.PortMissing | api.PortAmbiguous):
            while len(self._negative) >= _MAX_NEGATIVE:
                del self._negative[next(iter(self._negative))]
            self._negative[key] = answer, self.clock.monotonic() + self.settings.negative_ttl_s
        return answer

    def _judge(self, key: _Key, ports: Sequence[NeutronPort], asked: float) -> api.LookUp:
        scope, router, address = key
        if len(ports) > 1:
            return api.PortAmbiguous(len(ports))
        for port in ports:
            self.known.put(port, asked)
            if scope is Scope.ROUTER and port.serves:
                self.known.put_route(router, address, port, asked)
        found = self._recall(key)
        if found is not None:
            return found
        self._report()
        if self.queries.settling:
            return api.LookUpUnavailable(
                "Neutron has just come back, and may not show all ports yet"
            )
        return api.PortMissing()

    # Rounds

    async def _keep_fresh(self) -> None:
        while True:
            # Save before the queries: an answer may take long, and the controller may be killed meanwhile.
            await self._save()
            now = self.clock.monotonic()
            if self.queries.outage is None:
                # During an outage Neutron's last answers stay in force.
                self.known.expire(now, self.settings.aside_s)
            self._negative = {key: each for key, each in self._negative.items() if each[1] > now}
            self.queries.forget_old()
            if self.queries.may_ask:
                asked = await self._refresh(now - max(0.0, self.settings.refresh_s - _TICK_S))
                if not asked and (self.queries.outage is not None or not self.queries.results):
                    # This only tests whether Neutron answers; `queries` records an outage itself.
                    with contextlib.suppress(SourceUnavailable):
                        await self.queries.ask(PortQuery(limit=1))
            self._report()
            await self.sleep(_TICK_S)

    async def _refresh(self, before: float) -> bool:
        """Query again all ports and routes in use that were confirmed before then. Return false if there are none.

        Ports that cannot be queried now stay unchanged.
        """
        ports = self._due_ports(before)
        behind: dict[NetworkId, list[IpAddress]] = {}
        for (router, address), route in self.known.routes.items():
            if route.confirmed <= before:
                behind.setdefault(router, []).append(address)
        # Guests wait while their router is queried: start only as many refreshes as can run at once.
        slots = asyncio.Semaphore(self.queries.per_share)

        async def attempt(work: Callable[..., Awaitable[None]], *what: object) -> None:
            # `queries` has recorded the outage.
            with contextlib.suppress(SourceUnavailable):
                async with slots:
                    await work(*what)
                self._report()

        async with asyncio.TaskGroup() as group:
            for ids in ports:
                group.create_task(attempt(self._refresh_ports, ids))
            for router, addresses in behind.items():
                for some in chunks(addresses, MAX_VALUES):
                    group.create_task(attempt(self._refresh_routes, router, some))
        return bool(ports or behind)

    def _due_ports(self, before: float) -> list[tuple[str, ...]]:
        """Return due ids in chunks, each with the last confirmed port: its presence confirms a complete answer."""
        ports = self.known.ports
        due = [port_id for port_id, known in ports.items() if known.is_due(before)]
        if not due:
            return []
        sure = (each for each in ports.values() if not each.doubted and each.unseen is None)
        last = max(sure, key=lambda known: known.confirmed, default=None)
        witness = () if last is None else (last.port.id,)
        return [tuple(dict.fromkeys((*some, *witness))) for some in chunks(due, MAX_VALUES - 1)]

    async def _refresh_ports(self, ids: tuple[str, ...]) -> None:
        for _ in range(2):
            ports, asked = await self.queries.ask(PortQuery(ids=ids))
            self._update(ports, asked)
            found = {port.id for port in ports}
            missing = [port_id for port_id in ids if port_id not in found]
            # Query missing ports once more, together with a port that exists.
            ids = (*missing, *[port_id for port_id in ids if port_id in found][:1])
            steady = self.queries.steady if len(ids) == len(missing) else None
            if not missing or steady is not None:
                break
        for port_id in missing:
            self.known.lose(port_id, asked, steady)

    def _update(self, ports: Iterable[NeutronPort], asked: float) -> None:
        for port in ports:
            # A port that was forgotten while the query was on its way stays forgotten.
            if port.id in self.known.ports:
                self.known.put(port, asked)

    async def _refresh_routes(self, router: NetworkId, addresses: Sequence[IpAddress]) -> None:
        networks, joined = await self.queries.networks_of(router, None)
        found, asked = await self.queries.find(networks, addresses, None)
        asked = min(joined, asked)
        steady = None if any(found.values()) else self.queries.steady
        for address, ports in found.items():
            key = router, address
            self._update(ports, asked)
            route = self.known.routes.get(key)
            if route is not None and [port.id for port in ports] == [route.port]:
                self.known.put_route(router, address, ports[0], asked)
            else:
                self.known.lose(key, asked, steady)

    # The list

    async def _keep_listed(self) -> None:
        settings = self.settings
        while True:
            try:
                await self._list()
            except SourceUnavailable as error:
                self._list_failure = error
                pause = min(settings.list_every_s, _LIST_AGAIN_S) * self.random()
            else:
                self._list_failure = None
                self._complete = True
                pause = settings.list_every_s
            self._report()
            await self.sleep(max(pause, _TICK_S))

    async def _list(self) -> None:
        """Read the list of ports and put its ports in force.

        Raises:
            SourceUnavailable: The list could not be read to its end; the ports in force are unchanged.
        """
        host, page_size = self.settings.list_host, self.settings.page_size
        began = self.clock.monotonic()
        seen: dict[str, tuple[NeutronPort, float]] = {}
        after: str | None = None
        while True:
            query = PortQuery(host=host, limit=page_size, after=after)
            ports, asked = await self.queries.ask(query, patient=True)
            fresh = [port for port in ports if port.id not in seen]
            seen.update((port.id, (port, asked)) for port in fresh)
            # A different number of ports means the last page, or all ports from a Neutron without pages.
            if len(ports) != page_size or not fresh:
                break
            if len(seen) > _MAX_LISTED:
                raise SourceUnavailable(
                    f"Neutron's list of ports has more than {_MAX_LISTED}",
                    hint="set sources.neutron.list_host",
                )
            after = ports[-1].id
        self.known.take_list(seen, host, began)

    # Reports

    def _outage_changed(self) -> None:
        log = structlog.get_logger()
        outage = self.queries.outage
        if outage is None:
            log.info("neutron answers again")
        else:
            log.warning("neutron does not answer", code=outage.code, error=outage.message)
        self._report()

    def _report(self) -> None:
        if self._publish is None:
            return
        observation = self._reports.next(
            self.known.changes(),
            lambda: Observation(instances=dict(self.known.published)),
            # An outage does not count: known ports are published, and the others are looked up.
            in_sync=self._complete,
            problems=tuple(self._problems()),
            implied=self.known.networks,
        )
        if observation is not None:
            self._publish(observation)

    def _problems(self) -> Iterator[Problem]:
        outage, listing = self.queries.outage, self._list_failure
        if outage is not None:
            yield Problem("neutron", outage.message, outage.hint)
        elif listing is not None:
            yield Problem("list", f"not read: {listing.message}", listing.hint)
        if self._cache.problem is not None:
            yield self._cache.problem
        yield from self.known.problems

    # The cache

    async def _load(self) -> None:
        kept = await asyncio.to_thread(self._cache.load)
        now, settings = self.clock.monotonic(), self.settings
        # With this age all loaded ports are due at once.
        age = settings.refresh_s
        self._complete = not settings.list_every_s
        for key, value in kept:
            if isinstance(value, NeutronPort):
                self._complete = True
                known = self.known.put(value, now - age)
                if known is not None:
                    lifetime = settings.lifetime_s * (0.5 + 0.5 * self.random())
                    self.known.keep(known, now + lifetime)
                    known.listed = bool(settings.list_every_s)
            elif isinstance(value, Route) and isinstance(key, tuple):
                self.known.routes[key] = value
            elif isinstance(value, float):
                age = max(age, self.clock.now().timestamp() - value)
                self.queries.answered = now - age
        self.known.unsaved.clear()

    async def _save(self) -> None:
        known, answered, now = self.known, self.queries.answered, self.clock.monotonic()
        late = now - self._saved >= _SAVE_S
        if not (known.unsaved or (late and known.ports)):
            return
        known.unsaved[None] = self.clock.now().timestamp() - (now - answered)
        self._cache.keep(known.unsaved)
        known.unsaved.clear()
        self._saved = now
        await asyncio.to_thread(self._cache.save)
