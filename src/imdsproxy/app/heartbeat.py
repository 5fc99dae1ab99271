"""Shows that the controller's event loop makes progress: to systemd's watchdog, and to `/livez`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from imdsproxy.errors import HostRefused
from imdsproxy.host.notify import ServiceNotifier

_STUCK_S: Final = 120.0
"""As `WatchdogSec=` of our unit. To plan 100,000 instances at once stops the loop for 3 s, on a busy host for 17 s."""

_LONGEST_BEAT_S: Final = 5.0


class Heartbeat:
    """A task of the loop that is watched.

    Args:
        notifier: The service manager.
        environment: Where that says after how long it ends a service without a sign (sd_watchdog_enabled(3)).
        monotonic: The clock.

    Attributes:
        starting: While it is set, each beat also extends the time that a start may take.
    """

    def __init__(
        self,
        notifier: ServiceNotifier,
        environment: Mapping[str, str],
        monotonic: Callable[[], float],
    ) -> None:
        self.starting = True
        self._notifier = notifier
        self._monotonic = monotonic
        given = environment.get("WATCHDOG_USEC", "")
        self._stuck_s = int(given) / 1e6 if given.isdecimal() else _STUCK_S
        self._last = monotonic()

    def alive(self) -> bool:
        """Whether the loop has come round lately; for any thread."""
        return self._monotonic() - self._last < self._stuck_s

    async def run(self) -> None:
        """Beat until cancelled."""
        extension = str(int(self._stuck_s * 1e6))
        while True:
            self._last = self._monotonic()
            try:
                self._notifier.send(
                    WATCHDOG="1", EXTEND_TIMEOUT_USEC=extension if self.starting else ""
                )
            except HostRefused as error:
                # It may be executing itself anew; while it is gone, it ends no service either.
                structlog.get_logger().warning("service manager not notified", reason=error.message)
            await asyncio.sleep(min(_LONGEST_BEAT_S, self._stuck_s / 4))
