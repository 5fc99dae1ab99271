"""Run a source, and wait for what it reports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from imdsproxy.model.entities import Instance
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Observation
from imdsproxy.sources.api import Source
from support.patience import patience

DEADLINE_S: Final = 20.0
"""Far beyond what anything takes: a test that waits so long has failed."""


class WholeRecords:
    """What a source makes of a record that it keeps as it is."""

    def seen(self, instance: Instance) -> Instance:
        return instance

    def close(self) -> None:
        """End what it has started."""


async def until(holds: Callable[[], object]) -> None:
    """Wait for something that no observation announces."""
    async with asyncio.timeout(DEADLINE_S * patience()):
        while not holds():
            await asyncio.sleep(0.01)


class Heard:
    """Everything that a source has reported, folded into an inventory."""

    def __init__(self, source: Source) -> None:
        self.observations: list[Observation] = []
        self.inventory = Inventory([source.name])
        self._news = asyncio.Event()

    def publish(self, observation: Observation) -> None:
        # In the event loop's own thread.
        assert asyncio.current_task() is not None
        self.observations.append(observation)
        self.inventory.observe(observation)
        self._news.set()

    async def until(self, holds: Callable[[Heard], object]) -> None:
        """Wait until something holds of what was heard."""
        async with asyncio.timeout(DEADLINE_S * patience()):
            while not holds(self):
                self._news.clear()
                await self._news.wait()

    @property
    def last(self) -> Observation:
        return self.observations[-1]

    @property
    def owners(self) -> dict[str, str]:
        """Whose each address is: `n1/10.0.0.5`."""
        return {
            f"{network}/{address}": str(owner)
            for (network, address), owner in self.inventory.addresses()
        }


@contextlib.asynccontextmanager
async def running(source: Source) -> AsyncIterator[Heard]:
    """The source, running until the block ends, from when it has reported for the first time."""
    heard = Heard(source)
    task = asyncio.create_task(source.run(heard.publish))
    try:
        waiting = asyncio.create_task(heard.until(lambda each: each.observations))
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            waiting.cancel()
            task.result()
        await waiting
        yield heard
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
