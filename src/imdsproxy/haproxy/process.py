"""HAProxy's life cycle: start, adoption, configuration changes and supervision."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import structlog

from imdsproxy.errors import ConfigRejected, Problem, ReloadFailed, RuntimeUnavailable, refusing
from imdsproxy.haproxy.launch import Launcher
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.master import MasterClient, exchange
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.haproxy.rules.config import render_config
from imdsproxy.haproxy.rules.model import DataplaneSpec
from imdsproxy.haproxy.rules.nova import loopback_sockets
from imdsproxy.haproxy.rules.runtime import Processes, parse_failure
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import ensure_directory, write_atomic
from imdsproxy.host.process import Doubt, read_stat, run_program, wait_gone
from imdsproxy.host.socket_file import read_listener
from imdsproxy.reconcile.part import By, Gauge, Impact, Part, Times
from imdsproxy.reconcile.progress import Durations

_CHECK_DEADLINE_S = 60.0
"""Deadline for the check of a configuration, in seconds: the binds of 5,000 networks take a few seconds."""

_BEFORE_RELOAD_S = 0.5
"""Time for reads before a reload, in seconds."""


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """Result of a reload of HAProxy; `result` is HAProxy's own message after a failure."""

    number: int
    at: float
    reason: str
    ok: bool
    result: str = ""
    took_s: float = 0.0


@dataclass(slots=True)
class Haproxy(Part):
    """HAProxy on this host: starts, adopts and reloads it, and probes whether it answers.

    Attributes:
        reload_durations: Durations of successful starts and reloads, from the command until the worker serves.
        full: Reason why guests wait, while HAProxy has reached its connection limit.
        before_reload: Callbacks before a reload, to read from the old workers within half a second; must not raise.
        starting: Set once a start has begun, or none is needed: the processor is idle while HAProxy reads its files.

    Every start and reload happens under the records' lock, so a new worker's maps equal the files.
    """

    impact: ClassVar = Impact.HARMS
    program: str
    launcher: Launcher
    records: RecordApplier
    clock: Clock
    layout: Layout = field(init=False)
    master: MasterClient = field(init=False)
    processes: Processes | None = None
    full: Problem | None = None
    starting: asyncio.Event = field(default_factory=asyncio.Event)
    last_reload: ReloadReport | None = None
    reload_counts: Counter[str] = field(default_factory=lambda: Counter(ok=0, failed=0))
    reload_durations: Durations = field(default_factory=Durations)
    before_reload: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    version: str | None = None

    def __post_init__(self) -> None:
        self.layout, self.master = self.records.layout, self.records.master

    @property
    def worker(self) -> int | None:
        """Pid of the accepting worker; `None` without one, or while HAProxy does not run."""
        return None if self.processes is None else self.processes.worker

    @property
    def pids(self) -> tuple[int, ...]:
        """Pids of the master and all workers; none while HAProxy does not run."""
        return () if self.processes is None else self.processes.pids

    def problems(self) -> tuple[Problem | None]:
        return (self.full,)

    def haproxy_old_workers(self) -> Gauge:
        """Workers from before a reload that still have open connections."""
        return 0 if self.processes is None else len(self.processes.draining)

    def haproxy_reloads(self) -> Annotated[By, "counter", "result"]:
        """Reloads of HAProxy by result: ok or failed."""
        return self.reload_counts

    def haproxy_reload_seconds(self) -> Times:
        """Time from the order to start or reload HAProxy until the new worker serves; failures are not counted."""
        return self.reload_durations

    def haproxy_commands(self) -> Annotated[By, "counter", "result"]:
        """Runtime API commands by result: ok or failed."""
        return self.master.commands

    async def adopt(self) -> bool:
        """Adopt a running master; return whether there is one together with its map files.

        A slow master still serves guests, so it is asked again until it counts as hung. Raises `RuntimeUnavailable` if
        the master ended meanwhile, `CommandRefused` if the master's worker refused the records.
        """
        self.processes = await self._find_processes()
        if self.processes is None or not self.records.load():
            self.processes = None
            return False
        await self.records.adopt()
        return True

    async def _find_processes(self) -> Processes | None:
        doubt = Doubt()
        while True:
            try:
                return await self.master.read_processes()
            except RuntimeUnavailable as error:
                master = read_listener(self.layout.master_socket)
                stat = None if master is None else read_stat(master)
                if master is None or stat is None:
                    return None
                doubt = doubt.after_silence(master, stat)
                if doubt.hung:
                    return None
                structlog.get_logger().warning("haproxy is slow", reason=error.message)

    async def apply(
        self, spec: DataplaneSpec, reason: str
    ) -> Literal["started", "reloaded"] | None:
        """Run HAProxy with this configuration; return how that was done, `None` if it was in force already.

        If no HAProxy runs, the start itself is the check: a refused configuration replaces nothing then. Raises
        `ConfigRejected` if HAProxy refuses the configuration, and `ReloadFailed` if the new worker does not start: in
        both cases the earlier configuration stays. Raises `RuntimeUnavailable` if the master does not answer.
        """
        text = render_config(spec)
        if self.processes is not None and self.in_force() == text:
            return None
        began = asyncio.get_running_loop().time()
        if self.processes is not None:
            await self._check(spec, text, reason)
        async with self.records.lock:
            write_atomic(self.layout.config, text.encode())
            starts = self.processes is None
            await (self._start if starts else self._reload)(reason, began)
            write_atomic(self.layout.last_good, text.encode())
        _sweep_sockets(self.layout.jail, text)
        return "started" if starts else "reloaded"

    async def restart(self, reason: str) -> None:
        """Start HAProxy with the configuration on disk; raise `ConfigRejected` or `RuntimeUnavailable` for failures."""
        async with self.records.lock:
            await self._start(reason, asyncio.get_running_loop().time())

    async def fetch(self, path: str, deadline_s: float) -> tuple[int | None, bytes]:
        """Return status and body of the worker's answer on the probe's socket; no status without a timely answer."""
        request = f"GET {path} HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n"
        try:
            answer = await exchange(self.layout.probe_socket, request, deadline_s)
        except OSError:
            return None, b""
        head, _, body = answer.partition(b"\r\n\r\n")
        words = head.split(maxsplit=2)
        return (int(words[1]) if len(words) > 1 and words[1].isdigit() else None), body

    async def end_stray(self) -> None:
        """End a master of ours whose records are lost: the answers of its workers are unknown."""
        try:
            processes = await self.master.read_processes()
        except RuntimeUnavailable:
            await self.launcher.end_lost()
            return
        await self.launcher.kill(processes)
        await wait_gone(processes.master)

    def in_force(self) -> str:
        """Return the last configuration that we or an earlier controller brought into force; empty without one."""
        with refusing(f"read {self.layout.config}"), contextlib.suppress(FileNotFoundError):
            return self.layout.config.read_text()
        return ""

    async def _check(self, spec: DataplaneSpec, text: str, reason: str) -> None:
        # The check omits the records: the base map is replaced by an empty one.
        named = {**spec.paths.named, "base_map": str(self.layout.empty_map)}
        paths = replace(spec.paths, named=named)
        candidate = render_config(replace(spec, paths=paths))
        write_atomic(self.layout.candidate, candidate.encode())
        candidate_file = str(self.layout.candidate)
        status, words = await run_program(
            self.program, "-c", "-f", candidate_file, deadline_s=_CHECK_DEADLINE_S
        )
        if status == 0:
            return
        write_atomic(self.layout.rejected, text.encode())
        message = parse_failure(words)
        self._note(reason, message)
        raise ConfigRejected(f"HAProxy refuses the configuration: {message}")

    async def _start(self, reason: str, began: float) -> None:
        self.starting.set()
        try:
            self.processes = await self.launcher.start()
        except ConfigRejected as error:
            self.processes = None
            with contextlib.suppress(FileNotFoundError):
                write_atomic(self.layout.rejected, self.layout.config.read_bytes())
            self._note(reason, error.message)
            raise
        self.records.known.clear()
        self.records.trust(self.processes)
        self._note(reason, took_s=asyncio.get_running_loop().time() - began)

    async def _reload(self, reason: str, began: float) -> None:
        for look in self.before_reload:
            # A hung worker must not delay its own replacement.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEFORE_RELOAD_S):
                    await look()
        failed = await self.master.send_reload()
        self.processes = await self.master.read_processes()
        took_s = asyncio.get_running_loop().time() - began
        if failed is None:
            self.records.trust(self.processes)
            self._note(reason, took_s=took_s)
            return
        # Restore the last good file: the master's next start must read the configuration of the worker in force.
        with contextlib.suppress(FileNotFoundError):
            write_atomic(self.layout.rejected, self.layout.config.read_bytes())
            write_atomic(self.layout.config, self.layout.last_good.read_bytes())
        message = parse_failure(failed)
        self._note(reason, message, took_s=took_s)
        raise ReloadFailed(f"HAProxy could not reload: {message}")

    def _note(self, reason: str, failure: str | None = None, *, took_s: float = 0.0) -> None:
        self.reload_counts["ok" if failure is None else "failed"] += 1
        if failure is None:
            self.reload_durations.add(took_s)
        number, at = self.reload_counts.total(), self.clock.now().timestamp()
        self.last_reload = ReloadReport(number, at, reason, failure is None, failure or "", took_s)


def _sweep_sockets(directory: Path, config: str) -> None:
    """Remove HAProxy's loopback sockets that the configuration no longer has: HAProxy never removes them."""
    kept = loopback_sockets(config)
    with refusing(f"remove stale files in {directory}"):
        for path in directory.glob("hop-*.sock"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def link_jail_to_itself(jail: Path) -> None:
    """Make the jail's own path valid inside the jail: HAProxy connects to a peer by the path that it has bound."""
    inside = jail.joinpath(*jail.parts[1:])
    ensure_directory(inside.parent)
    with refusing(f"create the link {inside}"), contextlib.suppress(FileExistsError):
        inside.symlink_to("/")
