"""Keeps worker processes alive: one for each socket, a new one at once when one dies or hangs."""

from __future__ import annotations

import gc
import math
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Final, TypeAlias

import structlog

from imdsproxy.errors import HostRefused, ImdsproxyError
from imdsproxy.host.files import limit_log
from imdsproxy.host.process import (
    Doubt,
    ProcessHandle,
    open_process,
    raise_descriptor_limit,
    read_stat,
)
from imdsproxy.host.refusal import host_refused
from imdsproxy.serving.http import LIVENESS_PATH
from imdsproxy.serving.pidfile import PidFile

_START_WITHIN_S: Final = 15.0
_LOOK_EVERY_S: Final = 1.0
_STOP_WITHIN_S: Final = 8.0
_HEALTHY_AFTER_S: Final = 5.0
_FIRST_DELAY_S: Final = 0.1
_LONGEST_DELAY_S: Final = 5.0
_ATTEMPTS: Final = 3
_PID: Final = struct.Struct("=i")
HANDLED_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def restart_delay(failures: int) -> float:
    """Seconds until the next process starts after so many in a row that died young.

    The first time at once, as after a `kill`; then ever later, so that a fault does not keep the host busy.
    """
    if failures <= 1:
        return 0.0
    return min(_FIRST_DELAY_S * 2.0 ** min(failures - 2, 16), _LONGEST_DELAY_S)


class Ending(Enum):
    """Why the supervisor came back."""

    STOP = "stop"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class Place:
    """A listening socket and the file it is found by (device and inode tell whether it still is)."""

    path: Path
    listener: socket.socket
    identity: tuple[int, int]

    def is_ours(self) -> bool:
        """Whether clients that connect to the path still come to this socket."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.identity


Serve: TypeAlias = Callable[[Place, int, Callable[[], None]], None]
"""What a worker does: serve the place; the reading end of a pipe ends when the parent does; the last is called once,
when requests are answered."""


@dataclass(slots=True)
class _Worker:
    """One place and its process.

    Attributes:
        pid: `None` between two processes.
        answers: Whether its process has announced itself.
        failures: Processes in a row that died young.
        due: When the next one is to start, while there is none.
        question: A connection with a request on it; within a second there is to be an answer.
        doubt: What requests without an answer say of the process.
    """

    place: Place
    pid: int | None = None
    answers: bool = False
    started: float = 0.0
    failures: int = 0
    due: float = 0.0
    question: socket.socket | None = None
    doubt: Doubt = field(default_factory=Doubt)


class Supervisor:
    """The parent's part.

    Args:
        places: The sockets, one for each worker.
        serve: Run in each worker, which ends when it returns.
        pid_file: Kept current.
        log: Kept short.
        bind: Makes a socket anew where its file was removed.
        monotonic: The clock.

    Attributes:
        alive: The writing end of a pipe that ends, for the workers, when this process does.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        serve: Serve,
        pid_file: PidFile,
        log: Path | None,
        bind: Callable[[Path], Place],
        monotonic: Callable[[], float],
    ) -> None:
        self._workers = [_Worker(place) for place in places]
        self._serve = serve
        self._pid_file = pid_file
        self._log_file = log
        self._bind = bind
        self._monotonic = monotonic
        self._ending: Ending | None = None
        self._complaint = ""
        self._predecessors: list[ProcessHandle] = []
        self._predecessors_until = math.inf
        self._next_look = 0.0
        self._restarts = 0
        self._alive, self.alive = os.pipe()
        self._wakeup, self._wakeup_writer = os.pipe()
        self._announced, self._announce = os.pipe()
        self._log = structlog.get_logger()

    @property
    def places(self) -> tuple[Place, ...]:
        """The sockets, as they are now."""
        return tuple(worker.place for worker in self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Every worker process, predecessors that have not ended yet included."""
        workers = (worker.pid for worker in self._workers if worker.pid is not None)
        return (*workers, *(one.pid for one in self._predecessors))

    def start(self, predecessors: Iterable[int] = ()) -> None:
        """Start all workers and wait until they answer; then end the predecessors.

        Args:
            predecessors: Workers of an earlier program or parent: children of this process, or not.

        Raises:
            HostRefused: A worker does not come up; none is left running.
        """
        self._predecessors = [one for one in map(open_process, predecessors) if one is not None]
        self._catch_signals()
        raise_descriptor_limit()
        gc.collect()
        gc.freeze()
        deadline = self._monotonic() + _START_WITHIN_S
        while self._ending is None and not all(worker.answers for worker in self._workers):
            failed = max(worker.failures for worker in self._workers) >= _ATTEMPTS
            if failed or self._monotonic() > deadline:
                self._end(worker.pid for worker in self._workers if worker.pid is not None)
                raise HostRefused(
                    "the document server's workers do not come up", hint="see their messages above"
                )
            self._step()
        for one in self._predecessors:
            one.kill(signal.SIGTERM)
        self._predecessors_until = self._monotonic() + _STOP_WITHIN_S

    def run(self) -> Ending:
        """Keep the workers alive until a signal says what is next."""
        while self._ending is None:
            self._step()
        ending, self._ending = self._ending, None
        return ending

    def stop(self) -> None:
        """End all workers: ask, wait while they finish their requests, then kill what is left.

        The sockets go first, so that no client connects to what will not be served.
        """
        for place in self.places:
            if place.is_ours():
                place.path.unlink(missing_ok=True)
            place.listener.close()
        self._end(self.pids)

    def _end(self, pids: Iterable[int]) -> None:
        left = set(pids)
        for pid in left:
            _signal(pid, signal.SIGTERM)
        deadline = self._monotonic() + _STOP_WITHIN_S
        while left:
            if self._monotonic() > deadline:
                self._log.warning("workers do not end; killing them", pids=sorted(left))
                for pid in left:
                    _signal(pid, signal.SIGKILL)
                deadline = float("inf")
            self._wait(0.1)
            self._reap(stopping=True)
            left.intersection_update(self.pids)

    def _step(self) -> None:
        if not self._pid_file.is_ours():
            self._log.error(
                "the pid file was removed, or is another document server's: ending",
                file=str(self._pid_file.path),
            )
            self._ending = Ending.STOP
            return
        self._restore_places()
        now = self._monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_EVERY_S
            self._end_hung()
            if self._log_file is not None:
                limit_log(self._log_file)
        for worker in self._workers:
            if worker.pid is None and worker.due <= now:
                self._fork(worker)
        due = [worker.due for worker in self._workers if worker.pid is None]
        self._wait(min([_LOOK_EVERY_S, *(max(0.0, moment - now) for moment in due)]))
        self._reap(stopping=False)

    def _end_hung(self) -> None:
        """Ask each worker; end one that does not answer, and predecessors that do not end."""
        for worker in self._workers:
            if worker.pid is None:
                continue
            if worker.question is not None:
                if _answered(worker.question):
                    worker.doubt = Doubt()
                else:
                    worker.doubt = worker.doubt.after_silence(worker.pid, read_stat(worker.pid))
            worker.question = _ask(worker.place.path)
            if worker.doubt.hung:
                self._log.error(
                    "a worker does not answer: ending it",
                    pid=worker.pid,
                    socket=str(worker.place.path),
                )
                _signal(worker.pid, signal.SIGKILL)
        if self._monotonic() > self._predecessors_until:
            for one in self._predecessors:
                one.kill(signal.SIGKILL)

    def _restore_places(self) -> None:
        """Listen again where a socket's file is gone: a worker is unreachable without it."""
        for worker in self._workers:
            if worker.place.is_ours():
                continue
            try:
                place = self._bind(worker.place.path)
            except ImdsproxyError as error:
                reason, path = str(error), str(worker.place.path)
                if reason != self._complaint:
                    self._log.error(
                        "a socket is gone and cannot be made", socket=path, reason=reason
                    )
                self._complaint = reason
                continue
            self._log.warning("a socket was taken away; listening anew", socket=str(place.path))
            worker.place.listener.close()
            worker.place = place
            if worker.pid is not None:
                _signal(worker.pid, signal.SIGTERM)

    def _wait(self, timeout_s: float) -> None:
        readable, _, _ = select.select([self._wakeup, self._announced], [], [], timeout_s)
        if self._wakeup in readable:
            os.read(self._wakeup, 4096)
        if self._announced in readable:
            (pid,) = _PID.unpack(os.read(self._announced, _PID.size))
            for worker in self._workers:
                if worker.pid == pid:
                    worker.answers = True
                    path = str(worker.place.path)
                    self._log.info("a worker answers", pid=worker.pid, socket=path)

    def _reap(self, *, stopping: bool) -> None:
        ended = [one for one in self._predecessors if not one.alive()]
        for one in ended:
            _ended(one.pid)
            one.close()
            self._predecessors.remove(one)
        if ended:
            self._pid_file.write((os.getpid(), *self.pids), self._restarts)
        for worker in self._workers:
            if worker.pid is None:
                continue
            status = _ended(worker.pid)
            if status is None:
                continue
            if not stopping:
                self._restarts += 1
                self._log.error(
                    "a worker ended; starting another",
                    pid=worker.pid,
                    how=_describe(status),
                    socket=str(worker.place.path),
                )
            self._bury(worker)

    def _bury(self, worker: _Worker) -> None:
        now = self._monotonic()
        worker.failures = 0 if now - worker.started >= _HEALTHY_AFTER_S else worker.failures + 1
        worker.due = now + restart_delay(worker.failures)
        worker.pid, worker.answers = None, False

    def _fork(self, worker: _Worker) -> None:
        # A signal between fork and the child's own dispositions would run the parent's handlers there.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._child(worker)
        except OSError as error:
            raise host_refused("start a worker", error) from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        worker.pid, worker.started = pid, self._monotonic()
        self._pid_file.write((os.getpid(), *self.pids), self._restarts)

    def _child(self, worker: _Worker) -> None:
        """Never returns: nothing of the parent's may run twice."""
        status = 1
        try:
            self._leave_parent(worker)
            self._serve(worker.place, self._alive, self._announce_self)
            status = 0
        except BaseException:  # noqa: BLE001 - logged, and the process ends
            self._log.exception("a worker failed", socket=str(worker.place.path))
        finally:
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(status)

    def _leave_parent(self, worker: _Worker) -> None:
        signal.set_wakeup_fd(-1)
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # A terminal sends these to everybody; what is to happen the parent says.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        for other in self._workers:
            if other.question is not None:
                other.question.close()
            if other is not worker:
                other.place.listener.close()
        for descriptor in (
            self.alive,
            self._announced,
            self._wakeup,
            self._wakeup_writer,
            self._pid_file.descriptor,
        ):
            os.close(descriptor)

    def _announce_self(self) -> None:
        os.write(self._announce, _PID.pack(os.getpid()))
        os.close(self._announce)

    def _catch_signals(self) -> None:
        for descriptor in (self._wakeup, self._wakeup_writer):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wakeup_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._note_stop)
        signal.signal(signal.SIGINT, self._note_stop)
        signal.signal(signal.SIGHUP, self._note_replace)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)

    def _note_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._ending = Ending.STOP

    def _note_replace(self, _number: int, _frame: FrameType | None) -> None:
        if self._ending is None:
            self._ending = Ending.REPLACE


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _ask(path: Path) -> socket.socket:
    """Send a request, without waiting for anything; where that is not possible there will be no answer."""
    question = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    question.setblocking(False)
    with suppress(OSError):
        question.connect(os.fspath(path))
        question.send(
            b"GET %b HTTP/1.1\r\nHost: documents\r\nConnection: close\r\n\r\n" % LIVENESS_PATH
        )
    return question


def _answered(question: socket.socket) -> bool:
    """Whether an answer has begun; the connection is closed."""
    with question, suppress(OSError):
        return bool(question.recv(1))
    return False


def _ended(pid: int) -> int | None:
    """The wait status of a child that has ended; `None` while it has not."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return status if found == pid else None


def _describe(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.waitstatus_to_exitcode(status)}"
