"""A host of an OVN cloud, beside Neutron's own OVN agent: requests, memory, start, changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from bench.context import Bench
from bench.figures import Bar, Row, judge, median, percentile
from bench.nova import PATH
from bench.ovn import OvnHost, first_answers, names, open_host, place_of, run_agent, run_ours
from bench.place import BenchError
from bench.procs import find_by_argument, memory
from bench.sides import CONNECTIONS
from bench.southbound import CHASSIS, HOST
from bench.wrk import Load, WrkReport, run_wrk

__all__ = ["ROWS", "measure_ovn"]

ROWS: Final = ("ovn-requests", "ovn-memory", "ovn-start", "ovn-change")

_REQUESTS_BAR: Final = Bar("≥ 200 x at 1,000 ports", at_least=200.0)
_CHANGE_BAR: Final = Bar("p99 ≤ 20 ms", at_most=20.0)
_URL: Final = f"http://169.254.169.254{PATH}"
_PATIENCE_S: Final = 900.0
_EVENT_S: Final = 30.0
_OK: Final = 200
_AGENTS_EVENTS: Final = 20
_BETWEEN_S: Final = 0.05
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class _Side:
    """Results of one side.

    Attributes:
        rate: Requests a second.
        pss: Bytes of all processes.
        brain: Bytes of the process that knows the ports: the controller, or the agent.
        start_s: Seconds until the last local port was answered as itself.
        changes_ms: Milliseconds from a transaction to the first answer.
    """

    rate: float
    pss: int
    brain: int
    start_s: float
    changes_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """Results of both sides, in a cloud of this many ports."""

    ports: int
    ours: _Side
    theirs: _Side


def measure_ovn(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure the rows `ovn-…`."""
    scale = bench.scale
    steps = []
    for ports in scale.ovn_ports:
        bench.say(f"an OVN cloud with {ports:,} ports, {scale.ovn_local} of them on this host")
        with open_host(bench, ports, scale.ovn_local) as host:
            ours = _measure_ours(host)
            bench.say("Neutron's OVN agent on the same host")
            steps.append(_Step(ports, ours, _measure_agent(host)))
    made = (_requests(steps), _memory(steps), _start(steps), _change(steps))
    yield from (row for row in made if wanted(row.key))


def _measure_ours(host: OvnHost) -> _Side:
    with run_ours(host) as daemon:
        start_s = first_answers(host, host.cloud.local, _PATIENCE_S)
        daemon.wait_ready()
        processes = daemon.wait_settled()
        rate = _loaded(host, CONNECTIONS).rate
        time.sleep(host.bench.scale.settle_s)
        pss, brain = memory(processes.everything).pss, memory([processes.controller]).pss
        changes = _changes(host, host.bench.scale.ovn_events)
    return _Side(rate, pss, brain, start_s, changes)


def _measure_agent(host: OvnHost) -> _Side:
    with run_agent(host) as directory:
        start_s = first_answers(host, host.cloud.local, _PATIENCE_S)
        # The agent serves one request after the other, and refuses most requests of 64 connections.
        rate = _loaded(host, 1).rate
        time.sleep(host.bench.scale.settle_s)
        each = {pid: memory([pid]).pss for pid in find_by_argument(directory)}
        changes = _changes(host, min(_AGENTS_EVENTS, host.bench.scale.ovn_events))
    return _Side(rate, sum(each.values()), max(each.values()), start_s, changes)


def _loaded(host: OvnHost, connections: int) -> WrkReport:
    place = place_of(host.cloud.local[0])
    if host.bench.scale.warm_up:
        run_wrk(place, _URL, Load(connections=1, seconds=1))
    report = run_wrk(place, _URL, Load(connections=connections, seconds=host.bench.scale.seconds))
    if report.errors:
        raise BenchError(f"{report.errors} requests failed")
    return report


def _changes(host: OvnHost, count: int) -> tuple[float, ...]:
    """Change a port or its instance, and poll until the guest is answered so; return milliseconds for each change."""
    port, taken = host.spare, []
    for number in range(count):
        instance = f"instance-{number}"
        if number == 0:
            host.rows.add_port(port, CHASSIS, HOST)
            instance = port.instance
        else:
            host.rows.change(port, device_id=instance)
        taken.append(_answered(host, instance) * 1000)
        time.sleep(_BETWEEN_S)
    host.rows.remove_port(port)
    return tuple(taken)


def _answered(host: OvnHost, instance: str) -> float:
    began = time.perf_counter()
    guest = host.guest(host.spare, timeout_s=_EVENT_S)
    while time.perf_counter() - began < _EVENT_S:
        answer = guest.try_get(PATH)
        if answer is not None and answer.status == _OK and names(host.spare, answer.body, instance):
            guest.close()
            return time.perf_counter() - began
    raise BenchError(f"{instance} is not answered after {_EVENT_S:g} s")


def _requests(steps: Sequence[_Step]) -> Row:
    ratios = [one.ours.rate / one.theirs.rate for one in steps]
    texts = [
        f"{ratio:,.0f} x with {one.ports:,} ports ({one.ours.rate:,.0f} to {one.theirs.rate:,.1f})"
        for ratio, one in zip(ratios, steps, strict=True)
    ]
    return Row(
        key="ovn-requests",
        what="requests/s, signed and sent to Nova, beside Neutron's OVN agent",
        figure="; ".join(texts),
        verdict=judge(ratios[0], _REQUESTS_BAR),
        bar=_REQUESTS_BAR.text,
        value=ratios[0],
        how=(
            f"one guest, ours on {CONNECTIONS} connections, the agent on one: it serves one request after the other, "
            "and refuses most of what 64 send"
        ),
        data={"steps": [asdict(one) for one in steps]},
    )


def _memory(steps: Sequence[_Step]) -> Row:
    texts = [
        f"with {one.ports:,} ports {one.ours.pss / _MIB:.0f} to {one.theirs.pss / _MIB:,.0f} MiB (controller "
        f"{one.ours.brain / _MIB:.0f}, agent {one.theirs.brain / _MIB:.0f})"
        for one in steps
    ]
    value = steps[-1].theirs.pss / steps[-1].ours.pss
    return Row(
        key="ovn-memory",
        what="memory of all processes, beside Neutron's OVN agent and its proxies",
        figure="; ".join(texts),
        verdict=judge(value, None),
        value=value,
        how="PSS of every process of either, each local port answered at least once, at rest",
    )


def _start(steps: Sequence[_Step]) -> Row:
    texts = [
        f"with {one.ports:,} ports {one.ours.start_s:.1f} to {one.theirs.start_s:.1f} s"
        for one in steps
    ]
    value = steps[-1].theirs.start_s / steps[-1].ours.start_s
    return Row(
        key="ovn-start",
        what="start on a host without namespaces, until the last local port is answered as itself",
        figure="; ".join(texts),
        verdict=judge(value, None),
        value=value,
        how="from the start of the process; all guests ask again and again",
    )


def _change(steps: Sequence[_Step]) -> Row:
    texts = [
        f"with {one.ports:,} ports p50 {median(one.ours.changes_ms):.1f} ms, p99 "
        f"{percentile(one.ours.changes_ms, 99):.1f} ms; the agent p50 {median(one.theirs.changes_ms):.1f} ms"
        for one in steps
    ]
    value = percentile(steps[-1].ours.changes_ms, 99)
    return Row(
        key="ovn-change",
        what="a port bound, or given to another instance: from the end of the transaction to the first answer as that",
        figure="; ".join(texts),
        verdict=judge(value, _CHANGE_BAR),
        bar=_CHANGE_BAR.text,
        value=value,
        how=f"{len(steps[-1].ours.changes_ms)} changes of one port, one after the other, on a kept connection",
    )
