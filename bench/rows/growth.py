"""Memory and start by the number of networks, beside one HAProxy process for each network."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.bare import Limits, answering, render_bare
from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, judge, median
from bench.guest import Guest
from bench.lab import network_name
from bench.place import BenchError
from bench.procs import Memory, end_all, memory, wait_until

__all__ = ["measure_growth"]

_PATH = "/latest/meta-data/instance-id"
_MEMORY_BAR = Bar("HAProxy ≤ 12 kB", at_most=12.0)
_START_BAR = Bar("≤ 2 s", at_most=2.0)
_PATIENCE_S = 60.0
_AT_ONCE = 50
_OK = 200


@dataclass(frozen=True, slots=True)
class _Step:
    """A daemon that was started with this many networks."""

    networks: int
    first_s: tuple[float, ...]
    last_s: tuple[float, ...]
    haproxy: Memory
    documents: Memory
    controller: Memory

    @property
    def total_pss(self) -> int:
        """Bytes of all processes."""
        return self.haproxy.pss + self.documents.pss + self.controller.pss

    def numbers(self) -> dict[str, object]:
        """Return the numbers for the JSON."""
        return {
            "networks": self.networks,
            "first_answer_s": [round(one, 3) for one in self.first_s],
            "last_answer_s": [round(one, 3) for one in self.last_s],
            "pss_bytes": {
                "haproxy": self.haproxy.pss,
                "documents": self.documents.pss,
                "controller": self.controller.pss,
                "all": self.total_pss,
            },
        }


@dataclass(frozen=True, slots=True)
class _OneEach:
    """One bare HAProxy process for each network."""

    processes: int
    seconds: float
    pss: int


def measure_growth(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure the rows `memory` and `start`."""
    counts = sorted({1, min(100, bench.scale.networks), bench.scale.networks})
    daemon = Daemon(bench.directory / "growth")
    try:
        steps = [_step(bench, daemon, count) for count in counts]
    finally:
        daemon.stop()
    each = _one_process_each(bench)
    if wanted("memory"):
        yield _memory_row(steps, each)
    if wanted("start"):
        yield _start_row(steps, each, _one_for_all(bench))


def _step(bench: Bench, daemon: Daemon, count: int) -> _Step:
    bench.say(f"a daemon with {count} networks")
    bench.lab.grow(count)
    daemon.start()
    bench.fleet(daemon, count)
    times = []
    for _ in range(bench.scale.starts if count == bench.scale.networks else 1):
        daemon.stop()
        times.append(_timed_start(bench, daemon, count))
        daemon.wait_ready()
    processes = daemon.wait_settled()
    step = _Step(
        networks=count,
        first_s=tuple(first for first, _ in times),
        last_s=tuple(last for _, last in times),
        haproxy=memory(processes.haproxy),
        documents=memory(processes.documents),
        controller=memory([processes.controller]),
    )
    daemon.stop()
    return step


def _timed_start(bench: Bench, daemon: Daemon, count: int) -> tuple[float, float]:
    """Return the seconds from `imdsproxy run` to the first answer and to the last network's."""
    waiting = [network_name(number) for number in range(count)]
    began = time.perf_counter()
    daemon.spawn()
    while not _answers(bench, waiting[-1]):
        if time.perf_counter() - began > _PATIENCE_S:
            raise BenchError("no network answers after a start")
        time.sleep(0.005)
    first = time.perf_counter() - began
    while waiting:
        waiting = _unanswered(bench, waiting)
        if time.perf_counter() - began > _PATIENCE_S:
            raise BenchError(f"{len(waiting)} of {count} networks do not answer after a start")
    return first, time.perf_counter() - began


def _unanswered(bench: Bench, names: list[str]) -> list[str]:
    """Send requests in all these networks, many at once; return the networks without a 200."""
    left: list[str] = []
    for start in range(0, len(names), _AT_ONCE):
        asked = [Guest(bench.lab, name) for name in names[start : start + _AT_ONCE]]
        sent = [one for one in asked if one.try_send(_PATH)]
        good = {one.network for one in sent if (got := one.try_receive()) and got.status == _OK}
        for one in asked:
            one.close()
        left += [one.network for one in asked if one.network not in good]
    return left


def _answers(bench: Bench, name: str) -> bool:
    one = Guest(bench.lab, name)
    try:
        answer = one.try_get(_PATH)
    finally:
        one.close()
    return answer is not None and answer.status == _OK


def _one_process_each(bench: Bench) -> _OneEach:
    count = min(bench.scale.processes, bench.scale.networks)
    bench.say(f"{count} networks with one bare HAProxy process each")
    directory = bench.directory / "each"
    directory.mkdir()
    limits = Limits(nbthread=1, maxconn=200, maxconn_of_bind=200)
    files = []
    for number in range(count):
        bind = f"169.254.169.254:80 namespace {network_name(number)}"
        file = directory / f"{number}.cfg"
        file.write_text(render_bare(limits, [bind], answering(19)))
        files.append(file)
    began = time.perf_counter()
    running = [_spawn(bench.binary, file) for file in files]
    try:
        for number in range(count):
            _wait_for(bench, network_name(number))
        seconds = time.perf_counter() - began
        return _OneEach(count, seconds, memory(one.pid for one in running).pss)
    finally:
        _end(running)


def _one_for_all(bench: Bench) -> float:
    """Return the seconds until one bare HAProxy answers in all networks."""
    limits = Limits(nbthread=1, maxconn=4096, maxconn_of_bind=200)
    names = [network_name(number) for number in range(bench.scale.networks)]
    file = bench.directory / "all.cfg"
    binds = [f"169.254.169.254:80 namespace {name}" for name in names]
    file.write_text(render_bare(limits, binds, answering(19)))
    began = time.perf_counter()
    running = [_spawn(bench.binary, file)]
    try:
        for name in names:
            _wait_for(bench, name)
        return time.perf_counter() - began
    finally:
        _end(running)


def _spawn(binary: str, file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [binary, "-db", "-f", str(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _wait_for(bench: Bench, name: str) -> None:
    if not wait_until(lambda: _answers(bench, name), _PATIENCE_S, every_s=0.001):
        raise BenchError("a bare HAProxy does not answer")


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    end_all(one.pid for one in running)
    for one in running:
        one.wait()


def _memory_row(steps: list[_Step], each: _OneEach) -> Row:
    few, many = steps[0], steps[-1]
    further = many.networks - few.networks
    haproxy = (many.haproxy.pss - few.haproxy.pss) / further / 1000
    total = (many.total_pss - few.total_pss) / further / 1000
    single = each.pss / each.processes / 1000
    totals = ", ".join(f"{one.networks:,}: {one.total_pss / 1e6:.1f} MB" for one in steps)
    return Row(
        key="memory",
        what="memory per further network (IPv4 and IPv6 listened on, one guest each)",
        figure=(
            f"HAProxy {haproxy:.1f} kB, all processes {total:.1f} kB; all processes at {totals}; "
            f"one process each: {single:,.0f} kB"
        ),
        verdict=judge(haproxy, _MEMORY_BAR),
        bar=_MEMORY_BAR.text,
        value=haproxy,
        how=(
            "PSS of HAProxy's master and worker, the document server and the controller, after a start with "
            f"so many networks in the store; one process each: PSS of {each.processes} bare HAProxys"
        ),
        data={
            "steps": [one.numbers() for one in steps],
            "haproxy_kb_per_network": haproxy,
            "all_kb_per_network": total,
            "one_process_each_kb": single,
        },
    )


def _start_row(steps: list[_Step], each: _OneEach, for_all_s: float) -> Row:
    many = steps[-1]
    last, first = median(many.last_s), median(many.first_s)
    single = each.seconds / each.processes * many.networks
    return Row(
        key="start",
        what=f"`imdsproxy run` with {many.networks:,} networks in its store: until the last one answers 200",
        figure=(
            f"{last:.2f} s (the first one {first:.2f} s; the fastest start {min(many.last_s):.2f} s); "
            f"bare HAProxys: one process each {single:.1f} s, one for "
            f"all {for_all_s:.2f} s, {single / for_all_s:.0f} x faster"
        ),
        verdict=judge(last, _START_BAR),
        bar=_START_BAR.text,
        value=last,
        how=(
            f"median of {len(many.last_s)} cold starts of all three processes; every network's guest reads a "
            f"document, {_AT_ONCE} at once; one process each: {each.processes} bare HAProxys started at once, "
            "extrapolated"
        ),
        data={
            "steps": [one.numbers() for one in steps],
            "one_process_each_s": {
                "processes": each.processes,
                "seconds": each.seconds,
                "extrapolated": single,
            },
            "one_process_for_all_s": for_all_s,
        },
    )
