"""Operator of a demonstration's fleet: each command is printed, then run, with what it prints."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from support.fleet_world import FleetWorld
from support.lab import within

__all__ = ["DemoError", "Operator"]


class DemoError(Exception):
    """A command did not do what it was to do."""


@dataclass(slots=True)
class Operator:
    """The operator, and the console that shows what the operator does."""

    world: FleetWorld
    console: Console
    _certificate: Path = field(init=False)

    def __post_init__(self) -> None:
        self._certificate = self.world.operator("operator")

    def say(self, text: str) -> None:
        """Print what happens next."""
        self.console.print(text, style="bold", highlight=False, soft_wrap=True)

    def imdsproxy(self, line: str) -> None:
        """Run a command at the fleet's hubs.

        Raises:
            DemoError: The command fails.
        """
        self.console.print(f"  $ imdsproxy {line}", style="cyan", highlight=False, soft_wrap=True)
        where = [word for url in self.world.urls for word in ("--fleet", url)]
        words = (sys.executable, "-m", "imdsproxy", *where, "--fleet-certificate")
        ran = subprocess.run(
            (
                *within(self.world.etcd.lab.host),
                *(*words, str(self._certificate), *shlex.split(line)),
            ),
            capture_output=True,
            text=True,
            check=False,
        )
        for shown in (ran.stdout + ran.stderr).strip().splitlines():
            self.console.print(f"    {shown}", style="dim", highlight=False, markup=False)
        if ran.returncode != 0:
            raise DemoError(f"`imdsproxy {line}` ended with {ran.returncode}")
