"""Watchdog for HAProxy: handles its end, a hang, and reloads by other programs before guests notice for long."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Final

import structlog

from imdsproxy.errors import DataplaneError, HostRefused, Problem, RuntimeUnavailable
from imdsproxy.haproxy.master import WorkerEnded
from imdsproxy.haproxy.process import Haproxy, ReloadReport
from imdsproxy.haproxy.rules.runtime import Load, Processes
from imdsproxy.host.process import Doubt, read_stat, wait_gone
from imdsproxy.reconcile.part import Gauge, Part
from imdsproxy.reconcile.reconciler import Reconciler

_PROBE_EVERY_S: Final = 1.0
_DEADLINE_S: Final = 1.0
_RESTART_FIRST_S: Final = 0.05
_PATIENCE_S: Final = 0.2
"""Time after which a slow probe leads to a query of the worker's own socket, in seconds. The query ends with the probe,
so it does not delay the detection of a hung worker."""


@dataclass(frozen=True, slots=True)
class HaproxyReport:
    """The data plane; `None` for values that are unknown (HAProxy is not started or does not answer)."""

    version: str | None = None
    master: int | None = None
    worker: int | None = None
    old_workers: tuple[int, ...] = ()
    reloads: int = 0
    last_reload: ReloadReport | None = None
    problem: str = ""


@dataclass(slots=True)
class HaproxyWatchdog(Part):
    """Supervisor that restarts HAProxy when its master ends, and kills HAProxy when its master or worker hangs.

    Args:
        on_return: Callback when HAProxy is back, or runs with a worker that we did not start.
        on_trouble: Callback if HAProxy does not start with the configuration on disk, to look at the host again.

    Attributes:
        answering: Whether the last probe was answered, or had to wait because HAProxy is full.
    """

    haproxy: Haproxy
    on_return: Callable[[str], object]
    on_trouble: Callable[[str], object]
    restarts: int = 0
    answering: bool = True
    _doubt: Doubt = field(default_factory=Doubt)
    _reached: int = 0
    _starts: Reconciler = field(
        default_factory=partial(Reconciler, "haproxy", "haproxy not started", _RESTART_FIRST_S, 5.0)
    )

    @property
    def failure(self) -> Problem | None:
        """Reason why HAProxy does not run, or does not answer its master socket."""
        return self._starts.failure

    def problems(self) -> tuple[Problem | None]:
        return (self.failure,)

    async def report(self) -> Mapping[str, object]:
        haproxy = self.haproxy
        processes = haproxy.processes or Processes(0, None)
        report = HaproxyReport(
            haproxy.version,
            processes.master or None,
            processes.worker,
            processes.draining,
            processes.reloads,
            haproxy.last_reload,
            "" if self.failure is None else self.failure.reason,
        )
        return {"haproxy": report}

    def haproxy_up(self) -> Gauge:
        """1 while HAProxy's worker answers."""
        return self.answering and self.haproxy.processes is not None

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            HostRefused: Our files were removed while we ran: this process must be restarted.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_master(), name="haproxy-master")
            group.create_task(self._watch_worker(), name="haproxy-worker")

    async def _watch_master(self) -> None:
        while True:
            processes = self.haproxy.processes
            if processes is None:
                # The listener loop is about to start HAProxy, or has failed to.
                await asyncio.sleep(_RESTART_FIRST_S)
                continue
            await wait_gone(processes.master)
            if self._master() not in (None, processes.master):
                continue
            structlog.get_logger().error("haproxy ended", master=processes.master)
            await self._bring_back()

    async def _bring_back(self) -> None:
        try:
            await self.haproxy.restart("haproxy ended")
        except DataplaneError as error:
            delay = self._starts.fail(error)
            self._give_up_where_nothing_is_left()
            self.on_trouble("haproxy did not start")
            await asyncio.sleep(delay)
            return
        self._starts.succeed()
        self.restarts += 1
        structlog.get_logger().info("haproxy started again", master=self._master())
        self.on_return("haproxy started again")

    def _give_up_where_nothing_is_left(self) -> None:
        # Sockets, maps and links have gone with the directory. Only a start of the controller makes them all again.
        layout = self.haproxy.layout
        if not layout.unavailable.exists():
            raise HostRefused(
                f"the files were removed in {layout.runtime}: only a start makes them again",
                hint="find out who did: a clean-up of /run, tmpfiles.d, another unit's RuntimeDirectory=",
            )

    def _master(self) -> int | None:
        return None if self.haproxy.processes is None else self.haproxy.processes.master

    async def _watch_worker(self) -> None:
        doubt = Doubt()
        while True:
            await asyncio.sleep(_PROBE_EVERY_S)
            before = self.haproxy.processes
            if before is None or self.haproxy.records.lock.locked():
                # HAProxy is being started or reloaded, which has its own deadline.
                continue
            answered, full = await self._probe(before)
            self.answering = answered or full is not None
            self._report_full(full)
            if answered:
                await self._look_for_reloads(before)
            if self.answering or self.haproxy.processes is not before or before.worker is None:
                doubt = Doubt()
                continue
            doubt = doubt.after_silence(before.worker, read_stat(before.worker))
            if doubt.hung:
                doubt = Doubt()
                await self._end_hung(before)

    async def _probe(self, processes: Processes) -> tuple[bool, Load | None]:
        """Return whether the worker answers a probe; if not, its load if it is full.

        A full worker lets the probe wait, because `maxconn` counts it; `maxconn` does not count the worker's own
        socket.
        """
        load: Load | None = None
        async with asyncio.TaskGroup() as group:
            probe = group.create_task(self.haproxy.fetch("/", _DEADLINE_S))
            await asyncio.wait([probe], timeout=_PATIENCE_S)
            if not probe.done() and processes.worker is not None:
                load = await self._read_load(processes.worker)
        answered = probe.result()[0] == HTTPStatus.OK
        if answered or load is None:
            return answered, None
        # Between two guests there may be a free connection for a moment.
        full = load.connections >= load.most or load.reached != self._reached
        self._reached = load.reached
        return False, load if full else None

    async def _read_load(self, worker: int) -> Load | None:
        try:
            async with asyncio.timeout(_DEADLINE_S - _PATIENCE_S):
                return await self.haproxy.master.read_load(worker)
        except (TimeoutError, RuntimeUnavailable, WorkerEnded):
            return None

    def _report_full(self, load: Load | None) -> None:
        before = self.haproxy.full
        if load is None:
            self.haproxy.full = None
            if before is not None and self.answering:
                structlog.get_logger().info("haproxy has room again")
            return
        self.haproxy.full = found = Problem(
            "haproxy.maxconn",
            f"HAProxy is full: it has the {load.most} connections that it may have, and more guests wait",
            "raise haproxy.maxconn, or LimitNOFILE= where the limit on open files bounds it; then "
            "`imdsproxy stop --data-plane`, and start again",
        )
        if before is None:
            structlog.get_logger().error("haproxy is full", reason=found.reason, hint=found.hint)

    async def _end_hung(self, processes: Processes) -> None:
        structlog.get_logger().error(
            "haproxy does not answer: ending it", master=processes.master, worker=processes.worker
        )
        await self.haproxy.launcher.kill(processes)

    async def _look_for_reloads(self, before: Processes) -> None:
        """Adopt the worker of a reload that we did not order: bring its maps to the files' present state."""
        if self.haproxy.records.lock.locked():
            return
        try:
            now = await self.haproxy.master.read_processes()
        except RuntimeUnavailable as error:
            self._starts.failure = Problem("haproxy", error.message, error.hint)
            self._doubt = self._doubt.after_silence(before.master, read_stat(before.master))
            if self._doubt.hung:
                await self._end_hung(before)
            return
        self._starts.failure = None
        self._doubt = Doubt()
        if now.master == before.master and set(now.workers) <= self.haproxy.records.known:
            self.haproxy.processes = now
            return
        if await self.haproxy.adopt():
            self.on_return("haproxy was reloaded by another process")
