"""What people and programs are told: the table, the ways to play, the JSON file."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from demo.daemon import Pids
from demo.reading import Transport
from demo.roster import Guest, networks
from demo.verdict import Verdict

__all__ = ["WIDE", "Steps", "document", "hints", "table", "write_json"]

_DIGITS: Final = 8
_HEADINGS: Final = (
    *("network", "guest", "dialect", "instance id", "hostname", "user-data"),
    *("IPv4", "IPv6", "cloud-init"),
)
_ONLY_WIDE: Final = frozenset({"hostname", "user-data"})

WIDE: Final = 108
"""The characters that the whole table takes."""


class Steps:
    """Progress: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """One finished or beginning step."""
        self._console.print(text, style="dim", highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def count(self, text: str, total: int) -> Iterator[Progress]:
        """A counted step; advance the progress's only task."""
        self.say(text) if not self._console.is_terminal else None
        with Progress(
            TextColumn("{task.description}", style="dim"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        ) as progress:
            progress.add_task(text, total=total)
            yield progress


def table(verdicts: Sequence[Verdict], *, width: int) -> Table:
    """What each guest saw: by curl over both address families, and by cloud-init's boot.

    In less than `WIDE` characters it says less, but every verdict.
    """
    kinds = {network.id: network.kind for network in networks()}
    hidden = frozenset() if width >= WIDE else _ONLY_WIDE
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for heading in _HEADINGS:
        if heading not in hidden:
            shown.add_column(heading, no_wrap=True)
    for guest, rows in itertools.groupby(verdicts, key=lambda verdict: verdict.guest):
        places = iter([guest.network, f"({kinds[guest.network]})"])
        names = iter([guest.name, guest.ipv4, guest.ipv6])
        for verdict in rows:
            place = Text(next(places, ""), style=guest.network)
            cells = zip(_HEADINGS, (place, next(names, ""), *_seen(verdict, width)), strict=True)
            shown.add_row(*(cell for heading, cell in cells if heading not in hidden))
        shown.add_row()
    return shown


def _seen(verdict: Verdict, width: int) -> Iterator[str]:
    ipv4 = verdict.readings[Transport.IPV4]
    yield str(verdict.dialect)
    yield _cut(ipv4.instance_id, 19 if width >= WIDE else 12)
    yield _cut(ipv4.hostname, 19)
    yield ipv4.user_data_sha256[:_DIGITS]
    for transport in Transport:
        yield _mark(bad=bool(verdict.readings[transport].faults))
    yield _mark(bad=bool(verdict.boot_faults), good=f"own, {verdict.boot.seconds:.1f} s")


def _cut(text: str, length: int) -> str:
    return escape(text if len(text) <= length else f"{text[: length - 1]}…")


def _mark(*, bad: bool, good: str = "own") -> str:
    return "[bold white on red]WRONG[/]" if bad else f"[green]{good}[/]"


def hints(guests: Sequence[Guest], cli: Sequence[str]) -> Iterator[str]:
    """Lines to copy while the demonstration stays up."""
    first, last = guests[0], guests[-1]
    yield shlex.join([*first.enter, "curl", "http://169.254.169.254/latest/meta-data/"])
    yield shlex.join(
        [*last.enter, "curl", "http://169.254.169.254/openstack/latest/meta_data.json"]
    )
    yield shlex.join([*last.enter, "curl", "http://[fe80::a9fe:a9fe%25eth0]/nocloud/meta-data"])
    yield shlex.join([*cli, "status"])
    yield shlex.join([*cli, "explain", "--network", last.network, "--from", last.ipv4])


def document(guests: Sequence[Guest], pids: Pids, cli: Sequence[str]) -> dict[str, object]:
    """What `--json` writes."""
    return {
        "guests": [
            {
                "name": guest.name,
                "network": guest.network,
                "netns": guest.netns,
                "enter": guest.enter,
                "instance_id": guest.instance_id,
                "uuid": guest.uuid,
                "hostname": guest.hostname,
                "availability_zone": guest.zone,
                "addresses": [guest.ipv4, guest.ipv6],
                "ssh_keys": list(guest.ssh_keys),
                "user_data_sha256": guest.user_data_sha256,
            }
            for guest in guests
        ],
        "haproxy": {"master": pids.master, "worker": pids.worker},
        "documents": list(pids.documents),
        "controller": pids.controller,
        "cli": list(cli),
    }


def write_json(file: Path, content: dict[str, object]) -> None:
    """Writes the file whole or not at all."""
    # One name for every run, so that what a killed one left is written over.
    building = file.with_name(f".{file.name}.imdsdemo")
    try:
        building.write_text(json.dumps(content, indent=2) + "\n")
        building.replace(file)
    finally:
        building.unlink(missing_ok=True)
