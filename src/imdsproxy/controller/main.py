"""`imdsproxy run`: the controller as a process."""

from __future__ import annotations

import asyncio
import faulthandler
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from imdsproxy.app.heartbeat import Heartbeat
from imdsproxy.app.settings_reload import SettingsHolder
from imdsproxy.config.changes import refuse_dropped
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.controller.start import run_controller
from imdsproxy.errors import ImdsproxyError
from imdsproxy.host.clock import SystemClock
from imdsproxy.host.logs import open_logging
from imdsproxy.host.notify import ServiceNotifier, is_journal
from imdsproxy.host.process import leave_no_dumps, raise_descriptor_limit


def run(load: Callable[[], Loaded], *, config: Path | None, environment: Mapping[str, str]) -> None:
    """Be the controller until stopped.

    Args:
        load: Reads the settings; called again at each reload.
        config: The file that was named on the command line, handed on to the document server.
        environment: The process's variables, for the settings in it and the service manager's.

    Raises:
        ImdsproxyError: It cannot start; says who must act.
    """
    clock = SystemClock()

    def open_log(settings: Settings) -> None:
        log = settings.log
        journal = is_journal(sys.stderr, environment)
        open_logging(log.level, log.format, sys.stderr, clock=clock, journal=journal)

    loaded = load()
    open_log(loaded.settings)
    refuse_dropped(None, loaded)
    for path in sorted(loaded.empty):
        structlog.get_logger().warning("settings file is empty", file=str(path))
    holder = SettingsHolder(loaded, load, open_log)
    raise_descriptor_limit()
    leave_no_dumps()
    # systemd's watchdog ends a process that hangs by SIGABRT: the log then says where it hung.
    faulthandler.enable()
    notifier = ServiceNotifier(environment.get("NOTIFY_SOCKET", ""))
    heartbeat = Heartbeat(notifier, environment, clock.monotonic)

    async def live() -> None:
        beating = asyncio.create_task(heartbeat.run())
        try:
            await run_controller(
                holder,
                config=config,
                environment=environment,
                clock=clock,
                notifier=notifier,
                heartbeat=heartbeat,
            )
        finally:
            beating.cancel()

    try:
        asyncio.run(live())
    except BaseExceptionGroup as group:
        expected = group.subgroup(ImdsproxyError)
        if expected is None or group.split(ImdsproxyError)[1] is not None:
            raise
        raise _first(expected) from group


def _first(group: BaseExceptionGroup[ImdsproxyError]) -> ImdsproxyError:
    """The first failure of tasks that failed together: it is the reason of the others."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if not isinstance(first, ImdsproxyError):
        raise TypeError("a group of our errors holds another one") from first
    return first
