"""The document server's life beside the controller's: started when it is not there, adopted when it is."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import structlog

from imdsproxy.core.timing import Backoff
from imdsproxy.dataplane.launch import UNIT_S, wait_gone
from imdsproxy.errors import DataplaneError, HostRefused, Problem
from imdsproxy.host.process import (
    Doubt,
    ProcessHandle,
    open_process,
    read_rests,
    read_stat,
    run_program,
    spawn_logged,
)
from imdsproxy.serving.pidfile import DocumentProcesses, read_pids, stop_documents

_START_DEADLINE_S: Final = 15.0
_POLL_S: Final = 0.02
_LOOK_EVERY_S: Final = 1.5
_STOP_GRACE_S: Final = 10.0


class CompanionLauncher(Protocol):
    """How the document server comes up and goes down on this host."""

    async def start(self) -> None:
        """Have it started; `HostRefused` says why not."""
        ...

    async def wait(self, pid: int) -> None:
        """Return when this one has ended."""
        await wait_gone(pid)

    async def stop(self) -> None:
        """Have it ended, for good."""
        ...


@dataclass(slots=True)
class Companion:
    """Watches the document server's parent process.

    Attributes:
        restarts: How often it, or one of its workers, was started again.

    Args:
        read: Its processes that run, as in its pid file.
        needed: Off where no instance has documents of ours, as in front of Nova alone.
    """

    launcher: CompanionLauncher
    read: Callable[[], DocumentProcesses]
    needed: bool = True
    failure: Problem | None = None
    restarts: int = 0

    async def ensure(self) -> int | None:
        """Its pid, once it runs and answers; `None` where it is not needed, and ended if it ran.

        Raises:
            HostRefused: It does not start, or does not answer in time.
        """
        pid = self.read().parent
        if not self.needed:
            if pid is not None:
                await self.launcher.stop()
            return None
        if pid is None:
            await self.launcher.start()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_DEADLINE_S
        while True:
            found = self.read()
            if found.parent is not None and found.workers:
                return found.parent
            if loop.time() > deadline:
                raise HostRefused(
                    f"the document server did not answer within {_START_DEADLINE_S:g} s"
                )
            await asyncio.sleep(_POLL_S)

    async def run(self) -> None:
        """Keep it running until cancelled; or see that it does not, where it is not needed."""
        backoff = Backoff(0.1, 5.0)
        first = True
        while True:
            try:
                pid = await self.ensure()
            except DataplaneError as error:
                self.failure = Problem("documents", error.message, error.hint)
                delay = backoff.fail()
                structlog.get_logger().error(
                    "document server not started",
                    code=error.code,
                    error=error.message,
                    retry_in_s=delay,
                )
                await asyncio.sleep(delay)
                continue
            self.failure = None
            backoff.succeed()
            if pid is None:
                return
            if not first:
                self.restarts += 1
            first = False
            await self._watch(pid)
            structlog.get_logger().error("document server ended", pid=pid)

    async def _watch(self, pid: int) -> None:
        """Return when it has ended, counting its workers' restarts; it is ended when it makes no progress."""
        ended = asyncio.ensure_future(self.launcher.wait(pid))
        doubt, restarts, rests = Doubt(), self.read().restarts, read_rests(pid)
        try:
            while not (await asyncio.wait([ended], timeout=_LOOK_EVERY_S))[0]:
                before, restarts = restarts, self.read().restarts
                # One that executes itself anew begins to count anew.
                self.restarts += restarts - (before if before <= restarts else 0)
                last, rests = rests, read_rests(pid)
                # It looks after its workers every second, and rests in between.
                doubt = doubt.after_silence(pid, read_stat(pid)) if rests == last else Doubt()
                if doubt.hung and (handle := open_process(pid)) is not None:
                    structlog.get_logger().error("document server hangs: ending it", pid=pid)
                    handle.kill(signal.SIGKILL)
                    handle.close()
            await ended
        finally:
            ended.cancel()


@dataclass(slots=True)
class SpawnCompanion(CompanionLauncher):
    """A process of its own session, writing to its own log file."""

    arguments: Sequence[str]
    log: Path
    pid_file: Path
    environment: Mapping[str, str]
    child: ProcessHandle | None = None

    async def start(self) -> None:
        """See `CompanionLauncher.start`."""
        child, offset = spawn_logged(self.arguments, self.log, self.environment)
        self.child = child
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_DEADLINE_S
        while read_pids(self.pid_file).parent is None:
            if not child.alive():
                status = await child.wait()
                words = self.log.read_bytes()[offset:].decode("utf-8", "replace").strip()[-1000:]
                raise HostRefused(f"the document server ended with {status}: {words}")
            if loop.time() > deadline:
                # The next try would start another one beside it.
                child.kill_group()
                raise HostRefused("the document server wrote no pid file")
            await asyncio.sleep(_POLL_S)

    async def wait(self, pid: int) -> None:
        """See `CompanionLauncher.wait`."""
        if self.child is not None and self.child.pid == pid:
            # A child of ours leaves a zombie until it is waited for.
            await self.child.wait()
            self.child.close()
            self.child = None
            return
        await wait_gone(pid)

    async def stop(self) -> None:
        """See `CompanionLauncher.stop`."""
        # In a thread: it waits, and workers whose parent was killed are its business too.
        await asyncio.to_thread(stop_documents, self.pid_file, timeout_s=_STOP_GRACE_S)


@dataclass(slots=True)
class UnitCompanion(CompanionLauncher):
    """A systemd unit."""

    unit: str

    async def start(self) -> None:
        """See `CompanionLauncher.start`."""
        # Without it, each restart since the unit's last rest would make systemd wait longer. A unit that was
        # never started has nothing to forget, and systemd refuses.
        await self._systemctl("reset-failed")
        await self._expect("start")

    async def stop(self) -> None:
        """See `CompanionLauncher.stop`."""
        await self._expect("stop")

    async def _expect(self, verb: str) -> None:
        status, words = await self._systemctl(verb)
        if status != 0:
            raise HostRefused(
                f"systemctl {verb} {self.unit}: {words}", hint=f"journalctl -u {self.unit}"
            )

    async def _systemctl(self, verb: str) -> tuple[int, str]:
        return await run_program("systemctl", verb, self.unit, deadline_s=UNIT_S)
