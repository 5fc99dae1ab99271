"""What is cut off, hangs or has ended is known within seconds, and costs others no more than that."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from support.cli import Ran, run_main
from support.fleet_world import FleetHost, FleetWorld, HubProcess, fleet_world
from support.guest import Guest
from support.lab import run, until, within
from support.patience import patience

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

_HOSTNAME = "/latest/meta-data/hostname"
_SOON_S = 3.0
"""For what takes no time, on a busy machine."""


@dataclass(frozen=True)
class _Fleet:
    """Host `a` has the instance `web`; no record has the other guest."""

    world: FleetWorld
    host: FleetHost
    guest: Guest
    unknown: Guest
    capture: pytest.CaptureFixture[str]

    def __call__(self, *words: str, hubs: tuple[HubProcess, ...] = ()) -> Ran:
        certificate = str(self.world.directory / "anna.pem")
        options = [one for hub in hubs or self.world.hubs[:1] for one in ("--fleet", hub.url)]
        with self.world.etcd.entered():
            return run_main(self.capture, *options, "--fleet-certificate", certificate, *words)

    @property
    def followed(self) -> HubProcess | None:
        url = self.host.daemon.status()["fleet"]["hub"]
        return next((hub for hub in self.world.hubs if hub.url == url), None)


@pytest.fixture(scope="module")
def opened() -> Iterator[tuple[FleetWorld, FleetHost, Guest, Guest]]:
    with fleet_world() as world:
        world.operator("anna")
        host = world.add_host("a")
        yield world, host, host.lab.guest("blue"), host.lab.guest("blue", 9)


@pytest.fixture
def fleet(
    opened: tuple[FleetWorld, FleetHost, Guest, Guest], capsys: pytest.CaptureFixture[str]
) -> _Fleet:
    made = _Fleet(*opened, capsys)
    until(lambda: made.host.source["in_sync"], within_s=30, what="a hub that the host follows")
    if made("instance", "show", "web").status != 0:
        guest = made.guest
        assert made("network", "add", "blue", "--bridge", "blue").status == 0
        port = ("-n", "blue", "--mac", guest.mac, "--address", guest.addresses[0])
        added = made("instance", "add", "web", *port, "--host", "a")
        assert added.status == 0, added
    until(lambda: made("fleet", "status", "--check").status == 0, within_s=30, what="all well")
    return made


@contextlib.contextmanager
def _cut(host: FleetHost) -> Iterator[None]:
    """The host reaches no hub, and no hub the host, without a word to either."""
    nft = (*within(host.lab.host), "nft")
    chains = "\n".join(
        f"chain {hook} {{ type filter hook {hook} priority 0; tcp {side} 8469 drop; }}"
        for hook, side in (("input", "sport"), ("output", "dport"))
    )
    run(*nft, "-f", "-", stdin=f"table inet cut {{\n{chains}\n}}\n")
    try:
        yield
    finally:
        run(*nft, "delete", "table", "inet", "cut")


def test_a_host_that_is_cut_off_is_absent_and_out_of_sync_after_fifteen_seconds(
    fleet: _Fleet,
) -> None:
    assert fleet.unknown.ask(_HOSTNAME).status == 404
    with _cut(fleet.host):
        began = time.monotonic()
        until(lambda: not fleet.host.source["in_sync"], within_s=30, what="being out of sync")
        until(
            lambda: fleet("fleet", "status", "--json").json["absent"] == ["a"],
            within_s=30,
            what="being absent",
        )
        assert time.monotonic() - began < 15 + _SOON_S * patience()
        assert fleet.unknown.ask(_HOSTNAME).is_to_come_again
        assert fleet.guest.ask(_HOSTNAME).text == "web"
        checked = fleet("fleet", "status", "--check")
        assert (checked.status, "absent a" in checked.words) == (75, True)
    until(lambda: fleet.host.source["in_sync"], within_s=30, what="being in sync")
    assert fleet.unknown.ask(_HOSTNAME).status == 404


def test_a_hub_that_hangs_costs_seconds_and_one_that_was_killed_stays_listed(
    fleet: _Fleet,
) -> None:
    until(lambda: fleet.followed is not None, what="a hub that the host follows")
    hung = fleet.followed
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
            lambda: fleet.followed is other and fleet.host.source["in_sync"],
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
def test_a_member_of_etcd_that_hangs_costs_a_change_seconds(fleet: _Fleet, number: int) -> None:
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


def _is_followed_by_all(fleet: _Fleet) -> bool:
    return all(
        fleet("fleet", "status", "--check", hubs=(hub,)).status == 0 for hub in fleet.world.hubs
    )
