"""Time from adding a record, or a network, to the guest's first answer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from bench.context import Bench
from bench.daemon import AdminConnection, Daemon
from bench.figures import Bar, Row, judge, median, percentile
from bench.guest import Guest
from bench.lab import PREFIX, guest, network_name
from bench.place import BenchError
from bench.procs import cpu_seconds
from bench.records import first_guest, instance, network

__all__ = ["measure_additions"]

_PATH = "/latest/meta-data/instance-id"
_INSTANCE_BAR = Bar("p99 ≤ 10 ms", at_most=10.0)
_NETWORK_BAR = Bar("p99 ≤ 300 ms", at_most=300.0)
_FIRST_FREE = 1000
_OK = 200
_PATIENCE_S = 10.0


def measure_additions(bench: Bench, daemon: Daemon, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure the rows `add-instance` and `add-network`."""
    with closing(daemon.admin()) as admin:
        if wanted("add-instance"):
            with _processor_time(daemon) as spent:
                row = _instances(bench, admin)
            yield _with_cost(row, spent[0], bench.scale.adds)
        if wanted("add-network"):
            with _processor_time(daemon) as spent:
                row = _networks(bench, admin)
            yield _with_cost(row, spent[0], bench.scale.network_adds)


@contextlib.contextmanager
def _processor_time(daemon: Daemon) -> Iterator[list[float]]:
    """Measure the controller's own processor time in seconds, which other load on the machine hardly changes."""
    controller = daemon.processes().controller
    before = cpu_seconds(controller)
    spent: list[float] = []
    yield spent
    spent.append(cpu_seconds(controller) - before)


def _with_cost(row: Row, spent_s: float, count: int) -> Row:
    each = spent_s / count * 1000
    return replace(
        row,
        figure=f"{row.figure}; {each:.1f} ms of the controller's processor time each",
        data={**row.data, "controller_cpu_ms_each": each},
    )


@dataclass(slots=True)
class _Poll:
    """A guest that sends requests until it is answered 200."""

    guest: Guest
    every_s: float
    answered: float = 0.0
    tries: int = 0
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        deadline = time.perf_counter() + _PATIENCE_S
        while time.perf_counter() < deadline:
            self.tries += 1
            answer = self.guest.try_get(_PATH)
            if answer is not None and answer.status == _OK:
                self.answered = time.perf_counter()
                break
            time.sleep(self.every_s)
        self.guest.close()

    def wait(self) -> float:
        """Return the time of the answer.

        Raises:
            BenchError: The guest was not answered.
        """
        self.thread.join()
        if not self.answered:
            raise BenchError(f"{self.guest.network} {self.guest.address} was not answered")
        return self.answered


def _instances(bench: Bench, admin: AdminConnection) -> Row:
    polled: list[float] = []
    held: list[float] = []
    stored: list[float] = []
    for number in range(bench.scale.adds):
        name = network_name(number % bench.scale.networks)
        address = guest(_FIRST_FREE + number)
        record = instance(f"added-{number}", {name: [address]})
        waiting = number % 2 == 1
        one = Guest(bench.lab, name, address)
        poll = _Poll(one, 0.001) if waiting else None
        if waiting:
            time.sleep(0.01)  # its first request is on its way to the resolver
        began = time.perf_counter()
        if poll is None:
            poll = _Poll(one, 0.001)
        admin.ask("POST", "/v1/instances", record)
        stored.append((time.perf_counter() - began) * 1000)
        (held if waiting else polled).append((poll.wait() - began) * 1000)
    samples = polled + held
    value = percentile(samples, 99)
    return Row(
        key="add-instance",
        what=f"instance added → its first 200, at {bench.scale.networks:,} networks, outside a reload",
        figure=(
            f"p10 {percentile(samples, 10):.1f}, p50 {median(samples):.1f}, p99 {value:.1f} ms "
            f"(acknowledged p50 {median(stored):.1f} ms)"
        ),
        verdict=judge(value, _INSTANCE_BAR),
        bar=_INSTANCE_BAR.text,
        value=value,
        how=(
            f"{len(samples)} instances, from sending the admin API's request (its commit to SQLite included) to the "
            "guest's 200; half of the guests ask already when the record comes, half begin at that moment"
        ),
        data={
            "polled_ms": {"p50": median(polled), "p99": percentile(polled, 99), "max": max(polled)},
            "held_ms": {"p50": median(held), "p99": percentile(held, 99), "max": max(held)},
            "acknowledged_ms": {"p50": median(stored), "p99": percentile(stored, 99)},
        },
    )


def _networks(bench: Bench, admin: AdminConnection) -> Row:
    samples, stored = [], []
    for number in range(bench.scale.network_adds):
        name = f"{PREFIX}late-{number}"
        bench.lab.add(name)
        body = {"networks": [network(name)], "instances": [first_guest(name)]}
        time.sleep(0.05)  # the daemon has seen the namespace and found it of no use
        began = time.perf_counter()
        poll = _Poll(Guest(bench.lab, name), 0.001)
        admin.ask("POST", "/v1/records", body)
        stored.append((time.perf_counter() - began) * 1000)
        samples.append((poll.wait() - began) * 1000)
    value = percentile(samples, 99)
    return Row(
        key="add-network",
        what=f"network added → its guest's first 200, at {bench.scale.networks:,} networks",
        figure=(
            f"p10 {percentile(samples, 10):.0f}, p50 {median(samples):.0f}, p99 {value:.0f} ms "
            f"(acknowledged p50 {median(stored):.0f} ms)"
        ),
        verdict=judge(value, _NETWORK_BAR),
        bar=_NETWORK_BAR.text,
        value=value,
        how=(
            f"{len(samples)} networks one after the other, each with a guest that connects anew every ms, from "
            "sending the admin API's request; each takes a reload of HAProxy"
        ),
        data={
            "ms": [round(one, 1) for one in samples],
            "p50_ms": median(samples),
            "p99_ms": value,
            "acknowledged_p50_ms": median(stored),
        },
    )
