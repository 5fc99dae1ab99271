"""Listeners of every kind, both families, and how a guest is known."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from support.daemon import instance
from support.guest import IPV4, IPV6, inside
from support.lab import BRIDGE_MAC, NETNS, ip, until
from support.world import RIGHT_WITHIN_S, World, own

pytestmark = pytest.mark.root

_KINDS: Final = ("red", "green", "blue", "grey")
_TARGETS: Final = (
    "/",
    "/latest/",
    "/latest/meta-data/",
    "/latest/meta-data/instance-id",
    "/latest/user-data",
    "/openstack",
    "/openstack/latest/user_data",
    "/openstack/latest/network_data.json",
    "/nocloud/meta-data",
    "/latest/there-is-no-such-thing",
)


@pytest.mark.parametrize("network", _KINDS)
def test_both_families_are_answered_alike_by_every_kind_of_listener(
    world: World, network: str
) -> None:
    guest = world.guests[network]
    for target in _TARGETS:
        for method in ("GET", "HEAD"):
            four = guest.ask(target, method=method, to=IPV4)
            six = guest.ask(target, method=method, to=IPV6, host=f"[{IPV6}]")
            # A short document that HAProxy keeps has the same headers in another order.
            assert sorted(four.head.split(b"\r\n")) == sorted(six.head.split(b"\r\n")), target
            assert four.body == six.body, target
            assert four.status == (404 if "no-such" in target else 200)
    for to in (IPV4, IPV6):
        assert own(guest, guest.ask("/latest/user-data", to=to)) is None


def test_one_haproxy_serves_all_networks(world: World) -> None:
    pids = world.settled()
    haproxy = {
        pid
        for pid, words in world.daemon.processes().items()
        if words.split()[0].endswith("/haproxy")
    }
    assert haproxy == {pids.master, pids.worker}
    for namespace in (world.lab.name("red"), world.lab.name("green"), world.lab.host):
        sockets = inside(namespace, lambda: Path("/proc/thread-self/net/tcp").read_text())
        lines = [line.split() for line in sockets.splitlines()[1:]]
        # Only state LISTEN (0A): closed connections of other tests have no inode any more.
        inodes = {one[9] for one in lines if one[1].endswith(":0050") and one[3] == "0A"}
        assert inodes
        assert inodes <= _sockets_of(pids.worker)


def _sockets_of(pid: int) -> set[str]:
    links = (str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return {link[8:-1] for link in links if link.startswith("socket:")}


def test_a_guest_is_known_by_each_of_its_addresses(world: World) -> None:
    guest = world.lab.guest("red", 40)
    record = instance("red-40", "red", 40)
    addresses = ["10.0.0.40", "10.0.0.41", "2001:db8::28"]
    ports = [{"network": "red", "mac": guest.mac, "addresses": addresses}]
    ip("-n", guest.namespace, "address", "add", "10.0.0.41/24", "dev", "eth0")
    world.daemon.put(instances=[{**record, "ports": ports}])
    for source in ("10.0.0.40", "10.0.0.41"):
        assert own(guest, guest.ask("/latest/user-data", source=source)) is None, source
    for source in ("2001:db8::28", guest.link_local):
        assert own(guest, guest.ask("/latest/user-data", to=IPV6, source=source)) is None, source
    assert world.daemon.explain("red", guest.link_local)["how"] == "eui64"


def test_a_private_link_local_address_is_known_by_the_neighbour_table_and_a_strangers_is_not(
    world: World,
) -> None:
    address = "fe80::5eed:1"
    guests = [world.lab.guest(one, 50, privacy=address) for one in ("red", "blue", "grey")]
    records = [instance(f"{guest.network}-50", guest.network, 50) for guest in guests]
    world.daemon.put(instances=records)
    for guest in guests:
        reply = guest.ask("/latest/user-data", to=IPV6, source=address)
        assert own(guest, reply) is None, guest.network
        explained = world.daemon.explain(guest.network, address)
        # What was learned is HAProxy's: Python is not asked again.
        assert (explained["how"], explained["installed"] is None) == ("neighbour", False)
    stranger = world.lab.guest("green", 51, mac="fa:16:3e:ff:ff:51", privacy="fe80::5eed:2")
    assert stranger.ask("/latest/user-data", to=IPV6, source="fe80::5eed:2").status == 404


def _metadata_addresses(namespace: str, device: str | None = None) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for link in json.loads(ip("-n", namespace, "-json", "address", "show")):
        for one in link["addr_info"]:
            if one["local"] in (IPV4, IPV6) and device in (None, link["ifname"]):
                found.setdefault(link["ifname"], set()).add(one["local"])
    return found


def test_an_interface_carries_the_addresses_and_answers_as_long_as_its_network_is_there(
    world: World,
) -> None:
    network = world.lab.interface_network("if1")
    guest = world.lab.guest("if1", 5)
    ip("-n", world.lab.host, "address", "add", "10.0.0.1/24", "dev", "if1")
    # What it sends arrives at the host, whose other interface has the addresses.
    for to in (IPV4, IPV6):
        ip("-n", guest.namespace, "neighbor", "add", to, "lladdr", BRIDGE_MAC, "dev", "eth0")
    assert not [to for to in (IPV4, IPV6) if guest.reaches(to=to)]
    world.daemon.put([network])
    assert _metadata_addresses(world.lab.host, "if1") == {"if1": {IPV4, IPV6}}
    for to in (IPV4, IPV6):
        until(partial(guest.reaches, to=to), what=f"the same guest's way to {to}")
    world.daemon.remove_network("if1")
    until(lambda: not _metadata_addresses(world.lab.host, "if1"), within_s=RIGHT_WITHIN_S)
    assert "10.0.0.1" in ip("-n", world.lab.host, "address", "show", "dev", "if1")


def test_a_bridge_gets_namespace_and_cable_and_loses_them_with_its_network(world: World) -> None:
    before = (set(world.lab.made_by_daemon()), set(world.lab.host_links()))
    network = world.lab.bridge_network("br1")
    guest = world.lab.guest("br1", 5)
    world.daemon.put([network], [instance("br1-5", "br1")])
    assert own(guest, guest.ask("/latest/user-data")) is None
    made = set(world.lab.made_by_daemon()) - before[0]
    assert len(made) == 1
    name = made.pop()
    inode = (NETNS / name).stat().st_ino
    assert _metadata_addresses(name)
    world.daemon.remove_instance("br1-5")
    world.daemon.remove_network("br1")
    until(lambda: set(world.lab.made_by_daemon()) == before[0], within_s=RIGHT_WITHIN_S)
    links = [name for name in world.lab.host_links() if name.startswith(world.lab.prefix)]
    assert set(links) == {name for name in before[1] if name.startswith(world.lab.prefix)}
    world.freed(inode)


def test_a_network_that_comes_is_answered_and_one_that_goes_is_refused(world: World) -> None:
    network = world.lab.namespace_network("late")
    guest = world.lab.guest("late", 5)
    assert not guest.reaches()
    assert world.daemon.put([network], [instance("late-5", "late")])["applied"]
    assert own(guest, guest.ask("/latest/user-data")) is None
    world.daemon.remove_instance("late-5")
    world.daemon.remove_network("late")
    until(lambda: not guest.reaches(), within_s=RIGHT_WITHIN_S)
