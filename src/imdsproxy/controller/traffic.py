"""Guests' traffic, as HAProxy's worker counts it: connections by network, and the busiest instances."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeAlias

from imdsproxy.config.policy import LimitsSettings
from imdsproxy.errors import DataplaneError
from imdsproxy.haproxy.master import WorkerEnded
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules import limits
from imdsproxy.haproxy.rules.config import AGENTS
from imdsproxy.haproxy.rules.runtime import WorkerTotals, parse_count
from imdsproxy.host.clock import Clock
from imdsproxy.reconcile.part import By, Count, Gauge, Part

_WORTH_A_LOOK: Final = 10
"""An instance that uses less than this fraction (1/10) of its limit is not listed: most of 10,000 guests use less."""

_COUNTED: Final = ("stot", "dreq", "ereq")
TRAFFIC_COLUMNS: Final = frozenset({"pxname", "svname", "type", *_COUNTED})
"""Columns of `show stat` that `count_traffic` reads."""

_GUESTS: Final = ("guests", "unverified")
_LISTENER: Final = "3"

_TrafficKey: TypeAlias = tuple[str, str, str]


def count_traffic(rows: Iterable[Mapping[str, str]]) -> Counter[_TrafficKey]:
    """Count a worker's connections, refused and malformed requests by frontend, bind name and `show stat` column."""
    found: Counter[_TrafficKey] = Counter()
    for row in rows:
        frontend = _GUESTS[0] if row.get("pxname") in _GUESTS else row.get("pxname")
        if frontend in {_GUESTS[0], AGENTS} and row.get("type") == _LISTENER:
            for column in _COUNTED:
                found[frontend, row["svname"], column] += parse_count(row, column)
    return found


@dataclass(slots=True)
class Traffic(Part):
    """Sums of the workers' counters; a metric has no value until HAProxy has answered for the first time.

    Attributes:
        limited: Number of instances over their limits, when HAProxy answered last.
    """

    haproxy: Haproxy
    clock: Clock
    settings: Callable[[], LimitsSettings]
    totals: WorkerTotals[_TrafficKey] = field(default_factory=WorkerTotals)
    limited: int | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.haproxy.before_reload.append(self.count)

    async def refresh(self) -> None:
        await self.count()
        if (busiest := await self._read_busiest()) is not None:
            self.limited = sum(one.limited for one in busiest)

    async def count(self) -> None:
        """Add the worker's counters; also before a reload, which ends the worker."""
        # A late answer of another call has lower counts, which Prometheus takes for a restart.
        async with self._lock:
            if (worker := self.haproxy.worker) is None:
                return
            try:
                rows = await self.haproxy.master.read_stat(worker, TRAFFIC_COLUMNS)
            except (DataplaneError, WorkerEnded):
                # The watchdog restarts HAProxy; the next refresh reads its counters again.
                return
            self.totals.add(worker, count_traffic(rows))

    async def report(self) -> Mapping[str, object]:
        return {"busiest": await self._read_busiest() or ()}

    async def _read_busiest(self) -> tuple[limits.Asker, ...] | None:
        """Return the instances that are limited or busy now; `None` if HAProxy cannot answer."""
        allowed, haproxy = self.settings(), self.haproxy
        if not allowed.enabled:
            return ()
        if (worker := haproxy.worker) is None:
            return None
        now = self.clock.now().timestamp()
        most = limits.most_in_window(allowed.requests_per_s, allowed.burst)
        try:
            own = await haproxy.master.send(worker, f"show table {limits.POLICY_COUNTERS}")
            wanted = (
                f"data.gpc0_rate ge {max(1, most // _WORTH_A_LOOK)}",
                f"data.conn_cur ge {max(2, allowed.connections // _WORTH_A_LOOK)}",
                # A policy's limits can be lower than these thresholds.
                *(f"key {key}" for key in limits.refused_lately(own, now)),
            )
            commands = (f"show table {limits.COUNTERS} {each}" for each in wanted)
            usual = [await haproxy.master.send(worker, command) for command in commands]
        except (DataplaneError, WorkerEnded):
            # The watchdog handles the failure, and the same report shows HAProxy's state.
            return None
        table, connections = "\n".join(usual), allowed.connections
        return tuple(limits.busiest(table, own, requests=most, connections=connections, now=now))

    def _guests(self, column: str) -> Mapping[str, int] | None:
        if self.totals.worker is None:
            return None
        counts = self.totals.totals.items()
        return {key[1]: count for key, count in counts if key[::2] == (_GUESTS[0], column)}

    def _agents(self, column: str) -> int | None:
        totals = self.totals
        return None if totals.worker is None else totals.totals[AGENTS, AGENTS, column]

    def network_connections(self) -> Annotated[By, "counter", "network"]:
        """Guests' connections by network; one series "*" if there are more networks than metrics.network_series."""
        return self._guests("stot")

    def network_denied(self) -> Annotated[By, "counter", "network"]:
        """Refused requests of guests, by network as above."""
        return self._guests("dreq")

    def network_malformed(self) -> Annotated[By, "counter", "network"]:
        """Guests' requests that were not valid HTTP, by network as above."""
        return self._guests("ereq")

    def limited_guests(self) -> Gauge:
        """Instances whose requests or connections are refused for their limits, and networks whose unknown guests' are.

        At most ten are counted. `status` names them.
        """
        return self.limited

    def unix_listener_connections(self) -> Count:
        """Connections of Neutron's proxies, all networks together."""
        return self._agents("stot")

    def unix_listener_denied(self) -> Count:
        """Refused requests of Neutron's proxies: without exactly one network or router and one address."""
        return self._agents("dreq")

    def unix_listener_malformed(self) -> Count:
        """Requests of Neutron's proxies that were not valid HTTP."""
        return self._agents("ereq")
