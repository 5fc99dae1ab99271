"""Signs of life of a process, read from the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Vitals", "read_vitals"]


@dataclass(frozen=True, slots=True)
class Vitals:
    """What `/proc/PID/stat` shows (proc_pid_stat(5)).

    Attributes:
        state: One letter: R running, S sleeping, D in the disk, T stopped, t traced, Z ended.
        ticks: Processor time used, in clock ticks (usually 10 ms each).
    """

    state: str
    ticks: int

    @property
    def stopped(self) -> bool:
        """Somebody has stopped it; it does nothing until it is told to go on."""
        return self.state in {"T", "t"}


def read_vitals(pid: int, proc: Path = Path("/proc")) -> Vitals | None:
    """How the process is; `None` when there is none."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold blanks and parentheses itself.
    fields = text.rpartition(")")[2].split()
    return Vitals(fields[0], int(fields[11]) + int(fields[12]))
