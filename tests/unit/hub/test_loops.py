"""Loops of a hub that raise an unexpected exception: each goes on, and is reported."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import cast

import pytest

from imdsproxy.errors import SourceCorrupt
from imdsproxy.hub.parts import Hub
from support.hand_clock import HandClock
from support.tasks import background, until

_PARTS = 11


def _hub() -> Hub:
    make: Callable[..., Hub] = Hub
    return make(*(None,) * _PARTS, HandClock(), Random(1))  # noqa: S311


async def test_a_loop_that_fails_is_reported_for_an_hour_and_the_others_go_on() -> None:
    hub, others = _hub(), list[int]()

    async def fail() -> None:
        raise TypeError("a list is no number")

    async def go_on() -> None:
        others.append(0)
        await asyncio.Event().wait()

    async with background(hub.keep("sweep", fail)), background(hub.keep("beat", go_on)):
        await until(hub.loop_failures)
        assert hub.loop_failures() == {
            "sweep": "failed at 2001-09-09 01:45:00 UTC, and was restarted: TypeError: a list is no number"
        }
        assert others == [0]
        cast("HandClock", hub.clock).time += 3601
        assert not hub.loop_failures()


async def test_what_a_hub_cannot_go_on_with_ends_it() -> None:
    async def fail() -> None:
        raise SourceCorrupt("etcd has a fleet of format 2")

    hub = _hub()
    with pytest.raises(SourceCorrupt):
        await hub.keep("etcd", fail, final=(SourceCorrupt,))
    assert not hub.loop_failures()
