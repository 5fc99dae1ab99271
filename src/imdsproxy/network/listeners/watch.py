"""Watcher of host changes that affect HAProxy's binds, for the listener loop.

It has three inputs: namespaces that appear and disappear; devices and addresses, in the host's own namespace, in those
that HAProxy listens in, and in all with the name of one of OVN's networks; and a paced audit for changes without
events, such as other programs' listening sockets. Each audit checks the next networks in turn, and all networks that
are not served.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, TypeVar

from imdsproxy.errors import DataplaneError
from imdsproxy.host.events import KernelEvents, LinkChange, watch_links
from imdsproxy.host.namespace_watch import NamespaceWatch
from imdsproxy.host.namespaces import NamespaceMissing
from imdsproxy.host.netlink import assign_nsid
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.state import NamespaceRef, ObservedHost, ObservedNamespace, merge_observed
from imdsproxy.model.entities import Network, NetworkId
from imdsproxy.network.listeners.host import Peek, SystemHost
from imdsproxy.network.listeners.plan import Place, ovn_place, place_of, plan_network
from imdsproxy.network.ovn.plan import network_of

T = TypeVar("T")

_AT_ONCE: Final = 64
"""Maximum number of networks or namespaces in a batch: the namespace thread is free for others every 20 ms."""


@dataclass(eq=False, slots=True)
class HostWatch:
    """Asynchronous context manager that watches the host while it is entered.

    Before the first call of `expect` it reports only changes of OVN's namespaces, and lost events. An audit reports
    only differences from the host as last seen.

    Attributes:
        touch: Called with the kind of an event and the networks whose listeners the event concerns. Kinds are
            `namespace-came`, `namespace-went`, `link` (a device or an address changed), `audit` (a change without an
            event) and `overflow` (events were lost or an observation failed), with `None` for all networks.
        audits_per_s: Returns the number of networks to check in turn each second; one takes 0.1 ms. 0 for none.
        every_s: Seconds between two checks of networks that are not served.
        rechecks: Maximum number of networks in such a check; the others have their turn in the next ones.
    """

    host: SystemHost
    touch: Callable[[str, Collection[NetworkId] | None], object]
    audits_per_s: Callable[[], float]
    every_s: float = 0.5
    rechecks: int = 300
    _networks: Mapping[NetworkId, Network] = field(default_factory=dict)
    _namespaces: dict[str | None, set[NetworkId]] = field(default_factory=dict)
    _devices: dict[str, set[NetworkId]] = field(default_factory=dict)
    _not_served: tuple[NetworkId, ...] = ()
    _new: list[Network] = field(default_factory=list)
    _nsids: dict[int, NamespaceRef] = field(default_factory=dict)
    _wanted_ids: asyncio.Event = field(default_factory=asyncio.Event)
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _peeked: dict[str | None, Peek | None] = field(default_factory=dict)
    _turns: Counter[str] = field(default_factory=Counter)
    _namespace_watch: NamespaceWatch = field(init=False)
    _link_watch: KernelEvents[LinkChange] = field(init=False)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def namespace_of_id(self, nsid: int) -> NamespaceRef | None:
        return self._nsids.get(nsid)

    def is_watched(self, namespace: NamespaceRef | None) -> bool:
        """Return whether events of a namespace are received; `None` is our own."""
        return namespace is None or namespace in self._nsids.values()

    def expect(self, networks: Mapping[NetworkId, Network], silent: Collection[NetworkId]) -> None:
        """Set all networks, and those among them to check in every audit."""
        if networks != self._networks:
            before, self._networks = self._networks, dict(networks)
            self._namespaces, self._devices = {}, {}
            for network in networks.values():
                place = place_of(network, self.host.naming)
                self._namespaces.setdefault(place.namespace, set()).add(network.id)
                for device in place.observed_devices:
                    self._devices.setdefault(device, set()).add(network.id)
                if place.namespace is None and before.get(network.id) != network:
                    # Changes of its device since the last observation were not published.
                    self._new.append(network)
            for name in self._peeked.keys() - self._namespaces.keys():
                del self._peeked[name]
            self._wanted_ids.set()
        self._not_served = tuple(sorted(networks.keys() & silent))

    async def __aenter__(self) -> Self:
        directory = self.host.thread.directory
        self._namespace_watch = self._closing.enter_context(NamespaceWatch(directory))
        self._link_watch = self._closing.enter_context(watch_links())
        # OVN's namespaces need ids although no network may ever be expected.
        self._wanted_ids.set()
        works = (self._follow_namespaces, self._follow_links, self._give_ids, self._audit)
        self._tasks = [asyncio.create_task(work()) for work in works]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._closing.close()

    async def run(self) -> None:
        await asyncio.gather(*self._tasks)

    def _publish(self, kind: str, networks: Collection[NetworkId]) -> None:
        if networks:
            self.touch(kind, frozenset(networks))

    async def _follow_namespaces(self) -> None:
        async for ref, came in self._namespace_watch:
            if came:
                self._wanted_ids.set()
            else:
                self._nsids = {i: one for i, one in self._nsids.items() if one != ref}
            self._publish_in("namespace-came" if came else "namespace-went", ref.name)

    def _publish_in(self, kind: str, namespace: str) -> None:
        networks, of_ovn = self._namespaces.get(namespace, ()), self._ovn_network(namespace)
        self._publish(kind, networks)
        if of_ovn is not None and not networks:
            # It may lack what its network needs, although no guest is served there, or have to be removed.
            self.host.touch_place(ovn_place(of_ovn))
            self.touch(kind, ())

    def _ovn_network(self, namespace: str) -> NetworkId | None:
        return None if self.host.ovn is None else network_of(namespace)

    async def _follow_links(self) -> None:
        async for change in self._link_watch:
            if change is None:
                self.touch("overflow", None)
            elif change.nsid is None:
                # Wait for an observation that is under way, so that `seen` includes it.
                async with self.host.looking:
                    names = self._concerned(change)
                networks = (self._devices.get(name, set()) for name in names)
                self._publish("link", set().union(*networks))
            elif (ref := self._nsids.get(change.nsid)) is not None and (
                not change.is_other or self._ovn_network(ref.name) is not None
            ):
                self._publish_in("link", ref.name)

    def _concerned(self, change: LinkChange) -> list[str]:
        """Return the changed device, by its earlier name too, and the bridges that it joined or left."""
        devices = self.host.seen.root.devices
        known = devices.get(change.device)
        if change.index and (known is None or known.index != change.index):
            known = next((one for one in devices.values() if one.index == change.index), None)
        names, master = [change.device], 0
        if known is not None:
            names.append(known.name)
            master = known.master
            if change.gone or known.name != change.device:
                self.host.touch_place(Place(None, known.name))
        if change.master not in (None, master):
            bridges = (devices[name] for name in self._devices if name in devices)
            names += [one.name for one in bridges if one.index in (master, change.master)]
        return names

    async def _give_ids(self) -> None:
        """Assign an id to each namespace of a network, and to OVN's, so that their events are received.

        Also observe newly expected networks once their events are published: earlier events were not.
        """
        while True:
            await self._wanted_ids.wait()
            self._wanted_ids.clear()
            new, self._new = self._new, []
            for networks in _batches(new):
                await self._look(networks)
            if not self._link_watch.hears_all:
                continue
            have, current = set(self._nsids.values()), self._namespace_watch.current
            missing = [
                ref
                for name, ref in current.items()
                if (name in self._namespaces or self._ovn_network(name) is not None)
                and ref not in have
            ]
            for some in _batches(missing):
                given = await self.host.thread.run(functools.partial(self._assign, some))
                self._nsids.update(given)
                # Changes before the id was assigned were not reported.
                names = {ref.name for ref in given.values()}
                ids = (self._namespaces.get(name, ()) for name in names)
                await self._look([self._networks[one] for some in ids for one in some])
                for name in names - self._namespaces.keys():
                    self._publish_in("audit", name)

    def _assign(self, refs: Iterable[NamespaceRef]) -> dict[int, NamespaceRef]:
        given: dict[int, NamespaceRef] = {}
        with NetlinkSocket() as channel:
            for ref in refs:
                # A namespace without an id has no events: the audit observes each network there in its turn.
                with contextlib.suppress(NamespaceMissing, NetlinkRefused):
                    opened = self.host.thread.directory.open(ref.name)
                    with contextlib.closing(opened):
                        given[assign_nsid(channel, opened.descriptor)] = opened.ref
        return given

    async def _audit(self) -> None:
        due = 0.0
        while True:
            await asyncio.sleep(self.every_s)
            due = min(due + self.audits_per_s() * self.every_s, len(self._networks))
            # Check many networks in large batches: each batch wakes two threads.
            if due >= max(1, min(_AT_ONCE, len(self._networks) / 10)):
                await self._peek(self._next("audit", tuple(self._networks), int(due)))
                due -= int(due)
            for some in _batches(self._next("recheck", self._not_served, self.rechecks)):
                await self._look(some)

    def _next(self, which: str, ids: Sequence[NetworkId], count: int) -> list[Network]:
        turn = [ids[(self._turns[which] + n) % len(ids)] for n in range(min(count, len(ids)))]
        self._turns[which] += len(turn)
        return [self._networks[one] for one in turn]

    async def _peek(self, networks: list[Network]) -> None:
        # A namespace with an id has events for devices and addresses, but none for listening sockets:
        # if its sockets differ from the last full observation, it is observed again.
        heard = {None, *(ref.name for ref in self._nsids.values())}
        places = {place_of(one, self.host.naming).namespace for one in networks}
        seen = await self.host.peek(places)
        new = [
            place
            for place in places
            if place not in heard or place not in self._peeked or seen[place] != self._peeked[place]
        ]
        changed = await self._changed(new, heard, seen)
        # Observe all networks that listen there: a peek shows a change only once.
        stale = set[NetworkId]().union(*(self._namespaces.get(one, ()) for one in changed))
        looks = _batches([self._networks[one] for one in sorted(stale)])
        if all([await self._look(some) for some in looks]):
            self._peeked.update({place: seen[place] for place in changed})

    async def _changed(
        self,
        places: Iterable[str | None],
        heard: Collection[str | None],
        seen: Mapping[str | None, Peek | None],
    ) -> list[str | None]:
        """Return the places that have changed since the listener loop saw them, other than by HAProxy's own sockets.

        HAProxy binds after that look: without this, each place would be observed again after a start.
        """
        added = {
            place: peek[1] - known[1]
            for place in places
            if place in heard
            and (known := self._last_look(place)) is not None
            and (peek := seen[place]) is not None
            and known[0] == peek[0]
            and known[1] <= peek[1]
        }
        sockets = frozenset[int]().union(*added.values())
        ours = await self.host.find_ours(sockets) if sockets else sockets
        same = {place for place, inodes in added.items() if inodes <= ours}
        self._peeked.update({place: seen[place] for place in same})
        return [place for place in places if place not in same]

    def _last_look(self, place: str | None) -> Peek | None:
        host = self.host.seen
        observed = host.root if place is None else host.namespaces.get(place)
        if observed is None or observed.problem:
            return None
        inode = 0 if observed.ref is None else observed.ref.inode
        return inode, frozenset(one.inode for one in observed.sockets)

    async def _look(self, networks: Sequence[Network]) -> bool:
        try:
            part = await self.host.observe(networks)
        except DataplaneError:
            # The listener loop acts on the event: it observes the host too, reports the error and retries.
            self.touch("overflow", None)
            return False
        before = self.host.seen
        now = merge_observed(before, part)
        ports, known = _ports(now.root), _ports(before.root)
        changed = [
            one.id
            for one in networks
            if self._facts(one, now, ports) != self._facts(one, before, known)
        ]
        self._publish("audit", changed)
        return True

    def _facts(
        self, network: Network, host: ObservedHost, ports: Mapping[int, Collection[str]]
    ) -> object:
        place = place_of(network, self.host.naming)
        seen = host.namespaces.get(place.namespace or "")
        names = place.host_devices if place.bridge is None else place.bridge[:1]
        bridges = [host.root.devices[name] for name in names if name in host.root.devices]
        # MAC filters are on all devices of a namespace, redirections on all ports of a bridge.
        return (
            tuple(plan_network(network, host, self.host.naming)),
            None if seen is None else (seen.devices, seen.end),
            [ports.get(bridge.index) for bridge in bridges],
        )


def _ports(seen: ObservedNamespace) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for device in seen.devices.values():
        found.setdefault(device.master, set()).add(device.name)
    return found


def _batches(things: Sequence[T]) -> list[Sequence[T]]:
    return [things[start : start + _AT_ONCE] for start in range(0, len(things), _AT_ONCE)]
