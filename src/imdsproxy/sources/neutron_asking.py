"""How often Neutron is asked: so many queries at once, and none for a while when it does not answer."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from imdsproxy.errors import SourceUnavailable
from imdsproxy.sources.neutron_api import (
    NeutronClient,
    NeutronPort,
    PortQuery,
    QueryTimedOut,
)

if TYPE_CHECKING:
    from collections.abc import Hashable

    from imdsproxy.host.clock import Clock

__all__ = ["Answer", "Asking", "Outage", "QueryResult"]

QueryResult: TypeAlias = Literal["ok", "failed", "timeout"]

_FIRST_S: Final = 1.0
_LONGEST_S: Final = 30.0
_SETTLES_S: Final = 3.0
"""How long a Neutron that has just come back may leave ports out (see `neutron_refresh`)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What Neutron said, and when it was asked: it is not older than that (monotonic seconds)."""

    ports: tuple[NeutronPort, ...]
    asked: float


@dataclass(frozen=True, slots=True)
class Outage:
    """Neutron does not answer.

    Attributes:
        failure: What came instead, the last time.
        since: When that began, by the monotonic clock.
        until: When the next query is due.
    """

    failure: SourceUnavailable
    since: float
    until: float


class _Share:
    """The slots of one who asks, with how many hold or wait for one."""

    __slots__ = ("slots", "users")

    def __init__(self, slots: int) -> None:
        self.slots = asyncio.Semaphore(slots)
        self.users = 0


class Asking:
    """Queries to Neutron, bounded.

    Each query belongs to a share: a network, a router, or our own refreshing. No share may use more than half
    of the slots, so that one network's guests, however they invent addresses, leave room for the others'.

    After a failure nobody asks until a back-off with full jitter is over (at most 30 s); then one query does.
    Whoever else would, meanwhile and while that one is on its way, is refused at once.

    Args:
        random: Numbers from 0 to 1.
        max_queries: Slots.
        max_waiting: Queries of one share that may wait; more are refused.
        on_change: Told when an outage begins, goes on with another failure, or ends.

    Attributes:
        per_share: Queries that one share may have on their way.
        answered: When Neutron last answered, by the monotonic clock; `None` before it ever did.
        steady: Since when it has answered without an outage, by that clock.
    """

    def __init__(
        self,
        client: NeutronClient,
        clock: Clock,
        random: Callable[[], float],
        *,
        max_queries: int,
        max_waiting: int = 64,
        on_change: Callable[[], None],
    ) -> None:
        self._client = client
        self._clock = clock
        self._random = random
        self._slots = asyncio.Semaphore(max_queries)
        self.per_share = max(1, max_queries // 2)
        self._max_users = self.per_share + max_waiting
        self._on_change = on_change
        self._shares: dict[Hashable, _Share] = {}
        self._failures = 0
        self._probing = False
        self.outage: Outage | None = None
        self.answered: float | None = None
        self.steady = -math.inf
        self.results: Counter[QueryResult] = Counter()

    @property
    def may_ask(self) -> bool:
        """A query would be made, not refused."""
        if self.outage is None:
            return True
        return not self._probing and self._clock.monotonic() >= self.outage.until

    @property
    def settling(self) -> bool:
        """An outage has just ended: what Neutron does not show now, it may show in a moment."""
        return self._clock.monotonic() - self.steady < _SETTLES_S

    async def ask(self, query: PortQuery, *, share: Hashable, patient: bool = False) -> Answer:
        """Ask Neutron.

        Args:
            query: Whose filters no guest's word is in, but its address.
            share: In whose name.
            patient: Our own long query: that it takes too long says nothing of the others.

        Raises:
            SourceUnavailable: Neutron does not answer, now or since a moment ago, or the share is full.
        """
        self._refuse_in_outage()
        mine = self._shares.setdefault(share, _Share(self.per_share))
        if mine.users >= self._max_users:
            raise SourceUnavailable("too many questions about this network are waiting for Neutron")
        mine.users += 1
        try:
            async with mine.slots, self._slots:
                self._refuse_in_outage()
                return await self._ask(query, patient=patient)
        finally:
            mine.users -= 1
            if not mine.users:
                del self._shares[share]

    def _refuse_in_outage(self) -> None:
        if self.outage is not None and not self.may_ask:
            failure = self.outage.failure
            raise SourceUnavailable(failure.message, hint=failure.hint)

    async def _ask(self, query: PortQuery, *, patient: bool) -> Answer:
        asked = self._clock.monotonic()
        probe = self.outage is not None
        self._probing = self._probing or probe
        try:
            ports = await self._client.ports(query)
        except SourceUnavailable as error:
            late = isinstance(error, QueryTimedOut)
            self.results["timeout" if late else "failed"] += 1
            if not (late and patient):
                self._failed(error, probe=probe)
            raise
        finally:
            if probe:
                self._probing = False
        self.results["ok"] += 1
        self._succeeded()
        return Answer(ports, asked)

    def _failed(self, error: SourceUnavailable, *, probe: bool) -> None:
        outage = self.outage
        if outage is not None and not probe:
            # One of those that were on their way when another failed: the same failure.
            return
        now = self._clock.monotonic()
        self._failures += 1
        delay = self._random() * min(_LONGEST_S, _FIRST_S * 2.0 ** min(self._failures, 10))
        since = now if outage is None else outage.since
        self.outage = Outage(error, since, now + delay)
        self._on_change()

    def _succeeded(self) -> None:
        self.answered = self._clock.monotonic()
        if self.outage is not None:
            self.outage = None
            self.steady = self.answered
            self._failures = 0
            self._on_change()
