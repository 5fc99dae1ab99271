"""Launcher for HAProxy's master: starts it, finds a running one, ends it."""

import asyncio
import shutil
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal

from imdsproxy.errors import ConfigRejected, HaproxyMissing, HostRefused, RuntimeUnavailable
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.master import MasterClient
from imdsproxy.haproxy.rules.runtime import Processes, parse_failure, parse_features, parse_version
from imdsproxy.host import process
from imdsproxy.host.files import write_atomic

_MINIMUM: Final = (3, 0)
_START_DEADLINE_S: Final = 20.0
_MAXCONN: Final = 4096
_POLL_S: Final = 0.01
_SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STOP_GRACE_S: Final = 10.0
_ASK_S: Final = 10.0
_UNIT_S: Final = 90.0
"""Deadline for systemctl, in seconds: longer than our units may take to start or to stop."""


@dataclass(frozen=True, slots=True)
class HaproxyProgram:
    """Installed HAProxy; `path` is absolute."""

    path: str
    version: str
    features: frozenset[str]


def locate_program(binary: str) -> str:
    """Return the path of a program from the settings, which may be a bare name."""
    return shutil.which(binary, path=_SEARCH_PATH) or binary


async def read_program(binary: str) -> HaproxyProgram:
    """Query the program's version and features.

    Raises `HaproxyMissing` if HAProxy is missing, hangs, is older than 3.0, or was built without namespaces.
    """
    path = locate_program(binary)
    try:
        _, text = await process.run_program(path, "-vv", deadline_s=_ASK_S, errors=False)
    except OSError as error:
        raise HaproxyMissing(
            f"cannot run {binary}: {error.strerror}",
            hint="install HAProxy 3.0 or newer (Debian 13: apt install haproxy)",
        ) from error
    except HostRefused as error:
        raise HaproxyMissing(error.message, hint=error.hint) from error
    found = parse_version(text)
    if found is None:
        raise HaproxyMissing(f"{binary} -vv does not look like HAProxy", hint="set haproxy.binary")
    version = ".".join(str(part) for part in found if part != "")
    if found[:2] < _MINIMUM:
        raise HaproxyMissing(f"HAProxy {version} is too old: imdsproxy needs 3.0 or newer")
    features = parse_features(text)
    if "NS" not in features:
        raise HaproxyMissing(f"HAProxy {version} was built without network namespaces (USE_NS)")
    return HaproxyProgram(path, version, features)


def _maxconn(config: Path) -> int:
    """Return the configuration's own `maxconn`, for the command line.

    A waiting master reads no configuration and would take 100. It holds a socket whose descriptor number exceeds those
    of the namespaces that were open before. If that number is larger than 100 connections could need, the master ends
    at its start: from about 220 namespaces on (HAProxy 3.0, `MASTER_MAXCONN`).
    """
    lines = config.read_text().splitlines() if config.exists() else []
    found = [line.split()[1] for line in lines if line.split()[:1] == ["maxconn"]]
    return int(found[0]) if found else _MAXCONN


@dataclass(slots=True)
class Launcher:
    """Launcher of HAProxy's master on this host; the master outlives the controller.

    systemd restarts the master by itself if there is a unit; with `None` the master is a detached process.
    """

    program: str
    unit: str | None
    layout: Layout
    # A separate client, so that its queries during a start are not counted.
    master: MasterClient = field(init=False)

    def __post_init__(self) -> None:
        self.master = MasterClient(self.layout.master_socket)

    def arguments(self) -> list[str]:
        """Return the command line, by which a running master is also recognised as ours."""
        master, pid_file = f"{self.layout.master_socket},mode,600", str(self.layout.pid_file)
        config, maxconn = str(self.layout.config), str(_maxconn(self.layout.config))
        return [self.program, "-W", "-S", master, "-p", pid_file, "-n", maxconn, "-f", config]

    async def start(self) -> Processes:
        """Start the master and wait until its worker accepts.

        Raises `ConfigRejected` if HAProxy ends at once; the message has its alerts; `HaproxyMissing` if the program
        cannot be run; `RuntimeUnavailable` if HAProxy runs, but does not answer on its socket.
        """
        if self.unit is not None:
            return await self._start_unit(self.unit)
        child, offset = process.spawn_logged(self.arguments(), self.layout.haproxy_log, {})
        try:
            return await self._wait_for_worker(partial(self._read_end, child, offset))
        except (ConfigRejected, RuntimeUnavailable):
            # Otherwise the next attempt would start a second master beside this one.
            await child.kill_group()
            raise
        finally:
            child.close()

    async def _start_unit(self, unit: str) -> Processes:
        # The file stays, for starts by systemd without us.
        options = f"MAXCONN={_maxconn(self.layout.config)}\n"
        write_atomic(self.layout.environment, options.encode(), mode=0o644)
        status, words = await control_unit("start", unit)
        if status != 0:
            alerts = await _read_alerts(unit)
            reason = f"HAProxy did not start: {alerts}" if alerts else words
            raise ConfigRejected(reason, hint=f"journalctl -u {unit}")
        return await self._wait_for_worker(partial(_read_failure, unit))

    async def _wait_for_worker(self, read_end: Callable[[], Awaitable[str | None]]) -> Processes:
        """Poll the master socket until it names a worker; `read_end` returns the output of an ended master."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_DEADLINE_S
        while True:
            processes, last = None, None
            try:
                processes = await self.master.read_processes()
            except RuntimeUnavailable as error:
                last = error
            if processes is not None and processes.worker is not None:
                return processes
            words = await read_end()
            if words is not None:
                raise ConfigRejected(f"HAProxy did not start: {words}")
            if loop.time() > deadline:
                late = f"HAProxy did not come up within {_START_DEADLINE_S:g} s"
                raise RuntimeUnavailable(late) from last
            await asyncio.sleep(_POLL_S)

    async def _read_end(self, child: process.ProcessHandle, offset: int) -> str | None:
        if child.alive():
            return None
        output = self.layout.haproxy_log.read_bytes()[offset:].decode("utf-8", "replace")
        return parse_failure(output)[-2000:] or "it wrote nothing"

    async def kill(self, processes: Processes) -> None:
        """Kill the master and its workers at once, whatever their state."""
        # Kill the master first: it would report a killed worker as a failure in its log.
        for pid in processes.pids:
            kill_process(pid)

    async def end_lost(self) -> None:
        """Kill our master if its socket does not lead to it, because its files were removed or it hangs."""
        if self.unit is not None:
            await self.stop()
            return
        arguments = self.arguments()
        for handle in process.find_processes("haproxy", {arguments[3], arguments[-1]}):
            handle.kill(signal.SIGKILL)
            await handle.wait()
            handle.close()

    async def stop(self) -> None:
        if self.unit is not None:
            status, words = await control_unit("stop", self.unit)
            if status != 0:
                raise RuntimeUnavailable(words)
            return
        try:
            processes = await self.master.read_processes()
        except RuntimeUnavailable:
            await self.end_lost()
            return
        # The master passes SIGTERM on to its workers and ends when they have.
        for pid in processes.pids:
            handle = process.open_process(pid)
            if handle is not None:
                await handle.stop(_STOP_GRACE_S)
                handle.close()


def kill_process(pid: int) -> None:
    handle = process.open_process(pid)
    if handle is not None:
        handle.kill(signal.SIGKILL)
        handle.close()


async def control_unit(verb: Literal["start", "stop"], unit: str) -> tuple[int, str]:
    """Start or stop a systemd unit; return the exit status, and the command with its output.

    Raises `HaproxyMissing` if systemctl is missing, `HostRefused` if the command takes longer than our units may.
    """
    if verb == "start":
        # Otherwise each restart since the unit's last rest makes systemd wait longer. systemd refuses for a unit that
        # was never started, which has no failures to reset.
        await _run("systemctl", "reset-failed", unit)
    status, words = await _run("systemctl", verb, unit, deadline_s=_UNIT_S)
    return status, f"systemctl {verb} {unit}: {words}"


async def _run(*arguments: str, deadline_s: float = _ASK_S) -> tuple[int, str]:
    try:
        return await process.run_program(*arguments, deadline_s=deadline_s)
    except OSError as error:
        raise HaproxyMissing(f"cannot run {arguments[0]}: {error.strerror}") from error


async def _read_failure(unit: str) -> str | None:
    code, _ = await _run("systemctl", "is-failed", "--quiet", unit)
    return await _read_alerts(unit) or f"{unit} has failed" if code == 0 else None


async def _read_alerts(unit: str) -> str:
    """Return HAProxy's messages in the journal before it ended; empty if the journal cannot be read."""
    await _run("journalctl", "--sync")
    options = ("--unit", unit, "--output=cat", "--no-pager", "--lines=40")
    status, words = await _run("journalctl", *options)
    return find_alerts(words, unit) if status == 0 else ""


def find_alerts(journal: str, unit: str) -> str:
    """Return the alerts of HAProxy's last start that had any, each once; systemd's messages separate the starts."""
    for start in reversed(journal.split(f"Starting {unit}")):
        if "[ALERT]" in start:
            return parse_failure(start)
    return ""
