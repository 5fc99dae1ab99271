"""The one loop with its pauses: what it does after failures, by a clock that does not run by itself."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from imdsproxy.errors import HostRefused, SourceCorrupt
from imdsproxy.reconcile.reconciler import Reconciler
from support.hand_clock import HandClock
from support.tasks import background, until


@dataclass
class Rig:
    """A reconciler whose pauses take no time, and its rounds, each of which returns or raises the next of `results`."""

    results: list[float | Exception | None]
    clock: HandClock = field(default_factory=HandClock)
    pauses: list[float | None] = field(default_factory=list)
    round_s: float = 0.0
    made: Reconciler = field(init=False)

    def __post_init__(self) -> None:
        self.made = Reconciler(
            "part",
            "part not applied",
            1.0,
            4.0,
            retried=Exception,
            final=(SourceCorrupt,),
            settled_s=60.0,
            jitter=lambda: 0.5,
            clock=self.clock.monotonic,
            wait=self._wait,
        )

    async def _wait(self, woken: asyncio.Event, longest_s: float | None) -> None:
        self.pauses.append(longest_s)
        if longest_s is None:
            await woken.wait()
        else:
            self.clock.time += longest_s

    async def round(self) -> float | None:
        self.clock.time += self.round_s
        if not self.results:
            await asyncio.Event().wait()
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def _refused(reason: str = "no") -> HostRefused:
    return HostRefused(reason, hint="allow it")


async def test_pauses_grow_with_each_failure_up_to_the_longest_and_are_short_after_a_success() -> (
    None
):
    rig = Rig([_refused(), _refused(), _refused(), _refused(), 7.0, _refused()])
    async with background(rig.made.run(rig.round, after_s=0.0)):
        await until(lambda: len(rig.pauses) == 7)
    assert rig.pauses == [0.0, 0.5, 1.0, 2.0, 2.0, 7.0, 0.5]


async def test_a_failure_is_a_problem_until_a_round_succeeds() -> None:
    rig = Rig([_refused("disk full"), TypeError("a list is no number"), 0.0])
    seen = []

    async def look(round_: Callable[[], Awaitable[float | None]]) -> float | None:
        seen.append(rig.made.failure)
        return await round_()

    await rig.made.attempt(lambda: look(rig.round))
    first, expected, unexpected = seen
    assert first is None
    assert expected is not None
    assert (expected.field, expected.reason, expected.hint) == ("part", "disk full", "allow it")
    assert unexpected is not None
    assert unexpected.reason == "TypeError: a list is no number"
    assert (rig.made.failure, rig.made.failures, rig.made.failed_at) == (None, 2, 100.5)


async def test_rounds_wait_for_a_wake_and_none_that_comes_during_a_round_is_lost() -> None:
    rig = Rig([None, None])
    async with background(rig.made.run(rig.round)):
        await until(lambda: rig.pauses == [None])
        assert len(rig.results) == 2
        rig.made.wake()
        await until(lambda: rig.pauses == [None, None])
    during = Rig([None, None])

    async def wake_while_it_works() -> float | None:
        during.made.wake()
        return await during.round()

    async with background(during.made.run(wake_while_it_works, after_s=0.0)):
        await until(lambda: not during.results)


async def test_a_wake_ends_the_pause_after_a_failure() -> None:
    results = [_refused()]

    async def work() -> None:
        if results:
            raise results.pop()

    real = Reconciler("part", "part not applied", 3600.0, 3600.0)
    attempt = asyncio.create_task(real.attempt(work))
    await until(lambda: real.failure)
    real.wake()
    async with asyncio.timeout(30):
        await attempt
    assert real.failure is None


async def test_a_round_that_ran_long_before_it_failed_had_begun_well() -> None:
    rig = Rig([_refused(), _refused(), _refused()], round_s=61.0)
    async with background(rig.made.attempt(rig.round)):
        await until(lambda: len(rig.pauses) == 3)
    assert rig.pauses == [0.5, 0.5, 0.5]


async def test_what_is_final_or_not_retried_ends_the_loop() -> None:
    with pytest.raises(SourceCorrupt):
        await Rig([]).made.attempt(_raise_corrupt)
    with pytest.raises(TypeError):
        await Reconciler("part", "", 1.0, 1.0).attempt(_raise_type)


async def _raise_corrupt() -> None:
    raise SourceCorrupt("a fleet of format 2")


async def _raise_type() -> None:
    raise TypeError("a list is no number")
