"""A fleet: time until changes arrive, cost of changes and hosts for a hub, and the effect of losing all hubs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, judge, median, percentile
from bench.fleet import GUESTS, Cost, Crowd, Fleet, guest_name, guest_record, open_fleet
from bench.guest import Guest, SteadyLoad
from bench.hosts import instance_name
from bench.lab import guest, network_name
from bench.operator import Operator, Written
from bench.place import BenchError
from bench.procs import memory
from bench.records import network

__all__ = ["ROWS", "measure_fleet"]

ROWS: Final = (
    "fleet-guest",
    "fleet-memory",
    "fleet-change",
    "fleet-hub",
    "fleet-policy",
    "fleet-storm",
    "fleet-start",
)
_GUEST_BAR: Final = Bar("p50 ≤ 50 ms, p99 ≤ 200 ms", at_most=200.0)
_MEMORY_BAR: Final = Bar("≤ 10 MB", at_most=10.0)
_STORM_BAR: Final = Bar("0 guests notice", at_most=0.0)
_FEW: Final = 10
"""One host in this many is connected for `fleet-guest`."""

_STEP: Final = 7919
"""A prime, which spreads changes over the hosts of all processes."""

_PATH: Final = "/latest/meta-data/tags/instance/role"
_OK: Final = 200
_WAIT_S: Final = 60.0
_POLL_S: Final = 0.001
_PAUSE_S: Final = 0.02
_MB: Final = 1e6
_SHARED: Final = (
    "etcd's three members, both hubs and all hosts share the machine's processors and one disk"
)


def measure_fleet(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure all rows, in one fleet."""
    with open_fleet(bench) as fleet, contextlib.ExitStack() as stack:
        operator = stack.enter_context(Operator(fleet))
        real = [fleet.daemon(number) for number in range(fleet.real)]
        for daemon in real:
            stack.callback(daemon.stop)
            daemon.wait_serving(1)
        if wanted("fleet-memory"):
            yield _memory_of_a_host(fleet, real[0])
        if wanted("fleet-guest"):
            few = max(1, fleet.hosts // _FEW)
            bench.say(f"{few:,} hosts connect")
            with fleet.crowd(few) as crowd:
                crowd.wait_synced()
                yield _guest_row(fleet, operator, few)
        if any(map(wanted, ("fleet-change", "fleet-hub", "fleet-policy", "fleet-storm"))):
            try:
                made = _with_all(fleet, operator, real)
                yield from (row for row in made if wanted(row.key))
            except BenchError as error:
                # A failure must not stop the rows after this group.
                bench.say(f"failed: {error}")
        for daemon in real:
            daemon.stop()
        if wanted("fleet-start"):
            yield _start_row(fleet)


def _memory_of_a_host(fleet: Fleet, of_fleet: Daemon) -> Row:
    """Measure the controller of a complete host, beside one with the same records in its own store."""
    bench = fleet.bench
    bench.say(f"a host with {GUESTS} instances of the fleet, and one with them in its store")
    name = network_name(fleet.real)
    bench.lab.grow(fleet.real + 1)
    alone = Daemon(fleet.directory / "alone")
    try:
        alone.start()
        alone.put([network(name)], [guest_record(name, one) for one in range(GUESTS)])
        sizes = []
        for daemon in (of_fleet, alone):
            # The restart corresponds to a reboot of the host.
            daemon.stop()
            daemon.start()
            daemon.wait_serving(1)
            processes = daemon.wait_settled()
            time.sleep(bench.scale.settle_s)
            sizes.append(memory([processes.controller]).pss / _MB)
    finally:
        alone.stop()
    more = sizes[0] - sizes[1]
    return Row(
        key="fleet-memory",
        what=f"memory of a host's controller with {GUESTS} instances of a fleet, beside as many in its SQLite store",
        figure=f"{more:+.1f} MB ({sizes[1]:.1f} to {sizes[0]:.1f} MB)",
        verdict=judge(more, _MEMORY_BAR),
        bar=_MEMORY_BAR.text,
        value=more,
        how=f"PSS at rest after a start; the fleet has {fleet.size:,} instances",
        data={"fleet_mb": sizes[0], "sqlite_mb": sizes[1]},
    )


def _guest_row(fleet: Fleet, operator: Operator, connected: int) -> Row:
    """Change a guest of a complete host, and poll until the new value is answered."""
    asking = [Guest(fleet.bench.lab, network_name(one)) for one in range(fleet.real)]
    taken: list[float] = []
    answered: list[float] = []
    with ThreadPoolExecutor(1) as thread:
        for number in range(fleet.bench.scale.fleet_changes):
            which, tag = number % fleet.real, f"guest-{number}"
            began = time.monotonic()
            written = thread.submit(operator.tag, guest_name(which, 0), tag)
            while (answer := asking[which].get(_PATH)).body.decode() != tag:
                if time.monotonic() - began > _WAIT_S:
                    raise BenchError(f"a guest reads {answer!r} after {_WAIT_S:g} s, not {tag}")
                time.sleep(_POLL_S)
            taken.append((time.monotonic() - began) * 1000)
            answered.append((written.result().answered - began) * 1000)
            time.sleep(_PAUSE_S)
    for one in asking:
        one.close()
    middle, worst = median(taken), percentile(taken, 99)
    return Row(
        key="fleet-guest",
        what="an operator's request to a hub → a guest of a complete host reads the change",
        figure=(
            f"p50 {middle:.0f} ms, p99 {worst:.0f} ms; the request is answered, because it is in force there, after "
            f"p50 {median(answered):.0f} ms, p99 {percentile(answered, 99):.0f} ms"
        ),
        verdict=judge(worst, _GUEST_BAR),
        bar=_GUEST_BAR.text,
        value=worst,
        how=(
            f"{len(taken)} changes, one after the other, of {fleet.real} complete hosts; {connected:,} others are "
            f"connected, {fleet.size:,} instances are stored; {_SHARED}"
        ),
        data={"ms": taken, "answered_ms": answered},
    )


def _with_all(fleet: Fleet, operator: Operator, real: Sequence[Daemon]) -> Iterator[Row]:
    bench = fleet.bench
    empty = fleet.cost()
    bench.say(f"{fleet.hosts:,} hosts connect")
    with fleet.crowd(fleet.hosts) as crowd:
        crowd.wait_synced()
        time.sleep(bench.scale.settle_s)
        settled = fleet.cost()
        rest_s = bench.scale.idle_s / 3
        time.sleep(rest_s)
        rest = (fleet.cost() - settled).per(rest_s)
        bench.say("changes of one host each")
        began, before = time.monotonic(), fleet.cost()
        changes = [
            operator.tag(instance_name(number * _STEP % fleet.hosts, 0), f"change-{number}")
            for number in range(bench.scale.fleet_changes)
        ]
        took_s = time.monotonic() - began
        spent = (fleet.cost() - before - rest.per(1 / took_s)).per(len(changes))
        yield _change_row(crowd, changes)
        yield _hub_row(fleet, (settled - empty).per(fleet.hosts), rest, spent)
        bench.say("changes of all hosts")
        yield _policy_row(fleet, operator, crowd)
        bench.say("both hubs are killed, and started again")
        yield _storm_row(fleet, crowd, real)


def _change_row(crowd: Crowd, changes: Sequence[Written]) -> Row:
    received = [(crowd.received(one.revision)[0] - one.sent) * 1000 for one in changes]
    acknowledged = [(one.answered - one.sent) * 1000 for one in changes]
    return Row(
        key="fleet-change",
        what=(
            f"an operator's request that changes one of {crowd.count:,} hosts → received there; → answered, because it "
            "is acknowledged"
        ),
        figure=(
            f"received p50 {median(received):.1f} ms, p99 {percentile(received, 99):.1f} ms; acknowledged p50 "
            f"{median(acknowledged):.1f} ms, p99 {percentile(acknowledged, 99):.1f} ms"
        ),
        verdict=judge(percentile(acknowledged, 99), None),
        value=percentile(acknowledged, 99),
        how=(
            f"{len(changes)} changes, one after the other, written by compare-and-swap; half of the hosts are at the "
            f"other hub; each has a TLS connection and a certificate of its own; {_SHARED}"
        ),
        data={"received_ms": received, "acknowledged_ms": acknowledged},
    )


def _hub_row(fleet: Fleet, each: Cost, rest: Cost, change: Cost) -> Row:
    return Row(
        key="fleet-hub",
        what=f"what {fleet.hosts:,} hosts at two hubs cost",
        figure=(
            f"a host: hub {each.hub / 1000:.1f} kB, its HAProxy {each.haproxy / 1000:.1f} kB; {each.hub_s * 1000:.1f} "
            f"and {each.haproxy_s * 1000:.1f} ms to connect; a change: {change.hub_s * 1000:.1f} and "
            f"{change.haproxy_s * 1000:.1f} ms; at rest both hubs {rest.hub_s * 100:.1f} % of a processor, their "
            f"HAProxys {rest.haproxy_s * 100:.1f} %"
        ),
        verdict=judge(each.hub, None),
        value=each.hub / 1000,
        how=f"PSS and processor time; a change without what pings cost meanwhile, both hubs fold it; {_SHARED}",
        data={"host": each.numbers(), "rest_each_s": rest.numbers(), "change": change.numbers()},
    )


def _policy_row(fleet: Fleet, operator: Operator, crowd: Crowd) -> Row:
    received: list[list[float]] = []
    before = fleet.cost()
    acknowledged = []
    for number in range(fleet.bench.scale.fleet_policies):
        written = operator.set_policy({"boot_grace_s": 1 + number})
        acknowledged.append((written.answered - written.sent) * 1000)
        times = crowd.received(written.revision, crowd.count)
        received.append([(at - written.sent) * 1000 for at in times])
    spent = (fleet.cost() - before).per(len(received))
    every = [one for times in received for one in times]
    return Row(
        key="fleet-policy",
        what=f"an operator's request that changes the fleet's policy → received by all of {crowd.count:,} hosts",
        figure=(
            f"p50 {median(every):,.0f} ms, p99 {percentile(every, 99):,.0f} ms; all have acknowledged it after "
            f"{median(acknowledged):,.0f} ms; "
            f"{spent.hub_s:.2f} s of both hubs' processor time, {spent.haproxy_s:.2f} s of their HAProxys'"
        ),
        verdict=judge(percentile(every, 99), None),
        value=percentile(every, 99),
        how=f"{len(received)} changes; {_SHARED}",
        data={"acknowledged_ms": acknowledged, "cost": spent.numbers()},
    )


def _storm_row(fleet: Fleet, crowd: Crowd, real: Sequence[Daemon]) -> Row:
    """End both hubs as a loss of power would, start them, and wait for every host, while guests read."""
    guests = [Guest(fleet.bench.lab, network_name(one), guest(1)) for one in range(len(real))]
    with SteadyLoad(guests, _PATH, pause_s=_PAUSE_S) as load:
        began = time.monotonic()
        for hub in fleet.hubs:
            hub.kill()
        ready_s = fleet.start_hubs()
        report = crowd.wait_synced()
        for daemon in real:
            daemon.wait_in_sync("fleet")
        counts = load.stop()
    spent = fleet.cost()
    took_s = report["last"] - began
    return Row(
        key="fleet-storm",
        what=f"both hubs are killed and started again: until all of {crowd.count:,} hosts have everything",
        figure=(
            f"{took_s:.1f} s ({ready_s:.1f} s of them until both hubs had read etcd); guests of "
            f"{len(real)} complete hosts: {counts.lost} of {counts.sent:,} requests lost; since their start the hubs "
            f"have used {spent.hub_s:.1f} s of processor time, their HAProxys {spent.haproxy_s:.1f} s"
        ),
        verdict=judge(counts.lost, _STORM_BAR),
        bar=_STORM_BAR.text,
        value=counts.lost,
        how=(
            "SIGKILL of hubs and HAProxys; hosts come back with a host's own pauses, each shows what it has; "
            f"the simulated hosts need more processor time than hubs do; {_SHARED}"
        ),
        data={"s": took_s, "hubs_ready_s": ready_s, "lost": counts.faults, "cost": spent.numbers()},
    )


def _start_row(fleet: Fleet) -> Row:
    """Start a hub with the stored instances, and with three times as many."""
    steps = []
    hub = fleet.hubs[0]
    for count in (fleet.size, 3 * fleet.size):
        fleet.grow(count)
        fleet.bench.say(f"a hub with {count:,} instances in etcd")
        taken = []
        for _ in range(fleet.bench.scale.starts):
            hub.kill()
            began = hub.spawn()
            taken.append(hub.wait_ready() - began)
        cost = hub.cost()
        steps.append((count, median(taken), cost.hub_s, cost.hub / _MB))
    texts = [
        f"{count:,} instances: {taken:.1f} s ({spent:.1f} s of its processor time), {size:.0f} MB"
        for count, taken, spent, size in steps
    ]
    return Row(
        key="fleet-start",
        what="a hub's start until hosts can connect, and its memory then",
        figure="; ".join(texts),
        verdict=judge(steps[-1][1], None),
        value=steps[-1][1],
        how=f"median of {fleet.bench.scale.starts}; PSS; {_SHARED}",
        data={"steps": [list(one) for one in steps]},
    )
