"""From networks and the host as it is to HAProxy's binds, and what is done to the host for them."""

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import AsyncMock, Mock, call, patch
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from imdsproxy.config.schema import UnixListenerSettings
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.rules.model import DataplaneSpec, IssuerFrontend, Limits
from imdsproxy.haproxy.unix_listener.listener import UnixListener
from imdsproxy.host.clock import Clock
from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nftables import BRIDGE, Change
from imdsproxy.host.nlmessages import NetlinkRefused
from imdsproxy.host.state import (
    NamespaceRef,
    ObservedAddress,
    ObservedDevice,
    ObservedHost,
    ObservedNamespace,
    SeenSocket,
    SocketState,
)
from imdsproxy.model.entities import (
    METADATA_IPV4,
    METADATA_IPV6,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Observation
from imdsproxy.network.listeners.apply import HostTable
from imdsproxy.network.listeners.host import KeptNetworks, SystemHost
from imdsproxy.network.listeners.loop import ListenerLoop, ListenerRequests
from imdsproxy.network.listeners.plan import Place
from imdsproxy.network.planned import (
    AddAddress,
    DeleteLink,
    DeleteNamespace,
    HostOp,
    NotServedCode,
    RemoveAddress,
    RemoveTable,
    RouterTable,
)
from support.fake_haproxy import FakeHaproxy, control_fake
from support.fake_mac_filters import no_hop_limits, no_mac_filters
from support.record_files import last_written
from support.tasks import until


class FakeHost(SystemHost):
    """Namespaces by name; looked at as the real one is, whole or in part."""

    def __init__(self, links: Path, our_pids: Callable[[], Collection[int]]) -> None:
        nowhere = Path("/nowhere")
        thread = Mock(directory=Mock(path=nowhere))
        super().__init__(thread, Naming(), links=links, journal=nowhere, our_pids=our_pids)
        self.namespaces: dict[str, ObservedNamespace] = {}
        self.asked: list[tuple[bool, frozenset[NetworkId]]] = []
        self.refusal = ""
        self.done: list[HostOp] = []
        self.during: Callable[[], object] = lambda: None
        self.arp_filter, self.diverter = self.tables = [
            Mock(apply=AsyncMock(return_value=())) for _ in range(2)
        ]

    def make(self, name: str, inode: int, *, addressed: bool = True) -> None:
        self.namespaces[name] = ObservedNamespace(
            NamespaceRef(name, inode),
            {"eth0": ObservedDevice("eth0", 2, up=True, mtu=1500)},
            (ObservedAddress("eth0", METADATA_IPV4, 32),) * addressed,
        )

    async def observe(
        self,
        networks: Iterable[Network],
        others: Collection[Place] = (),
        *,
        everything: bool = False,
    ) -> ObservedHost:
        given = list(networks)
        self.asked.append((everything, frozenset(one.id for one in given)))
        self.during()
        names = {
            one.listener.namespace for one in given if isinstance(one.listener, NamespaceListener)
        }
        names |= {one.namespace for one in others if one.namespace is not None}
        names |= {one for one in self.namespaces if everything and self.naming.is_namespace(one)}
        seen = {name: self.namespaces[name] for name in sorted(names) if name in self.namespaces}
        return ObservedHost(namespaces=seen, asked=None if everything else frozenset(names))

    async def apply(self, ops: Iterable[HostOp]) -> Mapping[HostOp, Problem]:
        given = tuple(ops)
        self.done += given
        for one in () if self.refusal else given:
            if isinstance(one, DeleteNamespace):
                del self.namespaces[one.namespace]
            elif isinstance(one, AddAddress) and one.namespace is not None:
                seen = self.namespaces[one.namespace]
                there = (*seen.addresses, ObservedAddress(one.device, one.address, 32))
                self.namespaces[one.namespace] = replace(seen, addresses=there)
        return dict.fromkeys(given, Problem("host", self.refusal)) if self.refusal else {}


@dataclass
class Rig:
    host: FakeHost
    inventory: Inventory
    loop: ListenerLoop
    layout: Layout
    fake: FakeHaproxy
    taken: set[int]

    def say(self, *names: str, in_sync: bool = True) -> None:
        networks = {
            NetworkId(name): Network(NetworkId(name), NamespaceListener(name)) for name in names
        }
        self.inventory.observe(Observation("a", full=True, networks=networks, in_sync=in_sync))

    async def serve(self, *names: str) -> None:
        """Settle with these networks, whose namespaces there are."""
        for inode, name in enumerate(names, 7):
            self.host.make(name, inode)
        self.say(*names)
        await self.settle("networks changed", *names)

    async def settle(self, reason: str, *networks: str | None) -> None:
        given = [NetworkId(one) for one in networks if one is not None]
        await self.wait(self.loop.touch(reason, None if None in networks else given))

    async def wait(self, ticket: int | None = None) -> None:
        async with asyncio.timeout(30):
            await self.loop.tickets.wait(self.loop.tickets.given if ticket is None else ticket)

    async def fail(self, *networks: str) -> None:
        self.loop.touch("networks changed", [NetworkId(one) for one in networks])
        await until(lambda: self.loop.failure)

    def add(self, listener: Listener) -> None:
        network = Network(NetworkId("red"), listener)
        self.inventory.observe(Observation("a", full=True, networks={network.id: network}))

    def bound(self) -> set[str]:
        lines = self.layout.config.read_text().splitlines()
        return {
            line.split(" name ")[1].split(" ")[0]
            for line in lines
            if line.startswith("  bind 169.254.169.254:80")
        }

    def not_served(self) -> dict[str, NotServedCode]:
        return {
            one.network: one.code
            for one in self.loop.last_plan.not_served
            if one.family is None or one.family.value == 4
        }


@pytest.fixture
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """With the agents' socket if a test has its name as a parameter."""
    directory, agents = tmp_path, getattr(request, "param", None)
    layout = Layout(directory, directory, chroot=False)
    script = '#!/bin/sh\n! grep -q POISON "$3"\n'
    fake, _, haproxy = control_fake(layout, script)
    host = FakeHost(directory / "netns", lambda: haproxy.pids)
    inventory = Inventory(["a"])
    taken: set[int] = set()

    def try_listen(host: str, port: int) -> str | None:
        return f"{host} port {port}: Address already in use" if port in taken else None

    path = directory / "agents" / (agents or "metadata_proxy")
    wanted = UnixListenerSettings(enabled=agents is not None, path=path)
    spec = DataplaneSpec(
        (),
        layout.haproxy_paths(),
        Limits(maxconn=0),
        exporter="127.0.0.1:9",
        issuer=IssuerFrontend("127.0.0.1:8", "/issuer.pem", "digest", ()),
    )
    loop = ListenerLoop(
        inventory,
        ListenerRequests(host),
        haproxy,
        Clock(),
        lambda: spec,
        lambda: 0,
        no_mac_filters(inventory),
        no_hop_limits(),
        serves_routers=False,
        kept=KeptNetworks(directory / "networks.json"),
        unix=UnixListener(
            lambda: wanted, haproxy, lambda _path, _pids: SeenSocket(SocketState.MISSING), Clock()
        ),
    )
    with patch("imdsproxy.network.listeners.loop.try_tcp_listen", try_listen):
        await loop.first_round()
        task = asyncio.create_task(loop.run())
        try:
            yield Rig(host, inventory, loop, layout, fake, taken)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await fake.close()


async def test_a_missing_namespace_leaves_out_its_network_and_no_other_and_is_logged_once(
    rig: Rig,
) -> None:
    rig.host.make("red", 7)
    rig.say("red", "blue")
    with capture_logs() as logs:
        await rig.settle("networks changed", "red", "blue")
        await rig.settle("again", "red", "blue")
    # That red has no IPv6 address is no trouble.
    left = [one for one in logs if one["event"] == "listener not served"]
    assert [(one["network"], one["code"]) for one in left] == [("blue", "namespace-missing")]
    assert rig.bound() == {"red"}
    assert [str(one.readlink()) for one in rig.host.links.iterdir()] == ["/nowhere/red"]
    assert rig.not_served() == {"blue": NotServedCode.NAMESPACE_MISSING}
    rig.host.make("blue", 8)
    await rig.settle("namespace-came", "blue")
    assert rig.bound() == {"red", "blue"}
    assert rig.not_served() == {}


async def test_only_what_may_have_changed_is_looked_at_and_what_has_not_reloads_nothing(
    rig: Rig,
) -> None:
    await rig.serve("red", "blue", "green")
    # Looks between rounds know HAProxy's sockets.
    processes = rig.loop.haproxy.processes
    assert processes is not None
    assert rig.host.our_pids() == processes.pids != ()
    reloads = rig.fake.reloads
    rig.host.asked.clear()
    await rig.settle("link", "blue")
    assert rig.host.asked == [(False, frozenset({"blue"}))]
    assert rig.bound() == {"red", "blue", "green"}
    await rig.settle("overflow", None)
    assert rig.host.asked[-1] == (True, frozenset({"red", "blue", "green"}))
    assert rig.fake.reloads == reloads


async def test_after_a_refusal_the_whole_host_is_looked_at_again_once(rig: Rig) -> None:
    rig.host.make("red", 7)
    rig.host.make("POISON", 8)
    rig.say("red", "POISON")
    rig.host.asked.clear()
    await rig.fail("red", "POISON")
    assert [everything for everything, _ in rig.host.asked][:2] == [False, True]
    assert "POISON" not in rig.layout.config.read_text()
    del rig.host.namespaces["POISON"]
    await rig.wait()
    assert rig.bound() == {"red"}
    assert rig.loop.failure is None


async def test_what_is_ours_and_no_network_s_is_removed_once_and_known_to_be_gone(rig: Rig) -> None:
    rig.host.make("red", 7)
    rig.say("red")
    left, naming = NetworkId("gone"), rig.host.naming
    lo = ObservedDevice("lo", 1, up=True, mtu=65536, alias=naming.alias(left))
    name = naming.namespace(left)
    rig.host.namespaces[name] = ObservedNamespace(NamespaceRef(name, 9), {"lo": lo})
    await rig.settle("overflow", None)
    await rig.settle("link", "red")
    assert rig.host.done == [DeleteNamespace(name)]
    assert rig.host.seen.namespaces.keys() == {"red"}


async def test_a_redirection_is_removed_although_its_network_goes_as_the_whole_host_is_observed(
    rig: Rig,
) -> None:
    await rig.serve("red")
    seen = replace(rig.host.namespaces["red"], tables=frozenset({"imds-drop", "imds-redirect"}))
    rig.host.namespaces["red"] = seen
    rig.host.seen = ObservedHost(namespaces={"red": seen})
    rig.say()
    await rig.settle("overflow", None)
    ref = NamespaceRef("red", 7)
    assert rig.host.done == [RemoveTable(ref, RouterTable.REDIRECT, rig.host.naming)]


async def test_a_network_that_was_let_go_is_listened_in_no_more_and_its_records_stay(
    rig: Rig,
) -> None:
    await rig.serve("red", "blue")
    await rig.loop.release_networks([NetworkId("red")])
    assert rig.bound() == {"blue"}
    assert rig.inventory.networks.keys() == {"red", "blue"}


async def test_what_the_host_refuses_is_told_and_tried_again(rig: Rig) -> None:
    rig.host.make("red", 7, addressed=False)
    rig.add(NamespaceListener("red", "eth0", manage_addresses=True))
    rig.host.refusal = "no permission"
    await rig.settle("networks changed", "red")
    assert {problem.reason for problem in rig.loop.last_plan.problems} == {"no permission"}
    assert rig.not_served() == {"red": NotServedCode.HOST_REFUSED}
    assert rig.host.operations["failed"] >= 1
    rig.host.refusal = ""
    await until(lambda: not rig.not_served())


async def test_what_was_made_is_looked_at_and_planned_with_in_the_same_round(rig: Rig) -> None:
    rig.host.make("red", 7, addressed=False)
    rig.add(NamespaceListener("red", "eth0", manage_addresses=True))
    rig.host.asked.clear()
    await rig.settle("networks changed", "red")
    assert rig.host.asked == [(False, frozenset({NetworkId("red")}))] * 2
    report = rig.loop.last_plan
    assert (report.not_served, len(report.endpoints), report.operations) == ((), 2, 2)


@pytest.mark.parametrize("fails", [True, False])
async def test_after_a_look_that_failed_or_is_not_enough_any_more_all_is_looked_at(
    rig: Rig, *, fails: bool
) -> None:
    await rig.serve("red")

    def during() -> None:
        rig.host.during = lambda: None
        if fails:
            raise HostRefused("no descriptors left")
        rig.host.touch(None)

    rig.host.during = during
    rig.host.asked.clear()
    for _ in range(2):
        await rig.settle("link", "red")
    assert [everything for everything, _ in rig.host.asked][:2] == [False, True]
    assert rig.bound() == {"red"}


@pytest.mark.parametrize(
    ("port", "name", "setting"),
    [(9, "exporter", "metrics.haproxy_listen"), (8, "issuer", "identity.listen")],
)
async def test_a_frontend_of_the_host_whose_port_is_taken_costs_no_guest_anything(
    rig: Rig, port: int, name: str, setting: str
) -> None:
    frontend = f"bind 127.0.0.1:{port} name {name} "
    assert frontend in rig.layout.config.read_text()
    # The socket is HAProxy's own.
    rig.taken.add(port)
    await rig.serve("red")
    assert frontend in rig.layout.config.read_text()
    rig.loop.haproxy.processes = None
    await rig.fake.close()
    await rig.settle("haproxy did not start", "red")
    assert rig.bound() == {"red"}
    text = rig.layout.config.read_text()
    assert f" name {name} " not in text
    assert " name exporter " in text or " name issuer " in text
    assert [problem.field for problem in rig.loop.last_plan.problems] == [setting]
    rig.taken.clear()
    await until(lambda: frontend in rig.layout.config.read_text())


async def test_the_host_answers_arp_only_where_a_network_listens_on_its_device_or_says_why(
    rig: Rig,
) -> None:
    arp_filter = rig.host.tables[0].apply
    assert "virbr0" not in str(arp_filter.call_args)
    rig.add(InterfaceListener("virbr0"))
    await rig.settle("networks changed", "red")
    assert "virbr0" in str(arp_filter.call_args)
    arp_filter.return_value = (Problem("host", "no nft"),)
    await rig.serve("red")
    assert [problem.reason for problem in rig.loop.last_plan.problems] == ["no nft"]
    assert rig.bound() == {"red"}


@pytest.mark.parametrize("rig", ["POISON"], indirect=True)
async def test_a_haproxy_that_does_not_start_with_the_agents_socket_starts_without_it(
    rig: Rig,
) -> None:
    assert "frontend agents" not in rig.layout.config.read_text()
    await rig.serve("red")
    assert rig.bound() == {"red"}
    (problem,) = rig.loop.last_plan.problems
    assert problem.reason.endswith("the unix listener is not served")


@pytest.mark.parametrize("rig", ["metadata_proxy"], indirect=True)
async def test_a_refusal_that_it_is_not_to_blame_for_costs_the_agents_nothing(rig: Rig) -> None:
    rig.fake.refuse_reload = "[ALERT] Binding for frontend agents and for another"
    rig.host.make("red", 7)
    rig.say("red")
    await rig.fail("red")
    rig.fake.refuse_reload = ""
    await rig.wait()
    assert rig.bound() == {"red"}
    assert "frontend agents" in rig.layout.config.read_text()
    assert rig.loop.last_plan.problems == ()


# The journal of where we have put addresses

_ADD = AddAddress(NetworkId("red"), "red", "eth0", METADATA_IPV4, 200)
_ROOT = AddAddress(NetworkId("blue"), None, "virbr0", METADATA_IPV4, 200)
_REMOVE = RemoveAddress("red", "eth0", METADATA_IPV4, 32)


def _host(directory: Path) -> SystemHost:
    """Another process each time."""
    links, journal = directory / "netns", directory / "managed.json"
    return SystemHost(Mock(), Naming(), links=links, journal=journal)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> AsyncMock:
    """A kernel that refuses nothing."""
    apply = AsyncMock(return_value={})
    monkeypatch.setattr("imdsproxy.network.listeners.host.apply_ops", apply)
    return apply


async def test_a_place_is_noted_before_anything_is_put_there_whatever_becomes_of_it(
    tmp_path: Path, applied: AsyncMock
) -> None:
    def refuse(_: object, ops: Iterable[HostOp], *__: object) -> dict[HostOp, Problem]:
        assert _host(tmp_path).managed() == {("red", "eth0"), (None, "virbr0")}
        return dict.fromkeys(ops, Problem("host", "no"))

    applied.side_effect = refuse
    assert _host(tmp_path).managed() == frozenset()
    assert len(await _host(tmp_path).apply([_ADD, _ROOT])) == 2
    assert _host(tmp_path).managed() == {("red", "eth0"), (None, "virbr0")}


async def test_a_place_is_struck_out_once_all_that_was_to_be_removed_there_is(
    tmp_path: Path, applied: AsyncMock
) -> None:
    await _host(tmp_path).apply([_ADD, _ROOT])
    before = last_written(tmp_path / "managed.json")
    applied.return_value = {_REMOVE: Problem("host", "no")}
    for ops in ([DeleteLink("imds0")], [_REMOVE, replace(_REMOVE, address=METADATA_IPV6)]):
        await _host(tmp_path).apply(ops)
        assert last_written(tmp_path / "managed.json") == before
    applied.return_value = {}
    await _host(tmp_path).apply([_REMOVE])
    assert _host(tmp_path).managed() == {(None, "virbr0")}


async def test_routers_tables_that_redirect_are_gone_before_those_that_drop_are_removed(
    tmp_path: Path, applied: AsyncMock
) -> None:
    host, refs = _host(tmp_path), [NamespaceRef(f"qrouter-{uuid4()}", n) for n in (7, 8)]
    names = ["imds-1", *(one.name for one in refs)]
    host.thread.directory = Mock(names=lambda: names, identity={r.name: r for r in refs}.get)
    await host.remove_tables()
    assert [one.args[1] for one in applied.call_args_list] == [
        tuple(RemoveTable(ref, table, host.naming) for ref in refs)
        for table in (RouterTable.REDIRECT, RouterTable.DROP)
    ]
    # A table that stays redirects requests, and needs the other one.
    applied.reset_mock()
    applied.side_effect = lambda _thread, ops, _ovn: {ops[0]: Problem("host", "no")}
    with pytest.raises(HostRefused, match="no"):
        await host.remove_tables()
    applied.assert_called_once()


# Tables that are replaced as a whole

_CHANGE: Change = (1, 2, b"rule")


@pytest.fixture
async def table(tmp_path: Path) -> AsyncIterator[HostTable]:
    with contextlib.closing(NamespaceThread(NamespaceDirectory(tmp_path))) as thread:
        yield HostTable(thread, "imds", BRIDGE, "cannot redirect", "until then")


@pytest.fixture
def replaced() -> Iterator[Mock]:
    with patch("imdsproxy.network.listeners.apply.replace_table") as mock:
        yield mock


async def test_a_table_is_replaced_only_when_something_changes(
    table: HostTable, replaced: Mock
) -> None:
    for content in ((_CHANGE,), (_CHANGE,), ()):
        assert await table.apply(content) == ()
    assert replaced.mock_calls == [call("imds", BRIDGE, (_CHANGE,)), call("imds", BRIDGE, ())]


async def test_a_refusal_is_a_problem_and_the_change_is_tried_again(
    table: HostTable, replaced: Mock
) -> None:
    replaced.side_effect = NetlinkRefused(errno.EINVAL, "")
    for _ in range(2):
        (problem,) = await table.apply((_CHANGE,))
        assert (problem.reason.split(":")[0], problem.hint) == ("cannot redirect", "until then")
        assert "EINVAL" in problem.reason
    replaced.side_effect = None
    for _ in range(2):
        assert await table.apply((_CHANGE,)) == ()
    assert len(replaced.mock_calls) == 3


async def test_tables_are_missed_only_where_one_is_wanted(table: HostTable, replaced: Mock) -> None:
    # A kernel without such tables has none to remove.
    replaced.side_effect = NetlinkRefused(errno.EINVAL, "")
    assert await table.apply(()) == ()
    assert len(await table.apply((_CHANGE,))) == 1
