"""Document server: a parent that keeps its workers alive, each on its own unix socket.

The parent creates the sockets and holds them open, so a connection to a worker that has just died waits for the next
worker instead of being refused. The parent imports everything before it forks, so the workers share that memory. It
depends on neither the controller nor HAProxy.

SIGTERM and SIGINT stop the server. On SIGHUP the parent executes its own command line again: the same process loads new
code and settings, creates new sockets and workers, puts the sockets in place when all workers answer, and ends the old
workers. A start after the parent was killed does the same; the old workers serve until then. No connection is lost.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401 - see below
import gc
import math
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
import uvicorn.lifespan.off  # noqa: F401 - see below

from imdsproxy.documents.document_app import DocumentService
from imdsproxy.documents.http import LIVENESS_PATH, serving
from imdsproxy.documents.pidfile import PidFile, read_pids, signal_all
from imdsproxy.documents.store import PasswordStore, RecordReader
from imdsproxy.errors import HostRefused, ImdsproxyError, refusing
from imdsproxy.host import process
from imdsproxy.host.account import Account
from imdsproxy.host.files import ensure_directory, limit_log
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.host.servers import open_unix_socket
from imdsproxy.reconcile.progress import Backoff

# Libraries import the modules marked above at first use. That would be too late here: an unprivileged worker may not be
# able to read them, and after an upgrade they would not match the code in memory.

_SOCKET_MODE: Final = 0o660
_PRIVATE: Final = 0o750
_CACHE_BYTES: Final = 32 * 1024 * 1024
"""Memory for parsed records in each worker."""

_GRACE_S: Final = 5.0
_ORPHAN_POLL_S: Final = 0.2
_START_WITHIN_S: Final = 15.0
_START_POLL_S: Final = 0.02
_LOOK_EVERY_S: Final = 1.0
_STOP_WITHIN_S: Final = 8.0
_SHORTEST_S: Final = 1e-6
"""Shortest timer, because 0 would disarm it."""
_HEALTHY_AFTER_S: Final = 5.0
_ATTEMPTS: Final = 3
_QUESTION: Final = (
    b"GET %b HTTP/1.1\r\nHost: documents\r\nConnection: close\r\n\r\n" % LIVENESS_PATH
)
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM)
"""Signals that the parent blocks and waits for. Signals that arrive during a re-execution stay pending."""

_log: Final = structlog.get_logger()


@dataclass(slots=True)
class Worker:
    """Listening socket and its process.

    Attributes:
        at: Path of the socket: beside `path` until all workers answer.
        failures: Number of consecutive processes that ended soon after their start.
        backoff: Pauses before a restart, longer after each early end, so that a fault does not keep the host busy.
        question: Connection with a pending probe; the answer is due within a second.
        doubt: Unanswered probes of the process.
    """

    path: Path
    at: Path
    listener: socket.socket
    file: os.stat_result
    pid: int | None = None
    answers: bool = False
    started: float = 0.0
    failures: int = 0
    backoff: Backoff = field(default_factory=lambda: Backoff(0.1, 5.0))
    due: float = 0.0
    question: socket.socket | None = None
    doubt: process.Doubt = field(default_factory=process.Doubt)

    def is_at(self, path: Path) -> bool:
        """Return whether clients that connect to the path reach this socket."""
        with suppress(OSError):
            return os.path.samestat(path.stat(), self.file)
        return False

    def ask(self) -> None:
        self.question = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.question.setblocking(False)
        with suppress(OSError):
            self.question.connect(os.fspath(self.at))
            self.question.send(_QUESTION)

    def has_answered(self) -> bool:
        """Return whether an answer to the last probe has begun."""
        with suppress(OSError):
            return self.question is not None and bool(self.question.recv(1))
        return False

    def note_end(self, now: float) -> None:
        """Note the end of the process and schedule the next; the first restart is immediate, as after a `kill`."""
        if now - self.started >= _HEALTHY_AFTER_S:
            self.failures = 0
            self.backoff.succeed()
        else:
            self.failures += 1
        self.due = now + (self.backoff.fail() if self.failures > 1 else 0.0)

    def close_question(self) -> None:
        if self.question is not None:
            self.question.close()
            self.question = None


@dataclass(slots=True)
class DocumentServer:
    """Parent process of the document server.

    Args:
        passwords: Directory of guests' passwords; the server creates it and gives it to the workers' account.
        pid_file: File that lists the parent and the workers; locked while the server runs.
        log: File of this process's standard error, if it is ours; the server limits its size.
        account: Account of the workers, and group of the sockets; `None` keeps the present one.
    """

    sockets: tuple[Path, ...]
    records: Path
    passwords: Path
    pid_file: Path
    notifier: ServiceNotifier
    log: Path | None = None
    account: Account | None = None
    _lock: PidFile = field(init=False)
    _parent: process.ProcessHandle | None = None
    _workers: list[Worker] = field(default_factory=list)
    _predecessors: list[process.ProcessHandle] = field(default_factory=list)
    _predecessors_until: float = math.inf
    _next_look: float = 0.0
    _restarts: int = 0
    _complaint: str = ""
    _ending: signal.Signals | None = None

    def run(self) -> None:
        """Serve until a signal stops the server.

        Raises `HostRefused` if another document server runs, a socket cannot be bound, or no worker starts.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        before = read_pids(self.pid_file)
        self._predecessors = [*filter(None, map(process.open_process, before.workers))]
        self._lock = PidFile(self.pid_file)
        self._parent = process.open_process(os.getpid())
        self._make_directory(self.records, user=False)
        self._make_directory(self.passwords, user=True)
        # If nothing serves yet, clients may connect at once: they wait for the workers.
        self._workers = [
            self._bind(path, path.with_suffix(".new") if self._predecessors else path)
            for path in self.sockets
        ]
        process.raise_descriptor_limit()
        gc.collect()
        gc.freeze()
        self._start()
        self.notifier.ready(f"{len(self._workers)} workers answer")
        while self._ending is not signal.SIGTERM:
            if self._ending is signal.SIGHUP:
                self._ending = None
                self._replace()
            self._step(_LOOK_EVERY_S)
        self._stop()
        self._lock.release()

    def _make_directory(self, path: Path, *, user: bool) -> None:
        account, owner = self.account, None
        if account is not None:
            owner = account.user if user else -1, account.group
        # Without an account to own it, an existing directory keeps its owner and mode.
        if owner is not None or not path.is_dir():
            ensure_directory(path, mode=_PRIVATE, owner=owner)

    def _bind(self, path: Path, at: Path) -> Worker:
        if not at.parent.is_dir():
            ensure_directory(at.parent)
        owner = None if self.account is None else (-1, self.account.group)
        listener = open_unix_socket(at, mode=_SOCKET_MODE, owner=owner)
        return Worker(path, at, listener, at.stat())

    def _start(self) -> None:
        deadline = time.monotonic() + _START_WITHIN_S
        while not (self._ending is signal.SIGTERM or all(one.answers for one in self._workers)):
            failed = max(worker.failures for worker in self._workers) >= _ATTEMPTS
            if failed or time.monotonic() > deadline:
                self._predecessors.clear()
                self._stop()
                reason = "the document server's workers did not start"
                raise HostRefused(reason, hint="see the workers' messages above")
            self._step(_START_POLL_S)
        for worker in self._workers:
            # An existing socket file may be removed at any time; it is then created again.
            if worker.at != worker.path:
                with refusing(f"listen on {worker.path}"):
                    worker.at.replace(worker.path)
                worker.at = worker.path
        for one in self._predecessors:
            one.kill(signal.SIGTERM)
        self._predecessors_until = time.monotonic() + _STOP_WITHIN_S

    def _replace(self) -> None:
        """Execute our own command line again; return only if that fails."""
        self.notifier.reloading(int(time.monotonic() * 1_000_000))
        _log.info("loading new code and settings")
        try:
            # A failed start would end this process, so try first to create what it will need.
            for worker in self._workers:
                trial = self._bind(worker.path, worker.path.with_suffix(".new"))
                trial.listener.close()
                trial.at.unlink()
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - our own command line, no shell
        except (OSError, ImdsproxyError) as error:
            _log.error("the reload failed; the old workers keep serving", reason=str(error))
        self.notifier.ready("the reload failed; see the log")

    def _stop(self) -> None:
        """End all workers: SIGTERM, a grace period for their requests, then SIGKILL.

        Remove the sockets first, so that no client connects to a server that is stopping.
        """
        for worker in self._workers:
            if worker.is_at(worker.at):
                worker.at.unlink(missing_ok=True)
            worker.listener.close()
        deadline, number = time.monotonic() + _STOP_WITHIN_S, signal.SIGTERM
        signal_all(self._pids, number)
        while self._pids:
            if time.monotonic() > deadline:
                deadline, number = math.inf, signal.SIGKILL
                _log.warning("workers do not end; killing them", pids=sorted(self._pids))
                signal_all(self._pids, number)
            _wait_for_signal(0.1)
            self._collect()

    @property
    def _pids(self) -> tuple[int, ...]:
        workers = (worker.pid for worker in self._workers if worker.pid is not None)
        return (*workers, *(one.pid for one in self._predecessors))

    def _step(self, longest_s: float) -> None:
        """Start workers that are due, check running ones, and wait for the next event."""
        if not self._lock.is_ours():
            reason = "ending: the pid file was removed or belongs to another document server"
            _log.error(reason, file=str(self.pid_file))
            self._ending = signal.SIGTERM
            return
        now = time.monotonic()
        look = now >= self._next_look
        if look:
            self._next_look = now + _LOOK_EVERY_S
            if self.log is not None:
                limit_log(self.log)
        if now > self._predecessors_until:
            for one in self._predecessors:
                one.kill(signal.SIGKILL)
        for worker in self._workers:
            self._restore(worker)
            if worker.pid is not None:
                self._check(worker, worker.pid, look=look)
            elif worker.due <= now:
                self._fork(worker)
        self._lock.write((os.getpid(), *self._pids), self._restarts)
        due = (max(0.0, worker.due - now) for worker in self._workers if worker.pid is None)
        self._wait(min([longest_s, *due]))

    def _wait(self, timeout_s: float) -> None:
        caught = _wait_for_signal(timeout_s)
        if caught == signal.SIGHUP:
            self._ending = self._ending or signal.SIGHUP
        elif caught in {signal.SIGTERM, signal.SIGINT}:
            self._ending = signal.SIGTERM
        for worker, pid, status in self._collect():
            code, path = os.waitstatus_to_exitcode(status), str(worker.path)
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            _log.error("a worker ended; starting another", pid=pid, how=how, socket=path)
            self._restarts += 1
            worker.note_end(time.monotonic())

    def _restore(self, worker: Worker) -> None:
        """Create a missing socket file again: without it the worker is unreachable."""
        if worker.is_at(worker.at):
            return
        path = str(worker.path)
        try:
            new = self._bind(worker.path, worker.at)
        except ImdsproxyError as error:
            reason = str(error)
            if reason != self._complaint:
                _log.error("a missing socket file cannot be created", socket=path, reason=reason)
            self._complaint = reason
            return
        _log.warning("a socket file was removed; created again", socket=path)
        worker.listener.close()
        worker.listener, worker.file = new.listener, new.file
        if worker.pid is not None:
            signal_all([worker.pid], signal.SIGTERM)

    def _check(self, worker: Worker, pid: int, *, look: bool) -> None:
        """Read a worker's answer and, once a second, probe the worker again; kill a worker that does not answer."""
        if worker.has_answered():
            worker.close_question()
            worker.doubt = process.Doubt()
            if not worker.answers:
                worker.answers = True
                _log.info("a worker answers", pid=pid, socket=str(worker.path))
        # A worker started within the last second may not have run yet.
        if not look or time.monotonic() - worker.started < _LOOK_EVERY_S:
            return
        if worker.question is not None:
            worker.doubt = worker.doubt.after_silence(pid, process.read_stat(pid))
            worker.close_question()
        worker.ask()
        if worker.doubt.hung:
            _log.error("a worker does not answer: ending it", pid=pid, socket=str(worker.path))
            signal_all([pid], signal.SIGKILL)

    def _fork(self, worker: Worker) -> None:
        worker.close_question()
        with refusing("start a worker"):
            pid = os.fork()
        if pid == 0:
            self._run_worker(worker)
        worker.pid, worker.answers, worker.started = pid, False, time.monotonic()
        worker.ask()

    def _run_worker(self, worker: Worker) -> None:
        """Run the worker and exit: the parent's code must not run twice."""
        status = 1
        try:
            # A terminal sends these signals to every process of its group, but only the parent should act on them.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            for other in self._workers:
                other.close_question()
                if other is not worker:
                    other.listener.close()
            os.close(self._lock.descriptor)
            self.serve(worker)
            status = 0
        except BaseException:  # noqa: BLE001 - logged, and the process ends
            _log.exception("a worker failed", socket=str(worker.path))
        finally:
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(status)

    def _collect(self) -> list[tuple[Worker, int, int]]:
        statuses: dict[int, int] = {}
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                statuses[found[0]] = found[1]
        for one in [one for one in self._predecessors if not one.alive()]:
            one.close()
            self._predecessors.remove(one)
        ended = [(one, one.pid, statuses[one.pid]) for one in self._workers if one.pid in statuses]
        for worker, _, _ in ended:
            worker.pid, worker.answers = None, False
        return ended

    def serve(self, worker: Worker) -> None:
        """Run as a worker until SIGTERM, then finish open requests.

        A worker whose parent was killed serves until another server listens at its path.
        """
        if self.account is not None:
            self.account.assume()
        asyncio.run(self._serve(worker))

    async def _serve(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, over.set)
        records = RecordReader(self.records, capacity=_CACHE_BYTES)
        documents = DocumentService(records, PasswordStore(self.passwords))
        async with serving(documents, worker.listener, grace_s=_GRACE_S):
            succession = loop.create_task(self._end_when_replaced(worker, over))
            await over.wait()
            succession.cancel()

    async def _end_when_replaced(self, worker: Worker, over: asyncio.Event) -> None:
        if self._parent is not None:
            await self._parent.wait()
        path = str(worker.path)
        _log.warning("the document server's parent is gone; serving on", socket=path)
        while worker.is_at(worker.path):  # noqa: ASYNC110 - the file system is what changes
            await asyncio.sleep(_ORPHAN_POLL_S)
        _log.info("another document server has taken over", socket=path)
        over.set()


def _wait_for_signal(timeout_s: float) -> int:
    """Wait for one of `_SIGNALS` and return it; SIGALRM means the timeout."""
    # Not `sigtimedwait`: if a process is stopped until the timeout, CPython returns a signal that never arrived.
    signal.setitimer(signal.ITIMER_REAL, max(timeout_s, _SHORTEST_S))
    return signal.sigwaitinfo(_SIGNALS).si_signo
