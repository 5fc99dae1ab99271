"""Servers beside the controller: started or adopted, and watched. The document server is also probed as a guest would.

Readiness depends on the answers that guests get, not on running processes.
"""

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Final, Literal

import structlog

from imdsproxy.documents.compiled import compile_instance, compiled_path
from imdsproxy.documents.pidfile import DocumentProcesses, read_pids, signal_all
from imdsproxy.documents.store import DiskFiles
from imdsproxy.errors import HostRefused, ImdsproxyError, Problem
from imdsproxy.haproxy.launch import control_unit, kill_process
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.host import process
from imdsproxy.host.account import Account, find_closed
from imdsproxy.model.entities import Instance
from imdsproxy.model.wire import PROBE_INSTANCE, PROBE_PATH
from imdsproxy.reconcile.part import Gauge, Part
from imdsproxy.reconcile.reconciler import Reconciler

_START_DEADLINE_S: Final = 15.0
_POLL_S: Final = 0.02
_LOOK_EVERY_S: Final = 1.5
_STOP_GRACE_S: Final = 10.0


@dataclass(slots=True)
class Companion:
    """Supervisor of a server beside the controller, as the document server: starts, watches and stops it.

    Args:
        log: Output file of a server that the controller starts as a process.
        unit: The systemd unit to start instead of a process.
        needed: Whether the server must run; if false, the supervisor stops it.
        area: Field of the server's problems.

    Attributes:
        restarts: Number of restarts of the server or one of its workers.
    """

    pid_file: Path
    log: Path
    arguments: Sequence[str]
    environment: Mapping[str, str]
    unit: str | None = None
    needed: bool = True
    title: str = "document server"
    area: str = "documents"
    restarts: int = 0
    _starts: Reconciler = field(init=False)

    def __post_init__(self) -> None:
        self._starts = Reconciler(self.area, f"{self.title} not started", 0.1, 5.0)

    @property
    def failure(self) -> Problem | None:
        return self._starts.failure

    def read(self) -> DocumentProcesses:
        return read_pids(self.pid_file)

    async def ensure(self) -> int | None:
        """Start the server, wait until it answers, and return its pid. If it is not needed, stop it and return `None`.

        Raises:
            HostRefused: The server does not start, or does not answer in time.
        """
        pid = self.read().parent
        if not self.needed:
            if pid is not None:
                await self.stop()
            return None
        if pid is None and self.unit is not None:
            await self._control_unit("start", self.unit)
        if pid is not None or self.unit is not None:
            return await self._wait_for_workers(None, 0)
        child, offset = process.spawn_logged(self.arguments, self.log, self.environment)
        try:
            return await self._wait_for_workers(child, offset)
        except asyncio.CancelledError:
            if self.read().parent is None:
                # `stop` would not find a server that has not written its pid file yet.
                await child.kill_group()
            raise
        finally:
            child.close()

    async def _wait_for_workers(self, child: process.ProcessHandle | None, offset: int) -> int:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_DEADLINE_S
        while True:
            found = self.read()
            if found.parent is not None and found.workers:
                return found.parent
            if child is not None and not child.alive():
                status = await child.wait()
                words = self.log.read_bytes()[offset:].decode("utf-8", "replace").strip()[-1000:]
                raise HostRefused(f"the {self.title} ended with {status}: {words}")
            if loop.time() > deadline:
                if child is not None and found.parent is None:
                    # Otherwise the next attempt would start a second server beside this one.
                    await child.kill_group()
                    raise HostRefused(f"the {self.title} wrote no pid file")
                raise HostRefused(f"the {self.title} did not answer within {_START_DEADLINE_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """Stop the server for good.

        Raises:
            DataplaneError: The server does not end.
        """
        if self.unit is not None:
            await self._control_unit("stop", self.unit)
            return
        loop, number = asyncio.get_running_loop(), signal.SIGTERM
        deadline, running = loop.time() + _STOP_GRACE_S, self.read()
        # Also end workers whose parent was killed.
        signal_all(running.workers if running.parent is None else (running.parent,), number)
        while left := self.read().pids:
            if loop.time() >= deadline and number is signal.SIGKILL:
                raise HostRefused(
                    f"the {self.title}'s processes {', '.join(map(str, left))} do not end",
                    hint="a disk or a file system that hangs keeps them: see dmesg",
                )
            if loop.time() >= deadline:
                number, deadline = signal.SIGKILL, deadline + _STOP_GRACE_S
                signal_all(left, number)
            await asyncio.sleep(_POLL_S)

    async def _control_unit(self, verb: Literal["start", "stop"], unit: str) -> None:
        status, words = await control_unit(verb, unit)
        if status != 0:
            raise HostRefused(words, hint=f"journalctl -u {unit}")

    async def run(self) -> None:
        ended = 0
        while (pid := await self._starts.attempt(self.ensure)) is not None:
            self.restarts += ended
            ended = 1
            await self._watch(pid)
            structlog.get_logger().error(f"{self.title} ended", pid=pid)

    async def _watch(self, pid: int) -> None:
        """Wait until the server has ended, and count its workers' restarts; kill a server that makes no progress."""
        ended = asyncio.ensure_future(process.wait_gone(pid))
        doubt, restarts, rests = process.Doubt(), self.read().restarts, process.read_rests(pid)
        try:
            while not (await asyncio.wait([ended], timeout=_LOOK_EVERY_S))[0]:
                before, restarts = restarts, self.read().restarts
                # A server that re-executes itself restarts its count at zero.
                self.restarts += restarts - (before if before <= restarts else 0)
                last, rests = rests, process.read_rests(pid)
                # The server checks its workers every second and sleeps in between.
                doubt = (
                    doubt.after_silence(pid, process.read_stat(pid))
                    if rests == last
                    else process.Doubt()
                )
                if doubt.hung:
                    structlog.get_logger().error(f"{self.title} hangs: ending it", pid=pid)
                    kill_process(pid)
            await ended
        finally:
            ended.cancel()


_EVERY_S: Final = 2.0
_DEADLINE_S: Final = 3.0
_FAILURES: Final = 2
"""Failed probes before a problem is reported: one may fail while a worker is replaced."""

_INSTANCE: Final = Instance(PROBE_INSTANCE, "probe", "probe")
_probe_record: Final = cache(partial(compile_instance, _INSTANCE, {}))
_UNASKED: Final = Problem(
    "documents", "the controller has not requested a document yet", "a moment"
)


@dataclass(frozen=True, slots=True)
class DocumentsReport:
    """The document server's processes, the parent first.

    Attributes:
        needed: False if the settings disable the document server; then it does not run.
    """

    pids: tuple[int, ...] = ()
    problem: str = ""
    needed: bool = True


@dataclass(slots=True)
class DocumentProbe(Part):
    """Probe that repeatedly reads a document of its own through HAProxy and the document server.

    No real record may have the probe's id, and HAProxy serves it only on a root-only socket: no guest can read it. Its
    revision is not on disk, so the server reads the file each time.
    """

    companion: Companion
    haproxy: Haproxy
    files: DiskFiles
    account: Callable[[], Account | None]
    problem: Problem | None = field(init=False)
    _failures: int = 0

    def __post_init__(self) -> None:
        self.problem = _UNASKED if self.companion.needed else None

    @property
    def failure(self) -> Problem | None:
        return self.companion.failure or self.problem

    def problems(self) -> tuple[Problem | None]:
        return (self.failure,)

    def documents_processes(self) -> Gauge:
        """Running workers of the document server; no series if the settings disable the server."""
        return len(self.companion.read().workers) if self.companion.needed else None

    async def report(self) -> Mapping[str, object]:
        reason = "" if self.failure is None else self.failure.reason
        companion = self.companion
        return {"documents": DocumentsReport(companion.read().pids, reason, companion.needed)}

    async def run(self) -> None:
        while self.companion.needed:
            await asyncio.sleep(_EVERY_S)
            await self.ask()

    async def ask(self) -> None:
        """Probe once, if the server is needed; one failure after good answers changes nothing."""
        if not self.companion.needed:
            return
        found = await self._ask()
        self._failures = 0 if found is None else self._failures + 1
        if found is None:
            if self.problem not in (None, _UNASKED):
                structlog.get_logger().info("documents are answered again")
        elif self.problem is None and self._failures < _FAILURES:
            return
        elif found != self.problem:
            structlog.get_logger().error("no documents", reason=found.reason, hint=found.hint)
        self.problem = found

    async def _ask(self) -> Problem | None:
        try:
            self.files.apply(_INSTANCE.id, _probe_record())
        except ImdsproxyError as error:
            return Problem("documents", error.message, error.hint)
        status, body = await self.haproxy.fetch(PROBE_PATH, _DEADLINE_S)
        if status == 200 and body == _INSTANCE.ec2_id.encode():  # noqa: PLR2004 - HTTP
            return None
        if status is None and self.haproxy.full is not None:
            # The probe waits for a connection as guests do. The watchdog reports that; it says nothing about the
            # documents.
            return self.problem
        path = self.files.directory / compiled_path(_INSTANCE.id)
        try:
            closed = await asyncio.to_thread(find_closed, self.account(), path.parent)
        except HostRefused as error:
            return Problem("documents.user", error.message, error.hint)
        if closed is not None:
            return Problem(
                "paths.state_dir",
                f"the document server's account cannot enter {closed}: guests get 503",
                "let the account enter (chmod o+x, setfacl), or move paths.state_dir",
            )
        answer = "no answer" if status is None else f"status {status}"
        return Problem(
            "documents",
            f"a document requested from HAProxy has {answer}: guests get 503",
            "imdsproxy check; journalctl -u imdsproxy-documents -u imdsproxy-haproxy",
        )
