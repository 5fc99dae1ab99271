"""One network flooded with requests from addresses without an owner, and a known guest in another network."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bench.context import Bench
from bench.daemon import Daemon, Processes
from bench.figures import Row, Verdict, median, percentile
from bench.guest import Guest, measure_latency
from bench.lab import network_name
from bench.place import BenchError
from bench.procs import cpu_seconds

__all__ = ["measure_flood"]

_PATH = "/latest/meta-data/instance-id"
_FACTOR = 2.0
_ENOUGH_MS = 2.0
_CONNECTIONS_PER_S = 2000
_AT_ONCE = 180
_REPOSITORY = Path(__file__).resolve().parent.parent.parent


def measure_flood(bench: Bench, daemon: Daemon) -> Row:
    """Measure the row `flood`."""
    seconds = bench.scale.flood_s
    known = Guest(bench.lab, network_name(1))
    alone = _milliseconds(known, seconds)
    processes = daemon.processes()
    before = _used(processes)
    flood = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "bench.flood",
            network_name(0),
            str(seconds + 4),
            str(_CONNECTIONS_PER_S),
            str(_AT_ONCE),
        ],
        cwd=_REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(1.5)
        during = _milliseconds(known, seconds)
        told, _ = flood.communicate(timeout=60)
    finally:
        flood.kill()
        flood.wait()
    python_s, haproxy_s = (now - then for now, then in zip(_used(processes), before, strict=True))
    number, _, answers = told.partition(" ")
    if not number.isdecimal() or int(number) < 2 * _AT_ONCE:
        raise BenchError(f"the flood did not come about: {told}")
    again = _milliseconds(known, seconds)
    p99_alone, p99_during = percentile(alone + again, 99), percentile(during, 99)
    good = p99_during < _ENOUGH_MS or p99_during < _FACTOR * p99_alone
    return Row(
        key="flood",
        what="one network flooded with misses: a known guest of another network",
        figure=(
            f"p99 {p99_during:.2f} ms, alone {p99_alone:.2f} ms ({p99_during / p99_alone:.1f} x); "
            f"p50 {median(during):.2f} ms, alone {median(alone + again):.2f} ms"
        ),
        verdict=Verdict.PASS if good else Verdict.SHORT,
        bar="p99 < 2 x alone, or < 2 ms",
        value=p99_during,
        how=(
            f"as many connections from invented addresses as are taken, at most {_AT_ONCE} at once and "
            f"{_CONNECTIONS_PER_S:,} a second: {int(number):,} in {seconds + 4:g} s, from a program on the same "
            f"processors; the known guest reads on a kept connection every ms, {seconds:g} s before, during and "
            f"after; answers: {answers.strip()}"
        ),
        data={
            "alone_ms": {"p50": median(alone + again), "p99": p99_alone},
            "during_ms": {"p50": median(during), "p99": p99_during},
            "connections": int(number),
            "answers": answers.strip(),
            "controller_cpu_s": python_s,
            "haproxy_cpu_s": haproxy_s,
        },
    )


def _used(processes: Processes) -> tuple[float, float]:
    """Return the processor time of controller and HAProxy."""
    return cpu_seconds(processes.controller), cpu_seconds(processes.worker)


def _milliseconds(one: Guest, seconds: float) -> list[float]:
    return [sample * 1000 for sample in measure_latency(one, _PATH, seconds)]
