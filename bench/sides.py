"""Sides of a comparison, loaded in turn, so that other activity of the machine affects both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.context import Bench
from bench.figures import Bar, Row, judge, median
from bench.lab import network_name
from bench.place import BenchError
from bench.procs import cpu_seconds, pin
from bench.wrk import Load, run_wrk

__all__ = [
    "CONNECTIONS",
    "Side",
    "compare",
    "load_in_turn",
    "without_errors",
]

CONNECTIONS: Final = 64


@dataclass(slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        pid: The HAProxy whose processor time is counted, pinned to one processor.
        network: The network from which the load comes.
        script: A Lua script of wrk that changes the requests.
    """

    url: str
    pid: int
    headers: tuple[str, ...] = ()
    network: str = field(default_factory=lambda: network_name(0))
    script: Path | None = None
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    p50s: list[float] = field(default_factory=list)
    p99s: list[float] = field(default_factory=list)
    errors: int = 0

    @property
    def rate(self) -> float:
        """Median requests a second."""
        return median(self.rates)

    @property
    def cost_us(self) -> float:
        """Least processor time of HAProxy for a request, in µs: other activity of the machine only adds to it."""
        return min(self.costs)

    def numbers(self) -> dict[str, object]:
        """Return the numbers for the JSON."""
        return {
            "url": self.url,
            "requests_per_s": [round(one) for one in self.rates],
            "median_requests_per_s": round(self.rate),
            "haproxy_cpu_us_per_request": [round(one, 2) for one in self.costs],
            "p50_ms": [round(one * 1000, 2) for one in self.p50s],
            "p99_ms": [round(one * 1000, 2) for one in self.p99s],
            "errors": self.errors,
        }


def load_in_turn(bench: Bench, sides: Sequence[Side], seconds: float, *, rounds: int = 0) -> None:
    """Load the sides one after the other, in rounds: HAProxy on one processor, wrk on the other.

    Args:
        bench: The context, with processors and scale.
        sides: Sides, in the order of loading.
        seconds: Duration of each load.
        rounds: Number of rounds; 0 takes the scale's number. A warm-up round comes first, unless the scale disables it.
    """
    haproxy_cpu, load_cpu = bench.cpus
    for one in sides:
        pin(one.pid, {haproxy_cpu})
    warm_ups = 1 if bench.scale.warm_up else 0
    for number in range((rounds or bench.scale.rounds) + warm_ups):
        warm_up = number < warm_ups
        for one in sides:
            load = Load(
                connections=CONNECTIONS,
                seconds=1 if warm_up else seconds,
                cpu=load_cpu,
                headers=one.headers,
                script=one.script,
            )
            before = cpu_seconds(one.pid)
            report = run_wrk(one.network, one.url, load)
            spent = cpu_seconds(one.pid) - before
            one.errors += report.errors
            if not warm_up:
                one.rates.append(report.rate)
                one.costs.append(spent / max(1, report.requests) * 1e6)
                one.p50s.append(report.p50_s)
                one.p99s.append(report.p99_s)


def without_errors(*sides: Side) -> None:
    """Refuse failed requests: errors are answered fast, so a figure with errors means nothing.

    Raises:
        BenchError: Requests failed.
    """
    for one in sides:
        if one.errors:
            raise BenchError(f"{one.errors} requests to {one.url} failed")


def _rate_ratio(ours: Side, other: Side) -> float:
    """Return the ratio of the rates: the median over the rounds, since a disturbance affects both sides of a round."""
    return median([one / two for one, two in zip(ours.rates, other.rates, strict=True)])


def _cost_ratio(ours: Side, other: Side) -> float:
    """Return the ratio of HAProxy's processor time for a request."""
    return other.cost_us / ours.cost_us


def compare(
    key: str,
    ours: Side,
    other: Side,
    *,
    what: str,
    how: str,
    bar: Bar | None = None,
    beside: str = "off",
    more: Mapping[str, object] | None = None,
) -> Row:
    """Build a row that compares two sides: the rate decides the verdict, and the processor time is shown too.

    Args:
        key: The row's key.
        ours: The side that is judged.
        other: The side for comparison.
        what: Description of the requests.
        how: Description of the method.
        bar: Bar for the ratio of the rates.
        beside: Name of the other side in the JSON.
        more: Further entries of the JSON.
    """
    ratio, by_cost = _rate_ratio(ours, other), _cost_ratio(ours, other)
    return Row(
        key=key,
        what=what,
        figure=(
            f"{ratio:.2f} x ({ours.rate:,.0f} to {other.rate:,.0f} requests/s); by HAProxy's processor "
            f"time {by_cost:.2f} x ({ours.cost_us:.1f} to {other.cost_us:.1f} µs a request)"
        ),
        verdict=judge(ratio, bar),
        bar="" if bar is None else bar.text,
        value=ratio,
        how=how,
        data={
            "ours": ours.numbers(),
            beside: other.numbers(),
            "ratio": ratio,
            "cpu_ratio": by_cost,
            **(more or {}),
        },
    )
