"""Listeners that cannot be bound, foreign ones beside ours, and namespaces and devices that come, go and come again."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import instance
from support.guest import IPV4, IPV6, Guest, Load
from support.health import METRICS, ask_operator
from support.holders import holders
from support.lab import NETNS, ip, until
from support.patience import patience
from support.world import RIGHT_WITHIN_S, World, open_world, own, reads_own

pytestmark = pytest.mark.root

_NOT_IN_FORCE = 75


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    # What listens is not changed while it runs.
    with open_world({"metrics": METRICS}) as world:
        yield world


def _reported(world: World, network: str, code: str) -> None:
    """Wait until a network is reported as left out."""
    until(
        lambda: world.daemon.not_served().get(network, {}).get("code") == code,
        within_s=RIGHT_WITHIN_S,
        what=f"{network} reported as {code}",
    )


def _served(world: World, guest: Guest) -> None:
    """Wait until a guest reads its own over both families and nothing of its network is reported."""
    for to in (IPV4, IPV6):
        until(lambda to=to: reads_own(guest, to), within_s=RIGHT_WITHIN_S, what=guest.name)  # type: ignore[misc] # mypy cannot see the default's type
    until(lambda: guest.network not in world.daemon.not_served(), within_s=RIGHT_WITHIN_S)


@pytest.mark.parametrize(
    ("code", "effect"), [("port-busy", "blocks"), ("foreign-listener", "shares")]
)
def test_a_program_on_the_port_is_named_in_every_report_and_blocks_no_other_change(
    world: World, code: str, effect: str
) -> None:
    world.lab.namespace_network("busy")
    name = world.lab.name("busy")
    intruder = world.lab.intrude(name, IPV4, reuse_port=effect == "shares")
    named = f"(pid {intruder.pid})"
    added = world.daemon.command("network", "add", "busy", "--namespace", name)
    assert (added.status, named in added.out) == (_NOT_IN_FORCE, True)
    again = world.daemon.command("network", "set", "busy", "--name", "Busy", "--json")
    assert (again.status, json.loads(again.out)["applied"]) == (_NOT_IN_FORCE, False)
    _reported(world, "busy", code)
    for figure in (
        f'networks_not_served{{code="{code}"}}',
        f'foreign_listeners{{effect="{effect}"}}',
    ):
        line = f"\nimdsproxy_{figure} 1.0\n"
        until(lambda line=line: line in ask_operator(world.lab, "/metrics").text, what=line)  # type: ignore[misc] # mypy cannot see the default's type
    ready = ask_operator(world.lab, "/readyz")
    told = json.loads(ready.text)
    assert (ready.status, told["reasons"]) == (200, [])
    assert any(code in one and named in one for one in told["degraded"]), told
    checked = world.daemon.command("status", "--check")
    assert (checked.status, "degraded" in checked.out) == (_NOT_IN_FORCE, True)
    if effect == "shares":
        logged = [one for one in world.daemon.log_entries() if one["message"] == "foreign listener"]
        command = Path(f"/proc/{intruder.pid}/comm").read_text().strip()
        assert (logged[-1]["pids"], logged[-1]["programs"]) == ([intruder.pid], [command])
    # A change of another network comes through while it stays so.
    good, guest = world.lab.namespace_network("good"), world.lab.guest("good", 5)
    started = time.monotonic()
    world.daemon.put([good], [instance("good-5", "good")])
    assert own(guest, guest.ask("/latest/user-data")) is None
    assert time.monotonic() - started < RIGHT_WITHIN_S * patience()
    assert "busy" in world.daemon.not_served()
    intruder.stop()
    until(lambda: not json.loads(ask_operator(world.lab, "/readyz").text)["degraded"])
    world.wait_all_right()
    assert world.daemon.command("status", "--check").status == 0


def test_a_namespace_is_served_within_a_second_of_its_coming_and_freed_within_one_of_its_going(
    world: World,
) -> None:
    name = world.lab.name("tardy")
    world.daemon.put(
        [{"id": "tardy", "listener": {"namespace": name}}], [instance("tardy-5", "tardy")]
    )
    _reported(world, "tardy", "namespace-missing")
    with Load([world.red], "/latest/user-data", own) as load:
        load.wait_answers(20)
        world.lab.furnish("tardy")
        guest = world.lab.guest("tardy", 5)
        _served(world, guest)
        inode = (NETNS / name).stat().st_ino
        assert holders({inode}, world.daemon.processes())
        world.lab.delete_namespace("tardy")
        started = time.monotonic()
        _reported(world, "tardy", "namespace-missing")
        world.freed(inode)
        assert time.monotonic() - started < RIGHT_WITHIN_S * patience()
        load.wait_answers(20)
    assert load.report.lost == []


@pytest.mark.parametrize("how", ["seen", "unseen", "without a controller"])
def test_a_namespace_made_again_under_its_name_is_served_and_the_old_one_freed(
    world: World, how: str
) -> None:
    for _ in range(1 if how == "without a controller" else 2):
        inode = (NETNS / world.lab.name("green")).stat().st_ino
        # HAProxy hands sockets over by name, also those of a namespace that is gone.
        with world.looking_away() if how == "unseen" else contextlib.nullcontext():
            if how == "without a controller":
                world.daemon.kill_controller()
            world.lab.delete_namespace("green")
            world.lab.furnish("green")
            world.lab.replug(world.guests["green"])
            if how == "without a controller":
                world.daemon.start()
        _served(world, world.guests["green"])
        world.freed(inode)
    world.all_right()


@pytest.mark.parametrize("network", ["device", "blue", "grey"])
def test_a_device_made_again_under_its_name_is_served(world: World, network: str) -> None:
    """In a namespace, a bridge, and an interface of the host's."""
    lab, device = world.lab, "br0" if network == "device" else network
    place = lab.name("device") if network == "device" else lab.host
    if network == "device":
        record = lab.namespace_network("device", addresses=False)
        listener = {"namespace": place, "device": device, "manage_addresses": True}
        world.daemon.put([{**record, "listener": listener}], [instance("device-5", "device")])
        guest = lab.guest("device", 5)
        _served(world, guest)
    else:
        guest = world.guests[network]
    for unseen in (False, True):
        # Unseen, HAProxy would hand the old device's socket over.
        with world.looking_away() if unseen else contextlib.nullcontext():
            ip("-n", place, "link", "del", device)
            if not unseen:
                _reported(world, network, "device-missing")
            lab.remake_bridge(network, addresses=False)
            lab.replug(guest)
        _served(world, guest)
