"""Instances that are limited now, as HAProxy's worker counts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from imdsproxy.config.policy import LimitsSettings
from imdsproxy.core.haproxy.limits import (
    COUNTERS,
    POLICY_COUNTERS,
    Asker,
    busiest,
    most_in_window,
    refused_lately,
)
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError
from imdsproxy.host.clock import Clock

_WORTH_A_LOOK: Final = 10
"""An instance that uses less than one part in so many of its limit is not listed: most of 10,000 guests do."""


@dataclass(frozen=True, slots=True)
class LimitWatch:
    """Reads the counters.

    Attributes:
        limits: The settings of now.
    """

    haproxy: Haproxy
    clock: Clock
    limits: Callable[[], LimitsSettings]

    async def busiest(self) -> tuple[Asker, ...]:
        """As `core.haproxy.limits.busiest`; none while HAProxy cannot be asked."""
        limits, processes = self.limits(), self.haproxy.processes
        if not limits.enabled or processes is None or processes.worker is None:
            return ()
        most = most_in_window(limits.requests_per_s, limits.burst)
        filters = (
            f"data.gpc0_rate ge {max(1, most // _WORTH_A_LOOK)}",
            f"data.conn_cur ge {max(2, limits.connections // _WORTH_A_LOOK)}",
        )
        now = self.clock.now().timestamp()
        try:
            worker = processes.worker
            own = await self.haproxy.master.send(worker, f"show table {POLICY_COUNTERS}")
            # Limits of a policy may be as small as one likes.
            keys = (f"key {one}" for one in refused_lately(own, now))
            usual = [
                await self.haproxy.master.send(worker, f"show table {COUNTERS} {one}")
                for one in (*filters, *keys)
            ]
        except (DataplaneError, WorkerEnded):
            # The watchdog handles that, and the same report has HAProxy's state.
            return ()
        found = busiest(
            "\n".join(usual), own, requests=most, connections=limits.connections, now=now
        )
        return tuple(found)
