"""Work that goes on beside a test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from support.patience import patience


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """It goes on during the block, which may take half a minute on a quiet machine, and is cancelled after it."""
    task = asyncio.create_task(work)
    try:
        async with asyncio.timeout(30 * patience()):
            yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(holds: Callable[[], object]) -> None:
    """Return once it holds; within as long as that."""
    async with asyncio.timeout(30 * patience()):
        while not holds():
            await asyncio.sleep(0.002)
