"""The miss path: a request of an address that the data plane does not know.

The address may be about to become known (a guest can be faster than its own announcement), so the request
waits for it, within bounds: a guest that invents addresses fills its own network's share and nobody
else's. An address waits once: until a source reports it, further requests get their 404 at once. What is found
goes back to HAProxy once, with its record; from then on its maps have it.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final, Protocol, TypeAlias, assert_never

from imdsproxy.core.model import InstanceId, NetworkId, Scope
from imdsproxy.core.observation import AddressKey

__all__ = [
    "Contested",
    "HoldLimits",
    "Known",
    "Mismatched",
    "Missing",
    "Outcome",
    "Refused",
    "Resolution",
    "Resolver",
    "ResolverCounts",
]

_QUIET_S: Final = 60.0
"""An address that asks for nothing this long may be another guest's by then, and waits again."""
_MAX_ENDED: Final = 10_000
"""Addresses whose wait is remembered; an inventive guest must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Known:
    """The address is this instance's, and its documents can be served.

    Attributes:
        record: The map value by which HAProxy answers.
    """

    instance: InstanceId
    record: str


@dataclass(frozen=True, slots=True)
class Contested:
    """Two instances claim it."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Nobody has it; in a source that is not in sync it may only be late."""

    in_sync: bool


@dataclass(frozen=True, slots=True)
class Mismatched:
    """It is an instance's, and another MAC than that one's asks."""


Resolution: TypeAlias = Known | Contested | Missing | Mismatched


@dataclass(frozen=True, slots=True)
class Refused:
    """What a request gets that no instance was found for."""

    status: int
    reason: str


Outcome: TypeAlias = Known | Refused


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """How long, and how many at once."""

    hold_s: float = 5.0
    per_network: int = 32
    in_all: int = 256


@dataclass(slots=True)
class ResolverCounts:
    """What became of misses since the start."""

    found: int = 0
    held: int = 0
    not_found: int = 0
    not_in_sync: int = 0
    contested: int = 0
    mismatched: Counter[NetworkId] = field(default_factory=Counter)
    over_limit: int = 0


class Look(Protocol):
    """Finds out whose an address is, now; may ask the kernel's neighbour table, or Neutron.

    Args:
        scope: What the request said that the id is, where it did.
        port: The guest's, where its address is to be believed with its MAC only and nobody has seen to that yet.
    """

    def __call__(
        self, key: AddressKey, scope: Scope | None, port: int | None, /
    ) -> Awaitable[Resolution]: ...


@dataclass(slots=True)
class Resolver:
    """Answers who an unknown address is, holding what may still come.

    Args:
        look: The look-up; called once at first and again whenever `wake` names the address.
        limits: Asked at each request, so that a new setting counts at once.
        now: Monotonic seconds.
    """

    look: Look
    limits: Callable[[], HoldLimits]
    now: Callable[[], float]
    counts: ResolverCounts = field(default_factory=ResolverCounts)
    _waiting: dict[AddressKey, set[asyncio.Event]] = field(default_factory=dict)
    _held: Counter[NetworkId] = field(default_factory=Counter)
    _wait_ends: dict[AddressKey, float] = field(default_factory=dict)
    """When each address's one wait ends, or when it last asked after that; in about that order."""

    @property
    def held(self) -> int:
        """Requests that wait now."""
        return self._held.total()

    def wake(self, keys: Iterable[AddressKey]) -> None:
        """These addresses may have become known."""
        if not (self._wait_ends or self._waiting):
            return
        for key in keys:
            self._wait_ends.pop(key, None)
            for event in self._waiting.get(key, ()):
                event.set()

    def wake_all(self) -> None:
        """Something changed for every address, as a source that came in sync."""
        self.wake((*self._wait_ends, *self._waiting))

    def wake_networks(self, networks: Collection[NetworkId]) -> None:
        """Any address of these networks may have become known: whose it is, its MAC says."""
        self.wake([key for key in (*self._wait_ends, *self._waiting) if key[0] in networks])

    async def resolve(
        self, key: AddressKey, scope: Scope | None = None, port: int | None = None
    ) -> Outcome:
        """Whose the address is, or what to answer where it stays unknown (design §6)."""
        resolution = await self.look(key, scope, port)
        if not isinstance(resolution, Missing):
            return self._outcome(key, resolution)
        limits = self.limits()
        hold_s = self._left(key, limits.hold_s) if resolution.in_sync else limits.hold_s
        if hold_s <= 0:
            self._remember(key, 0)
            return self._outcome(key, resolution)
        if self._held[key[0]] >= limits.per_network or self.held >= limits.in_all:
            self.counts.over_limit += 1
            return Refused(503, "too many unknown addresses are waiting in this network")
        if resolution.in_sync:
            self._remember(key, hold_s)
        look = partial(self.look, key, scope, port)
        return self._outcome(key, await self._hold(key, look, resolution, hold_s))

    def _left(self, key: AddressKey, hold_s: float) -> float:
        """Seconds of an address's one wait that are left; all of them where it has not begun."""
        ends, now = self._wait_ends.get(key, -math.inf), self.now()
        return hold_s if now - ends >= _QUIET_S else max(0.0, min(hold_s, ends - now))

    def _remember(self, key: AddressKey, left_s: float) -> None:
        now = self.now()
        self._wait_ends.pop(key, None)
        self._wait_ends[key] = now + left_s
        for oldest, ends in tuple(islice(self._wait_ends.items(), 2)):
            if len(self._wait_ends) > _MAX_ENDED or now - ends >= _QUIET_S:
                del self._wait_ends[oldest]

    async def _hold(
        self,
        key: AddressKey,
        look: Callable[[], Awaitable[Resolution]],
        resolution: Resolution,
        hold_s: float,
    ) -> Resolution:
        self.counts.held += 1
        event = asyncio.Event()
        self._held[key[0]] += 1
        self._waiting.setdefault(key, set()).add(event)
        try:
            async with asyncio.timeout(hold_s):
                while isinstance(resolution, Missing):
                    await event.wait()
                    event.clear()
                    resolution = await look()
        except TimeoutError:
            # The time is over, and what was last known of the source still holds.
            return await look()
        finally:
            self._release(key, event)
        return resolution

    def _release(self, key: AddressKey, event: asyncio.Event) -> None:
        waiting = self._waiting[key]
        waiting.discard(event)
        if not waiting:
            del self._waiting[key]
        self._held[key[0]] -= 1
        if not self._held[key[0]]:
            del self._held[key[0]]

    def _outcome(self, key: AddressKey, resolution: Resolution) -> Outcome:
        match resolution:
            case Known():
                self.counts.found += 1
                return resolution
            case Contested():
                self.counts.contested += 1
                return Refused(503, "more than one instance claims this address")
            case Mismatched():
                self.counts.mismatched[key[0]] += 1
                return Refused(403, "this address goes with another MAC")
            case Missing(in_sync=in_sync) if in_sync:
                self.counts.not_found += 1
                return Refused(404, "no instance has this address")
            case Missing():
                self.counts.not_in_sync += 1
                return Refused(503, "the source of instances is not in sync yet")
            case _ as never:
                assert_never(never)
