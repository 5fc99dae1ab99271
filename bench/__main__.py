"""Measure imdsproxy: each figure beside a bare HAProxy, or as a count."""

from __future__ import annotations

import argparse
import compileall
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console

from bench.context import HAPROXY, Bench, Scale
from bench.daemon import Daemon
from bench.figures import Row, Verdict
from bench.lab import Lab
from bench.peer import Peer, peer_at
from bench.place import BenchError, alone, choose, clear, prepare, sweep
from bench.rows import (
    agents,
    audit,
    fairness,
    fleet,
    identity,
    issuing,
    many,
    ovn,
    replacing,
    sizes,
    tokens,
)
from bench.rows.additions import measure_additions
from bench.rows.flooding import measure_flood
from bench.rows.forwarding import measure_forwarding
from bench.rows.growth import measure_growth
from bench.rows.losses import measure_losses, measure_recovery
from bench.rows.misses import measure_misses
from bench.rows.moves import measure_moves
from bench.rows.reads import measure_reads
from bench.rows.scale import measure_scale
from bench.show import document, table, write_json

_REPOSITORY: Final = Path(__file__).resolve().parent.parent
_READS: Final = ("reads-leaf", "reads-user-data", "first-reads", "meta-data")
_GROWTH: Final = ("memory", "start")
_NOVA: Final = ("nova-signed", "nova-signed-close", "nova-slow")
_MISSES: Final = ("nova-misses",)
_FLEET: Final = (
    "add-instance",
    "add-network",
    "stale",
    "lost-reloads",
    "lost-kill",
    "lost-upgrade",
    "recovery",
    "flood",
    "controller",
    "reload",
)
WITH_PEER: Final = (*agents.WITH_PEER, *replacing.WITH_PEER)
"""Rows that need Neutron's own agents for comparison."""

_STAGES: Final[
    dict[tuple[str, ...], Callable[[Bench, frozenset[str], Peer | None], Iterator[Row]]]
] = {
    _READS: lambda bench, only, _: measure_reads(bench, only.__contains__),
    _GROWTH: lambda bench, only, _: measure_growth(bench, only.__contains__),
    tokens.ROWS: lambda bench, only, _: tokens.measure_tokens(bench, only.__contains__),
    identity.ROWS: lambda bench, only, _: identity.measure_identity(bench, only.__contains__),
    issuing.ROWS: lambda bench, only, _: issuing.measure_issuing(bench, only.__contains__),
    audit.ROWS: lambda bench, only, _: audit.measure_audit(bench, only.__contains__),
    fairness.ROWS: lambda bench, only, _: fairness.measure_fairness(bench, only.__contains__),
    _NOVA: lambda bench, only, _: measure_forwarding(bench, only.__contains__),
    (*agents.OURS, *agents.WITH_PEER): lambda bench, only, peer: agents.measure_agents(
        bench, only.__contains__, peer
    ),
    (*replacing.OURS, *replacing.WITH_PEER): lambda bench, only, peer: replacing.measure_replacing(
        bench, only.__contains__, peer
    ),
    _MISSES: lambda bench, _, __: measure_misses(bench),
    _FLEET: lambda bench, only, _: _measure_fleet(bench, only),
    many.ROWS: lambda bench, only, _: many.measure_many(bench, only.__contains__),
    sizes.ROWS: lambda bench, only, _: sizes.measure_sizes(bench, only.__contains__),
    ovn.ROWS: lambda bench, only, _: ovn.measure_ovn(bench, only.__contains__),
    fleet.ROWS: lambda bench, only, _: fleet.measure_fleet(bench, only.__contains__),
}
"""The groups of rows that are measured one after the other, each from nothing."""

ROWS: Final = tuple(chain.from_iterable(_STAGES))
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_S: Final = 600.0
_EXIT_SHORT: Final = 1
_EXIT_MISSING: Final = 2


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    scale: Scale
    strict: bool
    only: frozenset[str]
    json: Path | None
    keep: bool
    peer: Path | None = None
    patience_s: float = 0
    seed: int | None = None


def parse_options(argv: Sequence[str]) -> Options:
    """Read the command line; exit with 2 if it is wrong."""
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__, allow_abbrev=False)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer of everything, in two minutes")
    size.add_argument(
        "--smallest",
        action="store_true",
        help="fewest of everything: whether each row can be measured; waits for others of its kind",
    )
    parser.add_argument(
        "--only", metavar="ROW,…", default="", help=f"only these rows: {', '.join(ROWS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--keep", action="store_true", help="leave logs and files in .bench")
    parser.add_argument(
        "--shuffle", type=int, metavar="SEED", help="measure the groups of rows in a random order"
    )
    parser.add_argument(
        "--peer",
        type=Path,
        metavar="DIR",
        help="a harness with Neutron's own agents (its run.sh): ratios beside them, in the same run",
    )
    found = parser.parse_args(argv)
    only = frozenset(word.strip() for word in found.only.split(",") if word.strip())
    if unknown := only - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if found.peer is None and (without := only & set(WITH_PEER)):
        parser.error(f"--peer DIR is needed for {', '.join(sorted(without))}")
    every = frozenset(ROWS) - (frozenset(WITH_PEER) if found.peer is None else frozenset())
    scale = Scale.of(quick=found.quick, smallest=found.smallest)
    patience_s = _PATIENCE_S if found.smallest else 0
    return Options(
        scale,
        found.strict,
        only or every,
        found.json,
        found.keep,
        found.peer,
        patience_s,
        found.shuffle,
    )


def exit_status(rows: Sequence[Row], wanted: frozenset[str], *, strict: bool) -> int:
    """Return 0 if all rows are there, 2 if one is missing; with `strict`, 1 if a bar is missed."""
    there = {row.key for row in rows if row.verdict is not Verdict.MISSING}
    if wanted - there:
        return _EXIT_MISSING
    short = any(row.verdict is Verdict.SHORT for row in rows)
    return _EXIT_SHORT if strict and short else 0


class InterruptError(Exception):
    """A signal asked the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, _frame: FrameType | None) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # another signal must not interrupt the cleanup
    raise InterruptError(number)


def main(argv: Sequence[str]) -> int:
    """Measure; return the exit status."""
    options = parse_options(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    load = os.getloadavg()[0]
    try:
        with alone(options.patience_s):
            rows = _measure(options, console)
    except BenchError as failed:
        console.print(f"script/bench: {failed}", style="red", markup=False, soft_wrap=True)
        return _EXIT_MISSING
    except InterruptError as interrupted:
        return 128 + interrupted.number
    console.print(table(rows))
    _print_baseline(rows, console)
    if options.json is not None:
        write_json(options.json, document(rows, _machine(load)))
    return exit_status(rows, options.only, strict=options.strict)


def _measure(options: Options, console: Console) -> list[Row]:
    directory = choose(_REPOSITORY)
    lab = Lab()
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began:5.0f} s  {text}", markup=False, highlight=False)

    sweep(directory, lab)
    prepare(directory)
    # An installed package is compiled, too: compiling changed modules at each start takes longer than importing them.
    compileall.compile_dir(_REPOSITORY / "src", quiet=2)
    peer = None if options.peer is None else peer_at(options.peer, directory, say)
    if peer is None:
        say(f"without --peer, so without {', '.join(WITH_PEER)}")
    rows: list[Row] = []
    try:
        wanted = [keys for keys in _STAGES if options.only & set(keys)]
        if options.seed is not None:
            random.Random(options.seed).shuffle(wanted)  # noqa: S311 - an order, no secret
        for number, keys in enumerate(wanted):
            # Each group starts without processes, networks or files of the groups before.
            sweep(directory, lab)
            own = directory / str(number)
            own.mkdir()
            bench = Bench(own, lab, options.scale, say)
            stage = partial(_STAGES[keys], bench, options.only, peer)
            rows += _run_stage(stage, [key for key in keys if key in options.only], say)
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        say("cleaning up")
        sweep(directory, lab)
        lab.close()
        if not options.keep:
            clear(directory)
    return rows


_Stage = Callable[[], Iterator[Row]]


def _run_stage(stage: _Stage, keys: list[str], say: Callable[[str], None]) -> list[Row]:
    """Return the rows of a stage, with missing rows as not measured."""
    rows: list[Row] = []
    reason = "the stage gave no such row"
    try:
        for row in stage():
            say(f"{row.key}: {row.figure} [{row.verdict.value}]")
            rows.append(row)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}"
        say(f"failed: {reason}")
    there = {row.key for row in rows}
    return rows + [
        Row(key=key, what="", figure=reason, verdict=Verdict.MISSING)
        for key in keys
        if key not in there
    ]


def _measure_fleet(bench: Bench, only: frozenset[str]) -> Iterator[Row]:
    bench.say(f"a daemon with {bench.scale.networks:,} networks")
    bench.lab.grow(bench.scale.networks)
    daemon = Daemon(bench.directory / "fleet")
    try:
        daemon.start()
        bench.fleet(daemon, bench.scale.networks)
        daemon.wait_settled()
        for step in _fleet_steps(bench, daemon, only):
            yield from _guarded(step, daemon, bench.say)
    finally:
        daemon.stop()


def _fleet_steps(bench: Bench, daemon: Daemon, only: frozenset[str]) -> Iterator[_Stage]:
    wanted = only.__contains__
    singles = {
        "stale": lambda: iter([measure_moves(bench, daemon)]),
        "recovery": lambda: iter([measure_recovery(bench, daemon)]),
        "flood": lambda: iter([measure_flood(bench, daemon)]),
    }
    yield lambda: measure_additions(bench, daemon, wanted)
    if wanted("stale"):
        yield singles["stale"]
    yield lambda: measure_losses(bench, daemon, wanted)
    for key in ("recovery", "flood"):
        if wanted(key):
            yield singles[key]
    if wanted("controller") or wanted("reload"):
        yield lambda: measure_scale(bench, daemon, wanted)


def _guarded(step: _Stage, daemon: Daemon, say: Callable[[str], None]) -> Iterator[Row]:
    """Run a step; report its failure, so that it does not stop other rows."""
    try:
        yield from step()
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        say(f"failed: {type(error).__name__}: {error}; the daemon says: {daemon.last_words()}")


def _machine(load_at_start: float) -> dict[str, object]:
    haproxy = subprocess.run([HAPROXY, "-v"], capture_output=True, text=True, check=False)
    return {
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "haproxy": haproxy.stdout.partition("\n")[0],
        "load_average_at_start": load_at_start,
        "load_average_at_end": os.getloadavg()[0],
    }


def _print_baseline(rows: Sequence[Row], console: Console) -> None:
    for row in rows:
        if "bare_config" in row.data:
            console.print(f"The bare HAProxy of {row.key}:", style="bold")
            console.print(str(row.data["bare_config"]), markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
