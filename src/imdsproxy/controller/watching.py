"""Collector of requests that HAProxy's workers have seen, for `imdsproxy watch`."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from imdsproxy.errors import RuntimeUnavailable
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules.request_log import WATCH_RING, Watched, WatchReport, parse_events

_KEPT: Final = 5000
"""Number of requests kept for watchers that read a little later."""

_IDLE_S: Final = 5.0
"""Time after the last read when watching ends, in seconds: the watcher may have been killed."""


@dataclass(slots=True)
class Watching:
    """Recorder of requests, which HAProxy reports only while a watcher reads them.

    Args:
        apply: Function that applies the configuration for `wanted`; returns when it is in force, or given up for now.
        owner_of: Look-up of the instance with an address in a network, for requests that HAProxy's maps did not know.
    """

    haproxy: Haproxy
    apply: Callable[[], Awaitable[None]]
    owner_of: Callable[[str, str], str | None]
    wanted: bool = False
    _asked: asyncio.Event = field(default_factory=asyncio.Event)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _rings: dict[int, frozenset[Watched]] = field(default_factory=dict)
    _kept: deque[tuple[int, Watched]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _last: int = 0
    _lost: int = 0

    def __post_init__(self) -> None:
        self.haproxy.before_reload.append(self._look_before_reload)

    async def _look_before_reload(self) -> None:
        # A read under way looks itself, and may be the reason for this reload.
        if self.wanted and not self._lock.locked():
            async with self._lock:
                await self._look()

    async def run(self) -> None:
        """Switch off after a time without reads; run until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                async with asyncio.timeout(_IDLE_S):
                    await self._asked.wait()
            except TimeoutError:
                async with self._lock:
                    self.wanted = False
                    self._rings.clear()
                    self._kept.clear()
                    await self.apply()

    async def read(
        self, cursor: int | None, *, network: str | None = None, instance: str | None = None
    ) -> WatchReport:
        """Return the requests since `cursor`; with `None`, only a cursor to begin with."""
        self._asked.set()
        async with self._lock:
            if not self.wanted:
                self.wanted = True
                await self.apply()
            await self._look()
            # The time that a configuration takes to apply must not count as a time without reads.
            self._asked.set()
            if cursor is None:
                return WatchReport(self._last, ())
            named = (self._named(one) for number, one in self._kept if number > cursor)
            found = tuple(
                one
                for one in named
                if network in (None, one.network) and instance in (None, one.instance)
            )
            oldest = self._kept[0][0] if self._kept else self._last + 1
            missed = self._lost > cursor or oldest > cursor + 1
            return WatchReport(self._last, found, missed=missed)

    async def _look(self) -> None:
        try:
            asked = self.haproxy.master.ask_workers(f"show events {WATCH_RING}")
            answers = {worker: events async for worker, events in asked}
        except RuntimeUnavailable as error:
            structlog.get_logger().warning("requests cannot be watched", reason=error.message)
            return
        for gone in self._rings.keys() - answers.keys():
            del self._rings[gone]
        for worker, events in answers.items():
            for text in events:
                ring, known = parse_events(text), self._rings.get(worker, frozenset())
                self._rings[worker] = frozenset(ring)
                if known and known.isdisjoint(ring):
                    # The ring has wrapped since the last look, and an unknown number of requests is lost.
                    self._lost = self._last + 1
                for request in ring:
                    if request not in known:
                        self._last += 1
                        self._kept.append((self._last, request))

    def _named(self, request: Watched) -> Watched:
        if request.instance is not None or not request.network:
            return request
        return replace(request, instance=self.owner_of(request.network, request.address))
