"""The source `neutron` while it runs: what it knows, what it tells, and what it does by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from imdsproxy.core.observation import Observation
from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.sources.neutron_asking import Asking
from imdsproxy.sources.neutron_finding import Finder
from imdsproxy.sources.neutron_kept import KeptPorts
from imdsproxy.sources.neutron_known import KnownPorts
from imdsproxy.sources.neutron_lookups import LookUps, LookUpTimes
from imdsproxy.sources.neutron_refresh import ListPace, Refresher
from imdsproxy.sources.neutron_routes import Routes

if TYPE_CHECKING:
    from imdsproxy.host.clock import Clock
    from imdsproxy.sources.api import Publish
    from imdsproxy.sources.neutron_api import NeutronClient

__all__ = ["NeutronPace", "Running"]

_TICK_S: Final = 1.0
_SAVE_S: Final = 60.0
"""How often it is written down that Neutron still answers, where nothing else is to be."""
_LIST_AGAIN_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class NeutronPace:
    """How Neutron is asked; the settings `sources.neutron` have the words.

    Attributes:
        list_every_s: 0 for no list.
    """

    max_queries: int = 8
    negative_ttl_s: float = 3.0
    refresh_s: float = 10.0
    lifetime_s: float = 3600.0
    list_every_s: float = 0.0
    list_host: str | None = None
    page_size: int = 500

    @property
    def aside_s(self) -> float:
        """How long a port whose time is over is still kept up to date: its guest may ask again."""
        return max(6 * self.refresh_s, min(self.lifetime_s / 4, 900.0))


class Running:
    """One run; see `neutron.NeutronSource` for the arguments."""

    def __init__(
        self,
        name: str,
        client: NeutronClient,
        kept: KeptPorts,
        pace: NeutronPace,
        publish: Publish,
        *,
        clock: Clock,
        random: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._name = name
        self._client = client
        self._kept = kept
        self._pace = pace
        self._publish = publish
        self._clock = clock
        self._random = random
        self._sleep = sleep
        self._complete = False
        self._full = False
        self._probed = False
        self._down = False
        self._told: tuple[bool, tuple[Problem, ...]] | None = None
        self._list_failure: SourceUnavailable | None = None
        self._saved = clock.monotonic()
        self.known = KnownPorts()
        self.routes = Routes(self.known)
        self.asking = Asking(
            client, clock, random, max_queries=pace.max_queries, on_change=self._outage_changed
        )
        finder = Finder(self.asking, clock, networks_s=pace.refresh_s / 2)
        self._finder = finder
        self.look_ups = LookUps(
            self.known,
            self.routes,
            finder,
            LookUpTimes(pace.negative_ttl_s, pace.lifetime_s),
            clock=clock,
            random=random,
            settling=lambda: self.asking.settling,
            tell=self._tell,
        )
        self._refresher = Refresher(
            self.known,
            self.routes,
            finder,
            self.asking,
            clock=clock,
            refresh_s=max(0.0, pace.refresh_s - _TICK_S),
            tell=self._tell,
        )

    @property
    def complete(self) -> bool:
        """Whether it is in sync by what is kept, before anything was asked."""
        return self._complete

    async def start(self) -> None:
        """Take over what is kept, and tell it."""
        kept = await asyncio.to_thread(self._kept.load)
        now = self._clock.monotonic()
        # Old enough that all of it is asked for at once.
        age = self._pace.refresh_s
        if kept.answered is not None:
            age = max(age, self._clock.now().timestamp() - kept.answered)
            self.asking.answered = now - age
        for port in kept.ports:
            known = self.known.put(port, now - age)
            if known is None:
                continue
            self.known.keep(known, now + self._pace.lifetime_s * (0.5 + 0.5 * self._random()))
            if self._pace.list_every_s:
                self.known.enlist(known)
        self.known.unsaved.clear()
        self.routes.restore(kept.routes)
        self._complete = bool(kept.ports) or not self._pace.list_every_s
        self._tell()

    async def work(self) -> None:
        """Keep it up to date until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_fresh())
            if self._pace.list_every_s:
                group.create_task(self._keep_listed())

    async def close(self) -> None:
        """Let go of everything, and write down what is not yet."""
        await self.look_ups.close()
        await self._finder.close()
        await self._client.close()
        await self._save()

    async def _keep_fresh(self) -> None:
        while True:
            await self._round()
            await self._sleep(_TICK_S)

    async def _round(self) -> None:
        # Before Neutron is asked: an answer may take long, and the controller may be killed meanwhile.
        await self._save()
        if self.asking.outage is None:
            # What Neutron said last stays in force until it can say something else.
            self.known.expire(self._clock.monotonic(), self._pace.aside_s)
            self.routes.prune()
        self.look_ups.forget_old()
        self._finder.forget_old()
        if self.asking.may_ask:
            asked = await self._refresher.refresh()
            if not asked and (self.asking.outage is not None or not self._probed):
                await self._refresher.probe()
            self._probed = True
        self._tell()

    async def _keep_listed(self) -> None:
        pace = ListPace(self._pace.list_host, self._pace.page_size)
        while True:
            try:
                await self._refresher.list_all(pace)
            except SourceUnavailable as error:
                self._list_failure = error
                pause = min(self._pace.list_every_s, _LIST_AGAIN_S) * self._random()
            else:
                self._list_failure = None
                self._complete = True
                pause = self._pace.list_every_s
            self._tell()
            await self._sleep(max(pause, _TICK_S))

    # Telling

    def _outage_changed(self) -> None:
        log = structlog.get_logger()
        outage = self.asking.outage
        if outage is None:
            log.info("neutron answers again")
        elif not self._down:
            log.warning("neutron does not answer", error=outage.failure.message)
        self._down = outage is not None
        self._tell()

    def _tell(self) -> None:
        """Publish what has changed; the first time everything, once everything is known."""
        changes = self.known.changes()
        # Not a word of Neutron's being there: what is known is told, and who is not known is asked for.
        in_sync = self._complete
        problems = tuple(self._problems())
        full = self._complete and not self._full
        # Before the list was read there is nothing to say, unless it cannot be read.
        before = (False, ()) if self._told is None else self._told
        if not (full or changes.instances or changes.removed or before != (in_sync, problems)):
            return
        self._told = (in_sync, problems)
        self._full = self._full or full
        self._publish(
            Observation(
                self._name,
                full=full,
                instances=self.known.told if full else changes.instances,
                instances_removed=changes.removed,
                in_sync=in_sync,
                problems=problems,
                implied_networks=self.known.networks,
                defers=True,
            )
        )

    def _problems(self) -> Iterator[Problem]:
        outage = self.asking.outage
        if outage is not None:
            yield Problem("neutron", outage.failure.message, outage.failure.hint)
        elif self._list_failure is not None:
            failure = self._list_failure
            yield Problem("list", f"not read: {failure.message}", failure.hint)
        if self._kept.problem is not None:
            yield self._kept.problem
        yield from self.known.problems

    # Keeping

    def _something_to_save(self) -> bool:
        late = self._clock.monotonic() - self._saved >= _SAVE_S
        return bool(self.known.unsaved) or self.routes.unsaved or (late and len(self.known) > 0)

    async def _save(self) -> None:
        if not self._something_to_save():
            return
        now = self._clock.monotonic()
        ports = {port_id: self.known.get(port_id) for port_id in self.known.unsaved}
        routes = tuple(self.routes) if self.routes.unsaved else None
        answered = self.asking.answered
        self.known.unsaved.clear()
        self.routes.unsaved = False
        self._saved = now
        await asyncio.to_thread(
            self._kept.save,
            {port_id: None if known is None else known.port for port_id, known in ports.items()},
            routes,
            None
            if answered is None
            else self._clock.now().timestamp() - (self._clock.monotonic() - answered),
        )
