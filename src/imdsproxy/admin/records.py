"""Changes of records: stored, and confirmed by every worker of HAProxy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.documents.ec2 import list_warnings, warn_of_names
from imdsproxy.core.endpoints import LeftOut, LeftOutCode
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId
from imdsproxy.errors import AlreadyExists, NotFound, Problem, SourceRefused
from imdsproxy.listeners.loop import ListenerLoop
from imdsproxy.listeners.plan import find_shared
from imdsproxy.sources.sqlite.source import SqliteSource

_APPLY_DEADLINE_S = 10.0
"""How long nothing may come forward before the answer is that it is not in force yet."""

_LISTENER_DEADLINE_S = 2.0
_POLL_S = 0.05
_COMING = frozenset({LeftOutCode.PENDING, LeftOutCode.ADDRESS_TENTATIVE})
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Written:
    """What a change did: acknowledged once no worker of HAProxy answers with the old state.

    Attributes:
        applied: HAProxy has it. Off: it is stored, and comes in force when `pending` is mended.
        pending: Why it is not in force yet, as `namespace n1 is missing`.
        warnings: Names in the records that documents change or lack; twenty at most, then how many more.
    """

    networks: int = 0
    instances: int = 0
    applied: bool = True
    pending: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class RecordService:
    """Changes records in the store. Each method returns once no worker of HAProxy answers with the state before.

    Every method raises `SourceRefused` where no writable source is enabled or the record belongs to another source,
    and `SourceUnavailable` where the store does not answer.

    Args:
        store: Where records are written to; `None` when no enabled source takes any.
        unapplied: What keeps changes from guests.

    Attributes:
        patching: Held from reading a record until its change is stored: two PATCHes must not undo each other.
    """

    inventory: Inventory
    records: RecordLoop
    listeners: ListenerLoop
    store: SqliteSource | None
    unapplied: Callable[[], tuple[Problem, ...]]
    patching: asyncio.Lock = field(default_factory=asyncio.Lock)
    _claiming: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def put(
        self,
        networks: Sequence[Network],
        instances: Collection[Instance],
        *,
        create: bool = False,
        bulk: bool = False,
    ) -> Written:
        """Store records, or replace them: all of them, or none.

        Args:
            networks: The whole records.
            instances: The same.
            create: There must be none of these ids.
            bulk: The field of a problem begins with the kind and number of its record.

        Raises:
            AlreadyExists: With `create`, when there is one of an id.
            SourceRefused: A network is unknown, or an address taken (`problems` has the fields).
        """
        store = self._store()
        prefix = "{}[{}]." if bulk else ""
        coming = {one.id for one in networks}
        for network in networks:
            self._refuse_foreign("network", network.id, create=create)
        strangers: list[Problem] = []
        async for place, instance in _enumerated(instances):
            self._refuse_foreign("instance", instance.id, create=create)
            strangers += [
                Problem(
                    f"{prefix.format('instances', place)}ports[{number}].network",
                    f"there is no network {port.network}",
                    "imdsproxy network list",
                )
                for number, port in enumerate(instance.ports)
                if port.network not in coming and not self.inventory.knows(port.network)
            ]
        if strangers:
            raise SourceRefused("a port is in a network that does not exist", problems=strangers)
        async with self._claiming if networks else contextlib.nullcontext():
            await self._refuse_shared(networks, prefix)
            await store.put(networks, instances, bulk=bulk)
        written = await self._in_force([one.id for one in networks], instances=len(instances))
        found: list[Problem] = []
        async for _, instance in _enumerated(instances):
            found += warn_of_names(instance)
        return replace(written, warnings=list_warnings(found))

    async def _confirmed(self, waits: Sequence[Awaitable[None]]) -> bool:
        """Wait until it is in force, for as long as the work on it comes forward."""

        async def both() -> None:
            await asyncio.gather(*waits)
            if self.records.withheld:
                # The first MAC in a network: it takes another listener, and then the records again.
                await self.listeners.tickets.wait(self.listeners.tickets.given)
                await self.records.tickets.wait(self.records.tickets.given)

        waiting = asyncio.ensure_future(both())
        before = None
        while not (await asyncio.wait([waiting], timeout=_APPLY_DEADLINE_S))[0]:
            now = (self.records.looked, self.listeners.rounds)
            failing = self.listeners.failure is not None or self.records.failure is not None
            if failing or (now == before and not self.listeners.working):
                waiting.cancel()
                return False
            before = now
        return True

    async def _refuse_shared(self, networks: Sequence[Network], prefix: str) -> None:
        """Refuse listeners that another network has, each with its field."""
        if not networks:
            return
        known = self.inventory.networks
        every = {**known, **{one.id: one for one in networks}}
        shared = find_shared(every.values(), self.listeners.host.seen, known)
        if shared:
            # A namespace that was seen may be gone, and its inode another's by now.
            involved = [every[one] for one in shared.keys() | shared.values()]
            shared = find_shared(every.values(), await self.listeners.host.look_at(involved), known)
        problems = [
            Problem(
                f"{prefix.format('networks', place)}listener",
                f"network {shared[network.id]} has this listener",
                "give one of the two another, or remove one",
            )
            for place, network in enumerate(networks)
            if network.id in shared
            and (network.id not in known or known[network.id].listener != network.listener)
        ]
        if problems:
            raise SourceRefused("a listener is in use", problems=problems)

    async def remove_network(self, network: NetworkId) -> Written:
        """Remove a network.

        Raises:
            NotFound: There is none.
            SourceRefused: Instances still have ports in it (`problems` names them).
        """
        self._require("network", network)
        await self._store().remove_network(network)
        return await self._in_force([network])

    async def remove_instance(self, instance: InstanceId) -> Written:
        """Remove an instance; `NotFound` when there is none."""
        self._require("instance", instance)
        await self._store().remove_instance(instance)
        return await self._in_force([], instances=1)

    def _store(self) -> SqliteSource:
        if self.store is None:
            raise SourceRefused(
                "no source can be written to", hint="set sources.sqlite.enabled: true"
            )
        return self.store

    def _require(self, kind: str, subject: str) -> None:
        if not self._refuse_foreign(kind, subject):
            raise NotFound(f"there is no {kind} {subject}", hint=f"imdsproxy {kind} list")

    def _refuse_foreign(self, kind: str, subject: str, *, create: bool = False) -> bool:
        """Whether there is such a record, which is the store's."""
        sources = (
            self.inventory.sources_of_network(NetworkId(subject))
            if kind == "network"
            else self.inventory.sources_of_instance(InstanceId(subject))
        )
        if sources and self._store().name not in sources:
            raise SourceRefused(
                f"{kind} {subject} belongs to source {', '.join(sources)}", hint="change it there"
            )
        if sources and create:
            article = "a" if kind == "network" else "an"
            raise AlreadyExists(
                f"there is {article} {kind} {subject} already", hint="use set to change it"
            )
        return bool(sources)

    async def _unserved(self, networks: frozenset[NetworkId]) -> list[LeftOut]:
        """Why these are not served, once what comes by itself had its time to come."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LISTENER_DEADLINE_S
        while True:
            found = [one for one in self.listeners.degraded() if one.network in networks]
            if not any(one.code in _COMING for one in found) or loop.time() > deadline:
                return found
            await asyncio.sleep(_POLL_S)

    async def _in_force(self, networks: Sequence[NetworkId], *, instances: int = 0) -> Written:
        pending: list[str] = []
        waits = [self.records.tickets.wait(self.records.tickets.given)]
        if networks:
            waits.append(self.listeners.tickets.wait(self.listeners.tickets.given))
        if not await self._confirmed(waits):
            pending.append("the data plane has not confirmed it yet")
        pending += [problem.reason for problem in self.unapplied()]
        if networks:
            pending += map(str, await self._unserved(frozenset(networks)))
        return Written(
            len(networks), instances, applied=not pending, pending=tuple(dict.fromkeys(pending))
        )


async def _enumerated(instances: Iterable[Instance]) -> AsyncIterator[tuple[int, Instance]]:
    """Instances with their numbers; between some of them the event loop does other work."""
    for number, instance in enumerate(instances):
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
        yield number, instance
