"""What one instance may ask for, and what its neighbours and the daemon notice when it asks for more."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from imdsproxy.admin.metrics import TRAFFIC_COLUMNS
from imdsproxy.config.policy import LimitsSettings
from imdsproxy.dataplane.master import MasterClient
from support.daemon import instance
from support.guest import IPV4, IPV6, Guest, Lost
from support.lab import until
from support.patience import patience
from support.world import World, open_world

pytestmark = pytest.mark.root

_USER_DATA: Final = "/latest/user-data"
_PIPELINED: Final = f"GET {_USER_DATA} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 50
_DEFAULT: Final = LimitsSettings().model_dump(include={"requests_per_s", "burst", "connections"})


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with open_world({"limits": _DEFAULT, "resolver": {"hold_s": 1.0}}) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    # A worker that ends may tell the next one once more what the test before has asked for.
    until(lambda: _forgotten(shared_world), what="a guest of which nothing is counted")
    yield shared_world
    shared_world.heal()


def _statuses(guest: Guest, count: int, *, to: str = IPV4) -> list[int]:
    with guest.connect(to=to) as connection:
        return [connection.request(_USER_DATA).status for _ in range(count)]


def _flood(guest: Guest, count: int) -> None:
    """So many requests on eight connections, one behind the other without waiting."""

    def ask(_: int) -> None:
        with guest.connect() as connection:
            for _ in range(count // 8 // 50):
                connection.send(_PIPELINED)
                for _ in range(50):
                    connection.read()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


def _hold(stack: contextlib.ExitStack, guest: Guest, count: int) -> None:
    """Open connections and leave them open; some are closed at once."""
    for _ in range(count):
        with contextlib.suppress(Lost):
            stack.enter_context(guest.connect())


def _answered(guest: Guest) -> bool:
    try:
        return guest.ask(_USER_DATA).status == 200
    except Lost:
        return False


def _forgotten(world: World) -> bool:
    world.daemon.forget_floods()
    return _answered(world.red)


def test_a_hundred_and_fifty_requests_at_once_and_twenty_crawls_in_a_row_pass(world: World) -> None:
    with ThreadPoolExecutor(150) as pool:
        replies = list(pool.map(lambda _: world.red.ask(_USER_DATA), range(150)))
    assert {reply.status for reply in replies} == {200}
    # A dual-stack guest crawls over either family.
    assert set(_statuses(world.red, 10 * 150)) == {200}
    assert set(_statuses(world.red, 10 * 150, to=IPV6)) == {200}
    busiest = world.daemon.status()["busiest"][0]
    assert (busiest["instance"], busiest["limited"]) == ("red-5", False)
    assert busiest["requests"] > 3000


@pytest.mark.slow
def test_who_asks_for_more_than_the_default_is_refused_and_named(world: World) -> None:
    _flood(world.red, 4000)
    until(lambda: world.red.ask(_USER_DATA, to=IPV6).is_limited, what="a refusal")
    assert world.guests["green"].ask(_USER_DATA).status == 200
    first = world.daemon.status()["busiest"][0]
    assert (first["instance"], first["limited"]) == ("red-5", True)
    assert "limited" in world.daemon.command("status").out
    # What the metric of its network is made of.
    assert _denied(world, "red") >= 1
    assert _denied(world, "green") == 0
    world.reload()
    world.settled()
    assert world.red.ask(_USER_DATA).is_limited


@pytest.mark.slow
def test_a_new_limit_is_in_force_at_once_without_a_reload(world: World) -> None:
    pids = world.settled()
    world.have_policy({"instances": {"red-5": {"requests_per_s": 1, "burst": 1000}}})
    until(lambda: world.red.ask(_USER_DATA).status == 503, what="a refusal")
    world.have_policy({"instances": {"red-5": {"requests_per_s": 5000, "burst": 5000}}})
    assert world.red.ask(_USER_DATA).status == 200
    assert world.settled() == pids


@pytest.mark.slow
def test_what_was_counted_survives_reloads_in_a_row(world: World) -> None:
    world.have_policy({"instances": {"red-5": {"burst": 30}}})
    until(lambda: world.red.ask(_USER_DATA).status == 503, what="a refusal")
    for _ in range(4):
        world.reload()
    assert world.red.ask(_USER_DATA).is_limited


def test_a_thousand_idle_connections_starve_neither_neighbours_nor_the_daemon(world: World) -> None:
    with contextlib.ExitStack() as stack:
        _hold(stack, world.red, 1000)
        _starves_nothing(world)
    until(lambda: _answered(world.red), what="the connections' end")


def test_64_connections_that_ask_without_end_starve_neither_neighbours_nor_the_daemon(
    world: World,
) -> None:
    flood = subprocess.Popen(
        ["/usr/bin/nsenter", f"--net=/run/netns/{world.red.namespace}", "--",
         "/usr/bin/wrk", "-t1", "-c64", "-d60s", f"http://{IPV4}{_USER_DATA}"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: world.red.ask(_USER_DATA).is_limited, what="a refusal")
        _starves_nothing(world)
    finally:
        flood.kill()
        flood.wait()


def _denied(world: World, network: str) -> int:
    """Requests that HAProxy's worker of now has refused at the listeners of a network."""
    client = MasterClient(world.daemon.runtime / "master.sock")
    rows = asyncio.run(client.read_stat(world.pids().worker, TRAFFIC_COLUMNS))
    return sum(int(row["dreq"] or 0) for row in rows if row["svname"] == network)


def _starves_nothing(world: World) -> None:
    """A neighbour's documents, cached and new, its unknown neighbour's answer, the admin API and HAProxy's sockets."""
    green, stranger = world.guests["green"], world.lab.guest("green", 78)
    began = time.monotonic()
    assert green.ask(_USER_DATA).status == 200
    assert green.ask("/openstack/latest/meta_data.json").status == 200
    assert world.daemon.status()["haproxy"]["worker"] == world.pids().worker
    until(world.daemon.resolver_up, what="the resolver up")
    assert world.daemon.put(instances=[instance("green-77", "green", 77)])
    assert time.monotonic() - began < 5 * patience()
    # Held for a second, as settings say, and no longer.
    assert stranger.ask(_USER_DATA).status == 404
    assert time.monotonic() - began < 8 * patience()
