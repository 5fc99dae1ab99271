"""Pid file of the document server: lists its processes, and ensures that only one server runs.

The parent locks the file (flock(2)) for its whole life; the lock ends even if the parent is killed. Each line is `PID
START`, the parent's first, then its workers'. START is the process's start time in the kernel's ticks
(proc_pid_stat(5), field 22), so that a reused pid is not mistaken for ours. The last line is `restarts N`.
"""

import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.errors import HostRefused, refusing
from imdsproxy.host.files import is_file_at, open_locked
from imdsproxy.host.process import read_stat

_RESTARTS: Final = "restarts"


@dataclass(frozen=True, slots=True)
class DocumentProcesses:
    """Processes in the file that are running; no parent if it was killed. `restarts` counts restarts of its workers."""

    parent: int | None
    workers: tuple[int, ...]
    restarts: int = 0

    @property
    def pids(self) -> tuple[int, ...]:
        return self.workers if self.parent is None else (self.parent, *self.workers)


class PidFile:
    """Locked pid file; raises `HostRefused` if another document server holds the lock."""

    def __init__(self, path: Path) -> None:
        with refusing(f"open {path}"):
            descriptor = open_locked(path, os.O_RDWR | os.O_CREAT, 0o644)
        if descriptor is None:
            parent = read_pids(path).parent
            message = f"a document server is already running{f' (pid {parent})' if parent else ''}"
            raise HostRefused(message, hint=f"its pid file is {path}")
        self.path, self.descriptor = path, descriptor
        self._written = b""

    def is_ours(self) -> bool:
        return is_file_at(self.descriptor, self.path)

    def write(self, pids: Sequence[int], restarts: int = 0) -> None:
        text = "".join(f"{pid} {stat.started}\n" for pid in pids if (stat := read_stat(pid)))
        data = f"{text}{_RESTARTS} {restarts}\n".encode("ascii")
        if data != self._written:
            os.pwrite(self.descriptor, data, 0)
            os.ftruncate(self.descriptor, len(data))
            self._written = data

    def release(self) -> None:
        """Release the lock, so that another server can start; the file stays, empty."""
        os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


def read_pids(path: Path) -> DocumentProcesses:
    """Return the document server's running processes and the number of restarts; none without the file."""
    alive: list[int | None] = []
    restarts, lines = 0, list[str]()
    with suppress(OSError):
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    for line in lines:
        word, _, value = line.partition(" ")
        if word == _RESTARTS:
            restarts = int(value)
            continue
        stat = read_stat(int(word)) if word.isdigit() else None
        alive.append(int(word) if stat is not None and str(stat.started) == value else None)
    workers = tuple(pid for pid in alive[1:] if pid is not None)
    return DocumentProcesses(alive[0] if alive else None, workers, restarts)


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to the processes that have not ended; raise `PrivilegeMissing` if one has another account."""
    for pid in pids:
        with refusing(f"stop the document server's process {pid}"), suppress(ProcessLookupError):
            os.kill(pid, number)
