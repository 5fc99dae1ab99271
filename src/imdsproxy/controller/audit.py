"""Audit log: reads lines from HAProxy's workers and writes them to a file or to systemd's journal.

HAProxy does not wait for the log. Unread lines stay in the connection and in HAProxy's ring; HAProxy drops and counts
lines that do not fit in the ring. So a hung disk blocks only the log.

Lines are removed from a connection after they have been written. If the service manager keeps the connections while no
controller runs, the next controller gets all unwritten lines, even after a kill.
"""

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

import structlog

from imdsproxy.config.policy import AuditSettings
from imdsproxy.errors import Problem
from imdsproxy.haproxy.rules.request_log import lost_line, read_audit
from imdsproxy.host.files import open_log
from imdsproxy.host.process import start_thread
from imdsproxy.reconcile.part import Count, Gauge, Impact, Part

KEPT_WORKERS: Final = "audit-worker"
"""Name under which the service manager stores workers' connections."""

_FIELD: Final = "audit.destination"
_CHUNK: Final = 256 * 1024
_PAUSE_S: Final = 0.1
_SHORT_S: Final = 0.002
"""Pauses between two reads, in seconds. The short pause applies while much data is waiting: it empties HAProxy's ring
quickly, and HAProxy rests until the next read (ADR 36)."""

_MUCH: Final = 64 * 1024
_AGAIN_S: Final = 5.0
_HANGS_S: Final = 5.0
_LAST_S: Final = 1.0
"""Time for the last lines when the controller ends, in seconds."""

_JOURNAL: Final = "journal"
_JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
_ENTRY: Final = b"PRIORITY=6\nSYSLOG_IDENTIFIER=imdsproxy-audit\nMESSAGE=%s\n"
_PER_SECOND: Final = 300
"""Lines per second. The journal takes 10,000 lines in 30 seconds from a unit, then drops our other messages too."""


def append_lines(path: Path, lines: bytearray) -> None:
    """Append whole lines to a file; without lines, only check that the file is writable.

    The file is created with mode 0640 before the first line, also after it was renamed or removed.

    Raises:
        OSError: No line was written; the caller must retry all.
    """
    with os.fdopen(open_log(path), "ab", buffering=0) as file:
        before, left = os.fstat(file.fileno()).st_size, memoryview(lines)
        try:
            while left:
                left = left[os.write(file.fileno(), left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


@dataclass(slots=True)
class Journal:
    """Client of systemd's journal, in its native protocol. It limits lines per second to leave room for our messages.

    Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
    """

    address: Path = _JOURNAL_SOCKET
    clock: Callable[[], float] = time.monotonic
    per_second: int = _PER_SECOND
    lost: int = 0
    _second: int = 0
    _written: int = 0
    _skipped: int = 0

    def write(self, lines: bytearray) -> None:
        """Write lines as `append_lines`, but remove each written or dropped line from `lines` before a failure."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(1)
            channel.connect(os.fspath(self.address))
            while lines:
                end = lines.index(b"\n")
                self._take(channel, bytes(lines[:end]))
                del lines[: end + 1]

    def _take(self, channel: socket.socket, line: bytes) -> None:
        second = int(self.clock())
        if second != self._second:
            if self._skipped:
                channel.send(_ENTRY % lost_line(self._skipped, time.time()))
            self._second, self._written, self._skipped = second, 0, 0
        if self._written < self.per_second:
            channel.send(_ENTRY % line)
            self._written += 1
        else:
            self._skipped += 1
            self.lost += 1


def advise(destination: str, error: OSError) -> str:
    """Return what the operator must do to make the destination writable."""
    if destination == _JOURNAL:
        return "start systemd-journald, or name a file in audit.destination"
    directory = Path(destination).parent
    room, place = f"free space for {directory}", f"make the directory {directory}"
    link = "name the file itself in audit.destination: links are not followed"
    advice = {errno.ENOSPC: room, errno.EDQUOT: room, errno.ENOENT: place, errno.ENOTDIR: place}
    other = (
        f"have {destination} be a file that root may write, or name another in audit.destination"
    )
    return {**advice, errno.ELOOP: link}.get(error.errno or 0, other)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The audit log.

    Attributes:
        written: Lines since the controller started.
        lost: Requests without a line since then, because HAProxy's ring or the journal had no room.
        problem: Reason if no lines are written now.
    """

    mode: str
    destination: str
    written: int = 0
    lost: int = 0
    problem: str = ""


@dataclass(slots=True)
class _Worker:
    """Connection of one HAProxy worker.

    Attributes:
        kept: Whether the service manager keeps the connection open after this controller ends.
        stirred: Set when there is data to read, or this controller ends.
    """

    socket: socket.socket
    kept: bool
    stirred: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Audit(Part):
    """Writer of the audit log.

    Args:
        keep: Function that stores a connection with the service manager, and returns whether that worked.

    Attributes:
        written: Lines of requests since this controller started.
        lost: Requests without a line, because HAProxy's ring or the journal had no room.
    """

    impact: ClassVar = Impact.UNNOTICED
    settings: Callable[[], AuditSettings]
    keep: Callable[[socket.socket], bool] = lambda _: False
    clock: Callable[[], float] = time.monotonic
    journal: Journal = field(default_factory=Journal)
    written: int = 0
    lost: int = 0
    _failure: Problem | None = None
    _begun: float | None = None
    _workers: dict[asyncio.Task[None], _Worker] = field(default_factory=dict)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def problem(self) -> Problem | None:
        """Reason why lines cannot be written now, with a hint; `None` if they can."""
        settings = self.settings()
        if not settings.one_in:
            return None
        waited = 0.0 if self._begun is None else self.clock() - self._begun
        if waited < _HANGS_S:
            return self._failure
        reason = f"{settings.destination}: a write has not come back for {waited:.0f} s"
        return Problem(_FIELD, reason, "check the disk or the file system of the log")

    def problems(self) -> tuple[Problem | None]:
        return (self.problem,)

    async def report(self) -> Mapping[str, object]:
        settings, problem = self.settings(), self.problem
        if not settings.one_in:
            return {}
        reason = "" if problem is None else problem.reason
        sums = self.written, self.lost
        return {"audit": AuditReport(settings.mode, settings.destination, *sums, reason)}

    def audit_lines(self) -> Count:
        """Lines written to the audit log."""
        return self.written

    def audit_lines_lost(self) -> Count:
        """Requests without a line in the audit log, because HAProxy's ring or the journal had no room."""
        return self.lost

    def audit_failing(self) -> Gauge:
        """1 while the audit log cannot be written; `imdsproxy status` has the reason. Guests are served."""
        return self.problem is not None if self.settings().one_in else None

    async def run(
        self, listener: socket.socket, last: socket.socket, kept: Sequence[socket.socket] = ()
    ) -> None:
        """Run `serve`, and write datagrams of workers that are being replaced, one line each; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.serve(listener, kept))
            while True:
                await self._write(await asyncio.get_running_loop().sock_recv(last, _CHUNK))

    async def serve(self, listener: socket.socket, kept: Sequence[socket.socket] = ()) -> None:
        """Write the lines that workers send, until cancelled; then also write those sent so far.

        Args:
            kept: Non-blocking connections that the service manager has kept.
        """
        loop = asyncio.get_running_loop()
        for worker in kept:
            self._begin(_Worker(worker, kept=True))
        try:
            while True:
                worker, _ = await loop.sock_accept(listener)
                self._begin(_Worker(worker, kept=self.keep(worker)))
        finally:
            self._ended.set()
            for one in self._workers.values():
                if not one.kept:
                    # From now on HAProxy keeps new lines for the next controller.
                    with contextlib.suppress(OSError):
                        one.socket.shutdown(socket.SHUT_RD)
                one.stirred.set()
            if self._workers:
                await asyncio.wait(list(self._workers), timeout=_LAST_S)
            for taking in list(self._workers):
                taking.cancel()

    def _begin(self, worker: _Worker) -> None:
        taking = asyncio.get_running_loop().create_task(self._take(worker))
        self._workers[taking] = worker
        taking.add_done_callback(lambda done: self._workers.pop(done, None))

    async def _take(self, worker: _Worker) -> None:
        """Write all lines of one worker. Only whole lines are written, because several workers share the file."""
        begun = b""
        with contextlib.closing(worker.socket):
            # Report an unwritable destination before the first request.
            await self._write(b"")
            # An asyncio stream would keep reading ahead, and HAProxy would then send line by line.
            while (chunk := await self._look(worker)) and not (
                worker.kept and self._ended.is_set()
            ):
                whole = chunk.rfind(b"\n") + 1
                if whole:
                    await self._write(begun + chunk[:whole])
                    begun = b""
                else:
                    # Part of a line: take it out, or its end would look like the connection's end.
                    whole = len(chunk)
                    begun += chunk
                while whole:
                    whole -= len(worker.socket.recv(whole))
                with contextlib.suppress(TimeoutError):
                    pause_s = _SHORT_S if len(chunk) >= _MUCH else _PAUSE_S
                    await asyncio.wait_for(self._ended.wait(), pause_s)

    async def _look(self, worker: _Worker) -> bytes:
        """Peek at the data of a worker; return nothing if the worker has closed, or this controller ends."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return worker.socket.recv(_CHUNK, socket.MSG_PEEK)
            except BlockingIOError:
                if self._ended.is_set():
                    return b""
            except ConnectionError:
                return b""
            worker.stirred.clear()
            loop.add_reader(worker.socket, worker.stirred.set)
            try:
                await worker.stirred.wait()
            finally:
                loop.remove_reader(worker.socket)

    async def _write(self, raw: bytes) -> None:
        """Write lines, retrying until it works. Meanwhile other lines wait in HAProxy's ring, or are dropped there."""
        lines = read_audit(raw, time.time())
        rest = bytearray(lines.text)
        async with self._lock:
            while True:
                destination = self.settings().destination
                self._begun = self.clock()
                try:
                    work = partial(self._write_now, destination, rest)
                    # A thread, because a write to a hung disk may never return.
                    await start_thread(work, "audit")
                except OSError as error:
                    self._fail(destination, error)
                    await asyncio.sleep(_AGAIN_S)
                    continue
                finally:
                    self._begun = None
                break
            self._failure = None
        self.written += lines.requests
        self.lost += lines.lost

    def _write_now(self, destination: str, lines: bytearray) -> None:
        if destination != _JOURNAL:
            append_lines(Path(destination), lines)
            return
        before = self.journal.lost
        try:
            self.journal.write(lines)
        finally:
            lost = self.journal.lost - before
            self.lost += lost
            self.written -= lost

    def _fail(self, destination: str, error: OSError) -> None:
        reason, hint = f"{destination}: {error.strerror or error}", advise(destination, error)
        failure = Problem(_FIELD, reason, hint)
        if failure != self._failure:
            structlog.get_logger().warning("audit log not written", reason=reason, hint=hint)
        self._failure = failure
