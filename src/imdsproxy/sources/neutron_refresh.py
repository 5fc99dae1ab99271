"""Ports in use are asked for again, many with one query; and, where that is wanted, all ports are listed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeVar

from imdsproxy.errors import SourceUnavailable
from imdsproxy.sources.neutron_api import MAX_VALUES, NeutronPort, PortQuery
from imdsproxy.sources.neutron_finding import Finder, chunks
from imdsproxy.sources.neutron_known import Known, KnownPorts
from imdsproxy.sources.neutron_routes import Route, Routes

if TYPE_CHECKING:
    from imdsproxy.host.clock import Clock
    from imdsproxy.sources.neutron_asking import Asking

__all__ = ["ListPace", "Refresher"]

_T = TypeVar("_T")
_SHARE: Final = ("refresh",)
_LIST_SHARE: Final = ("list",)
_MAX_LISTED: Final = 1_000_000
_PATIENCE_S: Final = 3.0
"""For how long an answer without any port must be repeated to be believed. A Neutron that starts gives such answers:
while one of its threads reads the policy's rules, the others leave every port out, and say 200."""


@dataclass(frozen=True, slots=True)
class ListPace:
    """Which ports are listed.

    Attributes:
        host: Those bound there; `None` for all.
        page_size: Ports with one query.
    """

    host: str | None
    page_size: int


class Refresher:
    """Keeps what is known equal to what Neutron says.

    Args:
        refresh_s: How old what is known may become; in seconds.
        tell: Publishes what has changed.
    """

    def __init__(
        self,
        known: KnownPorts,
        routes: Routes,
        finder: Finder,
        asking: Asking,
        *,
        clock: Clock,
        refresh_s: float,
        tell: Callable[[], None],
    ) -> None:
        self._known = known
        self._routes = routes
        self._finder = finder
        self._asking = asking
        self._clock = clock
        self._refresh_s = refresh_s
        self._tell = tell

    async def probe(self) -> None:
        """Find out whether Neutron answers."""
        try:
            await self._asking.ask(PortQuery(limit=1), share=_SHARE)
        except SourceUnavailable:
            # The outage has been noted, or was already.
            return

    async def refresh(self) -> bool:
        """Ask for everything again that is older than it may become; `False` where nothing is.

        What cannot be asked for now stays as it is.
        """
        before = self._clock.monotonic() - self._refresh_s
        ids = [known.port.id for known in self._known if _is_due(known, before)]
        await self._each(self._batches(ids), self._refresh_ports)
        routes = [
            some
            for behind_one in self._routes.due(before).values()
            for some in chunks(behind_one, MAX_VALUES)
        ]
        await self._each(routes, self._refresh_routes)
        return bool(ids or routes)

    def _batches(self, ids: list[str]) -> list[tuple[str, ...]]:
        """The ids in parts, each with one more whose port was seen last: its being there vouches for the answer."""
        sure = [known for known in self._known if not known.doubted and known.unseen is None]
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
            for _ in range(self._asking.per_share):
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
                self._known.remove(port_id, asked)
            else:
                self._known.miss(port_id, asked, _PATIENCE_S, steady=self._asking.steady)
        self._tell()

    async def _ask_again(self, ids: tuple[str, ...]) -> tuple[tuple[str, ...], str | None, float]:
        """Ask for known ports; which are missing, one that is not, and when that was asked."""
        answer = await self._asking.ask(PortQuery(ids=ids), share=_SHARE)
        found = {port.id: port for port in answer.ports}
        for port in found.values():
            self._update(port, answer.asked)
        missing = tuple(port_id for port_id in ids if port_id not in found)
        return missing, next((each for each in ids if each in found), None), answer.asked

    def _update(self, port: NeutronPort, asked: float) -> None:
        # What was forgotten while the question was on its way stays so.
        if self._known.get(port.id) is not None:
            self._known.put(port, asked)

    async def _refresh_routes(self, routes: tuple[Route, ...]) -> None:
        try:
            joined = await self._finder.networks_of(routes[0].router, share=_SHARE)
            addresses = [route.key[1] for route in routes]
            found = await self._finder.find(joined.networks, addresses, share=_SHARE)
        except SourceUnavailable:
            return
        asked = min(joined.asked, found.asked)
        nothing = not any(found.ports.values())
        for route in routes:
            self._judge(route, found.ports[route.key[1]], asked, nothing=nothing)
        self._tell()

    def _judge(
        self, route: Route, ports: tuple[NeutronPort, ...], asked: float, *, nothing: bool
    ) -> None:
        address = route.key[1]
        for port in ports:
            self._update(port, asked)
        if len(ports) == 1 and ports[0].id == route.port:
            key = (ports[0].network, address)
            self._routes.put(Route(route.router, key, route.port, asked))
        elif nothing:
            key = (route.router, address)
            self._routes.miss(key, asked, _PATIENCE_S, steady=self._asking.steady)
        else:
            self._routes.remove((route.router, address), asked)

    # The list

    async def list_all(self, pace: ListPace) -> None:
        """Read the list of ports, and have in force what is on it.

        Raises:
            SourceUnavailable: It could not be read to its end; what was in force before still is.
        """
        began = self._clock.monotonic()
        seen: dict[str, tuple[NeutronPort, float]] = {}
        after: str | None = None
        while True:
            query = PortQuery(host=pace.host, limit=pace.page_size, after=after)
            answer = await self._asking.ask(query, share=_LIST_SHARE, patient=True)
            fresh = [port for port in answer.ports if port.id not in seen]
            seen.update((port.id, (port, answer.asked)) for port in fresh)
            # Another number than was asked for: the last page, or all at once from one that knows no pages.
            if len(answer.ports) != pace.page_size or not fresh:
                break
            if len(seen) > _MAX_LISTED:
                raise SourceUnavailable(
                    f"Neutron's list of ports has more than {_MAX_LISTED}",
                    hint="set sources.neutron.list_host",
                )
            after = answer.ports[-1].id
        self._take_over(seen, pace.host, began)

    def _take_over(
        self, seen: dict[str, tuple[NeutronPort, float]], host: str | None, began: float
    ) -> None:
        listed = set()
        for port, asked in seen.values():
            if host is not None and port.host not in {None, host}:
                continue
            known = self._known.put(replace(port, host=None), asked)
            if known is not None:
                self._known.enlist(known)
                listed.add(port.id)
        self._known.refused_only(seen, began)
        for known in self._known:
            if known.listed and known.port.id not in listed and known.confirmed <= began:
                known.doubted = True


def _is_due(known: Known, before: float) -> bool:
    if known.doubted:
        return True
    # Listed ports are as fresh as the list: whether they are in use nobody knows.
    in_use = not known.listed or known.until > known.confirmed
    return in_use and known.confirmed <= before
