"""The miss path: addresses that nobody knows, or not yet."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

import pytest

from support.daemon import instance
from support.guest import IPV6, Background, Guest, Load, Lost, Reply
from support.lab import batch, until
from support.patience import patience
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_HOLD_S: Final = 2.0
_HELD: Final = 32
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


@pytest.mark.parametrize("network", ["red", "blue", "grey"])
def test_a_request_is_held_until_its_record_comes(world: World, network: str) -> None:
    guest = world.lab.guest(network, 60)
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(_timed, partial(guest.ask, _TARGET, to=to))
            for to in ("169.254.169.254", IPV6)
        ]
        time.sleep(1)
        assert not any(one.done() for one in asked)
        world.daemon.put(instances=[instance(f"{network}-60", network, 60)])
        added = time.monotonic()
        for one in asked:
            reply, took = one.result()
            assert own(guest, reply) is None
            assert took >= 1
        assert time.monotonic() - added < _AT_ONCE_S * patience()


@pytest.mark.slow
def test_an_unknown_address_waits_once_until_its_record_comes(world: World) -> None:
    stranger = world.lab.guest("red", 71)
    reply, first = _timed(lambda: stranger.ask(_TARGET))
    assert (reply.status, reply.body) == (404, b"no instance has this address in this network")
    assert _HOLD_S <= first < _HOLD_S + 1 * patience()
    for _ in range(3):
        reply, took = _timed(lambda: stranger.ask(_TARGET))
        assert reply.status == 404
        assert took < _AT_ONCE_S * patience()
    world.daemon.put(instances=[instance("red-71", "red", 71)])
    assert own(stranger, stranger.ask(_TARGET)) is None
    world.daemon.remove_instance("red-71")
    _, again = _timed(lambda: stranger.ask(_TARGET))
    assert again >= _HOLD_S


@pytest.mark.alone
def test_no_more_than_32_requests_of_a_network_are_held(world: World) -> None:
    strangers, known = _flooded_network(world, "crowd")
    addresses = _invent(strangers, 40)
    green = world.lab.guest("green", 62)
    with ThreadPoolExecutor(len(addresses) + 1) as pool:
        asked = [
            pool.submit(_timed, partial(strangers.ask, _TARGET, source=source))
            for source in addresses
        ]
        until(lambda: len(_refused(asked)) == len(addresses) - _HELD, within_s=1)
        # Another network has its own share, and the known guests of this one are not concerned.
        other = pool.submit(_timed, lambda: green.ask(_TARGET))
        for _ in range(10):
            reply, took = _timed(lambda: known.ask(_TARGET))
            assert own(known, reply) is None
            assert took < _AT_ONCE_S * patience()
        assert not other.done()
        results = [one.result() for one in asked]
        assert other.result()[0].status == 404
    refused = _refused(asked)
    assert len(refused) == len(addresses) - _HELD
    assert all(reply.headers["retry-after"] for reply in refused)
    held = [took for reply, took in results if reply.status == 404]
    assert len(held) == _HELD
    assert min(held) >= _HOLD_S


def _refused(asked: Iterable[Future[tuple[Reply, float]]]) -> list[Reply]:
    replies = [one.result()[0] for one in asked if one.done()]
    return [reply for reply in replies if reply.status == 503]


def _invent(guest: Guest, number: int) -> list[str]:
    addresses = [f"10.0.0.{100 + index}" for index in range(number)]
    batch(guest.namespace, [f"address add {one}/24 dev eth0" for one in addresses])
    return addresses


def _flooded_network(world: World, name: str) -> tuple[Guest, Guest]:
    """Two guests of a network of its own, whose share stays used up for a while: one is known."""
    network = world.lab.namespace_network(name)
    known = world.lab.guest(name, 5)
    world.daemon.put([network], [instance(f"{name}-5", name)])
    return world.lab.guest(name, 63), known


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


@pytest.mark.alone
def test_a_guest_that_invents_addresses_slows_no_known_one_and_no_change(world: World) -> None:
    flooder, neighbour = _flooded_network(world, "invent")
    addresses = _invent(flooder, 100)
    known = [neighbour, world.guests["green"]]
    alone = _slowest(known)
    with _Flood(flooder, addresses) as flood, Load([neighbour], _TARGET, own) as load:
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


@pytest.mark.slow
def test_a_flood_that_is_refused_does_not_keep_all_others_of_its_network_out(world: World) -> None:
    flooder, _ = _flooded_network(world, "flood")
    stranger = world.lab.guest("flood", 64)
    with _Flood(flooder, _invent(flooder, 50)) as flood:
        until(lambda: flood.statuses.count(503) > 2 * _MISSES_PER_S, what="refusals")
        until(lambda: _reaches_python(stranger), within_s=4, what="a request that reaches Python")


def _reaches_python(guest: Guest) -> bool:
    """Python gives its reason in words, HAProxy refuses without any."""
    return guest.ask(_TARGET).body != b""


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


@pytest.mark.alone
def test_a_held_request_is_answered_however_often_haproxy_reloads_meanwhile(world: World) -> None:
    guest, stranger = world.lab.guest("red", 64), world.lab.guest("red", 70)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(partial(one.ask, _TARGET)) for one in (guest, stranger)]
        for _ in range(2):
            world.reload()
        world.daemon.put(instances=[instance("red-64", "red", 64)])
        for _ in range(4):
            world.reload()
        assert own(guest, asked[0].result()) is None
        assert asked[1].result().status == 404


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
        reply = asked.result()
    assert (reply.status, bool(reply.headers["retry-after"])) == (503, True)
    for _ in range(3):
        reply = stranger.ask(_TARGET, timeout_s=15)
        assert reply.status == 503
        assert reply.headers["retry-after"]
        assert reply.headers.get("content-length") == "0"
    # HAProxy has seen meanwhile that nobody is there: the answer comes at once.
    reply, took = _timed(lambda: stranger.ask(_TARGET, timeout_s=15))
    assert reply.status == 503
    assert took < _AT_ONCE_S * patience()
    world.all_right()
