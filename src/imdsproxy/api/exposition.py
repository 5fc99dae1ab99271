"""Exposition of a process's figures to Prometheus: each metric is a method of an `Exposed`.

The method's name is the metric's name, its docstring the help, its return type the kind and the labels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_type_hints

from prometheus_client import metrics_core
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from imdsproxy.api.answers import Readiness
from imdsproxy.reconcile.progress import Durations

_Kind: TypeAlias = Literal["gauge", "counter", "histogram"]
_SUFFIXES: Final[Mapping[_Kind, tuple[str, ...]]] = {
    "gauge": ("",),
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family.

    Attributes:
        name: The exposed name without the suffixes that follow from `kind`.
    """

    name: str
    kind: _Kind
    help: str
    labels: tuple[str, ...]
    read: Callable[[Any], Any]

    @property
    def exposed(self) -> str:
        """The names to use in a query."""
        return ", ".join(self.name + suffix for suffix in _SUFFIXES[self.kind])

    def family(self, value: Any) -> metrics_core.Metric:
        about = self.name, self.help
        if isinstance(value, Durations):
            within = value.within().items()
            buckets = [("+Inf" if le == math.inf else str(le), count) for le, count in within]
            return metrics_core.HistogramMetricFamily(*about, buckets, value.total_s)
        make = (
            metrics_core.GaugeMetricFamily
            if self.kind == "gauge"
            else metrics_core.CounterMetricFamily
        )
        family = make(*about, labels=self.labels)
        series = value if isinstance(value, Mapping) else {(): value}
        for key in sorted(series) if value is not None else ():
            family.add_metric([key] if isinstance(key, str) else key, series[key])
        return family


class Exposed(Collector):
    """Base class that reads every metric when Prometheus asks for it; a subclass's names begin with its `prefix`."""

    metrics: ClassVar[tuple[Metric, ...]] = ()

    def __init_subclass__(cls, prefix: str) -> None:
        cls.metrics = metrics_of(cls, prefix)

    @abstractmethod
    def readiness(self) -> Readiness:
        """Return the readiness that /readyz reports."""

    async def prepare(self) -> None:
        """Read values that are read only for an exposition; called before each."""

    @cached_property
    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        return registry

    def expose(self, accept: str) -> tuple[str, bytes]:
        """Return content type and text of all metrics, for the value of a request's `Accept`."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)

    def collect(self) -> Iterator[metrics_core.Metric]:
        return (metric.family(metric.read(self)) for metric in self.metrics)


def metrics_of(cls: type, prefix: str) -> tuple[Metric, ...]:
    """Return the metrics that a class's own methods are, in their order."""
    found: list[Metric] = []
    for name, read in vars(cls).items():
        if list(getattr(read, "__annotations__", ())) != ["return"]:
            continue
        hint: Any = get_type_hints(read, include_extras=True)["return"]
        if hasattr(hint, "__metadata__"):
            kind, *labels = hint.__metadata__
            text = " ".join((read.__doc__ or "").split())
            found.append(Metric(f"{prefix}{name}", kind, text, tuple(labels), read))
    return tuple(found)
