"""A wall clock of its own for a host or hub, which a test steps; the machine's goes on as before.

Debian's libfaketime stands between the programs and the kernel. What is monotonic stays, as where a clock is stepped.
Go's programs, such as etcd, ask the kernel without a library: theirs cannot be stepped so.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FOLDERS: Final = Path("/usr/lib")
NOTICED_S: Final = 1.1
"""So long programs go on with the step before."""

_LIBRARY: Final = "*/faketime/libfaketimeMT.so.1"


@dataclass(frozen=True, slots=True)
class WallClock:
    """One that all programs have that are started with `environment`, or by what `haproxy` makes.

    Args:
        file: Has the step; where it is missing there is none.
    """

    file: Path

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for a program."""
        (library,) = _FOLDERS.glob(_LIBRARY)
        return {
            # Behind it all of malloc: HAProxy's jemalloc would ask for the time while the library still loads itself.
            "LD_PRELOAD": f"{library}:libc.so.6:libstdc++.so.6",
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Else threads that wait with a monotonic deadline don't wait.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            "FAKETIME_DISABLE_SHM": "1",
            "NO_FAKE_STAT": "1",
        }

    def haproxy(self, directory: Path) -> Path:
        """A program in this directory that is HAProxy with this clock: a controller starts it without variables."""
        program = directory / "haproxy-with-clock"
        words = " ".join(f"{name}={value}" for name, value in self.environment.items())
        program.write_text(f'#!/bin/sh\nexec env {words} {shutil.which("haproxy")} "$@"\n')
        program.chmod(0o755)
        return program

    def step(self, seconds: float) -> None:
        """Set it so much ahead of the machine's, or behind it; programs notice within a second."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(f"{self.file.name}.new")
        draft.write_text(f"{seconds:+.3f}\n")
        draft.chmod(0o644)
        draft.rename(self.file)
