"""The controller's figures as Prometheus reads them: a snapshot is taken at each scrape."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from imdsproxy.admin.metrics import METRICS, MetricDescription
from imdsproxy.admin.snapshot import MetricsSnapshot, bound_counts, bound_networks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

__all__ = ["SnapshotCollector", "metrics_registry"]


class SnapshotCollector(Collector):
    """Turns a snapshot, taken at each scrape, into metric families.

    Args:
        take: Gives the figures of this moment; called on the event loop's thread.
        network_series: Networks up to which each has its own series.
    """

    def __init__(
        self, take: Callable[[], MetricsSnapshot], *, network_series: Callable[[], int]
    ) -> None:
        self._take = take
        self._network_series = network_series

    def describe(self) -> Iterable[Metric]:
        """The families without samples: registering must not take a snapshot."""
        return [_family(description) for description in METRICS]

    def collect(self) -> Iterator[Metric]:
        """The families with this moment's samples."""
        snapshot = self._take()
        limit = self._network_series()
        snapshot = replace(
            snapshot,
            traffic=bound_networks(snapshot.traffic, limit),
            mismatches=bound_counts(snapshot.mismatches, limit),
            no_token=bound_counts(snapshot.no_token, limit),
            no_token_rejected=bound_counts(snapshot.no_token_rejected, limit),
        )
        for description in METRICS:
            yield _filled(description, snapshot)


def metrics_registry(
    take: Callable[[], MetricsSnapshot], *, network_series: Callable[[], int]
) -> CollectorRegistry:
    """A registry of this controller's figures and its process's memory, time and descriptors."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(take, network_series=network_series))
    ProcessCollector(registry=registry)
    return registry


def _family(description: MetricDescription) -> Metric:
    labels = list(description.labels)
    if description.kind == "summary":
        return SummaryMetricFamily(description.name, description.help, labels=labels)
    if description.kind == "histogram":
        return HistogramMetricFamily(description.name, description.help, labels=labels)
    if description.kind == "counter":
        return CounterMetricFamily(description.name, description.help, labels=labels)
    return GaugeMetricFamily(description.name, description.help, labels=labels)


def _filled(description: MetricDescription, snapshot: MetricsSnapshot) -> Metric:
    family = _family(description)
    samples = list(description.read(snapshot))
    if isinstance(family, SummaryMetricFamily):
        (_, count), (_, total) = samples
        family.add_metric([], count_value=int(count), sum_value=total)
    elif isinstance(family, HistogramMetricFamily):
        *buckets, (_, total) = samples
        family.add_metric([], [(bound, count) for (bound,), count in buckets], total)
    elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
        for labels, value in samples:
            family.add_metric(list(labels), value)
    return family
