"""Resolver for requests from addresses that the data plane does not know.

The address may soon become known (a guest can be faster than its own announcement), so the resolver holds the request,
within limits: a guest that invents addresses fills only its own network's share. An address waits once: until a source
reports it, further requests get their 404 at once. The result goes back to HAProxy once, with the record; from then on
HAProxy's maps have it.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Annotated, Final, TypeAlias

from imdsproxy.config.schema import ResolverSettings
from imdsproxy.model.entities import NetworkId, Scope
from imdsproxy.model.identity import Denial
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.wire import MapRecord
from imdsproxy.reconcile.part import By, Gauge, Part, Times
from imdsproxy.reconcile.progress import Durations

_QUIET_S: Final = 60.0
"""Quiet time after which an address may belong to another guest, and its requests wait again, in seconds."""
_MAX_ENDED: Final = 10_000
"""Maximum number of addresses whose wait is remembered, so that an inventive guest cannot fill the memory."""


Outcome: TypeAlias = MapRecord | Denial
"""Record by which HAProxy answers, or the reason why the guest gets no document."""

Look: TypeAlias = Callable[[AddressKey, Scope | None, int | None], Awaitable[Outcome]]
"""Function that looks an address up now; it may read the kernel's neighbour table or query Neutron. Its arguments: the
address; the kind of id in the request, if any; and the guest's port, if the kernel has not yet checked the address
together with its MAC."""

FOUND: Final = "found"
_MAY_COME: Final = (Denial.UNKNOWN, Denial.UNAVAILABLE)


@dataclass(slots=True)
class WaitingGuests:
    """Addresses whose requests wait, or have waited; loops that are made before the resolver wake them."""

    events: dict[AddressKey, set[asyncio.Event]] = field(default_factory=dict)
    ends: dict[AddressKey, float] = field(default_factory=dict)
    """End of each address's wait, or its last request after that, in roughly ascending order."""

    def wake(self, keys: Iterable[AddressKey] | None) -> None:
        """Look these addresses up again, which may have become known; `None` for all, as when a source came in sync."""
        if not (self.ends or self.events):
            return
        for key in (*self.ends, *self.events) if keys is None else keys:
            self.ends.pop(key, None)
            for event in self.events.get(key, ()):
                event.set()

    def wake_networks(self, networks: Collection[NetworkId]) -> None:
        """Look up every waiting address of these networks again: its owner may be known by the MAC now."""
        self.wake([key for key in (*self.ends, *self.events) if key[0] in networks])

    def wake_changed(self, keys: Iterable[AddressKey] | None) -> None:
        """Look these addresses up again, and those in their networks that may be known by a new MAC."""
        named = None if keys is None else frozenset(keys)
        self.wake(named)
        # A new link-local address means a new MAC.
        self.wake_networks({network for network, at in named or () if at.is_link_local})


@dataclass(slots=True)
class Resolver(Part):
    """Resolver of unknown addresses, which holds a request while the answer may still arrive.

    Args:
        look: Look-up, called once at first and again whenever `waiting` wakes the address.
        limits: Getter of the settings, called at each request so that new ones apply at once.

    Attributes:
        outcomes: Number of misses since the start, by result: `FOUND` or the denial.
        durations: Durations of resolved misses, with the time that they were held.
    """

    look: Look
    limits: Callable[[], ResolverSettings]
    now: Callable[[], float]
    outcomes: Counter[str] = field(default_factory=Counter)
    mismatched: Counter[NetworkId] = field(default_factory=Counter)
    durations: Durations = field(default_factory=Durations)
    waiting: WaitingGuests = field(default_factory=WaitingGuests)
    _held: Counter[NetworkId] = field(default_factory=Counter)

    @property
    def held(self) -> int:
        return self._held.total()

    def resolver_requests(self) -> Annotated[By, "counter", "outcome"]:
        """Requests from unknown addresses by outcome.

        The outcomes are found, unknown, unavailable, conflict, over-limit and gone (the guest left).
        """
        return {outcome: self.outcomes[outcome] for outcome in (FOUND, *Denial)}

    def resolver_seconds(self) -> Times:
        """Time from a request of an unknown address until its guest was identified, without the answer itself.

        The time includes the wait of a request that is held until a source reports the guest.
        """
        return self.durations

    def resolver_held(self) -> Gauge:
        """Requests from unknown addresses that are held now."""
        return self.held

    async def resolve(
        self, key: AddressKey, scope: Scope | None = None, port: int | None = None
    ) -> Outcome:
        """Return the record for the address, or the denial if it stays unknown (design §6)."""
        began, look = self.now(), partial(self.look, key, scope, port)
        outcome = await look()
        if outcome in _MAY_COME:
            outcome = await self._hold(key, look, outcome)
        if not isinstance(outcome, Denial):
            self.durations.add(self.now() - began)
        self.outcomes[outcome if isinstance(outcome, Denial) else FOUND] += 1
        if outcome is Denial.MISMATCH:
            self.mismatched[key[0]] += 1
        return outcome

    def _left(self, key: AddressKey, hold_s: float) -> float:
        ends, now = self.waiting.ends.get(key, -math.inf), self.now()
        return hold_s if now - ends >= _QUIET_S else max(0.0, min(hold_s, ends - now))

    def _remember(self, key: AddressKey, left_s: float) -> None:
        now = self.now()
        self.waiting.ends.pop(key, None)
        self.waiting.ends[key] = now + left_s
        for oldest, ends in tuple(islice(self.waiting.ends.items(), 2)):
            if len(self.waiting.ends) > _MAX_ENDED or now - ends >= _QUIET_S:
                del self.waiting.ends[oldest]

    async def _hold(
        self, key: AddressKey, look: Callable[[], Awaitable[Outcome]], outcome: Outcome
    ) -> Outcome:
        limits, in_sync = self.limits(), outcome is Denial.UNKNOWN
        hold_s = self._left(key, limits.hold_s) if in_sync else limits.hold_s
        if hold_s <= 0:
            self._remember(key, 0)
            return outcome
        if self._held[key[0]] >= limits.max_held_per_network or self.held >= limits.max_held:
            return Denial.OVER_LIMIT
        if in_sync:
            self._remember(key, hold_s)
        event = asyncio.Event()
        self._held[key[0]] += 1
        self.waiting.events.setdefault(key, set()).add(event)
        try:
            async with asyncio.timeout(hold_s):
                while outcome in _MAY_COME:
                    await event.wait()
                    event.clear()
                    outcome = await look()
        except TimeoutError:
            # The wait is over, and the last known state of the source still applies.
            return await look()
        finally:
            self._release(key, event)
        return outcome

    def _release(self, key: AddressKey, event: asyncio.Event) -> None:
        waiting = self.waiting.events[key]
        waiting.discard(event)
        if not waiting:
            del self.waiting.events[key]
        self._held[key[0]] -= 1
        if not self._held[key[0]]:
            del self._held[key[0]]
