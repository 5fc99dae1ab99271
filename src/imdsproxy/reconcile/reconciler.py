"""Reconciler, the loop that brings a part to its wanted state and tries again after a failure; tickets to wait for."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NoReturn, TypeVar

import structlog

from imdsproxy.errors import DataplaneError, ImdsproxyError, Problem
from imdsproxy.reconcile.progress import Backoff

_Result = TypeVar("_Result")
_log: Final = structlog.get_logger()


async def wait_woken(woken: asyncio.Event, longest_s: float | None) -> None:
    """Wait for the event, at most so many seconds; `None` for no limit."""
    with suppress(TimeoutError):
        async with asyncio.timeout(longest_s):
            await woken.wait()


@dataclass(slots=True)
class Reconciler:
    """Runs rounds of work; a round that fails is reported, and run again after a pause that grows.

    Args:
        name: Field of the problem that a failure becomes.
        event: Log line of a failure; empty if its callers log it.
        first_s: Pause after the first failure, in seconds; each further one is twice as long.
        retried: Exceptions after which a round is run again. Any other ends the loop.
        final: Exceptions among them that end the loop as well.
        settled_s: Duration from which a round that failed had begun well, so that the pause is short again.
        jitter: Returns the factor by which a pause is changed, so that many hosts do not retry at once.

    Attributes:
        failure: Reason why the last round failed; `None` after a success.
        woken: Set by `wake`; a round begins by clearing it.
    """

    name: str
    event: str
    first_s: float
    longest_s: float
    retried: type[Exception] | tuple[type[Exception], ...] = DataplaneError
    final: tuple[type[Exception], ...] = ()
    settled_s: float = math.inf
    jitter: Callable[[], float] = lambda: 1.0
    clock: Callable[[], float] = time.monotonic
    wait: Callable[[asyncio.Event, float | None], Awaitable[None]] = wait_woken
    failure: Problem | None = None
    failures: int = 0
    failed_at: float = 0.0
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    _backoff: Backoff = field(init=False)

    def __post_init__(self) -> None:
        self._backoff = Backoff(self.first_s, self.longest_s)

    def wake(self) -> None:
        """Let the next round begin now: there is new work, which may also resolve a failure."""
        self.woken.set()

    async def run(
        self, work: Callable[[], Awaitable[float | None]], *, after_s: float | None = None
    ) -> NoReturn:
        """Run rounds until cancelled.

        Args:
            work: One round; returns the seconds until the next one, `None` to wait for `wake`.
            after_s: Seconds until the first round, as above.
        """
        pause = after_s
        while True:
            await self.wait(self.woken, pause)
            pause = await self.attempt(work)

    async def attempt(self, work: Callable[[], Awaitable[_Result]]) -> _Result:
        """Run one round until it succeeds; return its result."""
        while True:
            self.woken.clear()
            began = self.clock()
            try:
                result = await work()
            except self.final:
                raise
            except self.retried as error:
                if self.clock() - began > self.settled_s:
                    self._backoff.succeed()
                await self.wait(self.woken, self.fail(error))
            else:
                self.succeed()
                return result

    def fail(self, error: Exception) -> float:
        """Report a failure; return the seconds until the next attempt."""
        self.failures += 1
        self.failed_at = self.clock()
        pause = self._backoff.fail() * self.jitter()
        if isinstance(error, ImdsproxyError):
            self.failure = Problem(self.name, error.message, error.hint)
            log = _log.error if isinstance(error, DataplaneError) else _log.warning
            if self.event:
                log(self.event, code=error.code, error=error.message, retry_in_s=pause)
        else:
            reason = f"{type(error).__name__}: {error}"
            self.failure = Problem(self.name, reason)
            _log.error(self.event, loop=self.name, reason=reason, retry_in_s=pause, exc_info=error)
        return pause

    def succeed(self) -> None:
        """End the failure. A round that does not return calls it after each success."""
        self._backoff.succeed()
        self.failure = None


@dataclass(slots=True)
class Tickets:
    """Last ticket number given for incoming work, and the number up to which work is in force."""

    given: int = 0
    done: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def take(self) -> int:
        self.given += 1
        return self.given

    async def close(self, number: int) -> None:
        async with self._changed:
            self.done = max(self.done, number)
            self._changed.notify_all()

    async def wait(self, number: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.done >= number)
