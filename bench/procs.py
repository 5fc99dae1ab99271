"""Processes from outside: memory, processor time, processor affinity, and search by directory."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "Memory",
    "cpu_seconds",
    "end_all",
    "find_by_argument",
    "memory",
    "pin",
    "wait_until",
]

_PROC: Final = Path("/proc")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_POLL_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: proportional set size (shared pages divided among processes), and resident set size."""

    pss: int
    rss: int


def memory(pids: Iterable[int]) -> Memory:
    """Return the sums over these processes; processes that have ended count nothing."""
    pss = rss = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    pss += int(line.split()[1]) * 1024
                elif line.startswith("Rss:"):
                    rss += int(line.split()[1]) * 1024
    return Memory(pss, rss)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, user and system, in seconds.

    The value is exact if the kernel has schedstat (of the current threads), else in clock ticks of 10 ms. Ticks charge
    too much or too little to a process that wakes often and briefly.
    """
    try:
        tasks = [one / "schedstat" for one in (_PROC / str(pid) / "task").iterdir()]
        return sum(int(one.read_text().split()[0]) for one in tasks) / 1e9
    except FileNotFoundError:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def pin(pid: int, cpus: Iterable[int]) -> None:
    """Bind all threads of a process to these processors."""
    chosen = set(cpus) & os.sched_getaffinity(0)
    if not chosen:
        return
    for task in (_PROC / str(pid) / "task").iterdir():
        os.sched_setaffinity(int(task.name), chosen)


def find_by_argument(path: Path) -> set[int]:
    """Return the pids of processes whose command line names the directory or a file in it, except our own."""
    wanted = os.fsencode(path)
    found = set()
    for entry in _PROC.iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if any(one == wanted or wanted + b"/" in one for one in arguments):
                found.add(int(entry.name))
    return found


def end_all(pids: Iterable[int], *, patience_s: float = 5.0) -> None:
    """Send SIGKILL, and wait until all have ended."""
    left = set(pids)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(_alive(pid) for pid in left), patience_s)


def _alive(pid: int) -> bool:
    try:
        state = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def wait_until(
    condition: Callable[[], bool], patience_s: float, *, every_s: float = _POLL_S
) -> bool:
    """Poll the condition; return whether it came true in time."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True
