import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nftables import ARP
from imdsproxy.host.state import Effect
from imdsproxy.model.entities import (
    METADATA_IPV4,
    BridgeListener,
    InterfaceListener,
    Listener,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.network.endpoints import plan_binds, plan_links
from imdsproxy.network.listeners.apply import HostTable, apply_links, apply_ops, haproxy_name
from imdsproxy.network.listeners.host import SystemHost
from imdsproxy.network.listeners.plan import ListenerPlan, plan_listeners
from imdsproxy.network.listeners.rules import plan_arp_filter
from imdsproxy.network.planned import DeleteLink, DeleteNamespace, Endpoint, NotServedCode
from support.guest import inside
from support.hostlab import HostLab
from support.lab import NETNS, until, within

pytestmark = pytest.mark.root

BLUE = NetworkId("blue")


@dataclass(slots=True)
class _Host:
    """What a process of ours would do. It remembers nothing, so that each plan is that of another process."""

    lab: HostLab
    thread: NamespaceThread
    system: SystemHost

    async def plan(
        self, *networks: Network, ours: Collection[int] = (), everything: bool = False
    ) -> ListenerPlan:
        """The plan; with `everything` no address is taken for ours: its mark may be that of another daemon."""
        self.system.our_pids = lambda: ours
        seen = await self.system.observe(networks, everything=everything)
        managed = () if everything else None
        wanted = {one.id: one for one in networks}
        return plan_listeners(wanted, seen, self.lab.naming, managed=managed)

    async def settle(self, *networks: Network, everything: bool = False) -> ListenerPlan:
        """Plan and act until there is nothing to do."""
        for _ in range(5):
            plan = await self.plan(*networks, everything=everything)
            if not plan.ops:
                return plan
            assert await apply_ops(self.thread, plan.ops) == {}
        raise AssertionError(f"never settles: {plan.ops}")


@pytest.fixture
def host(lab: HostLab, tmp_path: Path) -> Iterator[_Host]:
    thread = NamespaceThread(NamespaceDirectory())
    yield _Host(lab, thread, SystemHost(thread, lab.naming, links=tmp_path, journal=tmp_path / "j"))
    thread.close()


def _blue(listener: Listener) -> Network:
    return Network(BLUE, listener)


def _with_addresses(lab: HostLab) -> tuple[str, str]:
    """A namespace of somebody else's with both addresses on a device, and the device."""
    name = lab.namespace("blue")
    device = lab.device("d", namespace=name)
    lab.address(name, "169.254.169.254/32", device)
    lab.address(name, "fe80::a9fe:a9fe/64", device, "nodad")
    return name, device


@pytest.mark.parametrize("another_s", [False, True])
async def test_managed_addresses_are_put_on_the_device_and_only_ours_are_taken_away(
    lab: HostLab, host: _Host, *, another_s: bool
) -> None:
    if another_s:
        name, device = _with_addresses(lab)
    else:
        name = lab.namespace("blue")
        device = lab.device("d", namespace=name)
    listener = NamespaceListener(name, device, manage_addresses=True)

    plan = await host.settle(_blue(listener))

    assert [one.device for one in plan.endpoints] == [device, device]
    assert plan.not_served == ()
    # A fresh process that does not know the network knows the addresses for ours.
    seen = await host.system.observe([_blue(listener)])
    gone = plan_listeners({}, seen, lab.naming, managed=[(name, device)])
    assert len(gone.ops) == (0 if another_s else 2)
    assert await apply_ops(host.thread, gone.ops) == {}
    shown = lab.ip("-n", name, "addr", "show", device)
    assert ["a9fe:a9fe" in shown, "169.254.169.254" in shown] == [another_s, another_s]


async def test_only_namespaces_where_something_of_ours_can_be_are_looked_at(
    lab: HostLab, host: _Host, tmp_path: Path
) -> None:
    elsewhere, managed = lab.namespace("elsewhere"), lab.namespace("managed")
    ours = lab.naming.namespace(BLUE)
    lab.run("ip", "netns", "add", ours)
    (tmp_path / "j").write_text(f'[["{managed}", "d"]]')
    seen = await host.system.observe((), everything=True)
    assert {elsewhere, managed, ours} & seen.namespaces.keys() == {managed, ours}


async def test_an_interface_without_ipv6_serves_ipv4_and_says_what_to_do(
    lab: HostLab, host: _Host
) -> None:
    device = lab.device("d")
    lab.run("/usr/sbin/sysctl", "-q", f"net.ipv6.conf.{device}.disable_ipv6=1")
    plan = await host.plan(_blue(InterfaceListener(device)))

    (failed,) = (await apply_ops(host.thread, plan.ops)).values()

    assert f"net.ipv6.conf.{device}.disable_ipv6=0" in failed.hint
    plan = await host.plan(_blue(InterfaceListener(device)))
    assert [one.address for one in plan.endpoints] == [METADATA_IPV4]


@pytest.mark.parametrize(
    ("address", "blocked"), [("169.254.169.254", [4]), ("0.0.0.0", [4]), ("::", [4, 6])]
)
async def test_a_foreign_listener_leaves_the_family_out_and_is_named_until_it_ends(
    lab: HostLab, host: _Host, address: str, blocked: list[int]
) -> None:
    name, _ = _with_addresses(lab)
    server = lab.serve(name, address)

    plan = await host.plan(_blue(NamespaceListener(name)))

    assert [one.address.version for one in plan.endpoints] == [6] * (2 - len(blocked))
    assert [(one.family, one.code) for one in plan.not_served] == [
        (family, NotServedCode.PORT_BUSY) for family in blocked
    ]
    assert all(f"(pid {server.pid})" in one.reason for one in plan.not_served)
    assert {(one.effect, one.socket.owners[0].pid) for one in plan.foreign} == {
        (Effect.BLOCKS, server.pid)
    }
    server.stop()
    assert len((await host.plan(_blue(NamespaceListener(name)))).endpoints) == 2


@pytest.mark.parametrize(
    ("ours", "foreign", "answered_by"),
    [
        (("169.254.169.254", ""), ("0.0.0.0", ""), "ours"),
        # With SO_REUSEPORT the kernel takes the socket it finds first, however precisely it is bound.
        (("169.254.169.254", ""), ("169.254.169.254", "lo"), "foreign"),
        (("169.254.169.254", "lo"), ("169.254.169.254", ""), "foreign"),
    ],
)
async def test_the_kernel_answers_by_the_socket_that_the_plan_says(
    lab: HostLab, host: _Host, ours: tuple[str, str], foreign: tuple[str, str], answered_by: str
) -> None:
    name = lab.namespace("blue")
    lab.address(name, "169.254.169.254/32", "lo")
    server = lab.serve(name, ours[0], device=ours[1], reuse_port=True, word="ours")
    lab.serve(name, foreign[0], device=foreign[1], reuse_port=True, word="foreign")
    plan = await host.plan(_blue(NamespaceListener(name, ours[1] or None)), ours=[server.pid])
    effect = Effect.YIELDS if answered_by == "ours" else Effect.SHARES
    assert {one.effect for one in plan.foreign} == {effect}
    answers = {lab.ask(name, "169.254.169.254", "lo").split()[0] for _ in range(20)}
    assert answers == {answered_by}


async def test_foreign_sockets_that_share_the_port_are_named_and_our_own_and_our_childrens_are_not(
    lab: HostLab, host: _Host
) -> None:
    name, device = _with_addresses(lab)
    servers = [lab.serve(name, "169.254.169.254", reuse_port=True) for _ in range(2)]
    servers.append(lab.serve(name, "fe80::a9fe:a9fe", device=device, reuse_port=True))
    pids = [server.pid for server in servers]
    for ours, foreign in (([], pids), (pids[:1], pids[1:]), (pids, []), ([os.getpid()], [])):
        plan = await host.plan(_blue(NamespaceListener(name)), ours=ours)
        assert len(plan.endpoints) == 2
        found = [(one.effect, one.socket.owners[0].pid) for one in plan.foreign]
        assert sorted(found) == [(Effect.SHARES, pid) for pid in sorted(foreign)]


async def test_a_bind_that_is_not_listening_yet_is_noticed_all_the_same(
    lab: HostLab, host: _Host
) -> None:
    name, _ = _with_addresses(lab)
    with inside(name, socket.socket) as held:
        held.bind(("169.254.169.254", 80))
        plan = await host.plan(_blue(NamespaceListener(name)))
    assert [one.code for one in plan.not_served] == [NotServedCode.PORT_BUSY]


async def test_a_neighbour_is_known_by_its_address_on_one_device_or_on_all(
    lab: HostLab, host: _Host
) -> None:
    name = lab.namespace("blue")
    device, other = (lab.device(which, namespace=name) for which in ("d", "e"))
    macs = [MacAddress(f"02:00:00:00:00:0{number}") for number in range(4)]
    there = [("10.0.0.5", device), ("10.0.0.6", device), ("10.0.0.6", other), ("fe80::5", device)]
    for mac, (address, at) in zip(macs, there, strict=True):
        lab.ip("-n", name, "neigh", "add", "lladdr", mac, address, "dev", at)
    questions: list[tuple[str, str | None, MacAddress | None]] = [
        *(("10.0.0.5", None, macs[0]), ("10.0.0.5", "none", None), ("10.0.0.6", device, macs[1])),
        # Two devices with a guest of one address each: which one asked cannot be told.
        *(("10.0.0.6", None, None), ("fe80::5", None, macs[3]), ("fe80::5", device, macs[3])),
        *(("10.0.0.9", None, None), ("10.0.0.9", device, None)),
    ]
    for address, on, expected in questions:
        network = Network(BLUE, NamespaceListener(name, on))
        assert await host.system.neighbour(network, ip_address(address)) == expected, (address, on)


_CONFIGURATION = """
global
    nbthread 1
defaults
    mode http
    timeout client 5s
    timeout server 5s
    timeout connect 1s
frontend guests
    bind {address}:80{device} namespace {namespace}
"""


@pytest.mark.parametrize("address", ["169.254.169.254", "0.0.0.0", "::", "fe80::a9fe:a9fe"])
@pytest.mark.parametrize(("reuse_port", "uid"), [(False, 0), (True, 0), (True, 65534)])
async def test_haproxy_binds_exactly_what_the_plan_says_it_can(
    lab: HostLab, host: _Host, address: str, *, reuse_port: bool, uid: int
) -> None:
    name, device = _with_addresses(lab)
    every = (await host.plan(_blue(NamespaceListener(name)))).endpoints
    assert len(every) == 2
    bound_to = device if address.startswith("fe80") else ""
    lab.serve(name, address, device=bound_to, reuse_port=reuse_port, uid=uid)
    possible = set((await host.plan(_blue(NamespaceListener(name)))).endpoints)
    for one in every:
        assert _is_bound(one) == (one in possible)


def _is_bound(one: Endpoint) -> bool:
    """Whether HAProxy comes up with this bind, through a link as ours."""
    with tempfile.TemporaryDirectory(prefix="imdst-") as directory:
        place = Path(directory)
        apply_links(place / "links", plan_links((one,), str(NETNS)))
        (bind,) = plan_binds((one,), haproxy_name(place / "links"))
        text = _CONFIGURATION.format(
            address=f"[{one.address}]" if one.address.version == 6 else one.address,
            device=f" interface {one.device}" if one.device else "",
            namespace=bind.namespace,
        )
        (place / "haproxy.cfg").write_text(text)
        # It goes into the background once all is bound.
        words = ("-D", "-p", f"{place}/pid", "-f", f"{place}/haproxy.cfg")
        came_up = subprocess.run(("/usr/sbin/haproxy", *words), check=False).returncode == 0
        if came_up:
            os.kill(int((place / "pid").read_text()), signal.SIGKILL)
    return came_up


def _links() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def _networks(**bridges: str) -> list[Network]:
    return [Network(NetworkId(name), BridgeListener(bridge)) for name, bridge in bridges.items()]


async def test_a_guest_of_a_bridge_outside_of_every_subnet_that_we_know_reaches_what_listens_there(
    lab: HostLab, host: _Host
) -> None:
    bridge = lab.bridge("b")
    stray = lab.guest("h", bridge, "192.0.2.77/32")
    plan = await host.settle(*_networks(blue=bridge), everything=True)
    name, device = lab.own_namespace("blue"), lab.naming.inner_device
    assert [one.namespace and one.namespace.name for one in plan.endpoints] == [name, name]
    assert plan.not_served == ()
    lab.serve(name, "169.254.169.254", device=device, reuse_port=True, word="hello")
    assert lab.ask(stray, "169.254.169.254") == "hello 192.0.2.77"


async def test_what_we_make_is_marked_forwards_nothing_and_stays_when_made_again(
    lab: HostLab, host: _Host
) -> None:
    networks = _networks(blue=lab.bridge("b", mtu=1400))
    plan = await host.plan(*networks, everything=True)
    # Done twice it changes nothing.
    for _ in range(2):
        assert await apply_ops(host.thread, plan.ops) == {}
    assert (await host.plan(*networks, everything=True)).ops == ()
    alias, name, inner = lab.naming.alias(BLUE), lab.own_namespace("blue"), lab.naming.inner_device
    outer = lab.ip("link", "show", lab.naming.link(BLUE))
    words = (f"master {lab.link_name('b')}", "mtu 1400", alias)
    assert [word in outer for word in words] == [True] * 3
    inside = lab.ip("-n", name, "link", "show", inner)
    assert ["mtu 1400" in inside, alias in inside] == [True, True]
    assert alias in lab.ip("-n", name, "link", "show", "lo")
    # Nor does a guest give it routes.
    keys = [f"net.ipv4.conf.{inner}.{key}" for key in ("forwarding", "accept_redirects")]
    keys += [f"net.ipv4.conf.{inner}.{key}" for key in ("rp_filter", "arp_ignore", "arp_filter")]
    six = ("accept_ra", "forwarding", "accept_redirects")
    keys += [f"net.ipv6.conf.{inner}.{key}" for key in six]
    keys += [key.replace(inner, "all") for key in keys]
    shown = lab.ip("netns", "exec", name, "/usr/sbin/sysctl", "-n", *keys)
    assert shown.split() == ["0"] * len(keys)


@pytest.mark.parametrize(
    "changes",
    [
        ["link set {link} nomaster down", "link set {bridge} mtu 1300"],
        ["-n {name} route del default", "-n {name} addr flush dev {inner}"],
        ["netns del {name}"],
        ["link del {link}"],
        ["-n {name} link del {inner}"],
        ["-n {name} link set {inner} down name other"],
    ],
)
async def test_what_another_program_changed_or_deleted_is_mended(
    lab: HostLab, host: _Host, changes: list[str]
) -> None:
    bridge = lab.bridge("b")
    await host.settle(*_networks(blue=bridge), everything=True)
    link, inner, name = lab.naming.link(BLUE), lab.naming.inner_device, lab.own_namespace("blue")
    for change in changes:
        words = change.format(link=link, bridge=bridge, name=name, inner=inner)
        lab.ip(*words.split())
    if "netns" in changes[0]:
        # The kernel takes the veth away a moment later: until then it is in the way.
        until(lambda: link not in _links())
    plan = await host.settle(*_networks(blue=bridge), everything=True)
    assert len(plan.endpoints) == 2
    shown = lab.ip("link", "show", link)
    mtu = "mtu 1300" if "mtu" in changes[-1] else "mtu 1500"
    assert [word in shown for word in (f"master {bridge}", ",UP", mtu)] == [True] * 3


async def test_a_later_process_sweeps_ours_and_nothing_else(lab: HostLab, host: _Host) -> None:
    bridge = lab.bridge("b")
    stranger = lab.namespace("stranger")
    device = lab.device("d")
    lab.ip("link", "set", device, "alias", "somebody's")
    # The form of ours, but marked by somebody else, and unmarked but in use.
    look_alike = lab.own_namespace("look-alike")
    used = lab.own_namespace("used")
    for name in (look_alike, used):
        lab.ip("netns", "add", name)
    lab.ip("-n", look_alike, "link", "set", "lo", "alias", "somebody's")
    lab.ip("-n", used, "link", "add", "v", "type", "veth", "peer", "name", "w")
    await host.settle(*_networks(blue=bridge), everything=True)
    ours = lab.own_namespace("blue")
    assert ours in lab.ip("netns")
    # Ours, unmarked and half made: their maker was killed.
    unmarked, half = lab.own_namespace("unmarked"), lab.own_namespace("half")
    lab.ip("netns", "add", unmarked)
    (NamespaceDirectory().path / half).touch()

    plan = await host.plan(everything=True)
    assert {one for one in plan.ops if not isinstance(one, DeleteLink)} == {
        DeleteNamespace(name) for name in (ours, unmarked, half)
    }
    assert {one for one in plan.ops if isinstance(one, DeleteLink)} == {
        DeleteLink(lab.naming.link(BLUE))
    }
    await host.settle(everything=True)

    present, links = set(NamespaceDirectory().names()), _links()
    assert {stranger, look_alike, used} <= present
    assert present.isdisjoint({ours, unmarked, half})
    assert {bridge, device} <= links
    assert lab.naming.link(BLUE) not in links


async def test_a_bridge_that_cannot_be_attached_keeps_no_other_network_back(
    lab: HostLab, host: _Host
) -> None:
    bridge = lab.bridge("b")
    plan = await host.plan(*_networks(blue=lab.bridge("c"), red=bridge), everything=True)
    lab.ip("link", "del", lab.link_name("c"))  # goes between the plan and its application

    ((op, failure),) = (await apply_ops(host.thread, plan.ops)).items()

    assert op.network == "blue"
    assert "bridge" in failure.reason
    (served,) = {
        one.network for one in (await host.plan(*_networks(red=bridge), everything=True)).endpoints
    }
    assert served == "red"


_KNOCK = "exec 3<>/dev/tcp/169.254.169.254/9"


@pytest.fixture
def guests(lab: HostLab) -> list[str]:
    """Behind a device each of one host; only the first device carries the metadata address."""
    host = lab.namespace("host")
    guests = [lab.namespace("a"), lab.namespace("b")]
    for number, guest in enumerate(guests):
        device = f"tap{number}"
        lab.ip("-n", host, "link", "add", device, "up", "type", "veth",
               "peer", "name", "eth0", "netns", guest)  # fmt: skip
        lab.address(host, f"10.0.{number}.1/24", device)
        lab.ip("-n", guest, "link", "set", "eth0", "up")
        lab.address(guest, f"10.0.{number}.5/24", "eth0")
        lab.ip("-n", guest, "route", "add", "169.254.169.254", "dev", "eth0")
    lab.address(host, "169.254.169.254/32", "tap0")
    return guests


def _is_answered(lab: HostLab, guest: str) -> bool:
    """Whether the guest learns a MAC for the metadata address."""
    lab.ip("-n", guest, "neigh", "flush", "dev", "eth0")
    knock = (*within(guest), "timeout", "1.5", "bash", "-c", _KNOCK)
    subprocess.run(knock, capture_output=True, check=False)
    return "lladdr" in lab.ip("-n", guest, "neigh", "show", "169.254.169.254")


def test_only_the_device_of_an_interface_listener_answers(lab: HostLab, guests: list[str]) -> None:
    host = within(lab.name("host"))

    def filter_arp(*devices: str) -> None:
        """As a fresh process does."""
        networks = [Network(NetworkId(one), InterfaceListener(one)) for one in devices]

        def apply() -> None:
            with contextlib.closing(NamespaceThread(NamespaceDirectory())) as thread:
                table = HostTable(thread, "imdst", ARP, "", "")
                assert asyncio.run(table.apply(plan_arp_filter(networks))) == ()

        inside(lab.name("host"), apply)

    assert [_is_answered(lab, guest) for guest in guests] == [True, True]
    filter_arp("tap0")
    assert [_is_answered(lab, guest) for guest in guests] == [True, False]
    # A process that needs no rule removes what an earlier one left.
    filter_arp()
    assert [_is_answered(lab, guest) for guest in guests] == [True, True]
    assert lab.run(*host, "nft", "list", "tables") == ""
