"""Long work of the event loop, which takes turns with all else that waits for it."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final, TypeVar

AT_ONCE: Final = 50
"""Records that are looked at before the loop does other work: 2 to 5 ms."""

_T = TypeVar("_T")


async def in_turns(values: Iterable[_T]) -> AsyncIterator[_T]:
    """The values; after each `AT_ONCE` of them the loop does other work, so what they are of may change meanwhile."""
    for number, value in enumerate(values, 1):
        yield value
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
