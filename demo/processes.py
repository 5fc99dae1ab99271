"""Commands run, and processes found and ended, by the namespace that they are in."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["CommandError", "Output", "end_processes", "inside", "processes_in", "run"]

_PROC: Final = Path("/proc")
_POLL_S: Final = 0.02


class CommandError(Exception):
    """A command that had to succeed did not; the message holds its words."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a command left: its exit status (negative: the signal), and both streams."""

    status: int
    out: bytes
    err: str


def inside(namespace: str, argv: Sequence[str]) -> list[str]:
    """The argv that runs `argv` in a network namespace, without a mount namespace of its own."""
    return ["nsenter", f"--net=/run/netns/{namespace}", "--", *argv]


def run(
    argv: Sequence[str], *, stdin: str = "", timeout_s: float = 30, must_succeed: bool = True
) -> Output:
    """Runs a command to its end.

    Raises:
        CommandError: It ran out of time, or ended with anything but 0 while it had to.
    """
    try:
        done = subprocess.run(
            argv,
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as expired:
        raise CommandError(f"{' '.join(argv)}: no end after {timeout_s:g} s") from expired
    output = Output(done.returncode, done.stdout, done.stderr.decode(errors="replace").strip())
    if must_succeed and output.status != 0:
        words = output.err or output.out.decode(errors="replace").strip()
        raise CommandError(f"{' '.join(argv)}: {words or f'exit status {output.status}'}")
    return output


def processes_in(namespaces: Iterable[str]) -> set[int]:
    """The pids whose own network namespace is one of the named ones."""
    inodes = set()
    for name in namespaces:
        with contextlib.suppress(OSError):
            inodes.add(Path("/run/netns", name).stat().st_ino)
    found = set()
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended, or is a kernel thread's leftover
                if (entry / "ns" / "net").stat().st_ino in inodes:
                    found.add(int(entry.name))
    found.discard(os.getpid())
    return found


def end_processes(namespaces: Sequence[str], *, patience_s: float = 2) -> int:
    """Ends every process in the namespaces: asked first, killed after `patience_s`.

    Returns:
        How many there were at the beginning.

    Raises:
        CommandError: Some survive being killed (uninterruptible in the kernel).
    """
    first = processes_in(namespaces)
    _signal(first, signal.SIGTERM)
    _signal(first, signal.SIGCONT)
    kill_at = time.monotonic() + patience_s
    give_up_at = kill_at + 10
    while left := processes_in(namespaces):
        now = time.monotonic()
        if now >= give_up_at:
            raise CommandError(f"processes that cannot be ended: {sorted(left)}")
        if now >= kill_at:
            _signal(left, signal.SIGKILL)
        time.sleep(_POLL_S)
    return len(first)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
