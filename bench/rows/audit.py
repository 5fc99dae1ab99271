"""The cost of the audit log for a guest behind a veth link: the shortest document, and a document from Nova."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, Verdict
from bench.lab import GUESTS, PLUGGED, network_name
from bench.nova import PATH, nova_guest, nova_settings, run_stub
from bench.place import BenchError
from bench.procs import pin
from bench.records import instance, network
from bench.sides import (
    CONNECTIONS,
    Side,
    compare,
    load_in_turn,
    without_errors,
)

__all__ = ["ROWS", "measure_audit"]

ROWS: Final = ("audit", "audit-sampled", "audit-signed")
_EMBEDDED: Final = frozenset(ROWS[:2])
_PATH: Final = "/latest/meta-data/instance-id"
_URL: Final = f"http://169.254.169.254{_PATH}"
_AGENT: Final = "User-Agent: Cloud-Init/24.4.1"
_BAR: Final = Bar("≥ 0.9 x", at_least=0.9)
_LEAST: Final = 0.01
"""Share of requests without a line from which a row is invalid: the remaining lines would seem too cheap."""

_MORE_ROUNDS: Final = 2
"""Factor for the number of rounds: the bar is near 1, and lines are written during the load."""


def measure_audit(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure all rows: daemons that differ only in `audit.mode`, each with a network."""
    if any(map(wanted, _EMBEDDED)):
        yield from _embedded(bench, wanted)
    if wanted("audit-signed"):
        yield _signed(bench)


def _embedded(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    modes = ("off", "all", "sampled")
    bench.lab.grow(len(modes))
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        daemons: dict[str, Daemon] = {}
        for number, mode in enumerate(modes):
            log = bench.directory / f"audit-{mode}.log"
            settings = {"mode": mode, "destination": str(log)}
            daemon = daemons[mode] = Daemon(bench.directory / f"audit-{mode}", {"audit": settings})
            stack.callback(daemon.stop)
            sides[mode] = _side(bench, daemon, network_name(number))
        rounds = _rounds(bench)
        load_in_turn(bench, list(sides.values()), bench.scale.seconds, rounds=rounds)
        without_errors(*sides.values())
        lines = {mode: _lines(bench, mode) for mode in modes}
        lost = _lost(daemons["all"])
    if lines["off"] or not lines["sampled"] < lines["all"]:
        raise BenchError(f"the logs have other lines than they should: {lines}")
    if wanted("audit"):
        row = _row(bench, "audit", "a line for each", sides["all"], sides["off"], bar=_BAR)
        yield _with_lines(row, lines["all"], lost)
    if wanted("audit-sampled"):
        what = "a line for one in 100"
        yield _row(bench, "audit-sampled", what, sides["sampled"], sides["off"])


def _signed(bench: Bench) -> Row:
    off, on = network_name(0), network_name(1)
    bench.lab.grow(2)
    sides: dict[str, Side] = {}
    with run_stub(bench.binary, bench.directory) as stub, contextlib.ExitStack() as stack:
        pin(stub.pid, {bench.cpus[1]})
        for name, mode in ((off, "off"), (on, "all")):
            directory = bench.directory / f"audit-signed-{mode}"
            directory.mkdir(exist_ok=True)
            log = bench.directory / f"audit-signed-{mode}.log"
            said = {"audit": {"mode": mode, "destination": str(log)}}
            daemon = Daemon(directory, {**nova_settings(directory, stub.port), **said})
            stack.callback(daemon.stop)
            daemon.start()
            daemon.put([bench.network(name)], [nova_guest(name)])
            daemon.wait_serving(1)
            worker = daemon.wait_settled().worker
            sides[mode] = Side(f"http://169.254.169.254{PATH}", worker, (_AGENT,), network=name)
        rounds = _rounds(bench)
        load_in_turn(bench, list(sides.values()), bench.scale.seconds, rounds=rounds)
        without_errors(*sides.values())
        lost = _lost(daemon)
    what = "a line for each"
    row = _row(bench, "audit-signed", what, sides["all"], sides["off"], bar=_BAR, path=PATH)
    return _with_lines(row, _lines(bench, "signed-all"), lost)


def _rounds(bench: Bench) -> int:
    return (_MORE_ROUNDS if bench.scale.warm_up else 1) * bench.scale.rounds


def _with_lines(row: Row, lines: int, lost: int) -> Row:
    share = lost / (lines + lost)
    return replace(
        row,
        figure=f"{row.figure}; {share:.1%} of the lines left out",
        verdict=row.verdict if share < _LEAST else Verdict.INVALID,
        data={**row.data, "lines": lines, "lost": lost},
    )


def _side(bench: Bench, daemon: Daemon, name: str) -> Side:
    subnets = [{"cidr": str(one)} for one in (GUESTS.network, PLUGGED.network)]
    daemon.start()
    daemon.put(
        [{**network(name), "subnets": subnets}],
        [instance(f"guest-{name}", {name: [str(PLUGGED.ip)]})],
    )
    daemon.wait_serving(1)
    return Side(_URL, daemon.wait_settled().worker, (_AGENT,), network=bench.lab.plug(name))


def _lost(daemon: Daemon) -> int:
    told = daemon.status()["audit"]
    if not isinstance(told, dict):
        raise BenchError("status does not tell of the audit log")
    return int(told["lost"])


def _lines(bench: Bench, mode: str) -> int:
    log = bench.directory / f"audit-{mode}.log"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _row(
    bench: Bench,
    key: str,
    what: str,
    ours: Side,
    other: Side,
    *,
    bar: Bar | None = None,
    path: str = _PATH,
) -> Row:
    return compare(
        key,
        ours,
        other,
        what=(
            f"{path} read by a guest behind a veth link, {what} in a file, beside no audit log, "
            f"{CONNECTIONS} connections"
        ),
        how=(
            f"median of {len(ours.rates)} pairs of runs of {bench.scale.seconds:g} s in turn, by equal daemons"
        ),
        bar=bar,
    )
