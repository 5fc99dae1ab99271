"""Waiting until everything that was reported up to now is in force, and what is reported when it cannot be."""

import asyncio
from dataclasses import dataclass, field

import structlog

from imdsproxy.core.timing import Backoff
from imdsproxy.errors import DataplaneError, Problem


@dataclass(slots=True)
class Tickets:
    """The last number handed out as work came in, and the number up to which it is in force."""

    given: int = 0
    done: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def take(self) -> int:
        """A number for work that has just come in."""
        self.given += 1
        return self.given

    async def close(self, number: int) -> None:
        """All work up to this number is in force."""
        async with self._changed:
            self.done = max(self.done, number)
            self._changed.notify_all()

    async def wait(self, number: int) -> None:
        """Return once all work up to this number is in force."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.done >= number)


def report_failure(
    field: str, event: str, error: DataplaneError, backoff: Backoff
) -> tuple[Problem, float]:
    """Log that work failed which is tried again; the problem to report, and the seconds until then."""
    delay = backoff.fail()
    structlog.get_logger().error(event, code=error.code, error=error.message, retry_in_s=delay)
    return Problem(field, error.message, error.hint), delay
