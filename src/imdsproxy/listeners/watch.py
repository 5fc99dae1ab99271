"""Everything on the host that may change what HAProxy can bind, reported to the listener loop.

Three sources: namespaces that come and go, devices and addresses (in the host's own namespace and in those that HAProxy
listens in), and a paced audit of what no event reports, above all other programs' listening sockets. The audit checks
one network after the other, and those that are not served every second.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import select
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self, TypeVar

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedHost, changed_places
from imdsproxy.core.model import Network, NetworkId
from imdsproxy.errors import DataplaneError
from imdsproxy.host.events import LinkChange, Stream, watch_links
from imdsproxy.host.inotify import (
    ENTRIES,
    IN_DELETE,
    IN_IGNORED,
    IN_MOVED_FROM,
    IN_Q_OVERFLOW,
    IN_UNMOUNT,
    ITSELF,
    Inotify,
)
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.netlink import assign_nsid
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.refusal import host_refused
from imdsproxy.listeners.observe import HostObserver, Peek, place_of

T = TypeVar("T")

_RESCAN_DELAY_S: Final = 0.5
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


@dataclass(slots=True)
class _Places:
    """Which networks listen where."""

    namespaces: dict[str, set[NetworkId]] = field(default_factory=dict)
    devices: dict[str, set[NetworkId]] = field(default_factory=dict)
    interfaces: set[NetworkId] = field(default_factory=set)


class HostWatch:
    """Watches the host as long as its context is entered. An asynchronous context manager.

    It reports nothing until `expect` was called.

    Args:
        thread: Where namespaces are entered.
        observer: Looks, for the audit.
        naming: How our own objects are named.
        touch: Called with a kind of event and the networks whose listener it concerns; `None` for all.
        pace: How often to look.
    """

    def __init__(
        self,
        thread: NamespaceThread,
        observer: HostObserver,
        naming: Naming,
        touch: Callable[[str, Collection[NetworkId] | None], object],
        pace: WatchPace | None = None,
    ) -> None:
        self._thread = thread
        self._observer = observer
        self._naming = naming
        self._touch = touch
        self._pace = pace or WatchPace()
        self._networks: dict[NetworkId, Network] = {}
        self._places = _Places()
        self._observed = ObservedHost()
        self._left_out: tuple[NetworkId, ...] = ()
        self._our_pids: frozenset[int] = frozenset()
        self._nsids: dict[int, NamespaceRef] = {}
        self._wanted_ids = asyncio.Event()
        self._closing = contextlib.AsyncExitStack()
        self._peeked: dict[str | None, Peek | None] = {}
        self._turn = 0
        self._recheck_turn = 0

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
        works = (self._follow_namespaces, self._follow_links, self._give_ids)
        self._tasks = [asyncio.create_task(w()) for w in (*works, self._audit, self._recheck)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._closing.aclose()

    async def run(self) -> None:
        """Wait until watching fails, and raise what failed."""
        await asyncio.gather(*self._tasks)

    def _publish(self, kind: EventKind, networks: Collection[NetworkId]) -> None:
        if networks:
            self._touch(kind, frozenset(networks))

    def _publish_all(self) -> None:
        if self._networks:
            self._touch(EventKind.OVERFLOW, None)

    async def _follow_namespaces(self) -> None:
        async for ref, came in self._namespace_watch:
            networks = self._places.namespaces.get(ref.name, ())
            if not came:
                self._nsids = {i: one for i, one in self._nsids.items() if one != ref}
                self._publish(EventKind.NAMESPACE_WENT, networks)
                continue
            if networks:
                self._wanted_ids.set()
            self._publish(EventKind.NAMESPACE_CAME, networks)

    async def _follow_links(self) -> None:
        async for change in self._link_watch:
            if change.overflow:
                self._publish_all()
            else:
                self._publish(EventKind.LINK, self._concerned(change))

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
            current = self._namespace_watch.current
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
            self._publish_all()
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
        self._publish(EventKind.AUDIT, concerned)
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


class NamespaceWatch(Stream[tuple[NamespaceRef, bool]]):
    """The namespaces of a directory, kept up to date. An asynchronous context manager.

    Each item is a namespace, and whether its name leads to it now or does not any more: its sockets may keep it alive.
    The directory need not exist yet.

    inotify reports names, but IN_CREATE comes before the mount that makes the name a namespace, and inotify does not
    report mounts. `/proc/self/mountinfo` does, by POLLPRI, without saying which: names that are still pending are tried
    again, and a scan of the whole directory, at most every half second, finds what no event reported (a mount upon an
    existing name, an overflow of the queue).

    Args:
        directory: What to watch.
    """

    def __init__(self, directory: NamespaceDirectory) -> None:
        super().__init__()
        self._directory = directory
        self._current: dict[str, NamespaceRef] = {}
        self._pending: set[str] = set()
        self._rescan: asyncio.TimerHandle | None = None
        self._watched: tuple[int, int] | None = None
        self._watch = -1

    @property
    def current(self) -> Mapping[str, NamespaceRef]:
        """Every usable namespace by name, as of now."""
        return self._current

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        try:
            self._inotify = Inotify()
            self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            # An epoll of our own, since asyncio knows no POLLPRI.
            self._epoll = select.epoll()
            self._epoll.register(self._inotify.descriptor, select.EPOLLIN)
            self._epoll.register(self._mounts, select.EPOLLPRI | select.EPOLLERR)
        except OSError as error:
            # EMFILE of inotify_init is about its instances, not about descriptors.
            hint = "raise fs.inotify.max_user_instances" if error.errno == errno.EMFILE else ""
            raise host_refused("watch the network namespaces", error, hint=hint) from error
        self._follow()
        self._current = self._directory.namespaces()
        self._pending = set(self._directory.names()) - self._current.keys()
        self._loop.add_reader(self._epoll.fileno(), self.attempt, self._take)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        if self._rescan is not None:
            self._rescan.cancel()
        self._epoll.close()
        os.close(self._mounts)
        self._inotify.close()

    def _take(self) -> None:
        # asyncio's own epoll has looked at ours to learn that it is ready, and with that the mount
        # event is used up: being called at all is the event.
        self._epoll.poll(0)
        for watch, mask, name in self._inotify.read():
            if mask & IN_Q_OVERFLOW or watch != self._watch or mask & ITSELF:
                self._look()
            elif mask & (IN_UNMOUNT | IN_IGNORED):
                self._watched = None
                self._look()
            else:
                self._entry(name, replaced=bool(mask & (IN_DELETE | IN_MOVED_FROM)))
        for name in sorted(self._pending):
            self._entry(name)
        if self._rescan is None:
            self._rescan = self._loop.call_later(_RESCAN_DELAY_S, self._look_later)

    def _entry(self, name: str, *, replaced: bool = False) -> None:
        """Check what a name leads to now, and report a change.

        Args:
            name: In the directory.
            replaced: It has been removed since it was last looked at. When it leads to a namespace
                all the same, that is another one, though the kernel may have used the inode again.
        """
        before, now = self._current.get(name), self._directory.identity(name)
        if now is None and os.path.lexists(self._directory.path / name):
            self._pending.add(name)
        else:
            self._pending.discard(name)
        if before == now and not (replaced and now is not None):
            return
        if before is not None:
            del self._current[name]
            self.put((before, False))
        if now is not None:
            self._current[name] = now
            self.put((now, True))

    def _look_later(self) -> None:
        self._rescan = None
        self.attempt(self._look)

    def _look(self) -> None:
        """Look at the whole directory."""
        self._follow()
        for name in sorted({*self._directory.names(), *self._current, *self._pending}):
            self._entry(name)

    def _follow(self) -> None:
        """Put the inotify watch on the directory, or on its nearest parent that exists."""
        for place in (self._directory.path, *self._directory.path.parents):
            try:
                status = place.stat()
                if (status.st_dev, status.st_ino) == self._watched:
                    return
                watch = self._inotify.add(place, ENTRIES | ITSELF)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise host_refused(f"watch {place}", error) from error
            if self._watched is not None and self._watch != watch:
                self._inotify.remove(self._watch)
            self._watched = (status.st_dev, status.st_ino)
            self._watch = watch
            return
