"""`imdsproxy run`, the controller's life: what runs beside what, from start to end.

HAProxy and the document server are not in it: they are started or adopted, watched, and left running. Only in a
container, where they would be killed with the controller, do they end with it, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import structlog

from imdsproxy.admin.health import HealthServer
from imdsproxy.admin.starting import StartingServer
from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.config.changes import SettingsHolder, refuse_dropped
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.controller import build
from imdsproxy.controller.controller import Controller
from imdsproxy.controller.reload import hang_up
from imdsproxy.core.inventory import Inventory
from imdsproxy.dataplane.launch import Launcher, read_program
from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import DataplaneError, HostRefused, first_expected
from imdsproxy.host.account import owner_of
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import find_directory_holder, hold_directory, limit_log, remove_file
from imdsproxy.host.log_copies import LogCopies
from imdsproxy.host.logs import open_logging
from imdsproxy.host.notify import Heartbeat, ServiceNotifier, is_journal
from imdsproxy.host.process import (
    freeze_garbage,
    leave_no_dumps,
    open_process,
    raise_descriptor_limit,
)
from imdsproxy.host.servers import open_tcp_socket, open_unix_socket
from imdsproxy.host.socket_file import SocketFiles, open_sole_socket
from imdsproxy.listeners.apply import apply_links
from imdsproxy.listeners.host import SystemHost
from imdsproxy.neutron_namespaces.routers import Routers
from imdsproxy.nova.upstream import NovaUpstream
from imdsproxy.ovn.sweep import sweep_places
from imdsproxy.unix_listener.listener import sweep_unix_socket

if TYPE_CHECKING:
    from imdsproxy.admin.metrics import Metrics
    from imdsproxy.core.timing import Step
    from imdsproxy.serving.http import AsgiApp

ShowStart: TypeAlias = "Callable[[Sequence[Step] | None], None]"

_FIRST_SYNC_S = 5.0
_LOOK_EVERY_S = 0.05
"""How long the first configuration waits for sources that publish nothing; a running HAProxy is not affected."""

_METRICS_EVERY_S = 10.0
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
    """Run until stopped; the data plane goes on unless it was to be stopped too.

    With `container` it always is, and what its processes log goes to standard error.

    Raises:
        ConfigError: A setting cannot be used here.
        DataplaneError: HAProxy or the document server does not start, or the host refuses.
    """
    settings, layout = holder.settings, Layout.of(holder.settings)
    notifier = ServiceNotifier(environment.get("NOTIFY_SOCKET", ""))
    heartbeat = Heartbeat(notifier, environment, clock.monotonic)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(asyncio.create_task(heartbeat.run()).cancel)
        build.prepare_directories(settings, layout)
        nova = NovaUpstream(layout.runtime)
        nova.read(settings.nova)
        # First of all: two controllers over one data plane would undo each other's work.
        owner = owner_of(settings.admin.user, settings.admin.group)
        mode = int(settings.admin.mode, 8)
        admin = open_sole_socket(settings.admin_socket, mode=mode, owner=owner)
        stack.callback(admin.close)
        starting = await stack.enter_async_context(StartingServer(admin))
        if show is not None:
            stack.callback(asyncio.create_task(_show_start(show, starting, heartbeat)).cancel)
        host = build.build_host(settings, layout)
        stack.callback(host.thread.close)
        stack.enter_context(hold_directory(layout.state))
        health = None
        if (listen := settings.metrics.listen) is not None:
            sock = open_tcp_socket(listen.host, listen.port)
            health = stack.enter_context(HealthServer(sock, alive=heartbeat.alive))
        controller = Controller(
            holder=holder,
            clock=clock,
            notifier=notifier,
            nova=nova,
            host=host,
            program=await read_program(settings.haproxy.binary),
            config=config,
            environment=environment,
        )
        controller.with_data_plane = container
        if container:
            copies = LogCopies((layout.haproxy_log, layout.documents_log), sys.stderr.buffer)
            stack.callback(copies.copy)
            stack.callback(asyncio.create_task(copies.run()).cancel)
        stack.callback(settings.admin_socket.unlink, missing_ok=True)
        starting.steps = lambda: controller.records.progress.steps
        await _live(controller, admin, starting, health, heartbeat)


async def _live(
    controller: Controller,
    admin: socket.socket,
    starting: StartingServer,
    health: HealthServer | None,
    heartbeat: Heartbeat,
) -> None:
    """Start in order, serve until the end is asked for, and stop what is ours."""
    settings, layout = controller.holder.settings, controller.layout
    loop = asyncio.get_running_loop()
    worker = owner_of(None, settings.haproxy.group)
    resolver_socket = open_sole_socket(layout.resolver_socket, mode=0o660, owner=worker)
    audit_socket = open_sole_socket(layout.audit_socket, mode=0o660, owner=worker)
    last_socket = open_unix_socket(
        layout.audit_last_socket, mode=0o660, owner=worker, kind=socket.SOCK_DGRAM
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, controller.ended.set)
    loop.add_signal_handler(signal.SIGHUP, hang_up, controller)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(controller.notifier.send, STOPPING="1")
        await stack.enter_async_context(controller.watch)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        tasks = [
            group.create_task(source.run(controller.records.observe), name=f"source-{source.name}")
            for source in controller.sources.all
        ]
        auditing = controller.audit.run(audit_socket, last_socket, controller.kept)
        tasks.append(group.create_task(auditing, name="audit"))
        loading = group.create_task(_load_http(controller))
        try:
            await _start_data_plane(controller)
        finally:
            controller.served.set()
            controller.haproxy.starting.set()
        tasks += [
            group.create_task(work, name=getattr(work, "__qualname__", None))
            for work in controller.work()
        ]
        (metrics, resolver), _ = await asyncio.gather(loading, controller.probe.ask())
        from imdsproxy.serving.http import serve  # noqa: PLC0415 - it is there now

        resolving = group.create_task(serve(resolver, resolver_socket))
        tasks.append(group.create_task(_count(metrics, layout.haproxy_log)))
        api = await asyncio.to_thread(_load_admin, controller)
        await starting.end()
        administering = group.create_task(serve(api, admin))
        if health is not None:
            health.reports = metrics
        # Enabled again (`cli.daemon`): guests would wait 70 ms for each look through 1,000 networks.
        freeze_garbage()
        heartbeat.starting = False
        networks = len(controller.inventory.networks)
        instances = len(controller.inventory.instances)
        controller.notifier.ready(f"{networks} networks")
        _log.info("ready", networks=networks, instances=instances, admin=str(settings.admin_socket))
        await controller.ended.wait()
        await _settle(controller)
        for task in (*tasks, administering):
            task.cancel()
        if controller.with_data_plane:
            # Who starts again what has ended is to be gone before it ends; the admin API may take its time.
            await asyncio.wait(tasks)
            await controller.haproxy.launcher.stop()
            await controller.companion.stop()
        # After HAProxy: while that runs, a request may be on its way on each connection that it keeps.
        resolving.cancel()
        if controller.with_data_plane:
            await sweep_host(settings, controller.host, controller.tables)
            sweep_unix_socket(layout.config, SocketFiles().observe)


async def _show_start(show: ShowStart, starting: StartingServer, heartbeat: Heartbeat) -> None:
    """Show how far a start is that takes long."""
    try:
        while heartbeat.starting:
            await asyncio.sleep(_SHOW_EVERY_S)
            show(starting.steps())
    finally:
        show(None)


async def _count(metrics: Metrics, log: Path) -> None:
    """Read HAProxy's counters now and then, so that none is lost over a reload; keep its log short."""
    while True:
        await metrics.refresh()
        limit_log(log)
        await asyncio.sleep(_METRICS_EVERY_S)


async def _settle(controller: Controller) -> None:
    """Have on disk what the next controller begins with."""
    controller.records.settle()
    # A worker that hangs must not keep this process from its end.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_LOOK_S):
            await controller.counting.refresh()
    await controller.counting.save()


async def _load_http(controller: Controller) -> tuple[Metrics, AsgiApp]:
    """Metrics and the resolver, loaded in a thread, beside a HAProxy that reads its files.

    To import them takes as long as everything else that happens before guests are served. They do not wait for it:
    nothing that is needed to serve the known ones may import these modules.
    """

    def make() -> tuple[Metrics, AsgiApp]:
        from imdsproxy.admin.metrics import Metrics  # noqa: PLC0415 - see above
        from imdsproxy.serving.resolver_app import resolver_app  # noqa: PLC0415 - as above

        return Metrics(controller), resolver_app(controller.resolver, controller.forward)

    await controller.haproxy.starting.wait()
    return await asyncio.to_thread(make)


def _load_admin(controller: Controller) -> AsgiApp:
    """Import the admin API, which takes longest of all, and make it."""
    from imdsproxy.admin.api import admin_app  # noqa: PLC0415 - the resolver does not wait for it

    return admin_app(controller)


async def _start_data_plane(controller: Controller) -> None:
    """Adopt what runs; start what does not, with everything that the sources know by now."""
    await controller.hop_limits.preload()
    adopted = await controller.haproxy.adopt()
    found = controller.companion.read().parent
    documents = asyncio.create_task(controller.companion.ensure())
    try:
        # The document server takes its time to start; so does a look at a thousand namespaces.
        await asyncio.gather(documents, _prepare(controller, adopted=adopted))
        await controller.listeners.first_round()
        # From the MAC filters that are still there: guests that are known by their MACs alone are known on.
        controller.lookup.recall()
    except DataplaneError:
        # One that is just being started could not be stopped.
        await asyncio.wait([documents])
        if found is None:
            # A document server that cannot be reached is not left behind.
            await controller.companion.stop()
        raise


async def _prepare(controller: Controller, *, adopted: bool) -> None:
    """Get ready what a HAProxy that is yet to start reads, or compare one that runs with the records."""
    await _wait_for_records(controller)
    if adopted:
        processes = controller.haproxy.processes
        _log.info("haproxy adopted", master=None if processes is None else processes.master)
        controller.records.resync()
        await controller.listeners.first_look()
    else:
        await controller.haproxy.end_stray()
        await asyncio.gather(controller.listeners.first_look(), _write_records(controller))


async def _write_records(controller: Controller) -> None:
    """What a HAProxy reads that is yet to start."""
    applier = controller.records.applier
    if await controller.records.reuse_maps():
        return
    # Records of a source that is not in sync yet are served on as they were.
    before: dict[str, str | None] = {}
    if not controller.inventory.in_sync and applier.load():
        before.update(controller.records.keep_of_last_run(applier.state.effective()))
        controller.hop_limits.restrict(before)
    records = await controller.records.compile_all()
    if before:
        records = {**{key: value for key, value in before.items() if value}, **records}
    applier.write_all(records)


async def _wait_for_records(controller: Controller) -> None:
    await controller.nova.resolve()
    before: object = None
    while not controller.inventory.in_sync:
        # As long as records come in, a start without them would serve no guest sooner.
        known = len(controller.inventory.instances), controller.records.progress.steps
        if known == before:
            reports = controller.inventory.reports.items()
            missing = [name for name, report in reports if not report.in_sync]
            _log.warning("starting before all sources are in sync", waiting_for=missing)
            break
        before = known
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_SYNC_S):
                await _enough_records(controller)
        if _is_alone(controller):
            _log.warning("starting with the fleet's records that are on disk: no hub answers")
            break
    # Before anything is swept: guests behind routers are known on, as they were before a restart.
    controller.lookup.follow_routes()


async def _enough_records(controller: Controller) -> None:
    """Wait until all sources are in sync, or the only one that is not serves what it has on disk."""
    while True:
        if controller.inventory.in_sync or _is_alone(controller):
            return
        await asyncio.sleep(_LOOK_EVERY_S)


def _is_alone(controller: Controller) -> bool:
    fleet, reports = controller.sources.fleet, controller.inventory.reports.items()
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
    """Be the controller until stopped.

    Args:
        load: Reads the settings; called again at each reload.
        config: The file that was named on the command line, handed on to the document server.
        environment: The process's variables, for the settings in it and the service manager's.
        container: Be the program of a container: HAProxy and the document server end with it.
        show: Given what is under way now and then while it starts, and `None` at the end of that.

    Raises:
        ImdsproxyError: It cannot start; says who must act.
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
    # systemd's watchdog ends a process that hangs by SIGABRT: the log then says where it hung.
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
    settings: Settings, host: SystemHost, tables: Iterable[MacFilters | HopLimits | Routers]
) -> None:
    """Remove every MAC filter, rule, namespace, link and address of ours, once they are no longer needed.

    Raises:
        DataplaneError: The host refuses.
        SourceUnavailable: Open vSwitch's database refuses.
    """
    for one in tables:
        await one.close_all()
    host.touch(None)
    left = await host.settle({}, {})
    apply_links(host.links, {})
    if left.problems:
        raise HostRefused("not everything of ours could be taken away", problems=left.problems)
    if settings.sources.ovn.enabled:
        await sweep_places(settings.sources.ovn.open_vswitch, host.thread, host.naming)


async def _end_unreachable(state: Path) -> None:
    """End the controller whose socket's file was removed: it would make again what is taken away beside it."""
    pid = find_directory_holder(state)
    controller = None if pid is None else open_process(pid)
    if controller is not None:
        await controller.stop(_END_GRACE_S)
        controller.close()


async def stop_data_plane(settings: Settings, environment: Mapping[str, str]) -> None:
    """End the data plane without a controller, which has ended or cannot be asked.

    Raises:
        DataplaneError: A process does not end, or the host refuses.
        SourceUnavailable: Open vSwitch's database refuses.
    """
    layout = Layout.of(settings)
    await _end_unreachable(layout.state)
    host = build.build_host(settings, layout)
    companion = build.build_companion(settings, layout, None, environment)
    try:
        await Launcher(settings.haproxy.binary, build.unit_of(settings.haproxy), layout).stop()
        await companion.stop()
        filters = build.build_filters(layout, host, Inventory(), Clock())
        await sweep_host(settings, host, (*filters, build.build_routers(settings, host)))
    finally:
        host.thread.close()
    sockets = (layout.master_socket, layout.probe_socket, layout.resolver_socket)
    for path in (*sockets, settings.admin_socket):
        remove_file(path, f"remove {path}")
    sweep_unix_socket(layout.config, SocketFiles().observe)
