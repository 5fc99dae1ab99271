"""Watching over HAProxy: it ends, it hangs, somebody else reloads it; guests must not notice for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from imdsproxy.core.haproxy.runtime import Processes
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.errors import DataplaneError, Problem, RuntimeUnavailable

__all__ = ["HaproxyGuard"]

_PROBE_EVERY_S: Final = 1.0
_PROBES: Final = 2
"""Probes that fail one after the other before a worker counts as hung: noticed within four seconds."""

_RESTART_FIRST_S: Final = 0.05
_RESTART_LAST_S: Final = 5.0


@dataclass(slots=True)
class HaproxyGuard:
    """Starts HAProxy again when its master ends, and ends it when its worker hangs.

    Args:
        on_return: HAProxy came back, or turned out to run with a worker that we did not ask for.
        on_trouble: It does not start with the configuration on disk: look at the host again.
    """

    haproxy: Haproxy
    on_return: Callable[[str], object]
    on_trouble: Callable[[str], object]
    failure: Problem | None = None
    restarts: int = 0
    hangs: int = 0
    _answering: bool = field(default=True)

    @property
    def answering(self) -> bool:
        """The last probe was answered."""
        return self._answering

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_master(), name="haproxy-master")
            group.create_task(self._watch_worker(), name="haproxy-worker")

    async def _watch_master(self) -> None:
        delay = _RESTART_FIRST_S
        while True:
            processes = self.haproxy.processes
            if processes is None:
                # The listener loop is about to start it, or has failed to.
                await asyncio.sleep(_RESTART_FIRST_S)
                continue
            await self.haproxy.launcher.wait(processes.master)
            if (
                self.haproxy.processes is not None
                and self.haproxy.processes.master != processes.master
            ):
                continue
            structlog.get_logger().error("haproxy ended", master=processes.master)
            delay = await self._bring_back(delay)

    async def _bring_back(self, delay: float) -> float:
        try:
            await self.haproxy.restart("haproxy ended")
        except DataplaneError as error:
            self.failure = Problem("haproxy", error.message, error.hint)
            structlog.get_logger().error(
                "haproxy not started", code=error.code, error=error.message, retry_in_s=delay
            )
            self.on_trouble("haproxy did not start")
            await asyncio.sleep(delay)
            return min(delay * 2, _RESTART_LAST_S)
        self.restarts += 1
        self.failure = None
        structlog.get_logger().info("haproxy started again", master=self._pid())
        self.on_return("haproxy started again")
        return _RESTART_FIRST_S

    def _pid(self) -> int | None:
        return None if self.haproxy.processes is None else self.haproxy.processes.master

    async def _watch_worker(self) -> None:
        failed = 0
        while True:
            await asyncio.sleep(_PROBE_EVERY_S)
            before = self.haproxy.processes
            if before is None:
                failed = 0
                continue
            self._answering = await self.haproxy.probe()
            if self._answering:
                failed = 0
                await self._look_for_strangers(before)
                continue
            failed += 1
            if failed < _PROBES or self.haproxy.processes is not before:
                continue
            failed = 0
            self.hangs += 1
            structlog.get_logger().error(
                "haproxy does not answer: ending it", master=before.master, worker=before.worker
            )
            await self.haproxy.kill()

    async def _look_for_strangers(self, before: Processes) -> None:
        """A reload that we did not order left a worker with the files of some moment: make it equal."""
        if self.haproxy.records.lock.locked():
            return
        try:
            now = await self.haproxy.master.read_processes()
        except RuntimeUnavailable as error:
            self.failure = Problem("haproxy", error.message, error.hint)
            return
        self.failure = None
        if now.master == before.master and set(now.workers) <= self.haproxy.records.known:
            self.haproxy.processes = now
            return
        if await self.haproxy.adopt():
            self.on_return("haproxy was reloaded by somebody else")
