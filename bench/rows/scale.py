"""Many instances: the controller at rest, a reload with all their records, and the cold cache after the reload."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing

from bench.context import Bench
from bench.daemon import Daemon, Processes
from bench.figures import Bar, Row, judge, median
from bench.guest import Guest
from bench.lab import guest, network_name
from bench.place import BenchError
from bench.procs import cpu_seconds, memory, wait_until
from bench.records import instance
from bench.rows.changes import Reloads

__all__ = ["measure_scale"]

_PATH = "/latest/meta-data/instance-id"
_REST_BAR = Bar("≤ 120 MB, ≤ 0.5 % of a processor", at_most=120.0)
_IDLE_PERCENT = 0.5
_BATCH = 1000
_FIRST = 2000
_OK = 200


def measure_scale(bench: Bench, daemon: Daemon, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure the rows `controller` and `reload`."""
    seconds = _store(bench, daemon, addresses=1)
    if wanted("controller"):
        yield _controller(bench, daemon, seconds)
    if wanted("reload"):
        each = bench.scale.records // bench.scale.instances
        seconds = _store(bench, daemon, addresses=each)
        yield _reload(bench, daemon, seconds)


def _addresses(bench: Bench, number: int, each: int) -> list[str]:
    place = number // bench.scale.networks
    return [guest(_FIRST + place * 100 + one) for one in range(each)]


def _store(bench: Bench, daemon: Daemon, *, addresses: int) -> float:
    """Store all instances with this many addresses each; return the seconds."""
    bench.say(f"{bench.scale.instances:,} instances with {addresses} addresses each")
    began = time.perf_counter()
    for start in range(0, bench.scale.instances, _BATCH):
        numbers = range(start, min(start + _BATCH, bench.scale.instances))
        daemon.put(
            instances=[
                instance(
                    f"many-{number}",
                    {
                        network_name(number % bench.scale.networks): _addresses(
                            bench, number, addresses
                        )
                    },
                    with_user_data=False,
                )
                for number in numbers
            ]
        )
    return time.perf_counter() - began


def _controller(bench: Bench, daemon: Daemon, stored_s: float) -> Row:
    processes = daemon.wait_settled()
    time.sleep(bench.scale.settle_s)  # all work after a change has ended
    grown = memory([processes.controller])
    percent = _idle_percent(processes, bench.scale.idle_s)
    daemon.stop_controller()
    daemon.start()
    processes = daemon.wait_settled()
    time.sleep(bench.scale.settle_s)
    started = memory([processes.controller])
    again = _idle_percent(processes, bench.scale.idle_s / 3)
    value = max(grown.rss, started.rss) / 1e6
    idle = max(percent, again)
    return Row(
        key="controller",
        what=f"the controller with {bench.scale.instances:,} instances in {bench.scale.networks:,} networks",
        figure=(
            f"{grown.rss / 1e6:.0f} MB RSS after adding them, {started.rss / 1e6:.0f} MB after a restart; "
            f"{percent:.2f} % of a processor at rest"
        ),
        verdict=judge(value if idle <= _IDLE_PERCENT else float("inf"), _REST_BAR),
        bar=_REST_BAR.text,
        value=value,
        how=(
            f"added through the admin API, {_BATCH:,} a request ({stored_s:.0f} s in all); processor time over "
            f"{bench.scale.idle_s:g} s without any request or change"
        ),
        data={
            "rss_bytes_grown": grown.rss,
            "rss_bytes_started": started.rss,
            "idle_percent": percent,
            "idle_percent_after_restart": again,
            "stored_s": stored_s,
        },
    )


def _idle_percent(processes: Processes, seconds: float) -> float:
    before, began = cpu_seconds(processes.controller), time.perf_counter()
    time.sleep(seconds)
    spent = cpu_seconds(processes.controller) - before
    return spent / (time.perf_counter() - began) * 100


def _reload(bench: Bench, daemon: Daemon, stored_s: float) -> Row:
    processes = daemon.wait_settled()
    before = memory([processes.worker])
    guests = _warm(bench)
    warm = median([_timed(one) for one in guests])
    with closing(daemon.admin()) as admin:
        reloads = Reloads(bench.lab, admin)
        began = time.perf_counter()
        reloads.once()
        ordered = time.perf_counter() - began
        peak = memory(daemon.processes().haproxy)
        for one in guests:
            one.close()
        cold = [_timed(one) for one in guests]
        hot = [_timed(one) for one in guests]
        for one in guests:
            one.close()
        took = _took(daemon)
        reloads.end()
    settled = wait_until(lambda: not daemon.processes().old_workers, 60, every_s=0.1)
    after = memory([daemon.processes().worker])
    status = daemon.status()
    return Row(
        key="reload",
        what=f"reload at {status['addresses']:,} records, and the cold cache after it",
        figure=(
            f"reload {took * 1000:,.0f} ms (a network added, acknowledged after {ordered * 1000:,.0f} ms); worker "
            f"{before.pss / 1e6:.0f} MB, with the old one beside it {peak.pss / 1e6:.0f} MB; first read of a "
            f"document after it {median(cold) * 1e3:.2f} ms, the next {median(hot) * 1e3:.2f} ms "
            f"(before it {warm * 1e3:.2f} ms)"
        ),
        verdict=judge(took, None, valid=settled),
        value=took,
        how=(
            "the daemon's own figure for `haproxy -c`, reload and ready worker; PSS; median of "
            f"{len(guests)} guests; the records were added through the admin API in {stored_s:.0f} s"
        ),
        data={
            "reload_s": took,
            "ordered_s": ordered,
            "worker_pss_before": before.pss,
            "workers_pss_peak": peak.pss,
            "worker_pss_after": after.pss,
            "cold_read_s": median(cold),
            "hot_read_s": median(hot),
            "warm_read_s": warm,
            "stored_s": stored_s,
        },
    )


def _warm(bench: Bench) -> list[Guest]:
    guests = [
        Guest(bench.lab, network_name(number), _addresses(bench, number, 1)[0])
        for number in range(min(200, bench.scale.networks))
    ]
    for one in guests:
        _timed(one)
    return guests


def _timed(one: Guest) -> float:
    began = time.perf_counter()
    answer = one.get(_PATH)
    if answer.status != _OK:
        raise BenchError(f"{one.network} {one.address}: {answer.status}")
    return time.perf_counter() - began


def _took(daemon: Daemon) -> float:
    haproxy = daemon.status()["haproxy"]
    if isinstance(haproxy, dict) and isinstance(haproxy["last_reload"], dict):
        return float(haproxy["last_reload"]["took_s"])
    raise BenchError("status tells of no reload")
