"""Tickets for pending changes: waiting until they are in force, and reporting failures."""

import asyncio
from dataclasses import dataclass, field

import structlog

from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.reconcile.progress import Backoff


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


def report_failure(
    field: str, event: str, error: DataplaneError, backoff: Backoff
) -> tuple[Problem, float]:
    """Log a failure that will be retried; return the problem to report, and the seconds until the retry."""
    delay = backoff.fail()
    structlog.get_logger().error(event, code=error.code, error=error.message, retry_in_s=delay)
    return Problem(field, error.message, error.hint), delay
