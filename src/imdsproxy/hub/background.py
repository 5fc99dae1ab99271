"""Supervision of a hub's loops: report a loop that raises an unexpected exception, and start it again with backoff."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import structlog

from imdsproxy.fleet.layout import plain
from imdsproxy.host.clock import Clock
from imdsproxy.reconcile.progress import Backoff

_FIRST_S: Final = 1.0
_LONGEST_S: Final = 60.0
_SHOWN_S: Final = 3600.0

_log = structlog.get_logger()


@dataclass(slots=True)
class Background:
    """Supervisor of a hub's loops.

    A loop may get a value that it cannot handle, or have a fault. Neither the hub nor its hosts may fail because of one
    loop.

    Args:
        clock: Monotonic, and the time for reports.
        random: Jitter of pauses.

    Attributes:
        failed: Number of failures by loop.
    """

    clock: Clock
    random: Random
    failed: Counter[str] = field(default_factory=Counter)
    _failures: dict[str, tuple[float, str]] = field(default_factory=dict)

    async def keep(
        self,
        name: str,
        work: Callable[[], Coroutine[Any, Any, None]],
        final: tuple[type[Exception], ...] = (),
    ) -> None:
        """Run a loop until it returns or is cancelled; start it again, with backoff, after an exception.

        Args:
            name: Name of the loop, for reports.
            work: Function that starts the loop.
            final: Exceptions that end the hub.
        """
        backoff = Backoff(_FIRST_S, _LONGEST_S)
        while True:
            begun = self.clock.monotonic()
            try:
                await work()
            except final:
                raise
            except Exception as error:  # noqa: BLE001 - reported below; what it is, is not known
                if self.clock.monotonic() - begun > _LONGEST_S:
                    backoff.succeed()
                self._report(name, error)
                await asyncio.sleep(backoff.fail() * self.random.uniform(0.5, 1.0))
            else:
                return

    def _report(self, name: str, error: Exception) -> None:
        self.failed[name] += 1
        reason = plain(f"{type(error).__name__}: {error}")
        at = self.clock.now().strftime("%Y-%m-%d %H:%M:%S UTC")
        self._failures[name] = self.clock.monotonic(), f"failed at {at} and began again: {reason}"
        _log.error("loop failed", loop=name, reason=reason, exc_info=error)

    def failures(self) -> dict[str, str]:
        """Return loops that failed within the last hour, with time and reason of the last failure."""
        since = self.clock.monotonic() - _SHOWN_S
        return {name: why for name, (at, why) in self._failures.items() if at > since}
