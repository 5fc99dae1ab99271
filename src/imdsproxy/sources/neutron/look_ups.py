"""Look-ups of addresses that guests ask from: by what is known, else by one query, however many requests wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, TypeAlias, assert_never

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
from imdsproxy.sources.neutron.known import Known, KnownPorts, Route
from imdsproxy.sources.neutron.ports import NeutronPort
from imdsproxy.sources.neutron.queries import Queries
from imdsproxy.sources.neutron.settings import NeutronSourceSettings

LookUpResult: TypeAlias = Literal[
    "known", "found", "missing", "ambiguous", "unavailable", "negative-cached", "coalesced"
]
_Key: TypeAlias = tuple[Scope, NetworkId, IpAddress]

_MAX_NEGATIVE: Final = 10_000
"""Negative answers that are kept: guests that invent addresses must not fill the memory."""
_SPREAD: Final = 0.1
"""By how much of itself a lifetime is shortened at random, so that those begun together do not end together."""


@dataclass(slots=True)
class LookUps:
    """Answers look-ups; what was found is in force, and published, before it is answered.

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
    _pending: dict[_Key, asyncio.Task[LookUp]] = field(default_factory=dict)

    async def look_up(self, key: _Key) -> LookUp:
        """The instance that has the address, which must be normalised."""
        found = self._recall(key)
        if found is not None:
            self.results["known"] += 1
            return found
        negative = self._negative.get(key)
        if negative is not None and negative[1] > self.clock.monotonic():
            self.results["negative-cached"] += 1
            return negative[0]
        task = self._pending.get(key)
        if task is not None:
            self.results["coalesced"] += 1
        else:
            task = self._pending[key] = asyncio.create_task(self._ask(key))
            task.add_done_callback(partial(self._asked, key))
        try:
            # A request that is given up does not cancel the look-up that others wait for.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            asker = asyncio.current_task()
            if task.cancelled() and (asker is None or not asker.cancelling()):
                return LookUpUnavailable("imdsproxy is about to end")
            raise

    def forget_old(self) -> None:
        """Forget negative answers that are not believed any more."""
        now = self.clock.monotonic()
        for key in [key for key, (_, until) in self._negative.items() if until <= now]:
            del self._negative[key]

    async def close(self) -> None:
        """Cancel what is being asked."""
        pending = tuple(self._pending.values())
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    def _asked(self, key: _Key, task: asyncio.Task[LookUp]) -> None:
        del task
        self._pending.pop(key, None)

    def _recall(self, key: _Key) -> PortFound | None:
        scope, network, address = key
        known = (
            self.known.at(network, address)
            if scope is Scope.NETWORK
            else self.known.routes.port_behind((network, address))
        )
        return None if known is None else self._found(known)

    def _found(self, known: Known) -> PortFound:
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
        match answer:
            case PortFound():
                self.results["found"] += 1
            case PortMissing() if self.queries.settling:
                self.results["unavailable"] += 1
                return LookUpUnavailable(
                    "Neutron has just come back, and may not show all ports yet"
                )
            case PortMissing():
                self.results["missing"] += 1
                self._deny(key, answer)
            case PortAmbiguous():
                self.results["ambiguous"] += 1
                self._deny(key, answer)
            case _ as never:
                assert_never(never)
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

    def _deny(self, key: _Key, answer: LookUp) -> None:
        while len(self._negative) >= _MAX_NEGATIVE:
            del self._negative[next(iter(self._negative))]
        if self.settings.negative_ttl_s > 0:
            self._negative[key] = (
                answer,
                self.clock.monotonic() + self.settings.negative_ttl_s,
            )
