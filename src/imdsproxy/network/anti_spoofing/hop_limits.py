"""Hop limits for records: the kernel's rule exists before a record relies on it.

Two loops use this module, as with MAC filters. The record loop checks every map value before it comes into force: if
the rule is missing, guests get no token. The listener loop creates the rule where HAProxy answers guests of such
records, and removes unneeded rules.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from imdsproxy.errors import Problem
from imdsproxy.model.entities import NetworkId
from imdsproxy.model.wire import UNLIMITED, hop_limit_of, withhold_token
from imdsproxy.network.anti_spoofing.kernel import HopPlace, KernelHopLimits, TableJournal, name_of
from imdsproxy.network.planned import Endpoint

_NONE: frozenset[NetworkId] = frozenset()


@dataclass(slots=True)
class HopLimits:
    """Networks that have records with a hop limit, and the places of the kernel's rule.

    Args:
        on_need: Called with networks whose listeners must be checked again.
    """

    kernel: KernelHopLimits
    journal: TableJournal
    on_need: Callable[[frozenset[NetworkId]], object] = lambda _: None
    refused: dict[NetworkId, Problem] = field(default_factory=dict)
    _limited: dict[NetworkId, set[str]] = field(default_factory=dict)
    _armed: frozenset[NetworkId] = _NONE
    _promised: frozenset[NetworkId] = _NONE
    _open: frozenset[HopPlace] = frozenset()
    _suspect: bool = False
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def in_use(self) -> bool:
        return bool(self._limited)

    async def preload(self) -> None:
        """Restore the rules of an earlier process, as far as possible, and rely on them.

        Raises:
            HostRefused: Our journal cannot be read.
        """
        places = self.journal.load()
        self._open = await self.kernel.restore({name for some in places.values() for name in some})
        there = set(map(name_of, self._open))
        self._armed = frozenset(network for network, some in places.items() if there >= set(some))
        # Until all records have been checked, HAProxy may have some that rely on the rule.
        self._promised = frozenset(places)

    # For the record loop

    def effective(self, network: NetworkId, policy: str) -> str:
        """Return a record's policy field, without a token if the network has no rule now."""
        if hop_limit_of(policy) == UNLIMITED or network in self._armed:
            return policy
        return withhold_token(policy)

    def restrict(self, wanted: dict[str, str | None]) -> frozenset[NetworkId]:
        """Change map values that rely on a missing rule. Return a value to pass to `commit`."""
        before = frozenset(self._limited)
        for key, value in wanted.items():
            network = NetworkId(key.rpartition("/")[0])
            if value is not None and hop_limit_of(value) != UNLIMITED:
                self._limited.setdefault(network, set()).add(key)
                if network not in self._armed:
                    wanted[key] = withhold_token(value)
            elif network in self._limited:
                self._limited[network].discard(key)
                if not self._limited[network]:
                    del self._limited[network]
        self._promised |= self._limited.keys() & self._armed
        if come := self._limited.keys() - before:
            self.on_need(frozenset(come))
        return self._armed

    def commit(self, armed: frozenset[NetworkId], *, complete: bool) -> None:
        """Note that the map values of `restrict` are in force.

        Args:
            complete: Whether every record has been checked by now.
        """
        if not complete or not self._promised:
            return
        if gone := self._promised - (armed & self._limited.keys()):
            self._promised -= gone
            self.on_need(gone)

    # For the listener loop

    async def open(
        self, endpoints: Iterable[Endpoint]
    ) -> tuple[frozenset[NetworkId], frozenset[NetworkId]]:
        """Create the rule wherever it is needed, before HAProxy listens there.

        Returns:
            Networks not to listen in yet: HAProxy has records that rely on the rule, which cannot be created there.
            Then the networks whose records must be planned again.

        Raises:
            HostRefused: Our journal cannot be read or written.
        """
        # Networks with records that rely on the rule, or may do so.
        needed = self._limited.keys() | self._promised
        if not needed:
            self._armed, self._open, self.refused = _NONE, frozenset(), {}
            return _NONE, _NONE
        # Namespaces that send answers to guests of these networks; networks without an endpoint have none.
        places: dict[NetworkId, set[HopPlace]] = {}
        for one in endpoints:
            if one.network in needed:
                places.setdefault(one.network, set()).add(one.namespace)
        wanted = frozenset(place for some in places.values() for place in some)
        # The next round handles a removal during this call.
        before, self._suspect = frozenset() if self._suspect else self._open, False
        missing = wanted - before
        if missing:
            noted = dict(self.journal.load())
            for network, some in places.items():
                names = {*map(name_of, some), *noted.get(network, ())}
                noted[network] = sorted(names, key=lambda name: name or "")
            self.journal.store(noted)
        results = await self.kernel.open(missing) if missing else {}
        self._open = wanted - {place for place, error in results.items() if error is not None}
        refused: dict[NetworkId, Problem] = {}
        for network, some in places.items():
            error = next((results[one] for one in some if results.get(one) is not None), None)
            if error is not None:
                refused[network] = Problem(f"networks.{network}", error.message, error.hint)
        for name in refused.keys() - self.refused.keys():
            structlog.get_logger().error("no hop limit", network=name, reason=refused[name].reason)
        self.refused = refused
        armed = frozenset(network for network, some in places.items() if some <= self._open)
        # A network without endpoints keeps its state: its records in force harm no guest.
        armed |= self._armed - places.keys()
        changed, self._armed = self._armed ^ armed, armed
        unsafe = self._promised & refused.keys()
        return frozenset(one for one in unsafe if not places[one] <= before), changed

    async def sweep(self) -> None:
        """Remove the rule where no record relies on it, after HAProxy's configuration is in force.

        Raises:
            HostRefused: The kernel refuses, or our journal cannot be written.
        """
        await self._close(self._limited.keys() | self._promised)

    async def close_all(self) -> None:
        await self._close(set())

    async def _close(self, needed: set[NetworkId]) -> None:
        places = self.journal.load()
        if places.keys() <= needed:
            return
        kept = {network: some for network, some in places.items() if network in needed}
        gone = {name for some in places.values() for name in some}
        gone -= {name for some in kept.values() for name in some}
        # Disarm before the removal: a record that comes meanwhile must not rely on the rule.
        self._armed &= kept.keys()
        async with self._lock:
            await self.kernel.close([(name, self.kernel.table) for name in gone])
            self._open = frozenset(one for one in self._open if name_of(one) not in gone)
        self.journal.store(kept)

    async def lost(self, table: str | None) -> None:
        """Recreate our tables after a table of this name (`None`: any) was removed, perhaps by us. Request a check.

        This happens at once: the listener loop may be waiting for HAProxy, and answers have no limit meanwhile.
        """
        if table in (None, self.kernel.table) and self._open:
            self._suspect = True
            self.on_need(self._armed)
            async with self._lock:
                await self.kernel.open(self._open)
