"""What guests get while their host's wall clock is stepped."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.model.policy import Policy, TokenMode
from support.access_table import META, TOKEN
from support.daemon import instance
from support.fleet_world import fleet_world
from support.guest import Guest, Lost, Reply, with_token
from support.haproxy_alone import Alone, open_alone
from support.lab import until
from support.wall_clock import WallClock

pytestmark = pytest.mark.root

_LIFETIME_S = 60
_HEADER = "x-aws-ec2-metadata-token-ttl-seconds"


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path / "clock")


@pytest.fixture
def alone(clock: WallClock, tmp_path: Path) -> Iterator[Alone]:
    clock.step(0)
    with open_alone(program=str(clock.haproxy(tmp_path))) as one:
        one.renew()
        one.have(Policy(tokens=TokenMode.REQUIRED))
        yield one


def _take(alone: Alone) -> str:
    reply = alone.ask(TOKEN, method="PUT", headers=(f"{_HEADER}: {_LIFETIME_S}",))
    assert reply.status == 200
    return reply.text


def _is_served(guest: Guest) -> bool:
    with contextlib.suppress(Lost):
        return guest.ask(META).status == 200
    return False


def _read(alone: Alone, token: str, *, kept: bool = True) -> Reply:
    return alone.ask(META, headers=with_token(token), kept=kept)


@pytest.mark.parametrize("step_s", [-3, -86_400])
def test_a_token_is_accepted_for_its_lifetime_and_as_long_as_its_hosts_clock_was_set_back(
    alone: Alone, clock: WallClock, step_s: int
) -> None:
    token = _take(alone)
    assert _read(alone, token).status == 200
    clock.step(step_s)
    longest = _LIFETIME_S - step_s
    until(lambda: int(_read(alone, token).headers[_HEADER]) > _LIFETIME_S)
    for kept in (True, False):
        assert int(_read(alone, token, kept=kept).headers[_HEADER]) <= longest
    # So much later by that clock.
    clock.step(step_s + longest)
    until(lambda: _read(alone, token).status == 401)
    assert _read(alone, token, kept=False).status == 401


def test_after_a_clock_was_ahead_a_guest_takes_a_new_token_and_no_document_is_lost(
    alone: Alone, clock: WallClock
) -> None:
    token = _take(alone)
    clock.step(40 * 86_400)
    until(lambda: _read(alone, token).status == 401)
    ahead = _take(alone)
    assert _read(alone, ahead).status == 200
    clock.step(0)
    until(lambda: _read(alone, token).status == 200)
    assert _read(alone, _take(alone)).status == 200


def test_a_host_of_a_fleet_whose_clock_is_behind_serves_on_names_the_clocks_and_comes_back() -> (
    None
):
    with fleet_world(1, clocks=True) as world:
        world.store_network("blue")
        host = world.add_host("a")
        world.place(instance("web", "blue"), host.name)
        guest = host.lab.guest("blue", 5)
        until(lambda: _is_served(guest), within_s=20)
        assert host.clock is not None
        host.clock.step(-2 * 3600)
        # Certificates are good from an hour before they are made.
        host.daemon.kill_controller()
        host.daemon.start(ready=False)
        until(lambda: "compare the clocks of both" in str(host.source), within_s=30)
        assert guest.ask(META).status == 200
        host.clock.step(0)
        until(lambda: host.source["in_sync"], within_s=60)
        assert "clock" not in str(host.source)
