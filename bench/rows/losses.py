"""Requests lost during reloads, kills and upgrades, and the time until HAProxy is back."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, judge, median
from bench.guest import Guest, LoadCount, SteadyLoad
from bench.lab import network_name
from bench.place import BenchError
from bench.procs import wait_until
from bench.rows.changes import Reloads, reload_count

__all__ = ["measure_losses", "measure_recovery"]

_NONE_LOST = Bar("0 lost, same master", at_most=0.0)
_RECOVERY_BAR = Bar("≤ 300 ms", at_most=300.0)
_CACHED = "/latest/meta-data/instance-id"
_NEVER_CACHED = "/openstack/latest/meta_data.json"
_GUESTS = 8
_OK = 200


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A load, and whether HAProxy's master stayed the same."""

    count: LoadCount
    seconds: float
    same_master: bool


@contextlib.contextmanager
def _under_load(bench: Bench, daemon: Daemon) -> Iterator[list[_Outcome]]:
    """Run guests that read continuously, half of them a document that only the document server has."""
    master = daemon.processes().master
    outcome: list[_Outcome] = []
    guests = [Guest(bench.lab, network_name(number)) for number in range(_GUESTS)]
    cached = SteadyLoad(guests[::2], _CACHED, pause_s=0.001)
    rendered = SteadyLoad(guests[1::2], _NEVER_CACHED, pause_s=0.001)
    began = time.monotonic()
    with cached, rendered:
        time.sleep(0.3)
        yield outcome
        time.sleep(0.3)
        seconds = time.monotonic() - began
        one, other = cached.stop(), rendered.stop()
    total = LoadCount(
        one.sent + other.sent,
        one.answered + other.answered,
        one.faults + other.faults,
        max(one.slowest_s, other.slowest_s),
    )
    outcome.append(_Outcome(total, seconds, daemon.processes().master == master))


def measure_losses(bench: Bench, daemon: Daemon, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure the rows `lost-reloads`, `lost-kill` and `lost-upgrade`."""
    if wanted("lost-reloads"):
        yield _reloads(bench, daemon)
    if wanted("lost-kill"):
        yield _kills(bench, daemon)
    if wanted("lost-upgrade"):
        yield _upgrades(bench, daemon)


def _row(key: str, what: str, outcome: _Outcome, how: str, **data: object) -> Row:
    count = outcome.count
    value = float(count.lost) if outcome.same_master else max(1.0, count.lost)
    return Row(
        key=key,
        what=what,
        figure=(
            f"{count.lost} of {count.sent:,} requests lost; master {'kept' if outcome.same_master else 'CHANGED'}; "
            f"slowest answer {count.slowest_s * 1000:,.0f} ms"
        ),
        verdict=judge(value, _NONE_LOST, valid=count.sent > 0),
        bar=_NONE_LOST.text,
        value=value,
        how=(
            f"{_GUESTS} guests in {_GUESTS} networks count every request and every whole 200 over "
            f"{outcome.seconds:.0f} s, on kept connections of 50 requests, half of them reading what is never "
            f"cached; {how}"
        ),
        data={
            "sent": count.sent,
            "lost": count.lost,
            "faults": count.faults[:20],
            "slowest_ms": count.slowest_s * 1000,
            "same_master": outcome.same_master,
            **data,
        },
    )


def _reloads(bench: Bench, daemon: Daemon) -> Row:
    before = reload_count(daemon)
    with closing(daemon.admin()) as admin:
        reloads = Reloads(bench.lab, admin)
        with _under_load(bench, daemon) as outcomes:
            for _ in range(bench.scale.reloads):
                reloads.once()
            done = reload_count(daemon) - before
        reloads.end()
    return _row(
        "lost-reloads",
        f"requests lost over {done} reloads under load, {bench.scale.networks:,} networks",
        outcomes[0],
        "a network is added and removed in turn through the admin API, one after the other",
        reloads=done,
    )


def _kills(bench: Bench, daemon: Daemon) -> Row:
    with _under_load(bench, daemon) as outcomes:
        for _ in range(bench.scale.kills):
            daemon.kill_controller()
            time.sleep(0.5)
            daemon.start()
    return _row(
        "lost-kill",
        f"requests lost over {bench.scale.kills} kill -9 of the controller under load",
        outcomes[0],
        "the controller is started again half a second later, and adopts what runs",
    )


def _upgrades(bench: Bench, daemon: Daemon) -> Row:
    before = set(daemon.processes().documents[1:])
    with _under_load(bench, daemon) as outcomes:
        for _ in range(bench.scale.kills):
            _upgrade(daemon)
    after = set(daemon.processes().documents[1:])
    if before & after:
        raise BenchError("the document server's workers were not replaced")
    return _row(
        "lost-upgrade",
        f"requests lost over {bench.scale.kills} upgrades under load",
        outcomes[0],
        "the controller is stopped and started again, the document server replaces its workers on SIGHUP, as the "
        "units do",
    )


def _upgrade(daemon: Daemon) -> None:
    workers = set(daemon.processes().documents[1:])
    daemon.stop_controller()
    daemon.start()
    daemon.replace_documents()
    if not wait_until(lambda: not workers & set(daemon.processes().documents), 20, every_s=0.02):
        raise BenchError("the document server's old workers do not end")


def measure_recovery(bench: Bench, daemon: Daemon) -> Row:
    """Measure the row `recovery`: HAProxy's master is killed."""
    samples = [_kill_haproxy(bench, daemon, number) for number in range(bench.scale.kills)]
    value = max(samples)
    return Row(
        key="recovery",
        what=f"HAProxy killed (its master, kill -9) → serving again, {bench.scale.networks:,} networks",
        figure=f"median {median(samples):.0f} ms, slowest of {len(samples)} {value:.0f} ms",
        verdict=judge(value, _RECOVERY_BAR),
        bar=_RECOVERY_BAR.text,
        value=value,
        how="a guest connects anew every ms until it reads a document; spawned processes, no systemd",
        data={"ms": [round(one, 1) for one in samples]},
    )


def _kill_haproxy(bench: Bench, daemon: Daemon, number: int) -> float:
    """Return the milliseconds without service."""
    master = daemon.wait_settled().master
    one = Guest(bench.lab, network_name(number))
    if (answer := one.try_get(_CACHED)) is None or answer.status != _OK:
        raise BenchError("HAProxy does not answer before it is killed")
    began = time.perf_counter()
    os.kill(master, signal.SIGKILL)
    # The old worker ends a moment after the master, and must not be taken for the new one.
    wait_until(lambda: one.try_get(_CACHED) is None, 1, every_s=0)
    _wait_for_answer(one)
    took = (time.perf_counter() - began) * 1000
    one.close()
    if not wait_until(lambda: _other_master(daemon, master), 10):
        raise BenchError("the daemon does not know HAProxy's new master")
    return took


def _wait_for_answer(one: Guest) -> None:
    def answered() -> bool:
        answer = one.try_get(_CACHED)
        return answer is not None and answer.status == _OK

    if not wait_until(answered, 20, every_s=0.001):
        raise BenchError("HAProxy does not come back")


def _other_master(daemon: Daemon, old: int) -> bool:
    try:
        return daemon.processes().master != old
    except BenchError:
        return False
