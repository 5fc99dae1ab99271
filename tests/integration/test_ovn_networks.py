"""Networks of a genuine OVN have the namespaces that Neutron's agent would give them, whatever happens to them."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final, Self

import pytest

from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import MacAddress
from support.daemon import Daemon
from support.guest import IPV4, IPV6, Background, Guest, Load, Reply
from support.lab import NETNS, ip, run, serve, until, within
from support.ovn_lab import CHASSIS, OTHER, OvnNetwork, open_ovn
from support.ovn_steps import provision
from support.ovn_world import OvnWorld, open_ovn_world
from support.patience import patience

pytestmark = pytest.mark.root

METADATA: Final = {f"{IPV4}/32", f"{IPV6}/128"}


@pytest.fixture(scope="module")
def running() -> Iterator[OvnWorld]:
    with open_ovn_world() as made:
        made.ovn.add_network("home")
        made.add("h1", "home")
        made.daemon.start()
        made.wait_own()
        yield made


@pytest.fixture
def world(running: OvnWorld) -> Iterator[OvnWorld]:
    """A network `home` that is served; what a test adds is taken away again, and nothing of it is left."""
    yield running
    others = [name for name in running.ovn.networks if name != "home"]
    running.remove(*others)
    for name in others:
        del running.ovn.networks[name]
    running.wait_own("h1")
    assert running.problems() == []


def addresses(network: OvnNetwork) -> set[str]:
    """Of the device in a network's namespace."""
    text = ip("-n", network.namespace, "-o", "address", "show", "dev", network.devices[1])
    return set(re.findall(r"inet6? (\S+)", text))


def link_local(network: OvnNetwork) -> str:
    return f"{link_local_of(MacAddress(network.metadata_mac))}/64"


def inner_link(network: OvnNetwork) -> str:
    return ip("-n", network.namespace, "-o", "link", "show", "dev", network.devices[1])


def outer_link(world: OvnWorld, network: OvnNetwork) -> str:
    return ip("-n", world.ovn.lab.host, "-o", "link", "show", "dev", network.devices[0])


def serves(world: OvnWorld, network: OvnNetwork) -> bool:
    """Whether a network's namespace is there, and plugged in as its metadata port."""
    plugged = world.ovn.plugged().get(network.devices[0])
    return (NETNS / network.namespace).exists() and plugged == network.metadata_port


def test_a_network_gets_what_neutrons_agent_would_give_it(world: OvnWorld) -> None:
    network = world.ovn.networks["home"]
    assert addresses(network) == {*network.cidrs, link_local(network), *METADATA}
    for text in (inner_link(network), outer_link(world, network)):
        assert "mtu 1442" in text
        assert "UP" in text
    assert network.metadata_mac in inner_link(network)
    assert serves(world, network)
    words = ("ethtool", "-k", network.devices[1])
    assert "tx-checksumming: off" in run(*within(network.namespace), *words)


@pytest.mark.parametrize("to", [IPV4, IPV6])
def test_every_guest_is_itself_in_networks_with_equal_addresses_and_macs(
    world: OvnWorld, to: str
) -> None:
    world.ovn.add_network("twin")
    world.add("i1", "twin", mac=world.guests["h1"].mac)
    assert world.guests["i1"].addresses == world.guests["h1"].addresses
    world.wait_own("i1", "h1", to=to)


def has_mtu(world: OvnWorld, network: OvnNetwork, mtu: str) -> bool:
    return all(f"mtu {mtu} " in one for one in (inner_link(network), outer_link(world, network)))


def test_both_ends_follow_a_changed_mtu(world: OvnWorld) -> None:
    network = world.ovn.networks["home"]
    for mtu in ("1400", "1442"):
        world.ovn.change_metadata_port(network, mtu=mtu)
        until(partial(has_mtu, world, network, mtu), what="the MTU")
    world.wait_own("h1")
    world.wait_own("h1", to=IPV6)


def test_a_network_whose_mtu_is_too_small_for_ipv6_is_served_over_ipv4(world: OvnWorld) -> None:
    network = world.ovn.add_network("small")
    world.ovn.change_metadata_port(network, mtu="1200")
    world.add("y1", "small")
    world.wait_own("y1")
    assert addresses(network) == {"10.0.0.2/24", f"{IPV4}/32"}
    status = world.daemon.status()
    assert status["readiness"]["ready"]
    assert status["not_served"] == status["problems"] == []


def test_a_metadata_port_that_is_given_another_address_has_it_and_not_the_old_one(
    world: OvnWorld,
) -> None:
    network = world.ovn.networks["home"]
    with Load([world.guests["h1"]], "/openstack", world.owns, keep_alive=False) as load:
        world.ovn.change_metadata_port(network, cidrs="10.0.0.3/24 fd00:10::2/64")
        until(lambda: "10.0.0.2/24" not in addresses(network), what="the old address's end")
        assert "10.0.0.3/24" in addresses(network)
        load.wait_answers(20)
        world.ovn.change_metadata_port(network, cidrs=" ".join(network.cidrs))
        until(lambda: "10.0.0.3/24" not in addresses(network), what="the new address's end")
        assert set(network.cidrs) <= addresses(network)
        load.wait_answers(20)
    assert load.report.lost == []
    assert load.report.longest_s < 2.5 * patience()


def test_a_subnet_that_is_added_gets_its_address_when_it_has_a_port_here(world: OvnWorld) -> None:
    network = world.ovn.networks["home"]
    cidrs = " ".join((*network.cidrs, "10.7.0.2/24"))
    world.ovn.change_metadata_port(network, cidrs=cidrs)
    world.ovn.add_port("h2", "home", cidrs=("10.7.0.12/24",))
    assert "10.7.0.2/24" not in addresses(network)
    world.plug("h2")
    try:
        world.wait_own("h2")
        until(lambda: "10.7.0.2/24" in addresses(network), what="the subnet's address")
    finally:
        world.ovn.remove_port("h2")
        del world.guests["h2"]
    until(lambda: "10.7.0.2/24" not in addresses(network), what="the address's end")
    world.ovn.change_metadata_port(network, cidrs=" ".join(network.cidrs))


def test_a_network_with_ipv6_alone_is_served(world: OvnWorld) -> None:
    network = world.ovn.add_network("six", cidrs=("fd00:66::2/64",))
    world.ovn.add_port("s1", "six", cidrs=("fd00:66::5/64",))
    world.plug("s1")
    world.wait_own("s1", to=IPV6)
    assert addresses(network) == {"fd00:66::2/64", link_local(network), *METADATA}


def test_a_network_whose_metadata_port_comes_late_is_served_then_and_shown_before(
    world: OvnWorld,
) -> None:
    network = world.ovn.add_network("late")
    world.ovn.remove_metadata_port(network)
    world.add("l1", "late")
    until(lambda: world.problems() == ["ovn.metadata_port"], what="the problem")
    assert network.namespace not in world.ovn.left_over()
    world.ovn.add_metadata_port(network)
    world.wait_own("l1")
    until(lambda: not world.problems(), what="the end of the problem")


def test_a_metadata_port_that_is_made_anew_leaves_the_namespace_and_gets_its_place(
    world: OvnWorld,
) -> None:
    old = world.ovn.add_network("anew")
    world.add("n1", "anew")
    world.wait_own("n1")
    inode = (NETNS / old.namespace).stat().st_ino
    world.ovn.remove_metadata_port(old)
    until(lambda: world.problems() == ["ovn.metadata_port"], what="the problem")
    network = world.ovn.renew_metadata_port("anew")
    until(lambda: network.metadata_mac in inner_link(network), what="the new MAC")
    # The guest would look for the old MAC for another half minute.
    ip("-n", world.guests["n1"].namespace, "neigh", "flush", "all")
    world.wait_own("n1")
    world.wait_own("n1", to=IPV6)
    assert (NETNS / old.namespace).stat().st_ino == inode
    assert serves(world, network)
    assert addresses(network) == {*network.cidrs, link_local(network), *METADATA}


def test_a_port_that_moves_here_finds_its_network_before_it_has_come(world: OvnWorld) -> None:
    network = world.ovn.add_network("move")
    world.ovn.add_port("m1", "move", chassis=OTHER)
    world.ovn.claim("m1")
    world.plug("m1")
    assert network.namespace not in world.ovn.left_over()
    world.ovn.request("m1", OTHER, CHASSIS)
    until(lambda: serves(world, network), what="the namespace")
    assert world.ovn.is_claimed("m1")
    world.ovn.request("m1", CHASSIS)
    world.wait_own("m1")
    world.ovn.request("m1", OTHER)
    device = network.devices[0]
    until(lambda: network.namespace not in world.ovn.left_over(), what="the namespace's end")
    until(lambda: device not in world.ovn.plugged(), what="the port's end")
    until(lambda: device not in world.ovn.lab.host_links(), what="the device's end")


def test_a_port_that_open_vswitch_does_not_see_is_served_by_its_groups_chassis(
    world: OvnWorld,
) -> None:
    network = world.ovn.add_network("wire")
    world.ovn.add_port("w1", "wire")
    world.ovn.be_external("w1")
    world.plug("w1", bridge="br-phys")
    until(lambda: serves(world, network), what="the namespace")
    world.wait_own("w1")


def test_another_integration_bridge_gets_the_networks_and_one_that_is_not_there_is_shown(
    world: OvnWorld,
) -> None:
    device = world.ovn.networks["home"].devices[0]
    # ovn-controller would make the bridge.
    world.ovn.kill("ovn-controller")
    world.ovn.set_up("ovn-bridge", "br-new")
    until(lambda: world.problems() == ["ovn.open_vswitch"], what="no bridge of that name")
    for bridge, before in (("br-new", "br-int"), ("br-int", "br-new")):
        world.ovn.set_up("ovn-bridge", bridge)
        world.ovn.use_bridge(bridge)
        world.ovn.start_controller()
        world.wait_own("h1")
        assert device in world.ovn.ports_of_bridge(bridge)
        assert device not in world.ovn.ports_of_bridge(before)
        until(partial(written, world, f"neutron:ovn-bridge={bridge}"), what="the bridge's name")
    assert world.problems() == []


def written(world: OvnWorld, words: str) -> bool:
    """Whether the server finds these words at this host's row."""
    return words in world.ovn.agent_ids()


def registered(world: OvnWorld) -> str:
    """The agent's id, where the server looks for it."""
    found = re.search(r"metadata-id=\S+", world.ovn.agent_ids())
    assert found is not None
    return found[0]


def test_neutron_sees_a_metadata_agent_that_is_alive(world: OvnWorld) -> None:
    world.ovn.sync()
    pattern = r"neutron:ovn-metadata-sb-cfg=\d"
    until(lambda: re.search(pattern, world.ovn.agent_ids()), what="the heartbeat", within_s=15)
    assert registered(world)


def test_guests_are_served_on_over_a_chassis_that_is_made_anew_and_it_is_registered(
    world: OvnWorld,
) -> None:
    agent = registered(world)
    with Load([world.guests["h1"]], "/openstack", world.owns, keep_alive=False) as load:
        world.ovn.delete_chassis()
        until(partial(written, world, agent), what="its registration", within_s=20)
        load.wait_answers(20)
    assert load.report.lost == []


def test_guests_are_served_on_over_a_chassis_with_another_name_and_it_is_registered(
    world: OvnWorld,
) -> None:
    before = registered(world)
    with Load([world.guests["h1"]], "/openstack", world.owns, keep_alive=False) as load:
        for name in ("imdst-renamed", CHASSIS):
            world.ovn.stop_controller()
            world.ovn.rename_chassis(name)
            world.ovn.start_controller()
            until(partial(written, world, "metadata-id="), what="its registration", within_s=20)
            load.wait_answers(20)
            assert (registered(world) == before) is (name == CHASSIS)
    assert load.report.lost == []


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
def test_guests_are_served_on_over_a_southbound_database_that_is_killed_and_started(
    world: OvnWorld, *, empty: bool
) -> None:
    own = world.ovn.ports["h1"].instance
    try:
        with world.ovn.without_southbound(empty=empty):
            until(lambda: not world.daemon.status()["sources"][0]["in_sync"], what="the loss")
            assert world.asks_as("h1") == own
        until(
            lambda: "no connection" not in str(world.daemon.status()),
            what="a connection",
            within_s=30,
        )
        assert world.asks_as("h1") == own
    finally:
        world.ovn.sync()


def test_what_keeps_a_network_from_its_namespace_is_shown_and_tried_again(world: OvnWorld) -> None:
    network = world.ovn.add_network("kept")
    obstacle = NETNS / network.namespace
    obstacle.mkdir()
    try:
        world.add("k1", "kept")
        until(lambda: world.problems() == ["ovn.host-refused"], what="the problem")
        (problem,) = world.daemon.status()["problems"]
        assert network.namespace in problem["reason"]
    finally:
        obstacle.rmdir()
    world.wait_own("k1", within_s=40)
    until(lambda: not world.problems(), what="the end of the problem")


def test_what_the_kernel_refuses_is_shown_until_it_is_corrected(world: OvnWorld) -> None:
    network = world.ovn.add_network("size")
    world.ovn.change_metadata_port(network, mtu="10")
    world.add("z1", "size")
    until(lambda: world.problems() == ["ovn.host-refused"], what="the problem")
    world.ovn.change_metadata_port(network, mtu="1442")
    world.wait_own("z1")
    until(lambda: not world.problems(), what="the end of the problem")


def test_what_open_vswitch_refuses_is_shown_and_tried_again(world: OvnWorld) -> None:
    network = world.ovn.add_network("taken")
    with world.ovn.interface_in_another_port(network.devices[0]):
        world.add("t1", "taken")
        until(lambda: world.problems() == ["ovn.open_vswitch"], what="the problem")
        (problem,) = world.daemon.status()["problems"]
        assert problem["hint"]
    world.wait_own("t1", within_s=40)
    until(lambda: not world.problems(), what="the end of the problem")


@dataclass(frozen=True)
class Identity:
    """What changes when something is made again."""

    inode: int
    devices: tuple[str, ...]

    @classmethod
    def of(cls, world: OvnWorld, network: OvnNetwork) -> Self:
        links = (inner_link(network), outer_link(world, network))
        numbers = tuple(one.partition(": <")[0] for one in links)
        return cls((NETNS / network.namespace).stat().st_ino, numbers)


_LAST: Final = "127.9.9.9"


@contextmanager
def deletions(namespace: str) -> Iterator[list[str]]:
    """What is removed in a namespace meanwhile; complete after the block."""
    found: list[str] = []
    words = (*within(namespace), "/usr/sbin/ip", "-o", "monitor", "link", "address", "route")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield found
        finally:
            # Its own last event: all before it were read.
            ip("-n", namespace, "address", "add", _LAST, "dev", "lo")
            ip("-n", namespace, "address", "del", _LAST, "dev", "lo")
            for line in process.stdout:
                if _LAST in line:
                    break
                if line.startswith("Deleted"):
                    found.append(line)
            process.kill()


def test_an_agents_namespace_is_taken_as_it_is_and_left_in_place_without_a_request_lost(
    world: OvnWorld,
) -> None:
    home = world.ovn.networks["home"]
    world.daemon.stop()
    assert home.namespace not in world.ovn.left_over()
    assert home.devices[0] not in world.ovn.plugged()
    assert home.devices[0] not in world.ovn.lab.host_links()

    network = world.ovn.add_network("agent")
    world.ovn.add_port("a1", "agent")
    world.ovn.provision_as_agent(network)
    agent = serve(within(network.namespace), IPV4, network.devices[1], reuse_port=True)
    guest = world.plug("a1")
    own: list[Reply] = []

    def is_answered(guest: Guest, answer: Reply) -> str | None:
        if answer.text == "foreign":
            return None
        own.append(answer)
        return world.owns(guest, answer)

    try:
        until(lambda: guest.reaches(to=IPV4), what="the agent")
        before = Identity.of(world, network)
        with (
            deletions(network.namespace) as deleted,
            Load([guest], "/openstack", is_answered, keep_alive=False) as load,
        ):
            load.wait_answers(20)
            world.daemon.start()
            until(lambda: own, what="imdsproxy's first answer")
            load.wait_answers(100)
    finally:
        agent.stop()
    assert load.report.lost == []
    assert deleted == []
    assert Identity.of(world, network) == before
    world.wait_own("a1")
    world.daemon.stop()
    assert Identity.of(world, network) == before
    assert world.ovn.plugged()[network.devices[0]] == network.metadata_port
    assert "imdsproxy" not in world.ovn.interface_ids(network.devices[0])
    world.daemon.start()
    world.wait_own("a1", "h1")


def test_a_namespace_that_another_process_serves_stays_when_everything_is_stopped(
    world: OvnWorld,
) -> None:
    home = world.ovn.networks["home"]
    agent = serve(within(home.namespace), IPV4, home.devices[1], reuse_port=True)
    try:
        before = Identity.of(world, home)
        world.daemon.stop()
        assert world.guests["h1"].ask("/").text == "foreign"
        assert Identity.of(world, home) == before
    finally:
        agent.stop()
    world.daemon.start()
    world.wait_own("h1")


@pytest.mark.slow
def test_what_a_provisioner_leaves_that_is_killed_at_any_step_is_mended_by_the_next_one() -> None:
    with open_ovn() as ovn:
        network = ovn.add_network("k")
        ovn.add_port("k1", "k")
        ovn.guest("k1")

        def left_over() -> set[str]:
            names = [*ovn.left_over(), *ovn.lab.host_links(), *ovn.plugged()]
            return {network.namespace, *network.devices} & set(names)

        whole = {*network.cidrs, link_local(network), *METADATA, network.metadata_port}

        removed = False
        for step in count(1):
            made = provision(ovn, network, wanted=True, kill_before=step)
            ovn.unbind("k1")
            forget_half_made(network)
            provision(ovn, network, wanted=False)
            assert not left_over(), f"killed at step {step}, and its port was unbound"
            ovn.bind("k1")
            provision(ovn, network, wanted=True, kill_before=step)
            provision(ovn, network, wanted=True)
            found = {*addresses(network), ovn.plugged()[network.devices[0]]}
            assert found == whole, f"killed at step {step}"
            ovn.unbind("k1")
            if not removed:
                removed = provision(ovn, network, wanted=False, kill_before=step)
                forget_half_made(network)
            provision(ovn, network, wanted=False)
            assert not left_over(), f"killed at step {step} of the removal"
            ovn.bind("k1")
            if made and removed:
                break
        assert step > 12


def forget_half_made(network: OvnNetwork) -> None:
    """Have a file that is no namespace look as old as one that its maker does not go on with."""
    file = NETNS / network.namespace
    if file.exists() and file.stat().st_dev == NETNS.stat().st_dev:
        os.utime(file, (0, 0))


@pytest.mark.slow
def test_fifty_networks_are_served_over_changes_and_killed_controllers(world: OvnWorld) -> None:
    names = [f"n{number}" for number in range(50)]
    with world.ovn.together():
        for number, name in enumerate(names):
            world.ovn.add_network(name)
            mac = "fa:16:3e:0f:00:01" if number % 2 else ""
            world.ovn.add_port(f"{name}g", name, mac=mac)
    world.ovn.bind_without_guests(*(f"{name}g" for name in names[6:]))
    for name in names[:6]:
        world.plug(f"{name}g")
    world.wait_own(within_s=20)
    namespaces = {world.ovn.networks[name].namespace for name in names}
    until(lambda: namespaces <= set(world.ovn.left_over()), what="all namespaces")
    steady = [world.guests[f"{name}g"] for name in names[:4]]
    with (
        Load(steady, "/openstack", world.owns, keep_alive=False, pause_s=0.02) as load,
        Killing(world.daemon) as killing,
    ):
        for name in names[4:6]:
            other = f"{name}h"
            world.add(other, name, 12)
            world.wait_own(other, within_s=10)
            world.ovn.change(other, device_id=f"{other}-instance")
            until(partial(is_asked_as, world, other, f"{other}-instance"), what="the instance")
            world.ovn.change(other, cidrs="10.0.0.99/24")
            until(partial(is_not_served, world, other), what="no instance there")
            world.ovn.change(other, cidrs="10.0.0.12/24")
            until(partial(is_asked_as, world, other, f"{other}-instance"), what="the instance")
            world.ovn.request(other, OTHER)
            until(partial(is_not_served, world, other), what="no instance here")
            world.ovn.request(other, CHASSIS)
            until(partial(is_asked_as, world, other, f"{other}-instance"), what="the instance")
            world.ovn.remove_port(f"{name}g")
            del world.guests[f"{name}g"], world.guests[other]
        load.wait_answers(100)
    assert load.report.lost == []
    assert killing.kills >= 3


class Killing(Background):
    """Kills a controller again and again, at any time, and starts it."""

    def __init__(self, daemon: Daemon) -> None:
        self.kills = 0
        self._daemon = daemon
        super().__init__(self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.1 + self.kills * 0.37 % 1.3):
            self._daemon.kill_controller()
            self.kills += 1
            self._daemon.start(ready=False)
        self._daemon.wait_ready()


def is_asked_as(world: OvnWorld, name: str, instance: str) -> bool:
    return world.asks_as(name) == instance


def is_not_served(world: OvnWorld, name: str) -> bool:
    """Whether a guest gets no answer, that there is none, or that it is not known yet."""
    answer = world.asks_as(name)
    return answer in ("404", "503") or "connecting" in answer
