"""Tickets for pending changes, to wait until they are in force."""

import asyncio
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tickets:
    """Last ticket number given for incoming work, and the number up to which work is in force."""

    given: int = 0
    done: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def take(self) -> int:
        """Return a number for new work."""
        self.given += 1
        return self.given

    async def close(self, number: int) -> None:
        """Mark all work up to this number as in force."""
        async with self._changed:
            self.done = max(self.done, number)
            self._changed.notify_all()

    async def wait(self, number: int) -> None:
        """Wait until all work up to this number is in force."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.done >= number)
