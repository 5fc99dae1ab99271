"""The miss path: addresses that nobody knows, or not yet.

How many are held, and for how long, is in tests/unit/documents/test_resolver.py.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import pytest

from support.daemon import instance
from support.guest import IPV4, IPV6, Background, Guest, Load, Lost, Reply
from support.lab import batch, until
from support.patience import patience
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_HOLD_S: Final = 2.0
_MISSES_PER_S: Final = 200
_AT_ONCE_S: Final = 0.5
_TARGET: Final = "/latest/user-data"


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with open_world({"resolver": {"hold_s": _HOLD_S}}) as world:
        yield world


def _timed(ask: Callable[[], Reply]) -> tuple[Reply, float]:
    started = time.monotonic()
    return ask(), time.monotonic() - started


def _reaches(guest: Guest) -> bool:
    """Whether a bridge has learned the way, and the kernel that nobody else has the guest's IPv6 address."""
    return guest.reaches(to=IPV4) and guest.reaches(to=IPV6)


@pytest.mark.parametrize("network", ["red", "blue", "grey"])
def test_a_request_is_held_until_its_record_comes_however_often_haproxy_reloads_meanwhile(
    world: World, network: str
) -> None:
    guest, stranger = world.lab.guest(network, 60), world.lab.guest(network, 61)
    for one in (guest, stranger):
        until(partial(_reaches, one), what=f"{one.name}'s way")
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(_timed, partial(one.ask, _TARGET, to=to))
            for one, to in ((guest, IPV4), (guest, IPV6), (stranger, IPV4))
        ]
        world.reload()
        assert not any(one.done() for one in asked)
        world.daemon.put(instances=[instance(f"{network}-60", network, 60)])
        added = time.monotonic()
        for held in asked[:2]:
            assert own(guest, held.result()[0]) is None
        assert time.monotonic() - added < _AT_ONCE_S * patience()
        # The fifth once ended the worker that holds one.
        for _ in range(4):
            world.reload()
        reply, took = asked[2].result()
    assert (reply.status, reply.body) == (404, b"no instance has this address in this network")
    assert took >= _HOLD_S
    # It has waited; once more, since the guest's MAC came meanwhile, by which any address may be known.
    stranger.ask(_TARGET)
    reply, took = _timed(partial(stranger.ask, _TARGET))
    assert (reply.status, took < _AT_ONCE_S * patience()) == (404, True)


class _Flood(Background):
    """A guest that asks from one invented address after the other, as fast as it can."""

    def __init__(self, guest: Guest, addresses: list[str]) -> None:
        super().__init__(*(partial(self._run, number) for number in range(8)))
        self._guest = guest
        self._addresses = addresses
        self.statuses: list[int] = []

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            number += 1
            source = self._addresses[number % len(self._addresses)]
            try:
                with self._guest.connect(source=source, timeout_s=0.25) as connection:
                    self.statuses.append(connection.request("/flood").status)
            except Lost:
                # It has no patience: the request is held, or no connection is left for it.
                self.statuses.append(0)


def _flood(world: World, name: str) -> tuple[_Flood, Guest]:
    """In a network of its own, whose share stays used up for a while; another guest there is known."""
    network = world.lab.namespace_network(name)
    known, flooder = world.lab.guest(name, 5), world.lab.guest(name, 63)
    world.daemon.put([network], [instance(f"{name}-5", name)])
    addresses = [f"10.0.0.{100 + index}" for index in range(100)]
    batch(flooder.namespace, [f"address add {one}/24 dev eth0" for one in addresses])
    return _Flood(flooder, addresses), known


@pytest.mark.alone
def test_a_guest_that_invents_addresses_slows_no_known_one_and_no_change(world: World) -> None:
    flood, neighbour = _flood(world, "invent")
    known = [neighbour, world.guests["green"]]
    alone = _slowest(known)
    with flood, Load([neighbour], _TARGET, own) as load:
        until(lambda: len(flood.statuses) > 100, what="a flood")
        flooded = _slowest(known)
        text = "changed while flooded"
        started = time.monotonic()
        world.daemon.put(instances=[{**instance("green-5", "green"), "user_data": text}])
        assert time.monotonic() - started < 1 * patience()
        assert world.guests["green"].ask(_TARGET).text == text
        load.wait_answers(50)
    assert load.report.lost == []
    assert flood.statuses.count(503) > 0
    assert flooded < max(3 * alone, 0.05 * patience())


class _Misses(Background):
    """Guests that ask for what there is not, under another path each time, as fast as they can."""

    def __init__(self, *guests: Guest) -> None:
        super().__init__(
            *(partial(self._run, guest, number) for guest in guests for number in range(30))
        )
        self.statuses: list[int] = []

    def _run(self, guest: Guest, number: int) -> None:
        turns = itertools.count()
        while not self._stop.is_set():
            with contextlib.suppress(Lost), guest.connect(timeout_s=2) as connection:
                while not self._stop.is_set():
                    part = "%61" * 4000 if number % 2 else "meta-data/tags/instance"
                    path = f"/latest/{part}/{number}-{next(turns)}"
                    self.statuses.append(connection.request(path).status)


@pytest.mark.alone
def test_health_checks_of_the_document_server_outlive_guests_that_ask_for_what_there_is_not(
    world: World,
) -> None:
    def downs() -> dict[str, str]:
        rows = world.daemon.haproxy_rows()
        return {row["svname"]: row["chkdown"] for row in rows if row["pxname"] == "documents"}

    before = downs()
    assert {"BACKEND", "documents-0", "documents-1"} <= before.keys()
    with _Misses(*(world.guests[name] for name in ("green", "blue", "grey"))) as flood:
        for answers in range(200, 4000, 200):
            until(lambda: len(flood.statuses) > answers, within_s=20, what="a flood")  # noqa: B023
            assert downs() == before
            assert own(world.red, world.red.ask(_TARGET)) is None
            world.daemon.wait_ready()
    # The tests' limits are so wide that no share of misses protects the document server.
    assert set(flood.statuses) == {404}


@pytest.mark.slow
def test_a_flood_that_is_refused_does_not_keep_all_others_of_its_network_out(world: World) -> None:
    flood, _ = _flood(world, "flood")
    stranger = world.lab.guest("flood", 64)
    with flood:
        until(lambda: flood.statuses.count(503) > 2 * _MISSES_PER_S, what="refusals")
        # Python gives its reason in words, HAProxy refuses without any.
        until(lambda: stranger.ask(_TARGET).body, within_s=4, what="a request that reaches Python")


def _slowest(guests: list[Guest]) -> float:
    """The 99th of 100 answers of guests that are known, from the cache and not."""
    took = []
    for target in (_TARGET, "/openstack/latest/meta_data.json"):
        for guest in guests:
            with guest.connect() as connection:
                for _ in range(100):
                    reply, seconds = _timed(partial(connection.request, target))
                    assert reply.status == 200
                    took.append(seconds)
    return sorted(took)[-len(took) // 100]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "host"), [(signal.SIGKILL, 68), (signal.SIGSTOP, 69)])
def test_without_a_controller_an_unknown_address_is_to_come_again_also_one_that_is_held(
    world: World, number: signal.Signals, host: int
) -> None:
    # Each address is held once in a minute.
    stranger, held = world.lab.guest("red", 65), world.lab.guest("red", host)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: held.ask(_TARGET, timeout_s=15))
        time.sleep(0.5)
        assert not asked.done()
        if number == signal.SIGSTOP:
            os.kill(world.pids().controller, number)
        else:
            world.daemon.kill_controller(number)
        assert asked.result().is_to_come_again
    for _ in range(3):
        reply = stranger.ask(_TARGET, timeout_s=15)
        assert reply.is_to_come_again
        assert reply.headers.get("content-length") == "0"
    # HAProxy has seen meanwhile that nobody is there: the answer comes at once.
    reply, took = _timed(lambda: stranger.ask(_TARGET, timeout_s=15))
    assert (reply.status, took < _AT_ONCE_S * patience()) == (503, True)
    world.all_right()
