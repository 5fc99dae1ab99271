from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imdsproxy.core.model import BridgeListener, Network, NetworkId
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.listeners.apply import apply_ops
from imdsproxy.listeners.host import SystemHost
from imdsproxy.listeners.plan import (
    DeleteLink,
    DeleteNamespace,
    ListenerPlan,
    plan_listeners,
)
from support.hostlab import HostLab, eventually

pytestmark = pytest.mark.root

BLUE = NetworkId("blue")


@dataclass(slots=True)
class _Daemon:
    """What a process of ours would do; a second one has no memory of the first."""

    lab: HostLab
    thread: NamespaceThread = field(default_factory=lambda: NamespaceThread(NamespaceDirectory()))

    async def plan(self, networks: Mapping[NetworkId, Network]) -> ListenerPlan:
        nowhere = Path("/nonexistent")
        host = SystemHost(self.thread, self.lab.naming, links=nowhere, journal=nowhere)
        seen = await host.observe(networks.values(), everything=True)
        # No address anywhere is ours: the mark may be that of another daemon on this machine.
        return plan_listeners(networks, seen, self.lab.naming, managed=())

    async def settle(self, networks: Mapping[NetworkId, Network]) -> ListenerPlan:
        plan = await self.plan(networks)
        for _ in range(4):
            if not plan.ops:
                return plan
            assert await apply_ops(self.thread, plan.ops) == {}
            plan = await self.plan(networks)
        raise AssertionError(f"never settles: {plan.ops}")


@pytest.fixture
def daemon(lab: HostLab) -> Iterator[_Daemon]:
    made = _Daemon(lab)
    yield made
    made.thread.close()


def _links() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def _networks(**bridges: str) -> dict[NetworkId, Network]:
    return {
        NetworkId(name): Network(NetworkId(name), BridgeListener(bridge))
        for name, bridge in bridges.items()
    }


def _serve(lab: HostLab, network: str, word: str) -> None:
    """Stand in for HAProxy at both addresses."""
    name = lab.own_namespace(network)
    inner = lab.naming.inner_device
    lab.serve(name, "169.254.169.254", device=inner, reuse_port=True, word=word)
    lab.serve(name, "fe80::a9fe:a9fe", device=inner, reuse_port=True, word=word)


async def test_guests_of_a_bridge_reach_what_listens_there_over_both_families(
    lab: HostLab, daemon: _Daemon
) -> None:
    bridge = lab.bridge("b")
    guest = lab.guest("g", bridge, "10.0.0.5/24")
    stray = lab.guest("h", bridge, "192.0.2.77/32")

    plan = await daemon.settle(_networks(blue=bridge))

    assert len(plan.endpoints) == 2
    assert plan.left_out == ()
    assert {one.namespace and one.namespace.name for one in plan.endpoints} == {
        lab.own_namespace("blue")
    }
    _serve(lab, "blue", "hello")
    assert lab.ask(guest, "169.254.169.254") == "hello 10.0.0.5"
    # A guest outside of every subnet that we know is answered too: all are on the link.
    assert lab.ask(stray, "169.254.169.254") == "hello 192.0.2.77"
    await eventually(lambda: "tentative" not in lab.ip("-n", guest, "-6", "addr", "show", "eth0"))
    answer = lab.ask(guest, "fe80::a9fe:a9fe")
    assert answer.startswith("hello fe80::")
    assert answer.split("::")[1] in lab.ip("-n", guest, "-6", "addr", "show", "eth0")


async def test_what_we_make_is_marked_forwards_nothing_and_stays_when_made_again(
    lab: HostLab, daemon: _Daemon
) -> None:
    networks = _networks(blue=lab.bridge("b", mtu=1400))
    plan = await daemon.plan(networks)
    # Done twice it changes nothing.
    for _ in range(2):
        assert await apply_ops(daemon.thread, plan.ops) == {}
    assert (await daemon.plan(networks)).ops == ()
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
    lab: HostLab, daemon: _Daemon, changes: list[str]
) -> None:
    bridge = lab.bridge("b")
    await daemon.settle(_networks(blue=bridge))
    link, inner, name = lab.naming.link(BLUE), lab.naming.inner_device, lab.own_namespace("blue")
    for change in changes:
        words = change.format(link=link, bridge=bridge, name=name, inner=inner)
        lab.ip(*words.split())
    if "netns" in changes[0]:
        # The kernel takes the veth away a moment later: until then it is in the way.
        await eventually(lambda: link not in _links())
    plan = await daemon.settle(_networks(blue=bridge))
    assert len(plan.endpoints) == 2
    shown = lab.ip("link", "show", link)
    mtu = "mtu 1300" if "mtu" in changes[-1] else "mtu 1500"
    assert [word in shown for word in (f"master {bridge}", ",UP", mtu)] == [True] * 3


async def test_a_later_process_sweeps_ours_and_nothing_else(lab: HostLab, daemon: _Daemon) -> None:
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
    await daemon.settle(_networks(blue=bridge))
    ours = lab.own_namespace("blue")
    assert ours in lab.ip("netns")
    # Ours, unmarked and half made: their maker was killed.
    unmarked, half = lab.own_namespace("unmarked"), lab.own_namespace("half")
    lab.ip("netns", "add", unmarked)
    (NamespaceDirectory().path / half).touch()

    later = _Daemon(lab)
    plan = await later.plan({})
    assert {one for one in plan.ops if not isinstance(one, DeleteLink)} == {
        DeleteNamespace(name) for name in (ours, unmarked, half)
    }
    assert {one for one in plan.ops if isinstance(one, DeleteLink)} == {
        DeleteLink(lab.naming.link(BLUE))
    }
    assert (await later.settle({})).ops == ()
    later.thread.close()

    present, links = set(NamespaceDirectory().names()), _links()
    assert {stranger, look_alike, used} <= present
    assert present.isdisjoint({ours, unmarked, half})
    assert {bridge, device} <= links
    assert lab.naming.link(BLUE) not in links


async def test_a_bridge_that_cannot_be_attached_keeps_no_other_network_back(
    lab: HostLab, daemon: _Daemon
) -> None:
    bridge = lab.bridge("b")
    plan = await daemon.plan(_networks(blue=lab.bridge("c"), red=bridge))
    lab.ip("link", "del", lab.link_name("c"))  # goes between the plan and its application

    ((op, failure),) = (await apply_ops(daemon.thread, plan.ops)).items()

    assert op.network == "blue"
    assert "bridge" in failure.reason
    (served,) = {one.network for one in (await daemon.plan(_networks(red=bridge))).endpoints}
    assert served == "red"
