"""The cost of limits for guests that keep to them, and the effect of a flooding guest on another guest."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Row, Verdict, median, percentile
from bench.guest import Guest, measure_latency
from bench.lab import network_name
from bench.nova import PATH, nova_guest, nova_settings, run_stub
from bench.procs import pin
from bench.records import first_guest
from bench.sides import (
    CONNECTIONS,
    Side,
    compare,
    load_in_turn,
    without_errors,
)
from bench.wrk import Load, wrk_command
from imdsproxy.config.policy import LimitsSettings

__all__ = ["ROWS", "measure_fairness"]

_COSTS: Final = ("limits", "limits-close", "limits-signed")
_UNCACHED: Final = ("flood-encoded", "flood-misses")
"""Floods of the document server, which also serves the guest that reads beside them."""

_FLOODS: Final = (
    *("flood-cached", "flood-query", "flood-404", "flood-idle", "flood-addresses"),
    *_UNCACHED,
)
ROWS: Final = (*_COSTS, *_FLOODS)

_LEAF: Final = "/latest/meta-data/instance-id"
_SEEDED: Final = "/openstack/latest/meta_data.json"
_URL: Final = "http://169.254.169.254"
_OFF: Final = {"enabled": False}
_DEFAULTS: Final = LimitsSettings().model_dump(include={"requests_per_s", "burst", "connections"})
_IDLE: Final = 1000
_ADDRESSES_PER_S: Final = 2000
_PAUSE_S: Final = 0.002
"""Pause with which the guest stays within its own limits."""

_FACTOR: Final = 2.0
_ENOUGH_MS: Final = 2.0
_REPOSITORY: Final = Path(__file__).resolve().parent.parent.parent
_QUERY: Final = """
local number = 0
request = function()
  number = number + 1
  return wrk.format(nil, wrk.path .. "?" .. number)
end
"""
_ENCODED: Final = """
local tail = string.rep("%61", 3990)
local number = 0
request = function()
  number = number + 1
  return wrk.format(nil, "/latest/meta-data/" .. number .. tail)
end
"""
_MISSES: Final = _ENCODED.replace("3990", "300")
_ENCODING: Final = 150
_WHAT: Final = {
    "flood-encoded": f"{_ENCODING} connections that ask for escaped paths of 12 kB, another each time",
    "flood-misses": f"{_ENCODING} connections that ask for escaped paths of 0.9 kB, another each time",
    "flood-cached": f"{CONNECTIONS} connections that read one document without end",
    "flood-query": f"{CONNECTIONS} connections with another query each time",
    "flood-404": f"{CONNECTIONS} connections that ask for what there is not",
    "flood-idle": f"{_IDLE:,} connections that ask for nothing, opened again a second after they are closed",
    "flood-addresses": f"{_ADDRESSES_PER_S:,} connections a second from invented addresses, {CONNECTIONS} at once",
}


def measure_fairness(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure all rows of limits."""
    if wanted("limits") or wanted("limits-close"):
        yield from _embedded(bench, wanted)
    if wanted("limits-signed"):
        yield _signed(bench)
    floods = [one for one in _FLOODS if wanted(one)]
    if floods:
        yield from _floods(bench, floods)


@contextlib.contextmanager
def _serving(
    daemon: Daemon, networks: list[dict[str, object]], guests: list[dict[str, object]]
) -> Iterator[int]:
    """Run a daemon that serves these networks and guests; yield its worker."""
    try:
        daemon.start()
        daemon.put(networks, guests)
        daemon.wait_serving(len(networks))
        yield daemon.wait_settled().worker
    finally:
        daemon.stop()


def _embedded(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    off, on = network_name(0), network_name(1)
    bench.lab.grow(2)
    with (
        _serving(
            Daemon(bench.directory / "limits-off", {"limits": _OFF}),
            [bench.network(off)],
            [first_guest(off)],
        ) as without,
        _serving(
            Daemon(bench.directory / "limits-on"), [bench.network(on)], [first_guest(on)]
        ) as limited,
    ):
        for key, headers in (("limits", ()), ("limits-close", ("Connection: close",))):
            if wanted(key):
                what = "out of the cache" + (
                    ", a connection for each request" if headers else ", kept connections"
                )
                yield _cost(
                    bench,
                    key,
                    what,
                    Side(f"{_URL}{_LEAF}", limited, headers, network=on),
                    Side(f"{_URL}{_LEAF}", without, headers, network=off),
                )


def _signed(bench: Bench) -> Row:
    off, on = network_name(0), network_name(1)
    bench.lab.grow(2)
    sides = []
    with run_stub(bench.binary, bench.directory) as stub, contextlib.ExitStack() as stack:
        pin(stub.pid, {bench.cpus[1]})
        for name, said in ((off, {"limits": _OFF}), (on, {})):
            directory = bench.directory / f"signed-{name}"
            directory.mkdir(exist_ok=True)
            daemon = Daemon(directory, {**nova_settings(directory, stub.port), **said})
            serving = _serving(daemon, [bench.network(name)], [nova_guest(name)])
            sides.append(Side(f"{_URL}{PATH}", stack.enter_context(serving), network=name))
        return _cost(
            bench, "limits-signed", "signed and sent to Nova, kept connections", sides[1], sides[0]
        )


def _cost(bench: Bench, key: str, what: str, ours: Side, other: Side) -> Row:
    load_in_turn(bench, [other, ours], bench.scale.seconds)
    without_errors(ours, other)
    return compare(
        key,
        ours,
        other,
        what=f"a document {what}, {CONNECTIONS} connections: with limits that are kept to, beside none",
        how=(
            f"median of {len(ours.rates)} runs of {bench.scale.seconds:g} s in turn; two daemons, the HAProxy of each "
            "on one processor, wrk on the other"
        ),
    )


@dataclass(slots=True)
class _Seen:
    """Latencies of the other guest in each round, in ms."""

    alone: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    p50s: list[float] = field(default_factory=list)


def _floods(bench: Bench, keys: list[str]) -> Iterator[Row]:
    """Measure the floods. Each flood, and each guest that reads beside it, has its own network with unused limits."""
    rounds, seconds = bench.scale.rounds, min(3.0, bench.scale.flood_s)
    names = [network_name(number) for number in range(2 * rounds * len(keys))]
    left = iter(names)
    bench.lab.grow(len(names))
    daemon = Daemon(bench.directory / "floods", {"limits": _DEFAULTS})
    scripts = {"flood-query": _QUERY, "flood-encoded": _ENCODED, "flood-misses": _MISSES}
    for key, script in scripts.items():
        (bench.directory / f"{key}.lua").write_text(script)
    seen = {key: _Seen() for key in keys}
    before = os.sched_getaffinity(0)
    with _serving(
        daemon, [bench.network(name) for name in names], [first_guest(name) for name in names]
    ) as worker:
        try:
            # The guest and HAProxy share one processor, and the flood has the other, so all effects on the guest are
            # HAProxy's.
            pin(worker, {bench.cpus[0]})
            os.sched_setaffinity(0, {bench.cpus[0]})
            for _ in range(rounds):
                for key in keys:
                    one = Guest(bench.lab, next(left))
                    path = _SEEDED if key in _UNCACHED else _LEAF
                    alone = _milliseconds(one, seconds, path)
                    with _flood(bench, key, next(left), seconds):
                        during = _milliseconds(one, seconds, path)
                    seen[key].alone.append(percentile(alone, 99))
                    seen[key].during.append(percentile(during, 99))
                    seen[key].p50s.append(median(during))
        finally:
            os.sched_setaffinity(0, before)
    for key in keys:
        yield _row(key, seen[key], seconds)


@contextlib.contextmanager
def _flood(bench: Bench, key: str, network: str, seconds: float) -> Iterator[None]:
    """Run a flood that lasts longer than the context."""
    argv = _command(bench, key, network, seconds + 5)
    pinned = ["taskset", "-c", str(bench.cpus[1]), *argv]
    flood = subprocess.Popen(
        pinned, cwd=_REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        # Python's start is not part of a flood.
        time.sleep(0.5 if key in ("flood-idle", "flood-addresses") else 0)
        yield
    finally:
        flood.kill()
        flood.wait()


def _command(bench: Bench, key: str, network: str, seconds: float) -> list[str]:
    python = [sys.executable, "-m"]
    if key == "flood-idle":
        return [*python, "bench.idle", network, str(seconds), str(_IDLE)]
    if key == "flood-addresses":
        rates = [str(_ADDRESSES_PER_S), str(CONNECTIONS)]
        return [*python, "bench.flood", network, str(seconds), *rates]
    path = "/latest/meta-data/no-such-thing" if key == "flood-404" else _LEAF
    connections = _ENCODING if key in _UNCACHED else CONNECTIONS
    script = bench.directory / f"{key}.lua"
    load = Load(connections, seconds, bench.cpus[1], script=script if script.exists() else None)
    return wrk_command(network, f"{_URL}{path}", load)


def _row(key: str, seen: _Seen, seconds: float) -> Row:
    alone, during = median(seen.alone), median(seen.during)
    ratio = median([two / one for one, two in zip(seen.alone, seen.during, strict=True)])
    good = during < _ENOUGH_MS or ratio < _FACTOR
    return Row(
        key=key,
        what=f"{_WHAT[key]}: a guest of another network",
        figure=f"p99 {during:.2f} ms, alone {alone:.2f} ms ({ratio:.1f} x); p50 {median(seen.p50s):.2f} ms",
        verdict=Verdict.PASS if good else Verdict.SHORT,
        bar="p99 < 2 x alone, or < 2 ms",
        value=ratio,
        how=(
            f"median of {len(seen.alone)} rounds of {seconds:g} s alone and {seconds:g} s under the flood, in turn, "
            "from its first moment on; limits as by default; the guest reads on a kept connection, 2 ms after each "
            "answer, on the processor of HAProxy; who floods has the other one"
        ),
        data={"alone_p99_ms": seen.alone, "during_p99_ms": seen.during, "during_p50_ms": seen.p50s},
    )


def _milliseconds(one: Guest, seconds: float, path: str) -> list[float]:
    found = measure_latency(one, path, seconds, pause_s=_PAUSE_S)
    return [sample * 1000 for sample in found]
