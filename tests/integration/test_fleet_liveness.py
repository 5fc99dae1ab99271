"""What is cut off, hangs or has ended is known within seconds, and costs others no more than that."""

import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest

from support.fleet_operator import ServedFleet, served_fleet
from support.fleet_world import PORT, HubProcess
from support.lab import cut, until
from support.patience import patience

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

_HOSTNAME = "/latest/meta-data/hostname"
_SOON_S = 3.0
"""For what takes no time, on a busy machine."""


@pytest.fixture(scope="module")
def opened() -> Iterator[ServedFleet]:
    with served_fleet() as made:
        yield made


@pytest.fixture
def fleet(opened: ServedFleet) -> ServedFleet:
    opened.have_web()
    until(lambda: opened("fleet", "status", "--check").status == 0, within_s=30, what="all well")
    return opened


def _followed(fleet: ServedFleet) -> HubProcess | None:
    url = fleet.host.daemon.status()["fleet"]["hub"]
    return next((hub for hub in fleet.world.hubs if hub.url == url), None)


def test_a_host_that_is_cut_off_is_absent_and_out_of_sync_after_fifteen_seconds(
    fleet: ServedFleet,
) -> None:
    assert fleet.stranger.ask(_HOSTNAME).status == 404
    with cut(fleet.host.lab.host, PORT):
        began = time.monotonic()
        until(lambda: not fleet.host.source["in_sync"], within_s=30, what="being out of sync")
        until(
            lambda: fleet("fleet", "status", "--json").json["absent"] == ["a"],
            within_s=30,
            what="being absent",
        )
        assert time.monotonic() - began < 15 + _SOON_S * patience()
        assert fleet.stranger.ask(_HOSTNAME).is_to_come_again
        assert fleet.guest.ask(_HOSTNAME).text == "web"
        checked = fleet("fleet", "status", "--check")
        assert (checked.status, "absent a" in checked.words) == (75, True)
    until(lambda: fleet.host.source["in_sync"], within_s=30, what="being in sync")
    assert fleet.stranger.ask(_HOSTNAME).status == 404


def test_a_hub_that_hangs_costs_seconds_and_one_that_was_killed_stays_listed(
    fleet: ServedFleet,
) -> None:
    until(lambda: _followed(fleet) is not None, what="a hub that the host follows")
    hung = _followed(fleet)
    assert hung is not None
    assert hung.process is not None
    (other,) = (hub for hub in fleet.world.hubs if hub is not hung)
    hung.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        shown = fleet("fleet", "status", "--check", hubs=(hung, other))
        # Two seconds of the command, and two of the other hub.
        assert time.monotonic() - began < 4 + _SOON_S * patience()
        assert shown.status == 75
        assert f"{hung.name} does not answer" in shown.words
        until(
            lambda: _followed(fleet) is other and fleet.host.source["in_sync"],
            within_s=30,
            what="being in sync with the next hub",
        )
        assert time.monotonic() - began < 17 + _SOON_S * patience()
        changed = fleet("instance", "set", "web", "--hostname", "anew", hubs=(hung, other))
        assert changed.status == 0, changed
        assert fleet.guest.ask(_HOSTNAME).text == "anew"
    finally:
        hung.end(9)
    words = f"{hung.name} absent since"
    until(lambda: words in fleet("fleet", "status", hubs=(other,)).words, within_s=40, what=words)
    assert fleet("fleet", "status", "--check", hubs=(other,)).status == 75
    hung.start()
    until(
        lambda: fleet("fleet", "status", "--check", hubs=(other,)).status == 0,
        within_s=30,
        what="no hub that is absent",
    )
    assert fleet("instance", "set", "web", "--hostname", "web").status == 0


@pytest.mark.parametrize("number", range(3))
def test_a_member_of_etcd_that_hangs_costs_a_change_seconds(
    fleet: ServedFleet, number: int
) -> None:
    def change(name: str, hub: HubProcess) -> float:
        began = time.monotonic()
        done = fleet("instance", "set", "web", "--hostname", name, hubs=(hub,))
        assert done.status == 0, done
        return time.monotonic() - began

    with fleet.world.etcd.paused(fleet.world.etcd.members[number]):
        took = [change(f"web-{hub.name}", hub) for hub in fleet.world.hubs]
        again = [change("web", hub) for hub in fleet.world.hubs]
    assert max(took) < 4 + _SOON_S * patience(), took
    assert max(again) < _SOON_S * patience()
    until(partial(_is_followed_by_all, fleet), within_s=30, what="all members")


def _is_followed_by_all(fleet: ServedFleet) -> bool:
    return all(
        fleet("fleet", "status", "--check", hubs=(hub,)).status == 0 for hub in fleet.world.hubs
    )
