from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from imdsproxy.core.hoststate import ObservedHost
from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.errors import HostRefused
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.listeners.observe import HostObserver
from imdsproxy.listeners.watch import EventKind, HostEvent, HostWatch, WatchPace
from support.hostlab import HostLab, eventually
from support.patience import patience

pytestmark = pytest.mark.root

BLUE = NetworkId("blue")
SLOW = WatchPace(audits_per_s=0, recheck_s=1000)
"""Nothing but events."""


@dataclass(slots=True)
class _Watched:
    watch: HostWatch
    observer: HostObserver
    networks: Mapping[NetworkId, Network]
    observed: ObservedHost

    async def expect(self, *left_out: NetworkId) -> None:
        self.observed = await self.observer.observe(self.networks.values())
        self.watch.expect(self.networks, self.observed, left_out=left_out)

    async def quiet(self) -> None:
        """Take what is told until nothing has been for a while."""
        try:
            while True:
                async with asyncio.timeout(0.3):
                    await anext(self.watch)
                await self.expect()
        except TimeoutError:
            return

    async def next(self, *kinds: EventKind, within_s: float = 1.0) -> HostEvent:
        async with asyncio.timeout(within_s * patience()):
            async for event in self.watch:
                if event.kind in kinds:
                    return event
        raise AssertionError("the watch ended")


@asynccontextmanager
async def _watching(
    lab: HostLab, listeners: Mapping[str, Listener], pace: WatchPace = SLOW
) -> AsyncIterator[_Watched]:
    thread = NamespaceThread(NamespaceDirectory())
    observer = HostObserver(thread, lab.naming)
    networks = {NetworkId(k): Network(NetworkId(k), one) for k, one in listeners.items()}
    try:
        async with HostWatch(thread, observer, lab.naming, pace) as watch:
            watched = _Watched(watch, observer, networks, ObservedHost())
            await watched.expect()
            yield watched
    finally:
        thread.close()


async def test_what_concerns_no_network_is_not_told_of(lab: HostLab) -> None:
    name = lab.namespace("blue")
    async with _watching(lab, {"blue": NamespaceListener(name)}) as watched:
        await watched.quiet()
        await asyncio.to_thread(lab.namespace, "other")
        await asyncio.to_thread(lab.device, "d")
        await asyncio.to_thread(lab.delete_namespace, name)
        event = await watched.next(*EventKind)
        assert event.kind is EventKind.NAMESPACE_WENT
        assert event.networks == {BLUE}


async def test_an_address_that_comes_late_in_a_namespace_is_an_event(lab: HostLab) -> None:
    name = lab.namespace("blue")
    async with _watching(lab, {"blue": NamespaceListener(name)}) as watched:
        await watched.quiet()
        await asyncio.to_thread(lab.address, name, "169.254.169.254/32", "lo")
        assert (await watched.next(EventKind.LINK)).networks == {BLUE}


async def test_an_address_in_a_namespace_made_later_is_an_event_too(lab: HostLab) -> None:
    name = lab.name("blue")
    async with _watching(lab, {"blue": NamespaceListener(name)}) as watched:
        await asyncio.to_thread(lab.namespace, "blue")
        await watched.next(EventKind.NAMESPACE_CAME)
        await watched.expect()
        await watched.quiet()
        await asyncio.to_thread(lab.address, name, "169.254.169.254/32", "lo")
        assert (await watched.next(EventKind.LINK)).networks == {BLUE}


@pytest.mark.parametrize("kind", [InterfaceListener, BridgeListener])
async def test_a_device_and_an_address_of_the_host_are_events_of_their_network(
    lab: HostLab, kind: type[InterfaceListener | BridgeListener]
) -> None:
    name = lab.link_name("d")
    async with _watching(lab, {"blue": kind(name)}) as watched:
        make = lab.device if kind is InterfaceListener else lab.bridge
        await asyncio.to_thread(make, "d")
        assert (await watched.next(EventKind.LINK)).networks == {BLUE}
        await watched.quiet()
        await asyncio.to_thread(lab.address, None, "169.254.169.254/32", name)
        assert (await watched.next(EventKind.LINK)).networks == {BLUE}


async def test_the_audit_finds_a_foreign_listener_that_no_event_told_of(lab: HostLab) -> None:
    name = lab.namespace("blue")
    lab.address(name, "169.254.169.254/32", "lo")
    pace = WatchPace(audits_per_s=20, recheck_s=1000)
    async with _watching(lab, {"blue": NamespaceListener(name)}, pace) as watched:
        await watched.quiet()
        server = await asyncio.to_thread(lab.serve, name, "169.254.169.254", reuse_port=True)

        event = await watched.next(EventKind.AUDIT)

        assert event.networks == {BLUE}
        await watched.expect()
        (found,) = watched.observed.namespaces[name].sockets
        assert [owner.pid for owner in found.owners] == [server.pid]
        # What is known is not reported again; that it ends is.
        await watched.quiet()
        server.stop()
        assert (await watched.next(EventKind.AUDIT)).networks == {BLUE}


async def test_the_audit_finds_a_foreign_listener_on_the_hosts_own_interface(
    lab: HostLab,
) -> None:
    device = lab.device("d")
    lab.address(None, "fe80::a9fe:a9fe/64", device, "nodad")
    pace = WatchPace(audits_per_s=20, recheck_s=1000)
    async with _watching(lab, {"blue": InterfaceListener(device)}, pace) as watched:
        await watched.quiet()
        await asyncio.to_thread(lab.serve, None, "fe80::a9fe:a9fe", device=device)
        assert (await watched.next(EventKind.AUDIT)).networks == {BLUE}


async def test_a_network_that_is_left_out_is_looked_at_every_second(lab: HostLab) -> None:
    name = lab.namespace("blue")
    lab.address(name, "169.254.169.254/32", "lo")
    server = lab.serve(name, "169.254.169.254")
    pace = WatchPace(audits_per_s=0)
    async with _watching(lab, {"blue": NamespaceListener(name)}, pace) as watched:
        await watched.expect(BLUE)
        server.stop()
        event = await watched.next(EventKind.AUDIT, within_s=1.0)
        assert event.networks == {BLUE}


async def test_more_left_out_networks_than_fit_are_looked_at_in_turn(lab: HostLab) -> None:
    names = [lab.namespace(f"n{number}") for number in range(5)]
    listeners = {name: NamespaceListener(name) for name in names}
    pace = WatchPace(audits_per_s=0, recheck_s=0.05, rechecks=2)
    async with _watching(lab, listeners, pace) as watched:
        await watched.quiet()
        # As if it were known that there are none of them.
        watched.watch.expect(watched.networks, ObservedHost(), left_out=watched.networks)
        told: set[NetworkId] = set()
        while told != set(watched.networks):
            told |= (await watched.next(EventKind.AUDIT)).networks


async def test_same_events_are_one_until_they_are_taken(lab: HostLab) -> None:
    first, last = lab.device("d"), lab.device("e")
    listeners = {"blue": InterfaceListener(first), "green": InterfaceListener(last)}
    async with _watching(lab, listeners) as watched:
        await watched.quiet()
        for device, mtu in ((first, "1400"), (first, "1300"), (first, "1200"), (last, "1400")):
            await asyncio.to_thread(lab.ip, "link", "set", device, "mtu", mtu)

        def waiting() -> list[NetworkId]:
            links = (e for e in watched.watch._events if e.kind is EventKind.LINK)
            return [network for event in links for network in event.networks]

        # The kernel tells in order: with the last device's, all of the first one's are there.
        await eventually(lambda: "green" in waiting())
        assert sorted(waiting()) == ["blue", "green"]
        await watched.next(EventKind.LINK)
        assert "blue" not in waiting()


async def test_a_watch_whose_look_fails_says_so_instead_of_falling_silent(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = lab.namespace("blue")
    pace = WatchPace(audits_per_s=50)
    async with _watching(lab, {"blue": NamespaceListener(name)}, pace) as watched:
        monkeypatch.setattr(watched.observer, "observe", None)
        with pytest.raises(TypeError):
            await watched.next(EventKind.OVERFLOW)


async def test_a_look_that_the_host_refuses_is_an_event_for_whoever_can_tell_of_it(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = lab.namespace("blue")
    pace = WatchPace(audits_per_s=50)
    async with _watching(lab, {"blue": NamespaceListener(name)}, pace) as watched:
        await watched.quiet()

        async def refuse(*_given: object) -> ObservedHost:
            raise HostRefused("cannot look")

        with monkeypatch.context() as patched:
            patched.setattr(watched.observer, "observe", refuse)
            await asyncio.to_thread(lab.serve, name, "0.0.0.0")
            assert (await watched.next(EventKind.OVERFLOW)).networks == {BLUE}
        # The watch goes on.
        assert (await watched.next(EventKind.AUDIT)).networks == {BLUE}


async def test_a_namespace_that_is_not_heard_is_looked_at_properly(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_channel: NetlinkSocket, _descriptor: int) -> int:
        raise NetlinkRefused(errno.ENOSPC)

    monkeypatch.setattr("imdsproxy.listeners.watch.assign_nsid", refuse)
    name = lab.namespace("blue")
    async with _watching(lab, {"blue": NamespaceListener(name)}, WatchPace()) as watched:
        await watched.quiet()
        await asyncio.to_thread(lab.address, name, "169.254.169.254/32", "lo")
        assert (await watched.next(EventKind.AUDIT)).networks == {BLUE}


@pytest.mark.alone
async def test_an_idle_watch_costs_next_to_nothing(lab: HostLab) -> None:
    names = [lab.namespace(f"n{number}") for number in range(5)]
    listeners = {name: NamespaceListener(name) for name in names}
    async with _watching(lab, listeners, WatchPace()) as watched:
        await watched.quiet()
        # Threads of the test's own run now and then: of several looks the cheapest counts.
        costs = []
        for _ in range(3):
            before = time.process_time()
            with pytest.raises(TimeoutError):
                await watched.next(*EventKind, within_s=1.0)
            costs.append(time.process_time() - before)
        assert min(costs) < 0.03, costs


@pytest.mark.parametrize("pace", [{"audits_per_s": -1.0}, {"recheck_s": 0.0}, {"rechecks": 0}])
def test_a_pace_below_zero_is_refused(pace: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="below zero"):
        WatchPace(**pace)  # type: ignore[arg-type]  # one keyword at a time
