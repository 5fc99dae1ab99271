"""Ports looked up when guests ask, asked for again while they are in use, and, if configured, listed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, TypeVar

from imdsproxy.core.model import IpAddress, NetworkId, Scope
from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.clock import Clock
from imdsproxy.sources.api import (
    LookUp,
    LookUpUnavailable,
    PortAmbiguous,
    PortFound,
    PortMissing,
)
from imdsproxy.sources.neutron.known import KnownPorts, Route
from imdsproxy.sources.neutron.ports import MAX_VALUES, NeutronPort, PortQuery
from imdsproxy.sources.neutron.queries import Queries, Shared, chunks
from imdsproxy.sources.settings import NeutronSourceSettings

LookUpResult: TypeAlias = Literal[
    "known", "found", "missing", "ambiguous", "unavailable", "negative-cached", "coalesced"
]
_Key: TypeAlias = tuple[Scope, NetworkId, IpAddress]
_T = TypeVar("_T")

_MAX_NEGATIVE: Final = 10_000
"""Negative answers that are kept: guests that invent addresses must not fill the memory."""
_SPREAD: Final = 0.1
"""By how much of itself a lifetime is shortened at random, so that those begun together do not end together."""
_REFRESH: Final = ("refresh",)
_LIST: Final = ("list",)
_MAX_LISTED: Final = 1_000_000


@dataclass(slots=True)
class LookUps:
    """Answers look-ups, and keeps what is known equal to Neutron.

    Attributes:
        random: Gives numbers from 0 to 1.
        report: Publishes what has changed.
        results: How look-ups ended, by number.
    """

    known: KnownPorts
    queries: Queries
    settings: NeutronSourceSettings
    clock: Clock
    random: Callable[[], float]
    report: Callable[[], None]
    results: Counter[LookUpResult] = field(default_factory=Counter)
    _negative: dict[_Key, tuple[LookUp, float]] = field(default_factory=dict)
    _pending: Shared[_Key, LookUp] = field(default_factory=Shared)

    async def look_up(self, key: _Key) -> LookUp:
        """The instance that has the address, which must be normalised.

        It is found by what is known, else by one query, however many wait for it; it is in force, and published, before
        it is answered.
        """
        found = self._recall(key)
        if found is not None:
            self.results["known"] += 1
            return found
        negative = self._negative.get(key)
        if negative is not None and negative[1] > self.clock.monotonic():
            self.results["negative-cached"] += 1
            return negative[0]
        if key in self._pending:
            self.results["coalesced"] += 1
        try:
            return await self._pending.get(key, lambda: self._ask(key))
        except asyncio.CancelledError:
            asker = asyncio.current_task()
            if asker is None or not asker.cancelling():
                return LookUpUnavailable("imdsproxy is about to end")
            raise

    def forget_old(self) -> None:
        """Forget negative answers that are not believed any more."""
        now = self.clock.monotonic()
        for key in [key for key, (_, until) in self._negative.items() if until <= now]:
            del self._negative[key]

    async def close(self) -> None:
        """Cancel what is being asked."""
        await self._pending.close()

    def _recall(self, key: _Key) -> PortFound | None:
        scope, network, address = key
        known = (
            self.known.at(network, address)
            if scope is Scope.NETWORK
            else self.known.routes.port_behind((network, address))
        )
        if known is None:
            return None
        lifetime = self.settings.lifetime_s * (1 - _SPREAD * self.random())
        self.known.keep(known, self.clock.monotonic() + lifetime)
        self.report()
        return PortFound(known.port.network, known.port.instance)

    async def _ask(self, key: _Key) -> LookUp:
        scope, network, address = key
        try:
            networks: tuple[NetworkId, ...] = (network,)
            if scope is Scope.ROUTER:
                networks = (await self.queries.networks_of(network, share=network)).value
            found = await self.queries.find(networks, (address,), share=network)
        except SourceUnavailable as error:
            self.results["unavailable"] += 1
            return LookUpUnavailable(error.message)
        answer = self._judge(key, found.value[address], found.asked)
        self._negative.pop(key, None)
        if isinstance(answer, PortMissing) and self.queries.settling:
            self.results["unavailable"] += 1
            return LookUpUnavailable("Neutron has just come back, and may not show all ports yet")
        match answer:
            case PortFound():
                self.results["found"] += 1
                return answer
            case PortMissing():
                self.results["missing"] += 1
            case PortAmbiguous():
                self.results["ambiguous"] += 1
        while len(self._negative) >= _MAX_NEGATIVE:
            del self._negative[next(iter(self._negative))]
        self._negative[key] = answer, self.clock.monotonic() + self.settings.negative_ttl_s
        return answer

    def _judge(
        self, key: _Key, ports: Sequence[NeutronPort], asked: float
    ) -> PortFound | PortMissing | PortAmbiguous:
        scope, router, address = key
        if not ports:
            return PortMissing()
        if len(ports) > 1:
            return PortAmbiguous(len(ports))
        port = ports[0]
        self.known.put(port, asked)
        if scope is Scope.ROUTER and port.serves:
            self.known.routes.put(Route(router, (port.network, address), port.id, asked))
        found = self._recall(key)
        if found is None:
            self.report()
            return PortMissing()
        return found

    # Refreshing

    async def refresh(self, refresh_s: float) -> bool:
        """Ask again for everything in use that was confirmed so many seconds ago; `False` where nothing is.

        What cannot be asked for now stays as it is.
        """
        before = self.clock.monotonic() - refresh_s
        ids = self.known.due(before)
        await self._each(self._batches(ids), self._refresh_ports)
        routes = [
            some
            for behind_one in self.known.routes.due(before).values()
            for some in chunks(behind_one, MAX_VALUES)
        ]
        await self._each(routes, self._refresh_routes)
        return bool(ids or routes)

    def _batches(self, ids: list[str]) -> list[tuple[str, ...]]:
        """The ids in parts, each with the port that was seen last: its presence confirms that an answer is whole."""
        sure = [known for known in self.known if not known.doubted and known.unseen is None]
        last = max(sure, key=lambda known: known.confirmed, default=None)
        parts = chunks(ids, MAX_VALUES - 1)
        if last is None:
            return parts
        return [some if last.port.id in some else (*some, last.port.id) for some in parts]

    async def _each(self, jobs: Iterable[_T], work: Callable[[_T], Awaitable[None]]) -> None:
        """Do the jobs, as many at once as one share may; a query that fails ends its job."""
        waiting = iter(jobs)

        async def worker() -> None:
            for job in waiting:
                try:
                    await work(job)
                except SourceUnavailable:
                    # The outage has been noted, or was already.
                    continue
                self.report()

        async with asyncio.TaskGroup() as group:
            for _ in range(self.queries.per_share):
                group.create_task(worker())

    async def _refresh_ports(self, ids: tuple[str, ...]) -> None:
        missing, witness, asked = await self._ask_again(ids)
        if missing and witness is not None:
            missing, witness, asked = await self._ask_again((*missing, witness))
        for port_id in missing:
            self.known.lose(port_id, asked, None if witness is not None else self.queries.steady)

    async def _ask_again(self, ids: tuple[str, ...]) -> tuple[tuple[str, ...], str | None, float]:
        """Ask for known ports; which are missing, one that is not, and when that was asked."""
        answer = await self.queries.ask(PortQuery(ids=ids), share=_REFRESH)
        found = {port.id: port for port in answer.value}
        self._update(found.values(), answer.asked)
        missing = tuple(port_id for port_id in ids if port_id not in found)
        return missing, next((each for each in ids if each in found), None), answer.asked

    def _update(self, ports: Iterable[NeutronPort], asked: float) -> None:
        for port in ports:
            # A port that was forgotten while the query was on its way stays forgotten.
            if self.known.get(port.id) is not None:
                self.known.put(port, asked)

    async def _refresh_routes(self, routes: tuple[Route, ...]) -> None:
        joined = await self.queries.networks_of(routes[0].router, share=_REFRESH)
        addresses = [route.key[1] for route in routes]
        found = await self.queries.find(joined.value, addresses, share=_REFRESH)
        asked = min(joined.asked, found.asked)
        steady = None if any(found.value.values()) else self.queries.steady
        for route, address in zip(routes, addresses, strict=True):
            ports = found.value[address]
            self._update(ports, asked)
            if len(ports) == 1 and ports[0].id == route.port:
                key = (ports[0].network, address)
                self.known.routes.put(Route(route.router, key, route.port, asked))
            else:
                self.known.routes.lose((route.router, address), asked, steady)

    async def list_all(self) -> None:
        """Read the list of ports, and have in force what is on it.

        Raises:
            SourceUnavailable: It could not be read to its end; what was in force before still is.
        """
        host, page_size = self.settings.list_host, self.settings.page_size
        began = self.clock.monotonic()
        seen: dict[str, tuple[NeutronPort, float]] = {}
        after: str | None = None
        while True:
            query = PortQuery(host=host, limit=page_size, after=after)
            answer = await self.queries.ask(query, share=_LIST, patient=True)
            fresh = [port for port in answer.value if port.id not in seen]
            seen.update((port.id, (port, answer.asked)) for port in fresh)
            # Another number than was asked for: the last page, or everything from a Neutron without pages.
            if len(answer.value) != page_size or not fresh:
                break
            if len(seen) > _MAX_LISTED:
                raise SourceUnavailable(
                    f"Neutron's list of ports has more than {_MAX_LISTED}",
                    hint="set sources.neutron.list_host",
                )
            after = answer.value[-1].id
        self.known.take_list(seen, host, began)
