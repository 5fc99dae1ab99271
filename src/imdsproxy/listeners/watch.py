"""Everything on the host that may change what HAProxy can bind, as one stream of events.

Three sources: namespaces that come and go, devices and addresses (in the host's own namespace and in those that HAProxy
listens in), and a paced audit of what no event reports, above all other programs' listening sockets. The audit checks
one network after the other, and those that are not served every second.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self, TypeVar, assert_never

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedHost, changed_places
from imdsproxy.core.model import Network, NetworkId
from imdsproxy.errors import DataplaneError
from imdsproxy.host.events import LinkChange, watch_links
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import assign_nsid
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.listeners.namespace_watch import NamespaceCame, NamespaceWatch, NamespaceWent
from imdsproxy.listeners.observe import HostObserver, Peek, place_of

T = TypeVar("T")

_AUDIT_INTERVAL_S: Final = 0.5
"""The audit looks at as many networks as are due, so often."""

_AT_ONCE: Final = 64
"""Namespaces looked at in one go: the thread is free for others every 20 ms."""


class EventKind(StrEnum):
    """Kinds of events."""

    NAMESPACE_CAME = "namespace-came"
    NAMESPACE_WENT = "namespace-went"
    LINK = "link"
    """A device or a metadata address has changed."""

    AUDIT = "audit"
    """A look without an event found something changed."""

    OVERFLOW = "overflow"
    """Events were lost, or a look failed: look at everything."""


@dataclass(frozen=True, slots=True)
class HostEvent:
    """Something that may change what can be listened on.

    Attributes:
        networks: Those whose listener it concerns; never empty.
    """

    kind: EventKind
    networks: frozenset[NetworkId]


@dataclass(frozen=True, slots=True)
class WatchPace:
    """How often to check what no event reports.

    Attributes:
        audits_per_s: Networks checked in turn each second, none of them more often than every
            half second; one takes 0.1 ms. 0 for none.
        recheck_s: Seconds between two checks of networks that are not served.
        rechecks: At most so many of them each time, in turn.
    """

    audits_per_s: float = 20.0
    recheck_s: float = 0.8
    rechecks: int = 500

    def __post_init__(self) -> None:
        if self.audits_per_s < 0 or self.recheck_s <= 0 or self.rechecks <= 0:
            raise ValueError(f"a pace cannot be below zero: {self}")


@dataclass(slots=True)
class _Places:
    """Which networks listen where."""

    namespaces: dict[str, set[NetworkId]] = field(default_factory=dict)
    devices: dict[str, set[NetworkId]] = field(default_factory=dict)
    interfaces: set[NetworkId] = field(default_factory=set)


class HostWatch:
    """One asynchronous iterator of `HostEvent`. An asynchronous context manager.

    It reports nothing until `expect` was called. Equal events are merged until they are taken.

    Args:
        thread: Where namespaces are entered.
        observer: Looks, for the audit.
        naming: How our own objects are named.
        pace: How often to look.
    """

    def __init__(
        self,
        thread: NamespaceThread,
        observer: HostObserver,
        naming: Naming,
        pace: WatchPace | None = None,
    ) -> None:
        self._thread = thread
        self._observer = observer
        self._naming = naming
        self._pace = pace or WatchPace()
        self._networks: dict[NetworkId, Network] = {}
        self._places = _Places()
        self._observed = ObservedHost()
        self._left_out: tuple[NetworkId, ...] = ()
        self._our_pids: frozenset[int] = frozenset()
        self._nsids: dict[int, NamespaceRef] = {}
        self._wanted_ids = asyncio.Event()
        self._events: dict[HostEvent, None] = {}
        self._some = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = contextlib.AsyncExitStack()
        self._peeked: dict[str | None, Peek | None] = {}
        self._turn = 0
        self._recheck_turn = 0

    @property
    def namespaces(self) -> Mapping[str, NamespaceRef]:
        """Every usable namespace by name, as of now."""
        return self._namespace_watch.current

    def namespace_of_id(self, nsid: int) -> NamespaceRef | None:
        """The namespace that has an id, as its events carry it."""
        return self._nsids.get(nsid)

    def is_watched(self, namespace: NamespaceRef | None) -> bool:
        """Whether events of a namespace are received; `None` is our own."""
        return namespace is None or namespace in self._nsids.values()

    def expect(
        self,
        networks: Mapping[NetworkId, Network],
        observed: ObservedHost,
        *,
        left_out: Iterable[NetworkId] = (),
        our_pids: Collection[int] = (),
    ) -> None:
        """Set what matters and what is known: an audit reports only what differs from that.

        Args:
            networks: All of them.
            observed: The host as it is known.
            left_out: Networks to check every second.
            our_pids: HAProxy's master and workers.
        """
        if networks != self._networks:
            self._networks = dict(networks)
            self._places = _places(networks.values(), self._naming)
            self._peeked = {
                name: one for name, one in self._peeked.items() if name in self._places.namespaces
            }
            self._wanted_ids.set()
        self._observed = observed
        self._left_out = tuple(sorted(set(left_out)))
        self._our_pids = frozenset(our_pids)

    async def __aenter__(self) -> Self:
        self._namespace_watch = await self._closing.enter_async_context(
            NamespaceWatch(self._thread.directory)
        )
        self._link_watch = await self._closing.enter_async_context(watch_links())
        for work in (
            self._follow_namespaces(),
            self._follow_links(),
            self._give_ids(),
            self._audit(),
            self._recheck(),
        ):
            task = asyncio.create_task(work)
            task.add_done_callback(lambda _: self._some.set())
            self._tasks.append(task)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._closing.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> HostEvent:
        while not self._events:
            self._raise_failure()
            self._some.clear()
            await self._some.wait()
        event = next(iter(self._events))
        del self._events[event]
        return event

    def _raise_failure(self) -> None:
        # One that has ended by itself has failed, and so has the watch.
        for task in self._tasks:
            if task.done():
                task.result()

    def _publish(self, event: HostEvent) -> None:
        if event.networks:
            self._events[event] = None
            self._some.set()

    async def _follow_namespaces(self) -> None:
        async for change in self._namespace_watch:
            networks = frozenset(self._places.namespaces.get(change.ref.name, ()))
            if isinstance(change, NamespaceCame):
                if networks:
                    self._wanted_ids.set()
                self._publish(HostEvent(EventKind.NAMESPACE_CAME, networks))
            elif isinstance(change, NamespaceWent):
                self._nsids = {i: ref for i, ref in self._nsids.items() if ref != change.ref}
                self._publish(HostEvent(EventKind.NAMESPACE_WENT, networks))
            else:
                assert_never(change)

    async def _follow_links(self) -> None:
        async for change in self._link_watch:
            if change.overflow:
                self._publish(HostEvent(EventKind.OVERFLOW, frozenset(self._networks)))
            else:
                self._publish(HostEvent(EventKind.LINK, self._concerned(change)))

    def _concerned(self, change: LinkChange) -> frozenset[NetworkId]:
        if change.nsid is None:
            return frozenset(self._places.devices.get(change.device, ())) | self._plugged(change)
        ref = self._nsids.get(change.nsid)
        if ref is None:
            return frozenset()
        return frozenset(self._places.namespaces.get(ref.name, ()))

    def _plugged(self, change: LinkChange) -> frozenset[NetworkId]:
        """The networks of a bridge that a device became a port of, or is a port of no longer."""
        if change.master is None:
            return frozenset()
        root = self._observed.root
        concerned: set[NetworkId] = set()
        for bridge, ports in root.ports.items():
            device = root.devices.get(bridge)
            is_port = device is not None and device.index == change.master
            if is_port is not any(one.name == change.device for one in ports):
                concerned |= self._places.devices.get(bridge, set())
        return frozenset(concerned)

    async def _give_ids(self) -> None:
        """Give an id to each namespace that HAProxy listens in, so that its events are received."""
        while True:
            await self._wanted_ids.wait()
            self._wanted_ids.clear()
            if not self._link_watch.hears_all:
                continue
            have = set(self._nsids.values())
            current = self.namespaces
            missing = [
                ref
                for name in self._places.namespaces
                if (ref := current.get(name)) and ref not in have
            ]
            for some in _batches(missing, _AT_ONCE):
                given = await self._thread.run(functools.partial(self._assign, some))
                self._nsids.update(given)
                # What happened before the id was given was not reported.
                await self._look(self._listening_in(ref.name for ref in given.values()))

    def _assign(self, refs: Iterable[NamespaceRef]) -> dict[int, NamespaceRef]:
        given: dict[int, NamespaceRef] = {}
        with NetlinkSocket() as channel:
            for ref in refs:
                opened = self._thread.directory.open(ref.name)
                if opened is None:
                    continue
                try:
                    given[assign_nsid(channel, opened.descriptor)] = opened.ref
                except NetlinkRefused:
                    # No events then; the audit looks at it properly every time.
                    continue
                finally:
                    opened.close()
        return given

    async def _audit(self) -> None:
        """Look at some networks after the others, for ever."""
        pace = self._pace.audits_per_s
        while pace > 0:
            interval = max(_AUDIT_INTERVAL_S, 1 / pace)
            await asyncio.sleep(interval)
            ids = list(self._networks)
            count = min(len(ids), round(pace * interval))
            turn = [ids[(self._turn + number) % len(ids)] for number in range(count)]
            self._turn += count
            await self._audit_some([self._networks[one] for one in turn])

    async def _audit_some(self, networks: list[Network]) -> None:
        # Devices and addresses are reported where a namespace has an id. Listening sockets are not:
        # where they differ from the last proper look, it is time for another one.
        heard = {None, *(ref.name for ref in self._nsids.values())}
        places = {one.id: place_of(one, self._naming).namespace for one in networks}
        seen = await self._observer.peek(set(places.values()))
        stale = [
            one
            for one in networks
            if (place := places[one.id]) not in heard
            or seen[place] not in (_known_sockets(self._observed, place), self._peeked.get(place))
        ]
        if stale and await self._look(stale):
            self._peeked.update({places[one.id]: seen[places[one.id]] for one in stale})

    async def _recheck(self) -> None:
        """Look at networks that are not served, again and again."""
        while True:
            await asyncio.sleep(self._pace.recheck_s)
            ids = [one for one in self._left_out if one in self._networks]
            start = self._recheck_turn % max(len(ids), 1)
            turn = (ids[start:] + ids[:start])[: self._pace.rechecks]
            self._recheck_turn = start + len(turn)
            for some in _batches([self._networks[one] for one in turn], _AT_ONCE):
                await self._look(some)

    async def _look(self, networks: list[Network]) -> bool:
        """Look properly, and report differences; false when that was not possible."""
        try:
            part = await self._observer.observe(networks, self._our_pids)
        except DataplaneError:
            # The listener loop, which acts on the event, looks too, reports the error and tries again.
            self._publish(HostEvent(EventKind.OVERFLOW, frozenset(self._networks)))
            return False
        changed = changed_places(self._observed, part)
        if not changed:
            return True
        concerned: set[NetworkId] = set()
        for name in changed.namespaces:
            concerned |= self._places.namespaces.get(name, set())
        for name in changed.devices:
            concerned |= self._places.devices.get(name, set())
        if changed.sockets:
            concerned |= self._places.interfaces
        self._publish(HostEvent(EventKind.AUDIT, frozenset(concerned)))
        return True

    def _listening_in(self, names: Iterable[str]) -> list[Network]:
        ids = sorted({one for name in names for one in self._places.namespaces.get(name, ())})
        return [self._networks[one] for one in ids]


def _known_sockets(observed: ObservedHost, place: str | None) -> Peek | None:
    """The peek that is expected when nothing has changed since the last proper look."""
    seen = observed.root if place is None else observed.namespaces.get(place)
    if seen is None or seen.problem:
        return None
    return 0 if seen.ref is None else seen.ref.inode, frozenset(one.inode for one in seen.sockets)


def _batches(things: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]


def _places(networks: Iterable[Network], naming: Naming) -> _Places:
    places = _Places()
    for network in networks:
        place = place_of(network, naming)
        if place.namespace is not None:
            places.namespaces.setdefault(place.namespace, set()).add(network.id)
        else:
            places.interfaces.add(network.id)
        for device in place.host_devices:
            places.devices.setdefault(device, set()).add(network.id)
    return places
