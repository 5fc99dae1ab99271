"""Listeners of every kind, both families, how a guest is known, and the metadata addresses themselves."""

import json
from functools import partial
from typing import Final

import pytest

from support.daemon import instance
from support.guest import IPV4, IPV6, Guest, Lost
from support.lab import BRIDGE_MAC, NETNS, RecordMapping, batch, ip, run, until, within
from support.world import RIGHT_WITHIN_S, World, own, reads_own

pytestmark = pytest.mark.root

_TARGETS: Final = (
    *("/", "/latest/meta-data/", "/latest/meta-data/instance-id", "/latest/user-data"),
    *(
        "/openstack/latest/network_data.json",
        "/nocloud/meta-data",
        "/latest/there-is-no-such-thing",
    ),
)


@pytest.mark.parametrize("network", ["red", "blue", "grey"])
def test_both_families_are_answered_alike_by_every_kind_of_listener_and_at_no_other_address(
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
    for other in ("10.0.0.1", "2001:db8::1"):
        with pytest.raises(Lost):
            world.red.ask("/latest/user-data", to=other)


def test_a_guest_is_known_by_each_of_its_addresses(world: World) -> None:
    guest = world.lab.guest("red", 40)
    record = instance("red-40", "red", 40)
    addresses = ["10.0.0.40", "10.0.0.41", "2001:db8::28"]
    ports = [{"network": "red", "mac": guest.mac, "addresses": addresses}]
    ip("-n", guest.namespace, "address", "add", "10.0.0.41/24", "dev", "eth0")
    world.daemon.put(instances=[{**record, "ports": ports}])
    for source in (*addresses, guest.link_local):
        to = IPV6 if ":" in source else IPV4
        assert own(guest, guest.ask("/latest/user-data", to=to, source=source)) is None, source
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


# Listeners that come and go


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
    def links() -> set[str]:
        return {one for one in world.lab.host_links() if one.startswith(world.lab.prefix)}

    before = (set(world.lab.made_by_daemon()), links())
    network = world.lab.bridge_network("br1")
    guest = world.lab.guest("br1", 5)
    world.daemon.put([network], [instance("br1-5", "br1")])
    assert own(guest, guest.ask("/latest/user-data")) is None
    (name,) = set(world.lab.made_by_daemon()) - before[0]
    inode = (NETNS / name).stat().st_ino
    assert _metadata_addresses(name)
    world.daemon.remove_instance("br1-5")
    world.daemon.remove_network("br1")
    until(lambda: set(world.lab.made_by_daemon()) == before[0], within_s=RIGHT_WITHIN_S)
    assert links() == before[1]
    world.freed(inode)
    until(lambda: not guest.reaches(), within_s=RIGHT_WITHIN_S)


# The IPv6 address: the kernel still asks whether somebody else has it, or somebody has


_AGENTS_ADDRESS: Final = f"address add {IPV6}/64 dev br0"


def _network(world: World, *, probes: int) -> tuple[RecordMapping, Guest]:
    """A network without its IPv6 address, and a guest; the kernel asks for its addresses that often."""
    lab = world.lab
    lab.furnish("late", addresses=False)
    guest = lab.guest("late", 5)
    name = lab.name("late")
    for key, value in (("accept_dad", 1), ("dad_transmits", probes)):
        place = f"/proc/sys/net/ipv6/conf/br0/{key}"
        run(*within(name), "sh", "-c", f"echo {value} >{place}")
    ip("-n", name, "address", "add", f"{IPV4}/32", "dev", "br0")
    return {"id": "late", "listener": {"namespace": name}}, guest


def _code(world: World) -> str:
    return str(world.daemon.not_served().get("late", {}).get("code", ""))


@pytest.mark.slow
def test_while_the_kernel_asks_whether_the_ipv6_address_is_taken_ipv4_is_served_and_then_both(
    world: World,
) -> None:
    network, guest = _network(world, probes=3)
    batch(world.lab.name("late"), [_AGENTS_ADDRESS])
    world.daemon.put([network], [instance("late-5", "late")])
    assert _code(world) == "address-tentative"
    assert own(guest, guest.ask("/latest/user-data", to=IPV4)) is None
    until(lambda: reads_own(guest, IPV6), within_s=10, what="IPv6 as well")
    until(lambda: _code(world) == "", what="nothing left out")


def test_where_somebody_else_has_the_ipv6_address_ipv4_is_served_and_ipv6_once_it_is_free(
    world: World,
) -> None:
    network, guest = _network(world, probes=1)
    ip("-n", guest.namespace, "address", "add", f"{IPV6}/64", "dev", "eth0", "nodad")
    batch(world.lab.name("late"), [_AGENTS_ADDRESS])
    world.daemon.put([network], [instance("late-5", "late")])
    until(lambda: _code(world) == "address-duplicate", within_s=10, what="the duplicate")
    assert own(guest, guest.ask("/latest/user-data", to=IPV4)) is None
    ip("-n", guest.namespace, "address", "del", f"{IPV6}/64", "dev", "eth0")
    batch(world.lab.name("late"), [f"address del {IPV6}/64 dev br0", _AGENTS_ADDRESS])
    until(lambda: reads_own(guest, IPV6), within_s=10, what="IPv6 as well")
