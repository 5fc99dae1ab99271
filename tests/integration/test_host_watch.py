import asyncio
import errno
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest

from imdsproxy.errors import HostRefused
from imdsproxy.host.namespace_watch import NamespaceWatch
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.state import NamespaceRef, ObservedHost
from imdsproxy.model.entities import (
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.network.listeners.host import Peek, SystemHost
from imdsproxy.network.listeners.watch import HostWatch
from imdsproxy.sources.ovn.source import OvnSource
from support.hostlab import HostLab, create_namespace
from support.patience import patience

pytestmark = pytest.mark.root

BLUE = NetworkId("blue")


@dataclass(slots=True)
class _Watched:
    watch: HostWatch
    host: SystemHost
    networks: Mapping[NetworkId, Network]
    events: asyncio.Queue[tuple[str, Collection[NetworkId] | None]]
    running: asyncio.Task[None]

    async def expect(self, *not_served: NetworkId) -> None:
        self.host.seen = await self.host.observe(self.networks.values())
        self.watch.expect(self.networks, not_served)

    async def quiet(self) -> None:
        """Take what is reported until nothing has been for a while."""
        try:
            while True:
                async with asyncio.timeout(0.3):
                    await self.events.get()
                await self.expect()
        except TimeoutError:
            return

    async def networks_of(self, *kinds: str, within_s: float = 1.0) -> Collection[NetworkId] | None:
        """The networks of the next event of these kinds."""
        async with asyncio.timeout(within_s * patience()):
            while True:
                kind, networks = await self.events.get()
                if not kinds or kind in kinds:
                    return networks


@asynccontextmanager
async def _watching(
    lab: HostLab,
    listeners: Mapping[str, Listener],
    audits_per_s: float = 0,
    every_s: float = 0.5,
    rechecks: int = 300,
    *,
    ovn: OvnSource | None = None,
) -> AsyncIterator[_Watched]:
    thread = NamespaceThread(NamespaceDirectory())
    nowhere = Path("/nonexistent")
    host = SystemHost(thread, lab.naming, links=nowhere, journal=nowhere, ovn=ovn)
    networks = {NetworkId(k): Network(NetworkId(k), one) for k, one in listeners.items()}
    events: asyncio.Queue[tuple[str, Collection[NetworkId] | None]] = asyncio.Queue()

    def touch(kind: str, networks: Collection[NetworkId] | None) -> None:
        events.put_nowait((kind, networks))

    try:
        watching = HostWatch(host, touch, lambda: audits_per_s, every_s=every_s, rechecks=rechecks)
        async with watching as watch:
            running = asyncio.create_task(watch.run())
            watched = _Watched(watch, host, networks, events, running)
            await watched.expect()
            yield watched
            running.cancel()
            await asyncio.wait([running])
    finally:
        thread.close()


async def test_what_concerns_no_network_is_not_reported(lab: HostLab) -> None:
    name = lab.namespace("blue")
    async with _watching(lab, {"blue": NamespaceListener(name)}) as watched:
        await watched.quiet()
        await asyncio.to_thread(lab.namespace, "other")
        await asyncio.to_thread(lab.device, "d")
        await asyncio.to_thread(lab.delete_namespace, name)
        async with asyncio.timeout(patience()):
            assert await watched.events.get() == ("namespace-went", {BLUE})


async def test_an_address_in_a_namespace_made_later_is_an_event_too(lab: HostLab) -> None:
    name = lab.name("blue")
    async with _watching(lab, {"blue": NamespaceListener(name)}) as watched:
        await asyncio.to_thread(lab.namespace, "blue")
        await watched.networks_of("namespace-came")
        await watched.expect()
        await watched.quiet()
        await asyncio.to_thread(lab.address, name, "169.254.169.254/32", "lo")
        assert await watched.networks_of("link") == {BLUE}


async def test_ovns_namespaces_and_all_their_addresses_are_events_even_of_no_network(
    lab: HostLab,
) -> None:
    name, of_ovn = lab.namespace("blue"), f"ovnmeta-{lab.token}"
    lab.ip("netns", "add", of_ovn)
    try:
        async with _watching(lab, {"blue": NamespaceListener(name)}) as watched:
            watched.host.ovn = Mock(OvnSource)
            for step in (("netns", "del", of_ovn), ("netns", "add", of_ovn)):
                await watched.quiet()
                await asyncio.to_thread(lab.ip, *step)
                async with asyncio.timeout(patience()):
                    kind, networks = await watched.events.get()
                assert kind.startswith("namespace-")
                assert networks == ()
            await watched.quiet()
            # Of another namespace only the metadata addresses matter.
            await asyncio.to_thread(lab.address, name, "10.0.0.2/24", "lo")
            await asyncio.to_thread(lab.address, of_ovn, "10.0.0.2/24", "lo")
            async with asyncio.timeout(patience()):
                assert await watched.events.get() == ("link", ())
    finally:
        lab.ip("netns", "del", of_ovn)


async def test_ovns_namespaces_of_before_are_events_although_there_is_no_network_at_all(
    lab: HostLab,
) -> None:
    of_ovn = f"ovnmeta-{lab.token}"
    lab.ip("netns", "add", of_ovn)
    try:
        async with _watching(lab, {}, ovn=Mock(OvnSource)) as watched:
            assert await watched.networks_of("audit") == ()
            await asyncio.to_thread(lab.address, of_ovn, "10.0.0.2/24", "lo")
            assert await watched.networks_of("link") == ()
    finally:
        lab.ip("netns", "del", of_ovn)


@pytest.mark.parametrize("kind", [InterfaceListener, BridgeListener])
async def test_a_device_its_address_and_its_ports_are_events_of_their_network(
    lab: HostLab, kind: type[InterfaceListener | BridgeListener]
) -> None:
    name = lab.link_name("d")
    steps: list[tuple[str, ...]] = [("addr", "add", "169.254.169.254/32", "dev", name)]
    if kind is BridgeListener:
        # The first port changes the bridge itself, later ones do not.
        ports = [lab.device(which) for which in ("p", "q")]
        steps += [("link", "set", port, "master", name) for port in ports]
        steps.append(("link", "set", ports[1], "nomaster"))
    else:
        # Its earlier name is the listener's.
        steps.append(("link", "set", name, "name", lab.link_name("e")))
    async with _watching(lab, {"blue": kind(name)}) as watched:
        make = lab.device if kind is InterfaceListener else lab.bridge
        await asyncio.to_thread(make, "d")
        assert await watched.networks_of("link") == {BLUE}
        for step in steps:
            await watched.quiet()
            await asyncio.to_thread(lab.ip, *step)
            assert await watched.networks_of("link") == {BLUE}, step


async def test_a_port_that_leaves_while_a_look_sees_it_join_is_an_event_of_its_bridge(
    lab: HostLab,
) -> None:
    bridge, port = lab.bridge("b"), lab.device("p")
    async with _watching(lab, {"blue": BridgeListener(bridge)}) as watched:
        await watched.quiet()
        async with watched.host.looking:
            await asyncio.to_thread(lab.ip, "link", "set", port, "master", bridge)
            seen = await watched.host.observe(watched.networks.values())
            await asyncio.to_thread(lab.ip, "link", "set", port, "nomaster")
            await asyncio.sleep(0.1)
            watched.host.seen = seen
        assert await watched.networks_of("link") == {BLUE}
        assert seen.root.devices[port].master


async def test_a_port_that_is_deleted_is_known_no_longer(lab: HostLab) -> None:
    bridge, ports = lab.bridge("b"), [lab.device(which) for which in ("p", "q")]
    for port in ports:
        lab.ip("link", "set", port, "master", bridge)
    async with _watching(lab, {"blue": BridgeListener(bridge)}) as watched:
        await watched.host._observe(watched.networks)
        watched.watch.expect(watched.networks, ())
        assert watched.host.seen.root.devices.keys() > set(ports)
        await asyncio.to_thread(lab.ip, "link", "del", ports[0])
        assert await watched.networks_of("link") == {BLUE}
        async with asyncio.timeout(patience()):
            while ports[0] in watched.host.seen.root.devices:
                watched.host.touch([BLUE])
                await watched.host._observe(watched.networks)


async def test_what_changed_between_a_look_and_the_first_expectation_is_found(lab: HostLab) -> None:
    device = lab.device("d")
    async with _watching(lab, {}) as watched:
        networks = {BLUE: Network(BLUE, InterfaceListener(device))}
        watched.host.seen = await watched.host.observe(networks.values())
        await asyncio.to_thread(lab.ip, "link", "set", device, "down")
        watched.watch.expect(networks, ())
        assert await watched.networks_of("audit") == {BLUE}


async def test_the_audit_finds_a_foreign_listener_that_no_event_reports(lab: HostLab) -> None:
    name, device = lab.namespace("blue"), lab.device("d")
    lab.address(name, "169.254.169.254/32", "lo")
    lab.address(None, "fe80::a9fe:a9fe/64", device, "nodad")
    listeners: dict[str, Listener] = {
        "blue": NamespaceListener(name, "lo"),
        "red": InterfaceListener(device),
    }
    # Others of these places, which it does not concern.
    for number in range(10):
        listeners[f"n{number}"] = NamespaceListener(name, f"none{number}")
        listeners[f"m{number}"] = InterfaceListener(f"none{number}")
    async with _watching(lab, listeners, 40) as watched:
        await watched.quiet()
        await asyncio.to_thread(lab.serve, None, "fe80::a9fe:a9fe", device=device)
        assert await watched.networks_of("audit") == {"red"}
        await watched.quiet()
        server = await asyncio.to_thread(lab.serve, name, "169.254.169.254", reuse_port=True)
        assert await watched.networks_of("audit") == {BLUE}
        await watched.expect()
        (found,) = watched.host.seen.namespaces[name].sockets
        assert [owner.pid for owner in found.owners] == [server.pid]
        # What is known is not reported again; that it ends is.
        await watched.quiet()
        server.stop()
        assert await watched.networks_of("audit") == {BLUE}


async def test_sockets_that_haproxy_binds_after_a_look_need_no_other_look(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = lab.namespace("blue")
    lab.address(name, "169.254.169.254/32", "lo")
    async with _watching(lab, {"blue": NamespaceListener(name, "lo")}, 20) as watched:
        await watched.quiet()
        peek, peeked = watched.host.peek, asyncio.Event()

        async def note(places: Collection[str | None]) -> dict[str | None, Peek | None]:
            seen = await peek(places)
            peeked.set()
            return seen

        async def refuse(*_given: object) -> ObservedHost:
            raise HostRefused("cannot look")

        with monkeypatch.context() as patched:
            patched.setattr(watched.host, "observe", refuse)
            patched.setattr(watched.host, "peek", note)
            ours = await asyncio.to_thread(lab.serve, name, "169.254.169.254", reuse_port=True)
            watched.host.our_pids = lambda: (ours.pid,)
            for _ in range(2):
                peeked.clear()
                async with asyncio.timeout(patience()):
                    await peeked.wait()
            while not watched.events.empty():
                # A look before our pid was known.
                watched.events.get_nowait()
            peeked.clear()
            async with asyncio.timeout(patience()):
                await peeked.wait()
            assert watched.events.empty()
        await asyncio.to_thread(lab.serve, name, "169.254.169.254", reuse_port=True)
        assert await watched.networks_of("audit") == {BLUE}


async def test_more_left_out_networks_than_fit_are_looked_at_in_turn(lab: HostLab) -> None:
    names = [lab.namespace(f"n{number}") for number in range(5)]
    listeners = {name: NamespaceListener(name) for name in names}
    async with _watching(lab, listeners, every_s=0.05, rechecks=2) as watched:
        await watched.quiet()
        # As if it were known that there are none of them.
        watched.host.seen = ObservedHost()
        watched.watch.expect(watched.networks, watched.networks.keys())
        found: set[NetworkId] = set()
        while found != set(watched.networks):
            found.update(await watched.networks_of("audit") or ())


async def test_a_look_that_the_host_refuses_is_an_event_and_one_that_fails_ends_the_watch(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = lab.namespace("blue")
    lab.address(name, "169.254.169.254/32", "lo")
    async with _watching(lab, {"blue": NamespaceListener(name)}, 20) as watched:
        await watched.quiet()

        async def refuse(*_given: object) -> ObservedHost:
            raise HostRefused("cannot look")

        with monkeypatch.context() as patched:
            patched.setattr(watched.host, "observe", refuse)
            server = await asyncio.to_thread(lab.serve, name, "0.0.0.0")
            assert await watched.networks_of("overflow") is None
        # The watch goes on.
        assert await watched.networks_of("audit") == {BLUE}
        await watched.expect()
        monkeypatch.setattr(watched.host, "observe", None)
        server.stop()
        with pytest.raises(TypeError):
            async with asyncio.timeout(patience()):
                await watched.running


async def test_after_events_were_lost_everything_is_looked_at(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel rounds it up to two messages or so.
    monkeypatch.setattr("imdsproxy.host.events._BUFFER_BYTES", 1)
    # Without a network too: OVN's namespaces may have changed.
    async with _watching(lab, {}) as watched:
        # The loop reads none of what this makes the kernel report.
        lab.device("d")
        assert await watched.networks_of("overflow") is None


async def test_a_namespace_that_is_not_heard_is_looked_at_properly(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_channel: NetlinkSocket, _descriptor: int) -> int:
        raise NetlinkRefused(errno.ENOSPC)

    monkeypatch.setattr("imdsproxy.network.listeners.watch.assign_nsid", refuse)
    name = lab.namespace("blue")
    async with _watching(lab, {"blue": NamespaceListener(name)}, 20) as watched:
        await watched.quiet()
        await asyncio.to_thread(lab.address, name, "169.254.169.254/32", "lo")
        assert await watched.networks_of("audit") == {BLUE}


async def _next(
    changes: AsyncIterator[tuple[NamespaceRef, bool]], *names: str
) -> tuple[NamespaceRef, bool]:
    """The next change of these names (others on this host come and go too)."""
    async with asyncio.timeout(patience()):
        while True:
            ref, came = await anext(changes)
            if ref.name in names:
                return ref, came


async def test_namespaces_that_a_name_leads_to_come_and_go(lab: HostLab) -> None:
    name = lab.namespace("blue")
    path = f"/run/netns/{name}"
    mount = ("/usr/bin/unshare", "--net", "/usr/bin/mount", "--bind", "/proc/self/ns/net", path)
    with NamespaceWatch(NamespaceDirectory()) as watch:
        changes = aiter(watch)
        known = watch.current[name]
        for steps, expected in (
            # The name stays.
            ([("/usr/bin/umount", path)], [False]),
            ([mount], [True]),
            ([("ip", "netns", "del", name), ("ip", "netns", "add", name)], [False, True]),
            ([("ip", "netns", "del", name)], [False]),
            # As for a container.
            ([("/usr/bin/ln", "-s", f"/proc/{os.getpid()}/ns/net", path)], [True]),
            ([("/usr/bin/rm", path)], [False]),
        ):
            for step in steps:
                await asyncio.to_thread(lab.run, *step)
            for came in expected:
                ref, now = await _next(changes, name)
                assert (now, came or ref == known) == (came, True), steps
                known = ref
            assert watch.current.get(name) == (known if expected[-1] else None)


async def test_a_name_that_was_removed_and_leads_to_the_same_inode_again_is_reported_too(
    lab: HostLab,
) -> None:
    # The kernel uses the inode of a namespace again once that has ended. Here it is the same one.
    name = lab.namespace("blue")
    inside = lab.serve(name, "127.0.0.1")
    with NamespaceWatch(NamespaceDirectory()) as watch:
        changes = aiter(watch)
        ref = watch.current[name]
        # The loop sees nothing meanwhile, and all of it afterwards.
        lab.delete_namespace(name)
        place = NamespaceDirectory().path / name
        place.touch()
        lab.run("/usr/bin/mount", "--bind", f"/proc/{inside.pid}/ns/net", str(place))
        assert await _next(changes, name) == (ref, False)
        assert await _next(changes, name) == (ref, True)


async def test_a_directory_that_comes_late_and_goes_and_comes_again_is_followed(
    tmp_path: Path,
) -> None:
    place = tmp_path / "deep" / "netns"
    thread = NamespaceThread(NamespaceDirectory(place))
    with NamespaceWatch(thread.directory) as watch:
        changes = aiter(watch)
        assert watch.current == {}
        for _ in range(2):
            ref = await create_namespace(thread, "blue")
            assert await _next(changes, "blue") == (ref, True)
            thread.directory.delete("blue")
            assert await _next(changes, "blue") == (ref, False)
            subprocess.run(("/usr/bin/umount", str(place)), check=True)  # noqa: ASYNC221 - short
            place.rmdir()
            place.parent.rmdir()
    thread.close()


async def test_a_watch_that_cannot_look_says_so_instead_of_falling_silent(
    lab: HostLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = NamespaceDirectory()

    def refuse(name: str) -> NamespaceRef | None:
        raise HostRefused(f"cannot look at namespace {name}")

    with NamespaceWatch(directory) as watch:
        changes = aiter(watch)
        monkeypatch.setattr(directory, "identity", refuse)
        name = await asyncio.to_thread(lab.namespace, "blue")
        with pytest.raises(HostRefused, match="cannot look at"):
            await _next(changes, name)


# Namespaces themselves


@pytest.fixture
def thread() -> Iterator[NamespaceThread]:
    made = NamespaceThread(NamespaceDirectory())
    yield made
    made.close()


def _inode(path: str) -> int:
    return Path(path).stat().st_ino


@pytest.mark.parametrize("half_made", [False, True])
async def test_a_namespace_is_made_as_by_ip_netns_even_of_what_a_killed_maker_left(
    lab: HostLab, thread: NamespaceThread, *, half_made: bool
) -> None:
    name, directory = lab.own_namespace("blue"), thread.directory
    if half_made:
        await thread.run(directory.prepare)
        (directory.path / name).touch()
        assert directory.identity(name) is None
        assert name in directory.names()
        assert name not in directory.namespaces()

    ref = await create_namespace(thread, name)

    assert directory.identity(name) == ref
    assert name in lab.ip("netns", "list")
    inode = lab.ip("netns", "exec", name, "/usr/bin/stat", "-Lc", "%i", "/proc/self/ns/net")
    assert inode == f"{ref.inode}\n"
    assert directory.delete(name)
    assert name not in lab.ip("netns", "list")
    assert directory.identity(name) is None
    assert not directory.delete(name)


async def test_work_inside_sees_the_namespace_and_the_thread_comes_home_even_when_it_fails(
    lab: HostLab, thread: NamespaceThread
) -> None:
    name = lab.namespace("blue")
    outside = _inode("/proc/self/ns/net")

    def look(name: str | None) -> tuple[NamespaceRef | None, int]:
        with thread.inside(name) as ref:
            return ref, _inode("/proc/thread-self/ns/net")

    def fail() -> None:
        with thread.inside(name) as ref:
            raise ValueError(ref)

    ref, inode = await thread.run(lambda: look(name))
    assert ref == NamespaceRef(name, inode)
    assert inode != outside
    with pytest.raises(ValueError, match=name):
        await thread.run(fail)
    assert await thread.run(lambda: look(None)) == (None, outside)
    assert _inode("/proc/self/ns/net") == outside


async def test_a_directory_of_ones_own_is_made_shared_so_that_others_see_its_namespaces(
    tmp_path: Path,
) -> None:
    place = tmp_path / "netns"
    thread = NamespaceThread(NamespaceDirectory(place))
    try:
        await create_namespace(thread, "first")
        # Somebody in a mount namespace of his own, as every unit with a private /tmp is.
        other = subprocess.Popen(  # noqa: ASYNC220 - it ends when its input does
            ("/usr/bin/unshare", "--mount", "--propagation", "slave", "/bin/cat"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"up\n")
        other.stdin.flush()
        await asyncio.to_thread(other.stdout.readline)

        second = await create_namespace(thread, "second")

        assert _inode(f"/proc/{other.pid}/root{place}/second") == second.inode
        other.communicate()
    finally:
        for name in ("first", "second"):
            thread.directory.delete(name)
        thread.close()
        subprocess.run(("/usr/bin/umount", str(place)), check=True)  # noqa: ASYNC221 - short


@pytest.mark.parametrize("name", ["../../proc/1/ns/net", "/proc/1/ns/net", "..", "", "a\0b"])
def test_a_name_that_leads_out_of_the_directory_is_refused(name: str) -> None:
    directory = NamespaceDirectory()
    for work in (directory.identity, directory.open, directory.delete):
        with pytest.raises(HostRefused, match="cannot be the name"):
            work(name)


async def test_what_is_no_namespace_of_networks_is_refused_in_words(tmp_path: Path) -> None:
    # Of what kind one is only the kernel knows.
    (tmp_path / "odd").symlink_to("/proc/self/ns/uts")
    thread = NamespaceThread(NamespaceDirectory(tmp_path))

    def enter() -> None:
        with thread.inside("odd"):
            raise AssertionError

    with pytest.raises(HostRefused, match="enter namespace odd"):
        await thread.run(enter)
    thread.close()


async def test_who_looks_at_many_namespaces_does_not_hold_up_the_end() -> None:
    thread = NamespaceThread(NamespaceDirectory())
    ending = threading.Event()

    def look() -> None:
        assert ending.wait(30)
        with thread.inside(None):
            pass

    looking = asyncio.create_task(thread.run(look))
    closing = asyncio.create_task(asyncio.to_thread(thread.close))
    async with asyncio.timeout(30):
        while not thread._closed:
            await asyncio.sleep(0.01)
    ending.set()
    with pytest.raises(HostRefused, match="ending"):
        await looking
    await closing
    # Twice is no error.
    thread.close()
