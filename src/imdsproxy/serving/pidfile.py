"""The document server's pid file: who runs, and that it is the only one.

The parent holds a lock on the file (flock(2)) as long as it lives, whatever kills it. Each line is `PID START`,
the parent's first, then its workers'; START is the process's start time in the kernel's ticks
(proc_pid_stat(5), field 22), so that a number given to another process since is not taken for ours. The last line
is `restarts N`.
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
    """The locked file.

    Raises:
        HostRefused: Another document server has it, or the file cannot be made.
        PrivilegeMissing: This process may not write there.
    """

    def __init__(self, path: Path) -> None:
        with refusing(f"open {path}"):
            descriptor = open_locked(path, os.O_RDWR | os.O_CREAT, 0o644)
        if descriptor is None:
            parent = read_pids(path).parent
            message = f"a document server runs here already{f' (pid {parent})' if parent else ''}"
            raise HostRefused(message, hint=f"its pid file is {path}")
        self.path, self.descriptor = path, descriptor
        self._written = b""

    def is_ours(self) -> bool:
        """Whether it was neither removed, nor is another server's by now."""
        return is_file_at(self.descriptor, self.path)

    def write(self, pids: Sequence[int], restarts: int = 0) -> None:
        """Say who runs: the parent, then the workers; and how many of these were started again."""
        text = "".join(f"{pid} {stat.started}\n" for pid in pids if (stat := read_stat(pid)))
        data = f"{text}{_RESTARTS} {restarts}\n".encode("ascii")
        if data != self._written:
            os.pwrite(self.descriptor, data, 0)
            os.ftruncate(self.descriptor, len(data))
            self._written = data

    def release(self) -> None:
        """Let another one start; the file stays, empty."""
        os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


def read_pids(path: Path) -> DocumentProcesses:
    """Which of the document server's processes live now, and how they have fared; none without the file."""
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
    """Send a signal to those of these processes that have not ended.

    Raises:
        PrivilegeMissing: One belongs to another account.
    """
    for pid in pids:
        with refusing(f"stop the document server's process {pid}"), suppress(ProcessLookupError):
            os.kill(pid, number)
