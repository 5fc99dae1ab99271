"""Life cycle of the controller (`imdsproxy run`): start, tasks, shutdown.

HAProxy and the document server outlive the controller, which starts or adopts them, watches them and leaves them
running. Only in a container, where they would be killed with the controller, does it stop them in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import itertools
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import structlog

from imdsproxy.api.health import HealthServer
from imdsproxy.api.starting import StartingServer
from imdsproxy.config.changes import SettingsHolder, refuse_dropped
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.controller import build
from imdsproxy.controller.parts import Parts, build_parts
from imdsproxy.controller.reload import on_sighup
from imdsproxy.errors import DataplaneError, HostRefused, first_expected
from imdsproxy.haproxy.launch import Launcher, read_program
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.unix_listener.listener import sweep_unix_socket
from imdsproxy.host.account import owner_of
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import find_directory_holder, hold_directory, limit_log, remove_file
from imdsproxy.host.logs import LogCopies, open_logging
from imdsproxy.host.notify import Heartbeat, ServiceNotifier, is_journal
from imdsproxy.host.process import (
    freeze_garbage,
    leave_no_dumps,
    open_process,
    raise_descriptor_limit,
)
from imdsproxy.host.servers import open_tcp_socket, open_unix_socket
from imdsproxy.host.socket_file import SocketFiles, open_sole_socket
from imdsproxy.model.inventory import Inventory
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.listeners.apply import apply_links
from imdsproxy.network.listeners.host import SystemHost
from imdsproxy.network.ovn.host import sweep_ovn
from imdsproxy.nova.upstream import NovaUpstream
from imdsproxy.reconcile.progress import Progress

if TYPE_CHECKING:
    from imdsproxy.api.metrics import Metrics
    from imdsproxy.documents.http import AsgiApp
    from imdsproxy.reconcile.progress import Step

ShowStart: TypeAlias = "Callable[[Sequence[Step] | None], None]"

_FIRST_SYNC_S = 5.0
"""Longest wait of the first configuration for sources without new records; a running HAProxy is not affected."""

_LOOK_EVERY_S = 0.05
_NOVA_EVERY_S = 10.0
_COUNT_TURNS = 6
_LAST_LOOK_S = 0.5
_END_GRACE_S = 30.0
_SHOW_EVERY_S = 0.5
_log = structlog.get_logger()


async def run_controller(
    holder: SettingsHolder,
    config: Path | None,
    environment: Mapping[str, str],
    clock: Clock,
    *,
    container: bool = False,
    show: ShowStart | None = None,
) -> None:
    """Run until stopped; leave the data plane running, unless the stop request includes it.

    With `container`, the data plane always stops too, and its processes' logs are copied to standard error. Raises
    `ConfigError`: a setting is not usable on this host; `DataplaneError`: HAProxy or the document server does not
    start, or the host refuses an operation.
    """
    settings, layout = holder.settings, Layout.of(holder.settings)
    notifier = ServiceNotifier(environment.get("NOTIFY_SOCKET", ""))
    heartbeat = Heartbeat(notifier, environment, clock.monotonic)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(asyncio.create_task(heartbeat.run()).cancel)
        build.prepare_directories(settings, layout)
        nova = NovaUpstream(layout.runtime)
        nova.read(settings.nova)
        # The socket comes first: two controllers of one data plane would undo each other's work.
        owner = owner_of(settings.admin.user, settings.admin.group)
        mode = int(settings.admin.mode, 8)
        admin = open_sole_socket(settings.admin_socket, mode=mode, owner=owner)
        stack.callback(admin.close)
        progress = Progress()
        starting = await stack.enter_async_context(StartingServer(admin, lambda: progress.steps))
        if show is not None:
            stack.callback(asyncio.create_task(_show_start(show, starting, heartbeat)).cancel)
        thread = build.build_thread(settings)
        stack.callback(thread.close)
        stack.enter_context(hold_directory(layout.state))
        health = None
        if (listen := settings.metrics.listen) is not None:
            sock = open_tcp_socket(listen.host, listen.port)
            health = stack.enter_context(HealthServer(sock, alive=heartbeat.alive))
        parts = build_parts(
            holder=holder,
            clock=clock,
            notifier=notifier,
            nova=nova,
            thread=thread,
            program=await read_program(settings.haproxy.binary),
            config=config,
            environment=environment,
            progress=progress,
        )
        parts.ending.with_data_plane = container
        if container:
            copies = LogCopies((layout.haproxy_log, layout.documents_log), sys.stderr.buffer)
            stack.callback(copies.copy)
            stack.callback(asyncio.create_task(copies.run()).cancel)
        stack.callback(settings.admin_socket.unlink, missing_ok=True)
        await _live(parts, admin, starting, health, heartbeat)


async def _live(
    parts: Parts,
    admin: socket.socket,
    starting: StartingServer,
    health: HealthServer | None,
    heartbeat: Heartbeat,
) -> None:
    """Start all parts in order, serve until stopped, then stop the controller's own parts."""
    settings, layout = parts.holder.settings, parts.layout
    loop = asyncio.get_running_loop()
    worker = owner_of(None, settings.haproxy.group)
    resolver_socket = open_sole_socket(layout.resolver_socket, mode=0o660, owner=worker)
    audit_socket = open_sole_socket(layout.audit_socket, mode=0o660, owner=worker)
    last_socket = open_unix_socket(
        layout.audit_last_socket, mode=0o660, owner=worker, kind=socket.SOCK_DGRAM
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, parts.ending.requested.set)
    loop.add_signal_handler(signal.SIGHUP, on_sighup, parts)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(parts.notifier.send, STOPPING="1")
        await stack.enter_async_context(parts.watch)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        tasks = [
            group.create_task(source.run(parts.records.observe), name=f"source-{source.name}")
            for source in parts.sources.all
        ]
        auditing = parts.audit.run(audit_socket, last_socket, parts.kept)
        tasks.append(group.create_task(auditing, name="audit"))
        loading = group.create_task(_load_http(parts))
        try:
            await _start_data_plane(parts)
        finally:
            parts.served.set()
            parts.haproxy.starting.set()
        tasks += [
            group.create_task(work, name=getattr(work, "__qualname__", None))
            for work in parts.work()
        ]
        (metrics, resolver), _ = await asyncio.gather(loading, parts.probe.ask())
        from imdsproxy.documents.http import serve

        resolving = group.create_task(serve(resolver, resolver_socket))
        tasks.append(group.create_task(_count(parts)))
        api = await asyncio.to_thread(_load_admin, parts)
        await starting.end()
        administering = group.create_task(serve(api, admin))
        if health is not None:
            health.reports = metrics
        # `cli.daemon` disabled garbage collection. This call enables it again and excludes existing objects: each
        # collection over 1,000 networks would delay guests by 70 ms.
        freeze_garbage()
        heartbeat.starting = False
        networks = len(parts.inventory.networks)
        instances = len(parts.inventory.instances)
        parts.notifier.ready(f"{networks} networks")
        _log.info("ready", networks=networks, instances=instances, admin=str(settings.admin_socket))
        await parts.ending.requested.wait()
        await _settle(parts)
        for task in (*tasks, administering):
            task.cancel()
        if parts.ending.with_data_plane:
            # Stop supervisors before the processes they restart. The admin API may end later.
            await asyncio.wait(tasks)
            await parts.haproxy.launcher.stop()
            for one in parts.companions:
                await one.stop()
        # The resolver ends after HAProxy, which may send requests over its open connections until then.
        resolving.cancel()
        if parts.ending.with_data_plane:
            await sweep_host(settings, parts.host, parts.tables)
            sweep_unix_socket(layout.config, SocketFiles().observe)


async def _show_start(show: ShowStart, starting: StartingServer, heartbeat: Heartbeat) -> None:
    try:
        while heartbeat.starting:
            await asyncio.sleep(_SHOW_EVERY_S)
            show(starting.steps())
    finally:
        show(None)


async def _count(parts: Parts) -> None:
    """Read HAProxy's counters regularly, because a worker may end by itself, and limit the size of HAProxy's log."""
    for turn in itertools.count():
        # Nova's answers 403 are a problem without a look of Prometheus.
        await parts.nova_watch.refresh()
        if turn % _COUNT_TURNS == 0:
            await parts.counting.refresh()
            await parts.traffic.refresh()
        limit_log(parts.layout.haproxy_log)
        await asyncio.sleep(_NOVA_EVERY_S)


async def _settle(parts: Parts) -> None:
    parts.records.settle()
    # Without the timeout, a hanging worker would block the shutdown.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_LOOK_S):
            await parts.counting.refresh()
    await parts.counting.save()


async def _load_http(parts: Parts) -> tuple[Metrics, AsgiApp]:
    """Import metrics and the resolver in a thread, while HAProxy reads its files.

    The import takes as long as the rest of the start. Known guests do not wait for it: no module needed to serve them
    may import these modules.
    """

    def make() -> tuple[Metrics, AsgiApp]:
        from imdsproxy.api.metrics import Metrics
        from imdsproxy.documents.resolver_app import resolver_app

        return Metrics(parts), resolver_app(parts.resolver, parts.forward)

    await parts.haproxy.starting.wait()
    return await asyncio.to_thread(make)


def _load_admin(parts: Parts) -> AsgiApp:
    """Import and build the admin API, the slowest import."""
    from imdsproxy.api.app import admin_app  # the resolver does not wait for it

    return admin_app(parts)


async def _start_data_plane(parts: Parts) -> None:
    """Adopt running processes, and start missing ones with the records that the sources have reported so far."""
    await parts.hop_limits.preload()
    adopted = await parts.haproxy.adopt()
    found = parts.companion.read().parent
    documents = asyncio.create_task(parts.companion.ensure())
    try:
        # Both take long: the document server's start, and observing a thousand namespaces.
        await asyncio.gather(documents, _prepare(parts, adopted=adopted))
        await parts.listeners.first_round()
        # The existing MAC filters restore guests that are known only by their MACs.
        parts.lookup.recall()
    except DataplaneError:
        # A document server that is still starting cannot be stopped, so wait for it.
        await asyncio.wait([documents])
        if found is None:
            # Do not leave behind a document server that this start created.
            await parts.companion.stop()
        raise


async def _prepare(parts: Parts, *, adopted: bool) -> None:
    """Write the records for a HAProxy that starts later, or compare an adopted HAProxy with the records."""
    await _wait_for_records(parts)
    if adopted:
        processes = parts.haproxy.processes
        _log.info("haproxy adopted", master=None if processes is None else processes.master)
        parts.records.resync()
        await parts.listeners.first_look()
    else:
        await parts.haproxy.end_stray()
        await asyncio.gather(parts.listeners.first_look(), _write_records(parts))


async def _write_records(parts: Parts) -> None:
    applier = parts.records.applier
    if await parts.records.reuse_maps():
        return
    # Sources that are not in sync yet keep their records of the last run.
    before: dict[str, str | None] = {}
    if not parts.inventory.in_sync and applier.load():
        before.update(parts.records.keep_of_last_run(applier.state.effective()))
        parts.hop_limits.restrict(before)
    records = await parts.records.compile_all()
    if before:
        records = {**{key: value for key, value in before.items() if value}, **records}
    applier.write_all(records)


async def _wait_for_records(parts: Parts) -> None:
    await parts.nova.resolve()
    before: object = None
    while not parts.inventory.in_sync:
        # Keep waiting while records arrive: a start without them would not serve their guests sooner.
        known = len(parts.inventory.instances), parts.records.progress.steps
        if known == before:
            reports = parts.inventory.reports.items()
            missing = [name for name, report in reports if not report.in_sync]
            _log.warning("starting before all sources are in sync", waiting_for=missing)
            break
        before = known
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_SYNC_S):
                await _enough_records(parts)
        if _is_alone(parts):
            _log.warning("starting with the fleet's records that are on disk: no hub answers")
            break
    # Restore guests behind routers before the first sweep.
    parts.lookup.follow_routes()


async def _enough_records(parts: Parts) -> None:
    """Wait until all sources are in sync, or only the fleet is missing and serves its records from disk."""
    while True:
        if parts.inventory.in_sync or _is_alone(parts):
            return
        await asyncio.sleep(_LOOK_EVERY_S)


def _is_alone(parts: Parts) -> bool:
    fleet, reports = parts.sources.fleet, parts.inventory.reports.items()
    missing = [name for name, report in reports if not report.in_sync]
    return fleet is not None and fleet.alone and missing == [fleet.name]


def run(
    load: Callable[[], Loaded],
    *,
    config: Path | None,
    environment: Mapping[str, str],
    container: bool = False,
    show: ShowStart | None = None,
) -> None:
    """Run the controller until stopped.

    `container`: run as the main process of a container: HAProxy and the document server end with the controller. Raises
    `ImdsproxyError`: the start failed; the error's class says who must act.
    """
    clock = Clock()

    def open_log(settings: Settings) -> None:
        log = settings.log
        journal = is_journal(sys.stderr, environment)
        open_logging(log.level, log.format, sys.stderr, clock=clock, journal=journal)

    loaded = load()
    open_log(loaded.settings)
    refuse_dropped(None, loaded)
    for path in sorted(loaded.empty):
        _log.warning("settings file is empty", file=str(path))
    holder = SettingsHolder(loaded, load, open_log)
    raise_descriptor_limit()
    leave_no_dumps()
    # systemd's watchdog ends a hanging process with SIGABRT; faulthandler then logs where it hung.
    faulthandler.enable()
    try:
        running = run_controller(holder, config, environment, clock, container=container, show=show)
        asyncio.run(running)
    except BaseExceptionGroup as group:
        first = first_expected(group)
        if first is None:
            raise
        raise first from group


async def sweep_host(
    settings: Settings, host: SystemHost, tables: Iterable[MacFilters | HopLimits]
) -> None:
    """Remove all MAC filters, rules, namespaces, links and addresses of imdsproxy after the data plane ended.

    Raises `DataplaneError`: the host refuses an operation; `SourceUnavailable`: open vSwitch's database refuses an
    operation.
    """
    for one in tables:
        await one.close_all()
    await host.remove_tables()
    host.ovn = None
    host.touch(None)
    left = await host.settle({}, {})
    apply_links(host.links, {})
    if left.problems:
        raise HostRefused("not everything of ours could be taken away", problems=left.problems)
    if settings.sources.ovn.enabled:
        await sweep_ovn(settings.sources.ovn.open_vswitch, host)


async def _end_unreachable(state: Path) -> None:
    """Stop a controller whose admin socket file was removed; it would recreate what this process removes."""
    pid = find_directory_holder(state)
    controller = None if pid is None else open_process(pid)
    if controller is not None:
        await controller.stop(_END_GRACE_S)
        controller.close()


async def stop_data_plane(settings: Settings, environment: Mapping[str, str]) -> None:
    """Stop the data plane without the help of a controller, which has ended or does not answer.

    Raises `DataplaneError`: a process does not end, or the host refuses an operation; `SourceUnavailable`: open
    vSwitch's database refuses an operation.
    """
    layout = Layout.of(settings)
    await _end_unreachable(layout.state)
    thread = build.build_thread(settings)
    host = build.build_host(settings, layout, thread)
    companion = build.build_companion(settings, layout, None, environment)
    try:
        unit = build.unit_of(settings.haproxy.supervisor, settings.haproxy.unit)
        await Launcher(settings.haproxy.binary, unit, layout).stop()
        for one in (
            companion,
            *build.build_identity_companions(settings, layout, None, environment),
        ):
            await one.stop()
        filters = build.build_filters(layout, host, Inventory(), Clock())
        await sweep_host(settings, host, filters)
    finally:
        thread.close()
    sockets = (layout.master_socket, layout.probe_socket, layout.resolver_socket)
    for path in (*sockets, settings.admin_socket):
        remove_file(path, f"remove {path}")
    sweep_unix_socket(layout.config, SocketFiles().observe)
