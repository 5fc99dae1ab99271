"""Listeners that cannot be bound, foreign ones beside ours, and namespaces that come, go and come again."""

from __future__ import annotations

import contextlib
import time

import pytest
import yaml

from support.daemon import instance
from support.guest import IPV4, IPV6, Guest, Load
from support.holders import holders
from support.lab import NETNS, ip, until
from support.patience import patience
from support.world import RIGHT_WITHIN_S, World, own, reads_own

pytestmark = pytest.mark.root


def _reported(world: World, network: str, code: str, *, within_s: float = RIGHT_WITHIN_S) -> str:
    """Wait until a network is reported as left out; the reason."""

    def there() -> bool:
        found = world.daemon.left_out().get(network)
        return found is not None and found["code"] == code

    until(there, within_s=within_s, what=f"{network} reported as {code}")
    return str(world.daemon.left_out()[network]["reason"])


def _served(
    world: World, guest: Guest, *, to: str = IPV4, within_s: float = RIGHT_WITHIN_S
) -> None:
    """Wait until a guest reads its own and nothing of its network is reported."""
    until(lambda: reads_own(guest, to), within_s=within_s, what=f"{guest.name}'s own documents")
    until(lambda: guest.network not in world.daemon.left_out(), within_s=within_s)


def test_a_listener_that_cannot_bind_is_reported_and_blocks_no_other_change(world: World) -> None:
    bad, good = (world.lab.namespace_network(name) for name in ("bad", "good"))
    world.lab.intrude(world.lab.name("bad"), IPV4, reuse_port=False)
    world.lab.intrude(world.lab.name("bad"), IPV6, device="br0", reuse_port=False)
    guest = world.lab.guest("good", 5)
    started = time.monotonic()
    answer = world.daemon.put([bad, good], [instance("good-5", "good")])
    assert own(guest, guest.ask("/latest/user-data")) is None
    assert time.monotonic() - started < RIGHT_WITHIN_S * patience()
    assert not answer["applied"]
    assert answer["pending"]
    _reported(world, "bad", "port-busy")
    # And a later change comes through while it stays so.
    later = world.lab.namespace_network("later")
    late = world.lab.guest("later", 5)
    world.daemon.put([later], [instance("later-5", "later")])
    assert own(late, late.ask("/latest/user-data")) is None
    assert "bad" in world.daemon.left_out()
    world.all_right()


def test_a_second_network_on_a_listener_in_use_is_refused_and_the_first_is_served_on(
    world: World,
) -> None:
    for kind, network in (("namespace", "red"), ("bridge", "blue"), ("interface", "grey")):
        place = world.lab.name(network) if kind == "namespace" else network
        done = world.daemon.command("network", "add", "second", f"--{kind}", place)
        assert done.status == 69
        assert f"network {network} has this listener" in done.err
        assert "second" not in world.daemon.command("network", "list", "--json").out
    world.all_right()


def test_of_two_sources_networks_on_one_listener_the_first_is_served_on(
    world: World,
) -> None:
    records = world.daemon.directory / "records"
    records.mkdir()
    before = world.daemon.settings
    world.daemon.configure(
        {**before, "sources": {"file": {"enabled": True, "directory": str(records)}}}
    )
    world.daemon.kill_controller()
    world.daemon.start()
    file = records / "second.yaml"
    # By its id it would be first.
    second = {"id": "a-second", "listener": {"namespace": world.lab.name("red")}}
    file.write_text(yaml.safe_dump({"networks": [second]}))
    with Load([world.red], "/latest/user-data", own) as load:
        assert "network red has" in _reported(world, "a-second", "listener-shared")
        load.wait_answers(20)
        world.daemon.kill_controller()
        world.daemon.start()
        assert "network red has" in _reported(world, "a-second", "listener-shared")
        load.wait_answers(20)
    assert load.report.lost == []
    file.unlink()
    until(lambda: world.daemon.left_out() == {}, within_s=RIGHT_WITHIN_S)
    world.daemon.configure(before)
    world.all_right()


def test_our_own_old_workers_are_no_foreign_listeners(world: World) -> None:
    with world.red.connect() as held:
        held.request("/latest/user-data")
        for _ in range(3):
            world.reload()
            assert world.daemon.left_out() == {}


def test_a_namespace_that_comes_late_is_served_within_a_second(world: World) -> None:
    name = world.lab.name("tardy")
    world.daemon.put(
        [{"id": "tardy", "listener": {"namespace": name}}], [instance("tardy-5", "tardy")]
    )
    _reported(world, "tardy", "namespace-missing")
    world.lab.furnish("tardy")
    guest = world.lab.guest("tardy", 5)
    _served(world, guest)
    _served(world, guest, to=IPV6)


def test_a_namespace_that_goes_is_reported_and_freed_within_a_second(world: World) -> None:
    inode = (NETNS / world.lab.name("green")).stat().st_ino
    assert holders({inode}, world.daemon.processes())
    with Load([world.red], "/latest/user-data", own) as load:
        load.wait_answers(20)
        world.lab.delete_namespace("green")
        started = time.monotonic()
        _reported(world, "green", "namespace-missing")
        world.freed(inode)
        assert time.monotonic() - started < RIGHT_WITHIN_S * patience()
        load.wait_answers(20)
    assert load.report.lost == []
    world.lab.furnish("green")
    world.lab.replug(world.guests["green"])
    _served(world, world.guests["green"])


def test_a_namespace_made_again_under_its_name_is_served_and_the_old_one_freed(
    world: World,
) -> None:
    name = world.lab.name("green")
    for unseen in (False, True, False, True):
        inode = (NETNS / name).stat().st_ino
        # HAProxy hands sockets over by name, also those of a namespace that is gone.
        with world.looking_away() if unseen else contextlib.nullcontext():
            world.lab.delete_namespace("green")
            world.lab.furnish("green")
            world.lab.replug(world.guests["green"])
        started = time.monotonic()
        _served(world, world.guests["green"])
        _served(world, world.guests["green"], to=IPV6)
        world.freed(inode)
        assert time.monotonic() - started < RIGHT_WITHIN_S * patience()
    world.all_right()


def test_a_namespace_made_again_while_the_controller_is_gone_is_served_by_the_next(
    world: World,
) -> None:
    inode = (NETNS / world.lab.name("green")).stat().st_ino
    world.daemon.kill_controller()
    world.lab.delete_namespace("green")
    world.lab.furnish("green")
    world.lab.replug(world.guests["green"])
    world.daemon.start()
    _served(world, world.guests["green"])
    world.freed(inode)


def test_a_device_made_again_under_its_name_is_served(world: World) -> None:
    network = world.lab.namespace_network("device", addresses=False)
    name = world.lab.name("device")
    listener = {"namespace": name, "device": "br0", "manage_addresses": True}
    world.daemon.put([{**network, "listener": listener}], [instance("device-5", "device")])
    guest = world.lab.guest("device", 5)
    _served(world, guest)
    ip("-n", name, "link", "del", "br0")
    _reported(world, "device", "device-missing")
    world.lab.remake_bridge("device", addresses=False)
    world.lab.replug(guest)
    _served(world, guest)
    _served(world, guest, to=IPV6)
    # And so that nobody sees it missing: HAProxy would hand the old device's socket over.
    with world.looking_away():
        world.lab.remake_bridge("device", addresses=False)
        world.lab.replug(guest)
    _served(world, guest)
    _served(world, guest, to=IPV6)


@pytest.mark.parametrize("network", ["blue", "grey"])
def test_a_bridge_or_interface_made_again_under_its_name_is_served(
    world: World, network: str
) -> None:
    guest = world.guests[network]
    for unseen in (False, True):
        with world.looking_away() if unseen else contextlib.nullcontext():
            ip("-n", world.lab.host, "link", "del", network)
            if not unseen:
                _reported(world, network, "device-missing")
            world.lab.remake_bridge(network, addresses=False)
            world.lab.replug(guest)
        _served(world, guest)
        _served(world, guest, to=IPV6)
