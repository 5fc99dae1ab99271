"""Long loops that yield to other tasks of the event loop."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final, TypeVar

AT_ONCE: Final = 50
"""Records processed before the loop yields to other tasks: 2 to 5 ms."""

_T = TypeVar("_T")


async def in_turns(values: Iterable[_T]) -> AsyncIterator[_T]:
    """Yield the values; yield to other tasks after each `AT_ONCE`, so the source of the values may change meanwhile."""
    for number, value in enumerate(values, 1):
        yield value
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
