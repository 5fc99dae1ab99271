"""Watches HAProxy: when it ends, hangs, or is reloaded by another program, guests must not notice for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from imdsproxy.core.backoff import Backoff
from imdsproxy.core.haproxy.runtime import Processes
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.errors import DataplaneError, HostRefused, Problem, RuntimeUnavailable
from imdsproxy.host.doubt import Doubt
from imdsproxy.host.process import ProcessStat, read_stat

_PROBE_EVERY_S: Final = 1.0
_RESTART_FIRST_S: Final = 0.05


@dataclass(slots=True)
class HaproxyWatchdog:
    """Starts HAProxy again when its master ends, and ends it when its master or its worker hangs.

    Args:
        on_return: HAProxy came back, or turned out to run with a worker that we did not ask for.
        on_trouble: It does not start with the configuration on disk: look at the host again.
    """

    haproxy: Haproxy
    on_return: Callable[[str], object]
    on_trouble: Callable[[str], object]
    read_stat: Callable[[int], ProcessStat | None] = read_stat
    failure: Problem | None = None
    restarts: int = 0
    _answering: bool = field(default=True)
    _doubt: Doubt = field(default_factory=Doubt)

    @property
    def answering(self) -> bool:
        """The last probe was answered."""
        return self._answering

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            HostRefused: Our files were removed while we ran: this process has to be started again.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_master(), name="haproxy-master")
            group.create_task(self._watch_worker(), name="haproxy-worker")

    async def _watch_master(self) -> None:
        backoff = Backoff(_RESTART_FIRST_S, 5.0)
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
            await self._bring_back(backoff)

    async def _bring_back(self, backoff: Backoff) -> None:
        try:
            await self.haproxy.restart("haproxy ended")
        except DataplaneError as error:
            self.failure = Problem("haproxy", error.message, error.hint)
            delay = backoff.fail()
            structlog.get_logger().error(
                "haproxy not started", code=error.code, error=error.message, retry_in_s=delay
            )
            self._give_up_where_nothing_is_left()
            self.on_trouble("haproxy did not start")
            await asyncio.sleep(delay)
            return
        backoff.succeed()
        self.restarts += 1
        self.failure = None
        structlog.get_logger().info("haproxy started again", master=self._pid())
        self.on_return("haproxy started again")

    def _give_up_where_nothing_is_left(self) -> None:
        # Sockets, maps and links have gone with it. A start makes all of them; nothing else does.
        layout = self.haproxy.layout
        if not layout.unavailable.exists():
            raise HostRefused(
                f"the files were removed in {layout.runtime}: only a start makes them again",
                hint="find out who did: a clean-up of /run, tmpfiles.d, another unit's RuntimeDirectory=",
            )

    def _pid(self) -> int | None:
        return None if self.haproxy.processes is None else self.haproxy.processes.master

    async def _watch_worker(self) -> None:
        doubt = Doubt()
        while True:
            await asyncio.sleep(_PROBE_EVERY_S)
            before = self.haproxy.processes
            if before is None or self.haproxy.records.lock.locked():
                # It is being started or reloaded; that has a deadline of its own.
                continue
            self._answering = await self.haproxy.probe()
            if self._answering:
                doubt = Doubt()
                await self._look_for_strangers(before)
                continue
            if self.haproxy.processes is not before or before.worker is None:
                doubt = Doubt()
                continue
            doubt = doubt.after_silence(before.worker, self.read_stat(before.worker))
            if not doubt.hung:
                continue
            doubt = Doubt()
            await self._end_hung(before)

    async def _end_hung(self, processes: Processes) -> None:
        structlog.get_logger().error(
            "haproxy does not answer: ending it", master=processes.master, worker=processes.worker
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
            self._doubt = self._doubt.after_silence(before.master, self.read_stat(before.master))
            if self._doubt.hung:
                await self._end_hung(before)
            return
        self.failure = None
        self._doubt = Doubt()
        if now.master == before.master and set(now.workers) <= self.haproxy.records.known:
            self.haproxy.processes = now
            return
        if await self.haproxy.adopt():
            self.on_return("haproxy was reloaded by another process")
