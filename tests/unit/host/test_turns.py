"""Long work of the event loop takes turns."""

import asyncio
from collections import Counter

from imdsproxy.host.turns import AT_ONCE, in_turns
from support.tasks import background


async def test_after_some_values_other_work_has_its_turn() -> None:
    turn, seen = 0, list[tuple[int, int]]()

    async def other() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async with background(other()):
        async for value in in_turns(range(3 * AT_ONCE + 1)):
            seen.append((value, turn))
    assert [value for value, _ in seen] == [*range(3 * AT_ONCE + 1)]
    assert max(Counter(turn for _, turn in seen).values()) == AT_ONCE
