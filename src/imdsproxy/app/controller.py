"""The controller's life: what runs beside what, from start to end.

HAProxy and the document server are not in it: they are started or adopted, watched, and left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import structlog

from imdsproxy import __version__
from imdsproxy.admin.health import health_app
from imdsproxy.admin.metrics import metrics_registry
from imdsproxy.admin.operations import SettingsReload
from imdsproxy.app.account import owner_of
from imdsproxy.app.build import (
    build_companion,
    build_files,
    build_haproxy,
    build_host,
    build_layout,
    build_sources,
    build_spec_settings,
    prepare_directories,
)
from imdsproxy.app.companion import Companion
from imdsproxy.app.explain import Explainer
from imdsproxy.app.exporter_port import ExporterPort
from imdsproxy.app.figures import Figures
from imdsproxy.app.guard import HaproxyGuard
from imdsproxy.app.kept_networks import KeptNetworks
from imdsproxy.app.listener_loop import ListenerLoop
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.nova_upstream import NovaUpstream
from imdsproxy.app.nova_watch import NovaWatch
from imdsproxy.app.operations import ControllerOperations
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.app.servers import AnyAsgiApp, open_sole_socket, open_tcp_socket, serve
from imdsproxy.app.settings_reload import SettingsHolder
from imdsproxy.app.stop import end_data_plane
from imdsproxy.app.unix_listener import UnixListener, sweep_unix_socket
from imdsproxy.app.writes import Writes
from imdsproxy.config.schema import Settings
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.inventory import AddressKey, Inventory, Observation
from imdsproxy.core.model import NetworkId
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.dataplane.launch import read_program
from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import ConfigError, DataplaneError
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import write_atomic
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.host.socket_file import SocketFiles
from imdsproxy.host.sockets import try_tcp_listen
from imdsproxy.host.watch import EventKind, HostWatch, WatchPace
from imdsproxy.serving.documents import DocumentService
from imdsproxy.serving.forward import Forwarder, SignedForwarder
from imdsproxy.serving.passwords import PasswordStore
from imdsproxy.serving.pidfile import read_pids
from imdsproxy.serving.resolver import HoldLimits, Resolver
from imdsproxy.serving.resolver_app import resolver_app
from imdsproxy.serving.store import RecordReader
from imdsproxy.sources.api import Source

__all__ = ["run_controller"]

_FIRST_SYNC_S = 5.0
"""How long the first configuration waits for the sources; HAProxy that runs already is not affected."""

_REVIEW_EVERY_S = 1.0
_FIGURES_EVERY_S = 10.0
_TAKE_OVER_S = 10.0
_FORWARD_S = 900.0
"""HAProxy's own deadlines end a forwarded request; this is for a HAProxy that hangs."""

_RESOLVER_CACHE = 8 * 1024 * 1024


@dataclass(slots=True)
class _Controller:
    """The parts that outlive start-up, and why it ends."""

    holder: SettingsHolder
    layout: Layout
    clock: Clock
    notifier: ServiceNotifier
    inventory: Inventory
    records: RecordLoop
    listeners: ListenerLoop
    haproxy: Haproxy
    guard: HaproxyGuard
    companion: Companion
    lookup: Lookup
    resolver: Resolver
    service: DocumentService
    operations: ControllerOperations
    figures: Figures
    watch: HostWatch
    nova: NovaUpstream
    forwarder: Forwarder
    sources: tuple[Source, ...]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    with_data_plane: bool = False
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def end(self, data_plane: bool) -> None:  # noqa: FBT001 - the shape of Operations.stop
        """Ask for the end; the answer to who asked goes out first."""
        self.with_data_plane = data_plane
        asyncio.get_running_loop().call_later(0.1, self.ended.set)

    def publish(self, observation: Observation) -> None:
        """Take in what a source saw."""
        self.records.observe(observation)

    async def follow_host(self) -> None:
        """Turn what the host reports into work for the listeners."""
        async for event in self.watch:
            everything = event.kind is EventKind.OVERFLOW
            self.listeners.touch(event.kind.value, None if everything else event.networks)

    async def review(self) -> None:
        """Look again at what was learned from neighbour tables, when its time is over."""
        while True:
            await asyncio.sleep(_REVIEW_EVERY_S)
            await self.lookup.review()

    async def refresh_figures(self) -> None:
        """Read HAProxy's counters now and then, so that none is lost over a reload."""
        while True:
            await self.figures.refresh()
            await asyncio.sleep(_FIGURES_EVERY_S)

    async def reload(self) -> SettingsReload:
        """Read the settings again; what can be taken over live or by a reload is.

        Returns once guests are answered by them: whoever gives a Nova its next secret must know when.
        """
        result, taken_over = self._begin_reload()
        if taken_over is None or (await asyncio.wait([taken_over], timeout=_TAKE_OVER_S))[0]:
            return result
        problems = dict.fromkeys(problem.reason for problem in self.operations.own_problems())
        pending = ("the data plane has not confirmed it yet", *problems)
        return replace(result, haproxy_reloaded=False, pending=pending)

    def _begin_reload(self) -> tuple[SettingsReload, asyncio.Task[None] | None]:
        self.notifier.reloading(int(self.clock.monotonic() * 1e6))
        before, resigned = self.nova.backends(), False

        def accept(after: Settings) -> None:
            nonlocal resigned
            resigned = self.nova.read(after.nova)

        try:
            result = self.holder.reload(accept)
        finally:
            self.notifier.ready()
        if self.nova.backends() != before:
            # Also where the settings are the same, and a file that they name is not.
            result = replace(result, haproxy_reloaded=True)
        if not (resigned or result.haproxy_reloaded):
            return result, None
        ticket = self.records.resync() if resigned else None
        return result, self._later(self._take_over(ticket))

    async def _take_over(self, ticket: int | None) -> None:
        # Rules that take another signature, or another set, find it in the records already.
        if ticket is not None:
            await self.records.tickets.wait(ticket)
        await self.nova.resolve()
        await self.listeners.tickets.wait(self.listeners.touch("settings changed"))

    def _later(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def follow_nova(self) -> None:
        """Reload when a name of Nova's leads to other addresses."""
        await self.nova.follow(lambda: self.listeners.touch("nova's addresses changed"))

    async def follow_unix(self) -> None:
        """Look after the unix listener's socket: the kernel tells nobody that a path leads elsewhere."""
        while True:
            await asyncio.sleep(_REVIEW_EVERY_S)
            unix = self.listeners.unix
            if unix is not None and unix.changed():
                self.listeners.touch("unix socket changed", ())

    def hang_up(self) -> None:
        """SIGHUP: as `imdsproxy reload`, but nobody waits for the answer."""
        try:
            result, _ = self._begin_reload()
        except ConfigError as error:
            structlog.get_logger().error("settings not reloaded", code=error.code, error=str(error))
            return
        structlog.get_logger().info(
            "settings reloaded",
            changed=[change.path for change in result.changes],
            restart_needed=list(result.restart_needed),
        )


async def run_controller(
    holder: SettingsHolder,
    *,
    config: Path | None,
    environment: Mapping[str, str],
    clock: Clock,
    notifier: ServiceNotifier,
) -> None:
    """Run until told to stop; the data plane goes on unless it was to be stopped too.

    Raises:
        ConfigError: A setting cannot be used here.
        DataplaneError: HAProxy or the document server does not start, or the host refuses.
    """
    settings = holder.settings
    program = await read_program(settings.haproxy.binary)
    layout = build_layout(settings)
    prepare_directories(settings, layout)
    nova = NovaUpstream(layout.runtime)
    nova.read(settings.nova)
    # First of all: two controllers over one data plane would undo each other's work.
    admin = open_sole_socket(
        settings.admin_socket,
        mode=int(settings.admin.mode, 8),
        owner=owner_of(settings.admin.user, settings.admin.group),
    )
    host, thread = build_host(settings, layout, naming := Naming(settings.host.name_prefix))
    with contextlib.closing(admin), contextlib.closing(thread):
        haproxy, applier = build_haproxy(settings, layout, program, clock)
        sources = build_sources(settings, clock)
        inventory = Inventory(source.name for source in sources.all)
        controller: _Controller

        def on_networks(networks: frozenset[NetworkId]) -> None:
            controller.listeners.touch("networks changed", networks)

        def on_applied(keys: Iterable[AddressKey] | None) -> None:
            if keys is None:
                controller.resolver.wake_all()
            else:
                controller.resolver.wake(keys)

        def on_return(reason: str) -> None:
            structlog.get_logger().info("records compared again", reason=reason)
            controller.records.resync()
            # All of them: who looked while HAProxy came back took its new sockets for somebody else's.
            controller.listeners.touch(reason)

        records = RecordLoop(
            inventory,
            applier,
            build_files(settings, layout),
            clock,
            on_networks,
            on_applied,
            lambda: nova.routing,
        )
        listeners = ListenerLoop(
            inventory,
            host,
            haproxy,
            layout,
            naming,
            clock,
            lambda: build_spec_settings(holder.settings, layout, nova),
            lambda networks, observed, left_out, pids: controller.watch.expect(
                networks, observed, left_out=left_out, our_pids=pids
            ),
            ExporterPort(try_tcp_listen),
            kept=KeptNetworks(layout.networks, partial(write_atomic, mode=0o640)),
            unix=UnixListener(
                lambda: holder.settings.unix_listener, haproxy, SocketFiles().observe, clock
            ),
        )
        guard = HaproxyGuard(haproxy, on_return, listeners.touch)
        companion = build_companion(
            settings,
            layout,
            config=config,
            find=lambda: read_pids(layout.documents_pid).parent,
            answering=lambda: len(read_pids(layout.documents_pid).workers) > 0,
            environment=environment,
        )
        lookup = Lookup(
            inventory,
            records,
            host,
            clock,
            lambda: holder.settings.resolver.learned_ttl_s,
            sources.look_up,
        )
        resolver = Resolver(lookup.look, lambda: _hold_limits(holder.settings))
        service = DocumentService(
            RecordReader(layout.records, capacity=_RESOLVER_CACHE), PasswordStore(layout.passwords)
        )
        forwarder = SignedForwarder(str(layout.signed_socket), _FORWARD_S)
        operations = ControllerOperations(
            version=__version__,
            pid=os.getpid(),
            clock=clock,
            started_at=clock.now().timestamp(),
            started=clock.monotonic(),
            inventory=inventory,
            records=records,
            listeners=listeners,
            haproxy=haproxy,
            haproxy_version=str(program.version),
            guard=guard,
            lookup=lookup,
            nova=nova,
            nova_watch=NovaWatch(haproxy, lambda: (one.name for one in nova.routing.sets)),
            explainer=Explainer(inventory, records, listeners, haproxy, lookup),
            service=service,
            forwarder=forwarder,
            sources=sources.all,
            writes=Writes(
                inventory,
                records,
                listeners,
                sources.writable,
                lambda: controller.operations.own_problems(),  # noqa: PLW0108 - made below
            ),
            documents_pids=lambda: read_pids(layout.documents_pid).pids,
            documents_problem=lambda: companion.failure,
            documents_restarts=lambda: companion.restarts,
            documents_needed=companion.needed,
            reload_settings=lambda: controller.reload(),  # noqa: PLW0108 - made below
            end=lambda data_plane: controller.end(data_plane),  # noqa: PLW0108 - made below
        )
        watch = HostWatch(
            thread,
            host.observer,
            naming,
            WatchPace(audits_per_s=max(0.01, float(settings.host.audit_per_second))),
        )
        controller = _Controller(
            holder=holder,
            layout=layout,
            clock=clock,
            notifier=notifier,
            inventory=inventory,
            records=records,
            listeners=listeners,
            haproxy=haproxy,
            guard=guard,
            companion=companion,
            lookup=lookup,
            resolver=resolver,
            service=service,
            operations=operations,
            figures=Figures(operations, resolver, sources.look_up),
            watch=watch,
            nova=nova,
            forwarder=forwarder,
            sources=sources.all,
        )
        try:
            await _live(controller, admin)
        finally:
            settings.admin_socket.unlink(missing_ok=True)


def _hold_limits(settings: Settings) -> HoldLimits:
    resolver = settings.resolver
    return HoldLimits(resolver.hold_s, resolver.max_held_per_network, resolver.max_held)


async def _live(controller: _Controller, admin: socket.socket) -> None:
    """Start in order, serve until the end is asked for, and stop what is ours."""
    settings = controller.holder.settings
    loop = asyncio.get_running_loop()
    resolver_socket = open_sole_socket(
        controller.layout.resolver_socket, mode=0o660, owner=owner_of(None, settings.haproxy.group)
    )
    listen = settings.metrics.listen
    health_socket = None if listen is None else open_tcp_socket(listen.host, listen.port)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, controller.ended.set)
    loop.add_signal_handler(signal.SIGHUP, controller.hang_up)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(controller.notifier.stopping)
        await stack.enter_async_context(controller.watch)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        tasks = [
            group.create_task(source.run(controller.publish), name=f"source-{source.name}")
            for source in controller.sources
        ]
        await _start_data_plane(controller)
        resolver = resolver_app(controller.resolver, controller.service, controller.forwarder)
        tasks.append(group.create_task(serve(resolver, resolver_socket)))
        tasks += [
            group.create_task(work(), name=work.__qualname__)
            for work in (
                controller.records.run,
                controller.listeners.run,
                controller.guard.run,
                controller.companion.run,
                controller.follow_host,
                controller.review,
                controller.refresh_figures,
                controller.follow_nova,
                controller.follow_unix,
            )
        ]
        admin_app = await asyncio.to_thread(_load_admin_api)
        apps: list[tuple[AnyAsgiApp, socket.socket]] = [
            (admin_app(controller.operations, version=__version__), admin)
        ]
        if health_socket is not None:
            registry = metrics_registry(
                controller.figures.take,
                network_series=lambda: controller.holder.settings.metrics.network_series,
            )
            health = health_app(
                alive=lambda: True, readiness=controller.operations.readiness, registry=registry
            )
            apps.append((health, health_socket))
        tasks += [group.create_task(serve(app, listener)) for app, listener in apps]
        # What the sources have told mostly stays. To look through it for garbage again and again takes 70 ms
        # each time at 1,000 networks, and guests wait meanwhile.
        gc.collect()
        gc.freeze()
        controller.notifier.ready(f"{len(controller.inventory.networks)} networks")
        structlog.get_logger().info(
            "ready",
            networks=len(controller.inventory.networks),
            instances=len(controller.inventory.instances),
            admin=str(settings.admin_socket),
        )
        await controller.ended.wait()
        for task in tasks:
            task.cancel()
    if controller.with_data_plane:
        await _stop_data_plane(controller)


def _load_admin_api() -> Callable[..., AnyAsgiApp]:
    """What it is made of takes as long to import as HAProxy to start: guests do not wait for it."""
    from imdsproxy.admin.api import admin_app  # noqa: PLC0415 - as said above

    return admin_app


async def _start_data_plane(controller: _Controller) -> None:
    """Adopt what runs; start what does not, with everything that the sources know by now."""
    log = structlog.get_logger()
    applier = controller.records.applier
    adopted = False
    if applier.load():
        adopted = await controller.haproxy.adopt()
    found = controller.companion.find()
    try:
        # The document server takes its time to start; so does a look at a thousand namespaces.
        await asyncio.gather(controller.companion.ensure(), _look(controller))
        if adopted:
            log.info("haproxy adopted", master=_master(controller))
            controller.records.resync()
        else:
            await controller.haproxy.end_stray()
            records = controller.records.compile_all()
            if not controller.inventory.in_sync:
                # What an untold source knew is served on, by what it told before.
                records = {**applier.state.effective(), **records}
            applier.write_all(records)
        await controller.listeners.first_round()
    except DataplaneError:
        if found is None:
            # A document server that nobody can reach is not left behind.
            await controller.companion.launcher.stop()
        raise


def _master(controller: _Controller) -> int | None:
    processes = controller.haproxy.processes
    return None if processes is None else processes.master


async def _look(controller: _Controller) -> None:
    await controller.nova.resolve()
    await _wait_for_sources(controller)
    # Before anything is swept: guests behind routers are known on, as they were before a restart.
    controller.lookup.follow_routes()
    await controller.listeners.first_look()


async def _wait_for_sources(controller: _Controller) -> None:
    try:
        async with asyncio.timeout(_FIRST_SYNC_S):
            await controller.records.in_sync.wait()
    except TimeoutError:
        structlog.get_logger().warning(
            "starting before all sources have told what they know",
            waiting_for=[name for name, there in controller.inventory.sources.items() if not there],
        )


async def _stop_data_plane(controller: _Controller) -> None:
    listeners = controller.listeners
    await end_data_plane(
        controller.haproxy.launcher,
        controller.companion.launcher,
        listeners.host,
        listeners.naming,
        listeners.inventory.networks.values(),
    )
    sweep_unix_socket(controller.layout.config, SocketFiles().observe)
