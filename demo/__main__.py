"""script/demo: builds the lab, starts the daemon, shows what each guest reads, cleans up."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from demo.cloudinit import download, unpack
from demo.daemon import Daemon
from demo.interruption import InterruptError, end_at_signals, ignore_signals
from demo.lab import build, forget_folder, remember_folder, sweep
from demo.place import alone, choose, prepare
from demo.processes import CommandError
from demo.reading import Dialect
from demo.roster import Guest, guests, networks
from demo.show import Steps, document, hints, table, write_json
from demo.verdict import Verdict, observe

_REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    once: bool
    dialects: tuple[Dialect, ...]
    json: Path | None
    directory: Path | None


def main(argv: Sequence[str]) -> int:
    """Runs the demonstration; returns the exit status."""
    options = _parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    end_at_signals()
    try:
        with alone():
            directory = choose(options.directory, _REPOSITORY)
            return _demonstrate(options, directory, console)
    except CommandError as failed:
        console.print(f"script/demo: {failed}", style="red", markup=False, soft_wrap=True)
        return 1
    except InterruptError as interrupted:
        return interrupted.exit_status


def _parse(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog="script/demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--once", action="store_true", help="leave after the table")
    parser.add_argument(
        "--dialect",
        action="append",
        choices=[str(one) for one in Dialect],
        help="only this one; may be given again (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="tell programs what is up")
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="where all files go (default: .demo)"
    )
    found = parser.parse_args(argv)
    dialects = tuple(one for one in Dialect if one in (found.dialect or Dialect))
    return Options(found.once, dialects, found.json, found.directory)


def _demonstrate(options: Options, directory: Path, console: Console) -> int:
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise CommandError(f"{options.json.absolute().parent} is no directory")
    steps = Steps(console)
    if sweep():
        steps.say("swept away what an interrupted run had left")
    prepare(directory)
    debs = download(_REPOSITORY / ".cache", say=steps.say)
    unpack(debs, directory / "cloud-init")
    daemon = Daemon(directory)
    folder_mark = directory / ".made-run-netns"
    word = secrets.token_hex(8)
    everyone = guests(word)
    try:
        remember_folder(folder_mark)
        steps.say(f"building {len(networks())} networks with {len(everyone)} guests")
        build(networks(), everyone)
        steps.say("starting imdsproxy and adding their records")
        daemon.start()
        daemon.fill(word)
        daemon.wait_serving()
        verdicts = _observe(everyone, options.dialects, directory, steps)
        right = _tell(verdicts, console)
        if options.json is not None:
            write_json(options.json, document(everyone, daemon.pids(), daemon.cli))
        if not options.once:
            _stay(everyone, daemon, console)
    finally:
        ignore_signals()
        steps.say("cleaning up")
        daemon.stop()
        sweep()
        forget_folder(folder_mark)
    return 0 if right else 1


def _observe(
    everyone: Sequence[Guest], dialects: Sequence[Dialect], directory: Path, steps: Steps
) -> list[Verdict]:
    total = len(everyone) * len(dialects)
    named = "every dialect" if len(dialects) == len(Dialect) else " and ".join(dialects)
    with steps.count(
        f"every guest reads with curl and boots with cloud-init, in {named}", total
    ) as bar:
        return observe(
            everyone,
            dialects,
            directory=directory,
            unpacked=directory / "cloud-init",
            at_once=(os.cpu_count() or 1) + 1,
            done=lambda: bar.advance(bar.task_ids[0]),
        )


def _tell(verdicts: Sequence[Verdict], console: Console) -> bool:
    console.print(table(verdicts, width=console.width))
    console.print()
    wrong = [
        f"{verdict.guest.name}, {verdict.dialect}, {fault}"
        for verdict in verdicts
        for fault in verdict.faults
    ]
    for line in wrong:
        console.print(line, style="red", markup=False, soft_wrap=True)
    if wrong:
        console.print("Not every guest saw its own metadata.", style="bold red")
    else:
        console.print("Every guest saw its own metadata and nothing else.", style="bold green")
    return not wrong


def _stay(everyone: Sequence[Guest], daemon: Daemon, console: Console) -> None:
    console.print("\nUp until Ctrl-C. Be a guest, or the operator:", style="bold")
    for line in hints(everyone, daemon.cli):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    with contextlib.suppress(InterruptError):
        while True:
            signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
