"""Ports in use are asked for again, many with one query; and, if configured, all ports are listed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.clock import Clock
from imdsproxy.sources.neutron.known import KnownPorts, Route
from imdsproxy.sources.neutron.ports import MAX_VALUES, NeutronPort, PortQuery
from imdsproxy.sources.neutron.queries import Queries, chunks

_T = TypeVar("_T")
_SHARE: Final = ("refresh",)
_LIST_SHARE: Final = ("list",)
_MAX_LISTED: Final = 1_000_000


@dataclass(slots=True)
class Refresher:
    """Keeps what is known equal to Neutron.

    Attributes:
        refresh_s: How old what is known may become; in seconds.
        report: Publishes what has changed.
    """

    known: KnownPorts
    queries: Queries
    clock: Clock
    refresh_s: float
    report: Callable[[], None]

    async def probe(self) -> None:
        """Find out whether Neutron answers."""
        try:
            await self.queries.ask(PortQuery(limit=1), share=_SHARE)
        except SourceUnavailable:
            # The outage has been noted, or was already.
            return

    async def refresh(self) -> bool:
        """Ask for everything again that is older than it may become; `False` where nothing is.

        What cannot be asked for now stays as it is.
        """
        before = self.clock.monotonic() - self.refresh_s
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
        waiting = iter(jobs)

        async def worker() -> None:
            for job in waiting:
                await work(job)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.queries.per_share):
                group.create_task(worker())

    async def _refresh_ports(self, ids: tuple[str, ...]) -> None:
        try:
            missing, witness, asked = await self._ask_again(ids)
            if missing and witness is not None:
                missing, witness, asked = await self._ask_again((*missing, witness))
        except SourceUnavailable:
            return
        for port_id in missing:
            if witness is not None:
                self.known.remove(port_id, asked)
            else:
                self.known.miss(port_id, asked, steady=self.queries.steady)
        self.report()

    async def _ask_again(self, ids: tuple[str, ...]) -> tuple[tuple[str, ...], str | None, float]:
        """Ask for known ports; which are missing, one that is not, and when that was asked."""
        answer = await self.queries.ask(PortQuery(ids=ids), share=_SHARE)
        found = {port.id: port for port in answer.value}
        for port in found.values():
            self._update(port, answer.asked)
        missing = tuple(port_id for port_id in ids if port_id not in found)
        return missing, next((each for each in ids if each in found), None), answer.asked

    def _update(self, port: NeutronPort, asked: float) -> None:
        # A port that was forgotten while the query was on its way stays forgotten.
        if self.known.get(port.id) is not None:
            self.known.put(port, asked)

    async def _refresh_routes(self, routes: tuple[Route, ...]) -> None:
        try:
            joined = await self.queries.networks_of(routes[0].router, share=_SHARE)
            addresses = [route.key[1] for route in routes]
            found = await self.queries.find(joined.value, addresses, share=_SHARE)
        except SourceUnavailable:
            return
        asked = min(joined.asked, found.asked)
        nothing = not any(found.value.values())
        for route in routes:
            self._judge(route, found.value[route.key[1]], asked, nothing=nothing)
        self.report()

    def _judge(
        self, route: Route, ports: tuple[NeutronPort, ...], asked: float, *, nothing: bool
    ) -> None:
        address = route.key[1]
        for port in ports:
            self._update(port, asked)
        if len(ports) == 1 and ports[0].id == route.port:
            key = (ports[0].network, address)
            self.known.routes.put(Route(route.router, key, route.port, asked))
        elif nothing:
            self.known.routes.miss((route.router, address), asked, steady=self.queries.steady)
        else:
            self.known.routes.remove((route.router, address), asked)

    async def list_all(self, host: str | None, page_size: int) -> None:
        """Read the list of ports, and have in force what is on it.

        Args:
            host: Ports bound there; `None` for all.
            page_size: Ports with one query.

        Raises:
            SourceUnavailable: It could not be read to its end; what was in force before still is.
        """
        began = self.clock.monotonic()
        seen: dict[str, tuple[NeutronPort, float]] = {}
        after: str | None = None
        while True:
            query = PortQuery(host=host, limit=page_size, after=after)
            answer = await self.queries.ask(query, share=_LIST_SHARE, patient=True)
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
