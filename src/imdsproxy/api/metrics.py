"""Prometheus metrics of the controller.

Every metric is a method of a part, or of `Metrics` itself (`api.exposition`). No label has values that guests or
operators choose freely, except `network`, whose number of series is bounded (see `NETWORK_SUM`). HAProxy's own exporter
has connections, queues and bytes.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from shutil import disk_usage
from typing import Annotated, Any, Final

from prometheus_client import metrics_core

from imdsproxy import __version__
from imdsproxy.api import status
from imdsproxy.api.answers import Readiness
from imdsproxy.api.exposition import Exposed, Metric, metrics_of
from imdsproxy.controller.parts import Parts
from imdsproxy.reconcile.part import By, Gauge

NETWORK_SUM: Final = "*"
"""Value of the label `network` for the sum of all networks, used when there are too many for a series each."""

PREFIX: Final = "imdsproxy_"

_READ_S: Final = 2.0
"""Deadline for all counters, in seconds: Prometheus gives up after ten."""


@dataclass(eq=False)
class Metrics(Exposed, prefix=PREFIX):
    """Reads every metric when Prometheus asks for it."""

    parts: Parts
    _reading: asyncio.Task[None] | None = None

    @cached_property
    def _readers(self) -> tuple[tuple[Any, Metric], ...]:
        everything: tuple[Any, ...] = (self, *self.parts.all())
        return tuple((part, one) for part in everything for one in metrics_of(type(part), PREFIX))

    async def prepare(self) -> None:
        """Read the figures that the parts do not have at hand, once for all scrapes that come together."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        # A scrape that is cancelled must not end the read of the others.
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        # If HAProxy hangs, the last figures stay.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READ_S):
                for part in self.parts.all():
                    await part.refresh()

    def collect(self) -> Iterator[metrics_core.Metric]:
        for part, metric in self._readers:
            value = metric.read(part)
            if metric.labels == ("network",) and value is not None:
                value = self._by_network(value)
            yield metric.family(value)

    def readiness(self) -> Readiness:
        """Return whether guests get what the sources report, as /readyz does."""
        return status.report_readiness(self.parts)

    def _by_network(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the count of each network, or only their sum if there are more than `network_series` networks.

        A network without a count has 0: Prometheus sees no increase in a counter that begins with its first event.
        """
        found = {**dict.fromkeys(map(str, self.parts.inventory.networks), 0), **counts}
        few = len(found) <= self.parts.holder.settings.metrics.network_series
        return found if few else {NETWORK_SUM: sum(counts.values())}

    def _disks(self) -> Mapping[str, tuple[int, int]]:
        layout = self.parts.layout
        places = {"runtime": layout.runtime, "state": layout.state}
        found = {name: disk_usage(path) for name, path in places.items() if path.exists()}
        return {name: (usage.free, usage.total) for name, usage in found.items()}

    def build_info(self) -> Annotated[By, "gauge", "version"]:
        """Always 1; the label has the running version."""
        return {__version__: 1}

    def ready(self) -> Gauge:
        """1 while guests get what the sources report; /readyz has the reasons for a 0."""
        return self.readiness().ready

    def start_time_seconds(self) -> Gauge:
        """Unix time of the controller's start."""
        return self.parts.started_at

    def clock_seconds(self) -> Gauge:
        """Unix time by this host's clock, to compare with another clock: session tokens and boots end by it."""
        return self.parts.clock.now().timestamp()

    def disk_free_bytes(self) -> Annotated[By, "gauge", "directory"]:
        """Bytes that can be written to the file systems of `paths.runtime_dir` and `paths.state_dir`."""
        return {name: free for name, (free, _) in self._disks().items()}

    def disk_size_bytes(self) -> Annotated[By, "gauge", "directory"]:
        """The sizes of the file systems of `paths.runtime_dir` and `paths.state_dir`."""
        return {name: size for name, (_, size) in self._disks().items()}

    def process_restarts(self) -> Annotated[By, "counter", "process"]:
        """Restarts of processes that died or hung, by process: haproxy, or documents (the server and its workers)."""
        parts = self.parts
        return {"documents": parts.companion.restarts, "haproxy": parts.watchdog.restarts}
