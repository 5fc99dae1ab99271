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
from imdsproxy.serving.resolver import FOUND, Outcome, Resolver

_WEB = EmbeddedRecord(InstanceId("web"), "0123456789abcdef")


def _key(network: str = "red", last: int = 5) -> AddressKey:
    return NetworkId(network), IPv4Address(f"10.0.0.{last}")


_KEY = _key()


class World:
    """A resolver, and what its look-up finds, which may change while requests wait."""

    def __init__(self, hold_s: float = 5, per_network: int = 32, in_all: int = 64) -> None:
        self.found: dict[AddressKey, Outcome] = {}
        self.otherwise: Outcome = Denial.UNKNOWN
        self.asked: list[tuple[AddressKey, Scope | None, int | None]] = []
        self.clock = 1000.0
        self.limits = ResolverSettings(
            hold_s=hold_s, max_held_per_network=per_network, max_held=in_all
        )
        self.resolver = Resolver(self._look, lambda: self.limits, lambda: self.clock)
        self.resolve = self.resolver.resolve

    async def _look(self, key: AddressKey, scope: Scope | None, port: int | None, /) -> Outcome:
        self.asked.append((key, scope, port))
        return self.found.get(key, self.otherwise)

    async def hold(self, key: AddressKey = _KEY) -> asyncio.Task[Outcome]:
        """A request that waits."""
        count = self.resolver.held
        request = asyncio.create_task(self.resolve(key))
        async with asyncio.timeout(30):
            while self.resolver.held == count:
                await asyncio.sleep(0)
        return request

    async def leave(self, *requests: asyncio.Task[Outcome]) -> None:
        """Their guests have gone away."""
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)


@pytest.mark.parametrize("hold_s", [0, 0.01])
@pytest.mark.parametrize("denial", [Denial.UNKNOWN, Denial.UNAVAILABLE, Denial.CONFLICT])
async def test_only_what_may_still_come_is_held_and_looked_up_again(
    denial: Denial, hold_s: float
) -> None:
    world = World(hold_s)
    world.otherwise = denial
    held = bool(hold_s) and denial is not Denial.CONFLICT
    assert await world.resolve(_KEY, Scope.NETWORK, 4711) == denial
    assert world.asked == [(_KEY, Scope.NETWORK, 4711)] * (1 + held)
    world.clock += 1
    await world.resolve(_KEY)
    # Of a source that is not in sync each request waits; else an address waits once a minute.
    again = held and denial is Denial.UNAVAILABLE
    assert len(world.asked) == 2 + held + again
    world.clock += 61
    await world.resolve(_KEY)
    assert len(world.asked) == 3 + held + again + held
    # A known one does not.
    world.found[_KEY] = _WEB
    assert await world.resolve(_KEY) == _WEB
    assert len(world.asked) == 4 + held + again + held
    assert world.resolver.outcomes == {denial: 3, FOUND: 1}


@pytest.mark.parametrize("outcome", [_WEB, Denial.CONFLICT])
async def test_a_request_waits_for_what_is_found_and_gets_it(outcome: Outcome) -> None:
    world = World()
    request = await world.hold()
    for others, looks in ((_key(last=9), 1), (_KEY, 2)):
        # Another address, and nothing new of its own.
        world.resolver.wake([others])
        async with asyncio.timeout(30):
            while len(world.asked) < looks:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not request.done()
    world.found[_KEY] = outcome
    world.resolver.wake([_KEY])
    assert await request == outcome
    assert world.resolver.held == 0


async def test_one_network_s_share_is_bounded_and_leaves_the_others_theirs() -> None:
    world = World(per_network=3)
    waiting = [await world.hold(_key(last=number)) for number in range(1, 4)]
    assert await world.resolve(_key(last=100)) == Denial.OVER_LIMIT
    assert world.resolver.outcomes == {Denial.OVER_LIMIT: 1}
    waiting.append(await world.hold(_key("blue")))
    # All networks together are bounded too.
    world.limits = ResolverSettings(max_held_per_network=4, max_held=4)
    assert await world.resolve(_key("green")) == Denial.OVER_LIMIT
    # A guest that leaves frees its place; one that found none has not waited.
    await world.leave(waiting.pop())
    request = await world.hold(_key("green"))
    await world.leave(request, *waiting)
    assert world.resolver.held == 0


async def test_an_address_that_is_asked_for_again_and_again_waits_once() -> None:
    world = World(hold_s=0.01)
    await world.resolve(_KEY)
    for looks in range(2, 52):
        assert len(world.asked) == looks
        world.clock += 50
        assert await world.resolve(_KEY) == Denial.UNKNOWN


async def test_who_gives_up_early_uses_up_the_wait_of_the_address_too() -> None:
    world = World()
    await world.leave(await world.hold())
    world.clock += 4.99
    assert await world.resolve(_KEY) == Denial.UNKNOWN
    assert len(world.asked) == 3
    world.clock += 0.02
    assert await world.resolve(_KEY) == Denial.UNKNOWN
    assert len(world.asked) == 4


@pytest.mark.parametrize(
    "reported",
    [
        lambda resolver: resolver.wake([_KEY]),
        lambda resolver: resolver.wake(None),
        lambda resolver: resolver.wake_networks({_KEY[0]}),
    ],
)
async def test_an_address_that_a_source_has_reported_waits_again_when_it_is_gone(
    reported: Callable[[Resolver], None],
) -> None:
    world = World(hold_s=0.01)
    await world.resolve(_KEY)
    await world.resolve(_key("blue"))
    world.clock += 1
    reported(world.resolver)
    request = await world.hold()
    world.found[_KEY] = _WEB
    reported(world.resolver)
    assert await request == _WEB


async def test_invented_addresses_fill_no_memory() -> None:
    world = World(hold_s=0)
    for number in range(10_500):
        await world.resolve((NetworkId("red"), IPv4Address(number)))
    assert len(world.resolver._wait_ends) == 10_000
    world.clock += 100
    for number in range(6000):
        await world.resolve((NetworkId("blue"), IPv4Address(number)))
    assert len(world.resolver._wait_ends) == 6000
