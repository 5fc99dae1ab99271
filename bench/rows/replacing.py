"""Memory and restart in front of Nova, by the number of networks, beside an agent with a proxy for each network."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon, Processes
from bench.figures import Bar, Row, judge, median
from bench.front import in_front, unanswered
from bench.guest import Guest
from bench.lab import PLUGGED, network_name
from bench.neutron import neutron_settings, plug_stranger, run_neutron
from bench.nova import PATH, run_stub
from bench.peer import Peer, PeerScale, parse_scale
from bench.place import BenchError
from bench.procs import memory, wait_until

__all__ = ["OURS", "WITH_PEER", "measure_replacing"]

OURS: Final = ("nova-memory", "nova-restart")
WITH_PEER: Final = ("peer-memory-100", "peer-memory-500", "peer-restart", "peer-cold")

_MEMORY_BARS: Final = {
    100: Bar("≥ 6 x less", at_least=6.0),
    500: Bar("≥ 25 x less", at_least=25.0),
}
_RESTART_BAR: Final = Bar("≥ 20 x faster", at_least=20.0)
_PATIENCE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Step:
    """A daemon in front of Nova with this many networks.

    Attributes:
        whole_s: Seconds from the request to end both processes, over their restart, to the last network's answer.
        haproxy_s: Seconds from the kill of HAProxy to the last network's answer.
        pss: Bytes, by process.
    """

    networks: int
    whole_s: tuple[float, ...]
    haproxy_s: tuple[float, ...]
    pss: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all processes."""
        return sum(self.pss.values())

    def with_times_of(self, other: _Step) -> _Step:
        """Return this step with the times of both."""
        return replace(
            self, whole_s=self.whole_s + other.whole_s, haproxy_s=self.haproxy_s + other.haproxy_s
        )

    def numbers(self) -> dict[str, object]:
        """Return the numbers for the JSON."""
        return {
            "networks": self.networks,
            "whole_restart_s": [round(one, 3) for one in self.whole_s],
            "haproxy_restart_s": [round(one, 3) for one in self.haproxy_s],
            "pss_bytes": {**self.pss, "all": self.total},
        }


def measure_replacing(
    bench: Bench, wanted: Callable[[str], bool], peer: Peer | None
) -> Iterator[Row]:
    """Measure the rows `nova-memory` and `nova-restart`, and with a peer the rows `peer-…`."""
    with run_stub(bench.binary, bench.directory) as stub, run_neutron() as neutron:
        steps = [_step(bench, stub.port, neutron, count) for count in bench.scale.replacing]
        theirs: dict[int, PeerScale] = {}
        if peer is not None and any(wanted(key) for key in WITH_PEER):
            bench.say("the peer with a proxy for each network")
            found = peer.scale(bench.scale.replacing, bench.scale.starts)
            theirs = {count: parse_scale(found, count) for count in bench.scale.replacing}
            # The peer takes minutes. A second measurement of imdsproxy then sees the same changes of the machine.
            again = _step(bench, stub.port, neutron, bench.scale.replacing[-1], name="again")
            steps[-1] = steps[-1].with_times_of(again)
    rows = [_memory_row(steps), _restart_row(steps[-1])]
    if theirs:
        rows += [_peer_memory_row(step, theirs[step.networks]) for step in steps]
        largest = steps[-1]
        rows.append(_peer_restart_row(largest, theirs[largest.networks]))
        rows.append(_peer_cold_row(largest, theirs[largest.networks]))
    yield from (row for row in rows if wanted(row.key))


def _step(bench: Bench, port: int, neutron: int, count: int, *, name: str = "replacing") -> _Step:
    bench.say(f"a daemon in front of Nova with {count} networks")
    names = [network_name(number) for number in range(count)]
    settings = neutron_settings(neutron)
    with in_front(bench, f"{name}-{count}", port, count, settings) as daemon:
        whole, haproxy = [], []
        for _ in range(bench.scale.starts):
            whole.append(_whole(bench, daemon, names))
            haproxy.append(_haproxy(bench, daemon, names))
        _miss(bench)
        processes = daemon.wait_settled()
        time.sleep(bench.scale.settle_s)
        return _Step(count, tuple(whole), tuple(haproxy), _pss(processes))


def _miss(bench: Bench) -> None:
    """Cause a query to Neutron, so that memory includes the needs of queries."""
    one = Guest(bench.lab, plug_stranger(bench.lab, network_name(0)), str(PLUGGED.ip))
    answer = one.get(PATH)
    one.close()
    if answer.status != 200:  # noqa: PLR2004 - HTTP's OK
        raise BenchError(f"a guest that only Neutron knows is answered {answer.status}")


def _pss(processes: Processes) -> dict[str, int]:
    return {
        "haproxy": memory(processes.haproxy).pss,
        "controller": memory([processes.controller]).pss,
    }


def _whole(bench: Bench, daemon: Daemon, names: Sequence[str]) -> float:
    """Return the seconds from asking HAProxy and the controller to end until the last network answers."""
    began = time.perf_counter()
    daemon.stop()
    daemon.spawn()
    _wait_for_all(bench, names)
    took = time.perf_counter() - began
    daemon.wait_ready()
    return took


def _haproxy(bench: Bench, daemon: Daemon, names: Sequence[str]) -> float:
    """Return the seconds from SIGKILL for HAProxy until the last network answers."""
    processes = daemon.wait_settled()
    began = time.perf_counter()
    os.kill(processes.master, signal.SIGKILL)
    # The old worker ends a moment after the master, and must not be taken for the new one.
    wait_until(lambda: bool(unanswered(bench, names[:1])), 1, every_s=0)
    _wait_for_all(bench, names)
    took = time.perf_counter() - began
    daemon.timed(lambda: _other_master(daemon, processes.master), 10, "HAProxy's new master")
    return took


def _other_master(daemon: Daemon, old: int) -> bool:
    try:
        return daemon.processes().master != old
    except BenchError:
        return False


def _wait_for_all(bench: Bench, names: Sequence[str]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while unanswered(bench, names[:1]):
        _in_time(deadline, names[:1])
        time.sleep(0.005)
    waiting = list(names)
    while waiting := unanswered(bench, waiting):
        _in_time(deadline, waiting)


def _in_time(deadline: float, waiting: Sequence[str]) -> None:
    if time.monotonic() > deadline:
        raise BenchError(f"{len(waiting)} networks do not answer after a start: {waiting[:3]}")


def _memory_row(steps: Sequence[_Step]) -> Row:
    told = "; ".join(
        f"{one.networks} networks {one.total / 2**20:.1f} MiB ("
        + ", ".join(f"{name} {size / 2**20:.1f}" for name, size in one.pss.items())
        + ")"
        for one in steps
    )
    return Row(
        key="nova-memory",
        what="memory of everything in front of Nova",
        figure=told,
        verdict=judge(steps[-1].total / 2**20, None),
        value=steps[-1].total / 2**20,
        how=(
            "PSS of HAProxy's master and worker, and of the controller, which asks a Neutron without Keystone; the "
            "document server is left out (`documents.enabled`); all networks answered"
        ),
        data={"steps": [one.numbers() for one in steps]},
    )


def _restart_row(step: _Step) -> Row:
    whole, haproxy = median(step.whole_s), median(step.haproxy_s)
    return Row(
        key="nova-restart",
        what=f"restart in front of Nova with {step.networks} networks, until the last guest is answered as itself",
        figure=(
            f"HAProxy alone, killed, {haproxy:.2f} s; both processes {whole:.2f} s; "
            "the controller alone: no guest notices"
        ),
        verdict=judge(haproxy, None),
        value=haproxy,
        how=(
            f"median of {len(step.whole_s)}; from asking both processes to end, and from SIGKILL for HAProxy; "
            "that a controller's restart loses nothing is `lost-kill` and `lost-upgrade`"
        ),
        data=step.numbers(),
    )


def _peer_memory_row(step: _Step, theirs: PeerScale) -> Row:
    value = theirs.pss / step.total
    bar = _MEMORY_BARS[step.networks]
    return Row(
        key=f"peer-memory-{step.networks}",
        what=f"memory with {step.networks} networks, beside neutron-metadata-agent and its proxies",
        figure=f"{value:.1f} x less ({step.total / 2**20:.1f} to {theirs.pss / 2**20:,.0f} MiB)",
        verdict=judge(value, bar),
        bar=bar.text,
        value=value,
        how="PSS of every process of either, each network answered at least once, at rest",
        data={"ours": step.numbers(), "peer_pss_bytes": theirs.pss},
    )


def _peer_restart_row(step: _Step, theirs: PeerScale) -> Row:
    ours = median(step.haproxy_s)
    value = theirs.proxies_s / ours
    return Row(
        key="peer-restart",
        what=f"restart of what listens, with {step.networks} networks, beside a proxy for each network",
        figure=f"{value:.0f} x faster ({ours:.2f} to {theirs.proxies_s:.1f} s)",
        verdict=judge(value, _RESTART_BAR),
        bar=_RESTART_BAR.text,
        value=value,
        how=(
            "until the last guest is answered as itself; ours, before and after theirs, from SIGKILL for HAProxy; "
            "theirs from the start of the proxies, the faster of one and two at a time, without Neutron's driver and "
            "with the agent up"
        ),
        data={"ours": step.numbers(), "peer_proxies_s": theirs.proxies_s},
    )


def _peer_cold_row(step: _Step, theirs: PeerScale) -> Row:
    ours = median(step.whole_s)
    value = theirs.whole_by_driver_s / ours
    return Row(
        key="peer-cold",
        what=f"restart of everything, with {step.networks} networks, beside neutron-metadata-agent and its proxies",
        figure=(
            f"{value:.1f} x faster ({ours:.2f} to {theirs.whole_by_driver_s:.1f} s); "
            f"beside proxies started two at a time by nobody {theirs.whole_s / ours:.1f} x ({theirs.whole_s:.1f} s)"
        ),
        verdict=judge(value, _RESTART_BAR),
        bar=_RESTART_BAR.text,
        value=value,
        how=(
            "from the order to end, until the last guest is answered as itself; ours, before and after theirs: HAProxy "
            "and the controller; theirs: the agent's restart, and that of all proxies by Neutron's driver, one after "
            "the other as it does"
        ),
        data={
            "ours": step.numbers(),
            "peer_whole_by_driver_s": theirs.whole_by_driver_s,
            "peer_whole_s": theirs.whole_s,
        },
    )
