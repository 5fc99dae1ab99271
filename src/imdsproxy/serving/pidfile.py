"""The document server's pid file: who runs, and that it is the only one.

The parent holds a lock on the file (flock(2)) as long as it lives, whatever kills it. Each line is `PID START`,
the parent's first, then its workers'; START is the process's start time in the kernel's ticks
(proc_pid_stat(5), field 22), so that a number given to another process since is not taken for ours. The last line
is `restarts N`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.errors import HostRefused
from imdsproxy.host.files import is_file_at, open_locked
from imdsproxy.host.process import read_stat
from imdsproxy.host.refusal import host_refused

_POLL_S: Final = 0.02
_RESTARTS: Final = "restarts"


@dataclass(frozen=True, slots=True)
class DocumentProcesses:
    """The processes that live, of those that the file names.

    Attributes:
        parent: `None` when it was killed.
        restarts: Workers of this parent that ended, and were started again.
    """

    parent: int | None
    workers: tuple[int, ...]
    restarts: int = 0

    @property
    def pids(self) -> tuple[int, ...]:
        """All of them, the parent first."""
        return self.workers if self.parent is None else (self.parent, *self.workers)


class PidFile:
    """The locked file; made by `claim`, or taken over with an inherited descriptor."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def claim(cls, path: Path) -> PidFile:
        """Take the lock.

        Raises:
            HostRefused: Another document server has it, or the file cannot be made.
            PrivilegeMissing: This process may not write there.
        """
        try:
            descriptor = open_locked(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise host_refused(f"open {path}", error) from error
        if descriptor is None:
            lines = _lines(path)
            who = f" (pid {lines[0].split()[0]})" if lines else ""
            raise HostRefused(
                f"a document server runs here already{who}", hint=f"its pid file is {path}"
            )
        return cls(path, descriptor)

    def is_ours(self) -> bool:
        """Whether it was neither removed, nor is another server's by now."""
        return is_file_at(self.descriptor, self.path)

    def write(self, pids: Sequence[int], restarts: int = 0) -> None:
        """Say who runs: the parent, then the workers; and how many of these were started again."""
        text = "".join(f"{pid} {stat.started}\n" for pid in pids if (stat := read_stat(pid)))
        data = f"{text}{_RESTARTS} {restarts}\n".encode("ascii")
        os.pwrite(self.descriptor, data, 0)
        os.ftruncate(self.descriptor, len(data))

    def release(self) -> None:
        """Let another one start; the file stays, empty."""
        os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


def read_pids(path: Path) -> DocumentProcesses:
    """Which of the document server's processes live now, and how they have fared."""
    alive: list[int | None] = []
    restarts = 0
    for line in _lines(path):
        word, _, value = line.partition(" ")
        if word == _RESTARTS:
            restarts = int(value)
            continue
        stat = read_stat(int(word)) if word.isdigit() else None
        alive.append(int(word) if stat is not None and str(stat.started) == value else None)
    workers = tuple(pid for pid in alive[1:] if pid is not None)
    return DocumentProcesses(alive[0] if alive else None, workers, restarts)


def stop_documents(
    path: Path,
    *,
    timeout_s: float = 10.0,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Stop the document server, and workers whose parent was killed; `False` when nothing runs.

    What has not ended after `timeout_s` seconds is killed.

    Raises:
        HostRefused: A process is still there after twice that time.
        PrivilegeMissing: They belong to another account.
    """
    running = read_pids(path)
    if not running.pids:
        return False
    _signal(running.workers if running.parent is None else (running.parent,), signal.SIGTERM)
    deadline = monotonic() + timeout_s
    killed = False
    while left := read_pids(path).pids:
        if monotonic() >= deadline:
            if killed:
                raise HostRefused(
                    f"the document server's processes {', '.join(map(str, left))} do not end",
                    hint="a disk or a file system that hangs keeps them: see dmesg",
                )
            _signal(left, signal.SIGKILL)
            killed, deadline = True, deadline + timeout_s
        sleep(_POLL_S)
    return True


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        except OSError as error:
            raise host_refused(f"stop the document server's process {pid}", error) from error


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        # Without the file no process is known to run.
        return []
