from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from imdsproxy.config.schema import ResolverSettings
from imdsproxy.core.identity import Denial
from imdsproxy.core.model import InstanceId, NetworkId, Scope
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.wire import EmbeddedRecord
from imdsproxy.serving.resolver import Outcome, Resolver

_WEB = EmbeddedRecord(InstanceId("web"), "0123456789abcdef")


def _key(network: str = "red", last: int = 5) -> AddressKey:
    return NetworkId(network), IPv4Address(f"10.0.0.{last}")


class World:
    """What the look-up finds; it may change while requests wait."""

    def __init__(self) -> None:
        self.found: dict[AddressKey, Outcome] = {}
        self.otherwise: Outcome = Denial.UNKNOWN
        self.looks = 0
        self.scopes: list[Scope | None] = []
        self.clock = 1000.0

    def now(self) -> float:
        return self.clock

    async def look(self, key: AddressKey, scope: Scope | None, port: int | None, /) -> Outcome:
        del port
        self.looks += 1
        self.scopes.append(scope)
        return self.found.get(key, self.otherwise)


def _resolver(world: World, hold_s: float = 5, per_network: int = 32, in_all: int = 64) -> Resolver:
    settings = ResolverSettings(hold_s=hold_s, max_held_per_network=per_network, max_held=in_all)
    return Resolver(world.look, lambda: settings, world.now)


async def _held(resolver: Resolver, count: int) -> None:
    async with asyncio.timeout(30):
        while resolver.held < count:
            await asyncio.sleep(0)


async def test_a_known_address_is_answered_at_once() -> None:
    world = World()
    world.found[_key()] = _WEB
    resolver = _resolver(world)
    assert await resolver.resolve(_key()) == _WEB
    assert resolver.counts.found == 1
    assert resolver.counts.held == 0


@pytest.mark.parametrize("hold_s", [0, 0.01])
@pytest.mark.parametrize("denial", [Denial.UNKNOWN, Denial.UNAVAILABLE, Denial.CONFLICT])
async def test_only_what_may_still_come_is_held_and_looked_up_again(
    denial: Denial, hold_s: float
) -> None:
    world = World()
    world.otherwise = denial
    resolver, held = _resolver(world, hold_s), bool(hold_s) and denial is not Denial.CONFLICT
    assert await resolver.resolve(_key()) == denial
    assert (resolver.counts.held, world.looks) == (int(held), 1 + held)
    world.clock += 1
    await resolver.resolve(_key())
    # Of a source that is not in sync each request waits; else an address waits once a minute.
    again = held and denial is Denial.UNAVAILABLE
    assert resolver.counts.held == held + again
    world.clock += 61
    await resolver.resolve(_key())
    assert resolver.counts.held == held + again + held


async def test_a_request_waits_for_its_record_and_gets_it() -> None:
    world = World()
    resolver = _resolver(world)
    request = asyncio.create_task(resolver.resolve(_key()))
    await _held(resolver, 1)
    world.found[_key()] = _WEB
    resolver.wake([_key(last=9)])
    await asyncio.sleep(0)
    assert not request.done()
    resolver.wake([_key()])
    assert await request == _WEB
    assert resolver.held == 0


async def test_a_wake_for_nothing_keeps_the_request_waiting() -> None:
    world = World()
    resolver = _resolver(world)
    request = asyncio.create_task(resolver.resolve(_key()))
    await _held(resolver, 1)
    looks = world.looks
    resolver.wake([_key()])
    async with asyncio.timeout(30):
        while world.looks == looks:
            await asyncio.sleep(0)
    assert not request.done()
    world.found[_key()] = Denial.CONFLICT
    resolver.wake_all()
    assert isinstance(await request, Denial)


async def test_one_network_s_share_is_bounded_and_leaves_the_others_theirs() -> None:
    world = World()
    resolver = _resolver(world, per_network=3)
    waiting = [asyncio.create_task(resolver.resolve(_key(last=n))) for n in range(1, 4)]
    await _held(resolver, 3)
    outcome = await resolver.resolve(_key(last=100))
    assert outcome == Denial.OVER_LIMIT
    assert resolver.counts.denied[Denial.OVER_LIMIT] == 1
    other = asyncio.create_task(resolver.resolve(_key("blue")))
    await _held(resolver, 4)
    # All networks together are bounded too.
    resolver.limits = lambda: ResolverSettings(max_held_per_network=4, max_held=4)
    assert await resolver.resolve(_key("green")) == Denial.OVER_LIMIT
    for request in (*waiting, other):
        request.cancel()
    await asyncio.gather(*waiting, other, return_exceptions=True)
    assert resolver.held == 0


async def test_a_guest_that_leaves_frees_its_place() -> None:
    world = World()
    resolver = _resolver(world, per_network=1)
    request = asyncio.create_task(resolver.resolve(_key()))
    await _held(resolver, 1)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert resolver.held == 0
    again = asyncio.create_task(resolver.resolve(_key()))
    await _held(resolver, 1)
    world.found[_key()] = _WEB
    resolver.wake_all()
    assert await again == _WEB


async def test_an_address_that_nobody_has_waits_once_and_is_then_answered_at_once() -> None:
    world = World()
    resolver = _resolver(world, hold_s=0.01)
    await resolver.resolve(_key())
    world.clock += 1
    for _ in range(100):
        world.clock += 50
        looks = world.looks
        outcome = await resolver.resolve(_key())
        assert outcome == Denial.UNKNOWN
        assert world.looks == looks + 1
    assert resolver.counts.held == 1
    world.found[_key()] = _WEB
    assert await resolver.resolve(_key()) == _WEB


async def test_who_gives_up_early_uses_up_the_wait_of_the_address_too() -> None:
    world = World()
    resolver = _resolver(world)
    impatient = asyncio.create_task(resolver.resolve(_key()))
    await _held(resolver, 1)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    world.clock += 4.99
    outcome = await resolver.resolve(_key())
    assert resolver.counts.held == 2
    world.clock += 0.02
    assert await resolver.resolve(_key()) == outcome == Denial.UNKNOWN
    assert resolver.counts.held == 2


@pytest.mark.parametrize(
    "reported",
    [
        lambda resolver: resolver.wake([_key()]),
        lambda resolver: resolver.wake_all(),
        lambda resolver: resolver.wake_networks({_key()[0]}),
    ],
)
async def test_an_address_that_a_source_has_reported_waits_again_when_it_is_gone(
    reported: Callable[[Resolver], None],
) -> None:
    world = World()
    resolver = _resolver(world, hold_s=0.01)
    await resolver.resolve(_key())
    await resolver.resolve(_key("blue"))
    world.clock += 1
    reported(resolver)
    request = asyncio.create_task(resolver.resolve(_key()))
    await _held(resolver, 1)
    world.found[_key()] = _WEB
    resolver.wake([_key()])
    assert await request == _WEB


async def test_who_found_no_place_to_wait_has_not_waited() -> None:
    world = World()
    resolver = _resolver(world, per_network=1, hold_s=0.01)
    waiting = asyncio.create_task(resolver.resolve(_key(last=9)))
    await _held(resolver, 1)
    assert await resolver.resolve(_key()) == Denial.OVER_LIMIT
    await waiting
    world.clock += 1
    await resolver.resolve(_key())
    assert resolver.counts.held == 2


async def test_invented_addresses_fill_no_memory() -> None:
    world = World()
    resolver = _resolver(world, hold_s=0)
    for number in range(10_500):
        await resolver.resolve((NetworkId("red"), IPv4Address(number)))
    assert len(resolver._wait_ends) == 10_000
    world.clock += 100
    for number in range(6000):
        await resolver.resolve((NetworkId("blue"), IPv4Address(number)))
    assert len(resolver._wait_ends) == 6000
