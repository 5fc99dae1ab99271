"""Loops of a hub that raise what nobody expected: each goes on, and is reported."""

import asyncio
from random import Random

import pytest

from imdsproxy.errors import SourceCorrupt
from imdsproxy.hub import background as module
from imdsproxy.hub.background import Background
from support.hand_clock import HandClock
from support.tasks import background, until


async def test_a_loop_that_fails_is_reported_and_started_again_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_FIRST_S", 0.001)
    loops, tries, others = Background(HandClock(), Random(1)), list[int](), list[int]()  # noqa: S311

    async def fail() -> None:
        tries.append(0)
        if len(tries) < 4:
            raise TypeError("a list is no number")
        await asyncio.Event().wait()

    async def go_on() -> None:
        others.append(0)
        await asyncio.Event().wait()

    async with background(loops.keep("sweep", fail)), background(loops.keep("beat", go_on)):
        await until(lambda: len(tries) == 4)
    assert (loops.failed, len(others)) == ({"sweep": 3}, 1)
    assert loops.failures().keys() == {"sweep"}
    assert "TypeError: a list is no number" in loops.failures()["sweep"]


async def test_what_a_hub_cannot_go_on_with_ends_it() -> None:
    loops = Background(HandClock(), Random(1))  # noqa: S311

    async def fail() -> None:
        raise SourceCorrupt("etcd has a fleet of format 2")

    with pytest.raises(SourceCorrupt):
        await loops.keep("etcd", fail, final=(SourceCorrupt,))
    assert not loops.failures()
