"""Hop limits as records and the host want them: the kernel's rule is there before a record counts on it.

Two loops work here, as with gates (`app.gates`). The record loop has every map value looked at before it is in force:
where the rule is missing, no token is given. The listener loop puts the rule where such records' guests are answered,
and takes it away where nobody needs it any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog

from imdsproxy.app.place_journal import read_places, render_places
from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.hop_limit import UNLIMITED, HopPlace, limit_of, plan_places, withhold
from imdsproxy.core.model import NetworkId
from imdsproxy.errors import DataplaneError, Problem

_NONE: frozenset[NetworkId] = frozenset()


class HopKernel(Protocol):
    """`imdsproxy.host.hop_table.KernelHops`."""

    table: str

    async def open(self, places: Iterable[HopPlace]) -> Mapping[HopPlace, DataplaneError | None]:
        """Have the rule there; says of each place what the kernel has against it."""
        ...

    async def present(self, names: Collection[str | None]) -> frozenset[HopPlace]:
        """Which of these namespaces have the rule."""
        ...

    async def close(self, names: Collection[str | None]) -> None:
        """Have no rule there."""
        ...


@dataclass(slots=True)
class Hops:
    """Who has a hop limit, and where the rule for it is.

    Args:
        journal: Where the rule is, so that a later process believes it, or takes it away.
        on_change: Told of networks whose records have to be made anew.
        on_need: Told of networks whose listeners have to be looked at.

    Attributes:
        refused: Why there is no rule, by network.
    """

    kernel: HopKernel
    journal: Path
    write: Callable[[Path, bytes], None]
    on_change: Callable[[frozenset[NetworkId]], None] = lambda _: None
    on_need: Callable[[frozenset[NetworkId]], None] = lambda _: None
    refused: dict[NetworkId, Problem] = field(default_factory=dict)
    _limited: dict[NetworkId, set[str]] = field(default_factory=dict)
    _armed: frozenset[NetworkId] = _NONE
    _promised: frozenset[NetworkId] = _NONE
    _open: frozenset[HopPlace] = frozenset()
    _places: dict[NetworkId, list[str | None]] | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What keeps guests from getting tokens."""
        return tuple(self.refused[one] for one in sorted(self.refused))

    async def prime(self) -> None:
        """Believe in what an earlier process left, as far as it is there.

        Raises:
            HostRefused: Our journal cannot be read.
        """
        places = self._known_places()
        names = {name for some in places.values() for name in some}
        self._open = await self.kernel.present(names)
        there = {None if place is None else place.name for place in self._open}
        self._armed = frozenset(network for network, some in places.items() if there >= set(some))
        # HAProxy may have records that count on it until all of them have been looked at.
        self._promised = frozenset(places)

    # For the record loop

    def word(self, network: NetworkId, word: str) -> str:
        """A policy word as it may be in force now."""
        if limit_of(word) == UNLIMITED or network in self._armed:
            return word
        return withhold(word)

    def hold(self, wanted: dict[str, str | None]) -> frozenset[NetworkId]:
        """Change map values that count on a rule which is not there; `settled` wants what this gives.

        Args:
            wanted: Map values by map key.
        """
        before = self._limited.keys()
        come: set[NetworkId] = set()
        for key, value in wanted.items():
            if value is not None and limit_of(value) != UNLIMITED:
                network = NetworkId(key.rpartition("/")[0])
                if network not in before:
                    come.add(network)
                self._limited.setdefault(network, set()).add(key)
                if network not in self._armed:
                    wanted[key] = withhold(value)
            elif self._limited:
                self._drop(key)
        self._promised |= self._limited.keys() & self._armed
        if come:
            self.on_need(frozenset(come))
        return self._armed

    def _drop(self, key: str) -> None:
        network = NetworkId(key.rpartition("/")[0])
        keys = self._limited.get(network)
        if keys is not None:
            keys.discard(key)
            if not keys:
                del self._limited[network]

    def settled(self, armed: frozenset[NetworkId], *, complete: bool) -> None:
        """What was held is in force.

        Args:
            armed: What `hold` gave.
            complete: Every record has been looked at by now.
        """
        if not complete or not self._promised:
            return
        gone = frozenset(
            one for one in self._promised if one not in armed or one not in self._limited
        )
        if gone:
            self._promised -= gone
            self.on_need(gone)

    # For the listener loop

    async def open(self, endpoints: Iterable[Endpoint]) -> frozenset[NetworkId]:
        """Have the rule wherever it is needed, before anybody listens there.

        Args:
            endpoints: What can be bound.

        Returns:
            Networks not to listen in yet: HAProxy has records that count on a rule which cannot be had there.

        Raises:
            HostRefused: Our journal cannot be read or written.
        """
        needed = frozenset(self._limited) | self._promised
        if not needed:
            self._armed, self._open, self.refused = _NONE, frozenset(), {}
            return _NONE
        places = plan_places(endpoints, needed)
        async with self._lock:
            return await self._have(places)

    async def _have(self, places: Mapping[NetworkId, frozenset[HopPlace]]) -> frozenset[NetworkId]:
        wanted = frozenset(place for some in places.values() for place in some)
        missing = wanted - self._open
        if missing:
            self._note(places)
        results = await self.kernel.open(missing) if missing else {}
        before = self._open
        self._open = wanted - {place for place, error in results.items() if error is not None}
        refused: dict[NetworkId, Problem] = {}
        for network, some in places.items():
            error = next((results[one] for one in some if results.get(one) is not None), None)
            if error is not None:
                refused[network] = Problem(f"networks.{network}", error.message, error.hint)
        self._refuse(refused)
        armed = frozenset(network for network, some in places.items() if some <= self._open)
        # Who is listened to nowhere keeps what it has: what is in force for it harms nobody.
        self._arm(armed | (self._armed - places.keys()))
        return frozenset(
            network for network in self._promised & refused.keys() if not places[network] <= before
        )

    def _refuse(self, refused: dict[NetworkId, Problem]) -> None:
        for name in refused.keys() - self.refused.keys():
            told = refused[name]
            structlog.get_logger().error("no hop limit", network=name, reason=told.reason)
        self.refused = refused

    def _arm(self, armed: frozenset[NetworkId]) -> None:
        changed, self._armed = self._armed ^ armed, armed
        if changed:
            self.on_change(changed)

    async def sweep(self) -> None:
        """Take the rule away where no record counts on it any more, once HAProxy listens as it should.

        Raises:
            HostRefused: The kernel refuses, or our journal cannot be written.
        """
        places = self._known_places()
        needed = self._limited.keys() | self._promised
        if all(network in needed for network in places):
            return
        async with self._lock:
            kept = {network: some for network, some in places.items() if network in needed}
            await self._close({name for some in places.values() for name in some}, kept)

    async def close_all(self) -> None:
        """Take all of ours away."""
        async with self._lock:
            names = {name for some in self._known_places().values() for name in some}
            await self._close(names, {})

    async def _close(self, names: set[str | None], kept: dict[NetworkId, list[str | None]]) -> None:
        gone = names - {name for some in kept.values() for name in some}
        await self.kernel.close(gone)
        self._open = frozenset(
            one for one in self._open if (None if one is None else one.name) not in gone
        )
        self._armed &= kept.keys()
        self._store(kept)

    async def lost(self, table: str) -> None:
        """Somebody, perhaps we ourselves, has removed a table of this name (empty: any): have it again."""
        if table not in ("", self.kernel.table) or not self._open:
            return
        async with self._lock:
            results = await self.kernel.open(self._open)
            gone = {place for place, error in results.items() if error is not None}
            if not gone:
                return
            self._open -= gone
            names = {None if place is None else place.name for place in gone}
            hit = frozenset(
                network
                for network, some in self._known_places().items()
                if not names.isdisjoint(some)
            )
            self._arm(self._armed - hit)
        self.on_need(hit)

    # The journal

    def _known_places(self) -> dict[NetworkId, list[str | None]]:
        if self._places is None:
            self._places = read_places(self.journal, family="inet")
        return self._places

    def _note(self, places: Mapping[NetworkId, frozenset[HopPlace]]) -> None:
        noted = dict(self._known_places())
        for network, some in places.items():
            names = {None if place is None else place.name for place in some}
            names |= set(noted.get(network, ()))
            noted[network] = sorted(names, key=lambda name: name or "")
        self._store(noted)

    def _store(self, places: dict[NetworkId, list[str | None]]) -> None:
        if places != self._places:
            self.write(self.journal, render_places(places))
            self._places = places
