"""imdsproxy in front of Nova beside Neutron's own agents: throughput, a crowd, and a run behind Neutron's proxies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from bench.bare import run_bare
from bench.context import Bench
from bench.crowd import Crowd, ask_at_once
from bench.daemon import Daemon
from bench.figures import Bar, Row, judge, median
from bench.front import agent_socket, in_front, render_agents_proxy
from bench.lab import guest, network_name
from bench.nova import PATH, SLOW_MS, nova_guest, run_stub
from bench.peer import (
    AGENT,
    OVN,
    PORTS,
    Peer,
    parse_burst,
    parse_load,
    parse_slow,
    parse_southbound,
)
from bench.place import BenchError
from bench.sides import CONNECTIONS
from bench.wrk import Load, WrkReport, run_wrk

__all__ = ["OURS", "WITH_PEER", "measure_agents"]

OURS: Final = ("nova-burst", "nova-unix")
WITH_PEER: Final = (
    "peer-agent",
    "peer-ovn",
    "peer-ovn-1000",
    "peer-unix",
    "peer-slow",
    "peer-burst",
)

_CROWD: Final = 256
_BURSTS: Final = 3
_PROXY_PORT: Final = 8090
_AGENT_BAR: Final = Bar("≥ 20 x", at_least=20.0)
_OVN_BAR: Final = Bar("≥ 15 x", at_least=15.0)
_SOUTHBOUND_BAR: Final = Bar("≥ 100 x", at_least=100.0)
_ALL: Final = Bar(f"all {_CROWD} answered 200", at_least=1.0)
_HOW: Final = (
    "in turn, in this run: ours first, then the agent in its harness; both with wrk on 64 kept connections, a "
    "stand-in for Nova that checks the signature (HAProxy, 1.1 kB), no process bound to a processor; the agent's "
    "look-up of ports is replaced by a dictionary, and its listen backlog mended"
)


@dataclass(slots=True)
class _Rounds:
    """Results of the rounds, in requests a second."""

    direct: list[float] = field(default_factory=list)
    unix: list[float] = field(default_factory=list)
    slow: list[float] = field(default_factory=list)
    p99s: list[float] = field(default_factory=list)
    crowds: list[Crowd] = field(default_factory=list)
    peer: list[Mapping[str, object]] = field(default_factory=list)


def measure_agents(bench: Bench, wanted: Callable[[str], bool], peer: Peer | None) -> Iterator[Row]:
    """Measure the rows `nova-burst` and `nova-unix`, and with a peer `peer-agent` … `peer-burst`."""
    beside = peer if any(wanted(key) for key in WITH_PEER) else None
    rounds = _Rounds()
    with run_stub(bench.binary, bench.directory) as stub:
        with in_front(bench, "agents", stub.port, 1) as daemon:
            _settle_crowd(daemon)
            proxy = render_agents_proxy(network_name(0), _PROXY_PORT, agent_socket(daemon))
            with run_bare(bench.binary, bench.directory, "agents-proxy", proxy):
                for _ in range(bench.scale.rounds if beside is None else bench.scale.peer_rounds):
                    _round(bench, rounds, beside)
        if beside is not None and wanted("peer-slow"):
            with in_front(bench, "agents-slow", stub.slow_port, 1):
                rounds.slow.append(_loaded(bench, 80).rate)
    rows = [_burst_row(rounds), _unix_row(rounds)]
    if beside is not None:
        rows += _peer_rows(rounds)
    yield from (row for row in rows if wanted(row.key))


def _settle_crowd(daemon: Daemon) -> None:
    """Store a record for each guest of the crowd, except the first, which has one."""
    name = network_name(0)
    guests = []
    for number in range(1, _CROWD):
        ports = [{"network": name, "addresses": [guest(number)]}]
        guests.append({**nova_guest(f"{name}.{number}"), "ports": ports})
    daemon.put((), guests)


def _round(bench: Bench, rounds: _Rounds, peer: Peer | None) -> None:
    report = _loaded(bench, 80)
    rounds.direct.append(report.rate)
    rounds.p99s.append(report.p99_s)
    rounds.unix.append(_loaded(bench, _PROXY_PORT).rate)
    addresses = [guest(number) for number in range(_CROWD)]
    rounds.crowds += [
        ask_at_once(bench.lab, network_name(0), addresses, PATH) for _ in range(_BURSTS)
    ]
    if peer is not None:
        bench.say("the peer under load")
        rounds.peer.append(peer.load(bench.scale.seconds, _BURSTS))


def _loaded(bench: Bench, port: int) -> WrkReport:
    url = f"http://169.254.169.254:{port}{PATH}"
    if bench.scale.warm_up:
        run_wrk(network_name(0), url, Load(connections=4, seconds=1))
    load = Load(connections=CONNECTIONS, seconds=bench.scale.seconds)
    report = run_wrk(network_name(0), url, load)
    if report.errors:
        raise BenchError(f"{report.errors} requests to {url} failed")
    return report


def _burst_row(rounds: _Rounds) -> Row:
    share = min(one.share for one in rounds.crowds)
    slowest = [max(one.seconds, default=float("nan")) * 1000 for one in rounds.crowds]
    return Row(
        key="nova-burst",
        what=f"{_CROWD} guests of a network that ask Nova for the first time, all at once",
        figure=f"{share:.1%} answered 200; the last one after {median(slowest):.0f} ms",
        verdict=judge(share, _ALL),
        bar=_ALL.text,
        value=share,
        how=(
            f"{len(rounds.crowds)} crowds of {_CROWD} addresses, each with an instance of its own, a connection and a "
            "request; the worst of the crowds"
        ),
        data={"statuses": [dict(one.statuses) for one in rounds.crowds], "last_ms": slowest},
    )


def _unix_row(rounds: _Rounds) -> Row:
    unix, direct = median(rounds.unix), median(rounds.direct)
    return Row(
        key="nova-unix",
        what="listener `unix` behind the HAProxy that Neutron's agents start: signed and sent to Nova, keep-alive",
        figure=f"{unix:,.0f} requests/s, {unix / direct:.2f} x of what it is without that one ({direct:,.0f})",
        verdict=judge(unix, None),
        value=unix,
        how=(
            f"{CONNECTIONS} connections, no process bound to a processor; that HAProxy opens one to us for each "
            "request"
        ),
        data={"unix_requests_per_s": rounds.unix, "direct_requests_per_s": rounds.direct},
    )


def _peer_rows(rounds: _Rounds) -> list[Row]:
    agent = [parse_load(one, AGENT) for one in rounds.peer]
    ovn = [parse_load(one, OVN) for one in rounds.peer]
    rows = [
        _against(_AGENT_ROW, rounds.direct, agent),
        _against(_OVN_ROW, rounds.direct, ovn),
        _against(_SOUTHBOUND_ROW, rounds.direct, [parse_southbound(one) for one in rounds.peer]),
        _against(_UNIX_ROW, rounds.unix, agent),
        _peer_burst_row(rounds),
    ]
    if rounds.slow:
        slow = [max(parse_slow(one, AGENT), parse_slow(one, OVN)) for one in rounds.peer]
        rows.append(_against(_SLOW_ROW, rounds.slow * len(slow), slow))
    return rows


@dataclass(frozen=True, slots=True)
class _Beside:
    """A row beside an agent."""

    key: str
    what: str
    bar: Bar | None = None
    how: str = _HOW


def _against(beside: _Beside, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    value = median(ratios)
    return Row(
        key=beside.key,
        what=f"signed and sent to Nova, keep-alive, {CONNECTIONS} connections, beside {beside.what}",
        figure=(
            f"{value:.1f} x ({median(ours):,.0f} to {median(theirs):,.0f} requests/s); rounds "
            f"{min(ratios):.1f} to {max(ratios):.1f} x"
        ),
        verdict=judge(value, beside.bar),
        bar="" if beside.bar is None else beside.bar.text,
        value=value,
        how=beside.how,
        data={
            "ours_requests_per_s": list(ours),
            "peer_requests_per_s": list(theirs),
            "ratios": ratios,
        },
    )


_AGENT_ROW: Final = _Beside("peer-agent", "neutron-metadata-agent", _AGENT_BAR)
_OVN_ROW: Final = _Beside("peer-ovn", "the OVN agent", _OVN_BAR)
_SOUTHBOUND_ROW: Final = _Beside(
    "peer-ovn-1000",
    f"the OVN agent with {PORTS:,} ports in its Southbound database",
    _SOUTHBOUND_BAR,
    "as above, but nothing of that agent is replaced: a real ovsdb-server, its own connection to it; on one "
    "connection, its best case: it serves one request after the other, and refuses most of what 64 send",
)
_UNIX_ROW: Final = _Beside(
    "peer-unix", "neutron-metadata-agent, ours behind the same HAProxy in each network"
)
_SLOW_ROW: Final = _Beside(
    "peer-slow", f"the better of both agents, with a Nova that takes {SLOW_MS} ms"
)


def _peer_burst_row(rounds: _Rounds) -> Row:
    shares: dict[str, list[float]] = {}
    for one in rounds.peer:
        for variant, share in parse_burst(one).shares.items():
            shares.setdefault(variant, []).append(share)
    ours = min(one.share for one in rounds.crowds)
    told = {variant: median(found) for variant, found in shares.items()}
    as_shipped = " and ".join(
        f"{share:.0%}" for one, share in told.items() if one not in {AGENT, OVN}
    )
    mended = " and ".join(f"{told[one]:.0%}" for one in (AGENT, OVN))
    return Row(
        key="peer-burst",
        what=f"{_CROWD} guests at once, beside neutron-metadata-agent and the OVN agent",
        figure=f"{ours:.0%} answered 200; theirs, as shipped: {as_shipped}; backlog mended: {mended}",
        verdict=judge(ours, None),
        value=ours,
        how=f"{_BURSTS} crowds a round; what is not 200 of theirs is 503 at once",
        data={"shares": shares},
    )
