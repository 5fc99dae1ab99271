"""What the audit log costs: a document out of the cache, read by a guest behind a veth link, with and without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, Verdict, judge
from bench.lab import GUESTS, PLUGGED, network_name
from bench.place import BenchError
from bench.records import instance, network
from bench.sides import CONNECTIONS, Side, cost_ratio, load_in_turn, rate_ratio, without_errors

__all__ = ["ROWS", "measure_audit"]

ROWS: Final = ("audit", "audit-sampled")
_PATH: Final = "/latest/meta-data/instance-id"
_URL: Final = f"http://169.254.169.254{_PATH}"
_AGENT: Final = "User-Agent: Cloud-Init/24.4.1"
_BAR: Final = Bar("≥ 0.9 x", at_least=0.9)
_LEAST: Final = 0.01
"""Where more lines than this were left out, the rest cost less than they say."""

_MORE_ROUNDS: Final = 2
"""Times as many as other rows have: the bar is near 1, and lines are written beside the load."""


def measure_audit(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Both rows: three daemons that differ in nothing but `audit.mode`, a network each."""
    modes = ("off", "all", "sampled")
    bench.lab.grow(len(modes))
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        daemons: dict[str, Daemon] = {}
        for number, mode in enumerate(modes):
            log = bench.directory / f"audit-{mode}.log"
            settings = {"mode": mode, "destination": str(log)}
            daemon = daemons[mode] = Daemon(bench.directory / f"audit-{mode}", {"audit": settings})
            stack.callback(daemon.stop)
            sides[mode] = _side(bench, daemon, network_name(number))
        rounds = _MORE_ROUNDS * bench.scale.rounds
        load_in_turn(bench, list(sides.values()), bench.scale.seconds, rounds=rounds)
        without_errors(*sides.values())
        lines = {mode: _lines(bench, mode) for mode in modes}
        left_out = _left_out(daemons["all"])
    if lines["off"] or not lines["sampled"] < lines["all"]:
        raise BenchError(f"the logs have other lines than they should: {lines}")
    if wanted("audit"):
        row = _row(bench, "audit", "a line for each", sides["all"], sides["off"], bar=_BAR)
        share = left_out / (lines["all"] + left_out)
        verdict = row.verdict if share < _LEAST else Verdict.INVALID
        yield replace(
            row,
            figure=f"{row.figure}; {share:.1%} of the lines left out",
            verdict=verdict,
            data={**row.data, "lines": lines["all"], "left_out": left_out},
        )
    if wanted("audit-sampled"):
        what = "a line for one in 100"
        yield _row(bench, "audit-sampled", what, sides["sampled"], sides["off"])


def _side(bench: Bench, daemon: Daemon, name: str) -> Side:
    subnets = [{"cidr": str(one)} for one in (GUESTS.network, PLUGGED.network)]
    daemon.start()
    daemon.put(
        [{**network(name), "subnets": subnets}],
        [instance(f"guest-{name}", {name: [str(PLUGGED.ip)]})],
    )
    daemon.wait_serving(1)
    return Side(_URL, daemon.wait_settled().worker, (_AGENT,), network=bench.lab.plug(name))


def _left_out(daemon: Daemon) -> int:
    told = daemon.status()["audit"]
    if not isinstance(told, dict):
        raise BenchError("status does not tell of the audit log")
    return int(told["left_out"])


def _lines(bench: Bench, mode: str) -> int:
    log = bench.directory / f"audit-{mode}.log"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _row(
    bench: Bench, key: str, what: str, ours: Side, other: Side, *, bar: Bar | None = None
) -> Row:
    ratio, by_cost = rate_ratio(ours, other), cost_ratio(ours, other)
    return Row(
        key=key,
        what=(
            f"{_PATH} read by a guest behind a veth link, {what} in a file, beside no audit log, "
            f"{CONNECTIONS} connections"
        ),
        figure=(
            f"{ratio:.2f} x ({ours.rate:,.0f} to {other.rate:,.0f} requests/s); by HAProxy's processor "
            f"time {by_cost:.2f} x ({ours.cost_us:.1f} to {other.cost_us:.1f} µs a request)"
        ),
        verdict=judge(ratio, bar),
        bar="" if bar is None else bar.text,
        value=ratio,
        how=(
            f"median of {len(ours.rates)} pairs of runs of {bench.scale.seconds:g} s in turn, three equal "
            "daemons; out of HAProxy's cache, so that nothing else costs much"
        ),
        data={"ours": ours.numbers(), "off": other.numbers(), "ratio": ratio, "cpu_ratio": by_cost},
    )
