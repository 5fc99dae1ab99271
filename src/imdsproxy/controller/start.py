"""The controller's life: what runs beside what, from start to end.

HAProxy and the document server are not in it: they are started or adopted, watched, and left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import signal
import socket
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from imdsproxy.admin.health import HealthServer
from imdsproxy.app.audit import KEPT_WORKERS, Audit
from imdsproxy.app.document_probe import DocumentProbe
from imdsproxy.app.guard import HaproxyGuard
from imdsproxy.app.guarding import GuardingChange
from imdsproxy.app.heartbeat import Heartbeat
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.app.servers import open_datagram_socket, open_sole_socket, open_tcp_socket
from imdsproxy.app.settings_reload import SettingsHolder, with_contents
from imdsproxy.app.token_report import open_counting
from imdsproxy.app.watching import Watching
from imdsproxy.config.change import SettingsReload
from imdsproxy.config.schema import Settings
from imdsproxy.controller.build import (
    build_companion,
    build_files,
    build_haproxy,
    build_hop_limits,
    build_host,
    build_layout,
    build_mac_filters,
    build_rule_sets,
    build_sources,
    build_spec,
    open_guarding,
    prepare_directories,
    prepare_jail,
)
from imdsproxy.controller.follow_kernel import PairFollower
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.stop import end_processes, sweep_host
from imdsproxy.core.addresses import normalise_address
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import NetworkId
from imdsproxy.core.nova import changed_secrets
from imdsproxy.core.observation import AddressKey, Observation
from imdsproxy.core.progress import Progress
from imdsproxy.dataplane.launch import read_program
from imdsproxy.errors import DataplaneError, HostRefused, ImdsproxyError
from imdsproxy.host.account import owner_of
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import hold_directory, limit_log, write_atomic
from imdsproxy.host.notify import ServiceNotifier, kept_sockets
from imdsproxy.host.process_limits import descriptor_limit, release_memory
from imdsproxy.host.socket_file import SocketFiles
from imdsproxy.host.sockets import try_tcp_listen
from imdsproxy.listeners.exporter_port import ExporterPort
from imdsproxy.listeners.kept_networks import KeptNetworks
from imdsproxy.listeners.loop import ListenerLoop
from imdsproxy.listeners.watch import EventKind, HostWatch, WatchPace
from imdsproxy.nova.upstream import NovaUpstream
from imdsproxy.serving.account import find_account
from imdsproxy.serving.resolver import HoldLimits, Resolver
from imdsproxy.unix_listener.listener import UnixListener, sweep_unix_socket

if TYPE_CHECKING:
    from imdsproxy.controller.http import HttpApps

__all__ = ["run_controller"]

_FIRST_SYNC_S = 5.0
"""How long the first configuration waits for sources that publish nothing; a running HAProxy is not affected."""

_REVIEW_EVERY_S = 1.0
_FIGURES_EVERY_S = 10.0
_TAKE_OVER_S = 10.0
_WATCH_S = 10.0


@dataclass(slots=True)
class _Controller:
    """What goes on while it runs, and why it ends.

    Attributes:
        kept: Connections of workers for the audit log, from the controller before this one.
        served: Set once known guests are served: what takes the processor's time waits for it.
    """

    parts: Parts
    notifier: ServiceNotifier
    watch: HostWatch
    served: asyncio.Event
    pairs: PairFollower
    heartbeat: Heartbeat
    kept: Sequence[socket.socket] = ()
    apps: HttpApps | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    with_data_plane: bool = False
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def end(self, data_plane: bool) -> None:  # noqa: FBT001 - the shape of Operations.stop
        """Ask for the end; the admin API gives the answers that it has begun before it ends."""
        self.with_data_plane = data_plane
        self.ended.set()

    def publish(self, observation: Observation) -> None:
        """Take in what a source saw."""
        self.parts.records.observe(observation)

    async def follow_host(self) -> None:
        """Turn what the host reports into work for the listeners."""
        async for event in self.watch:
            everything = event.kind is EventKind.OVERFLOW
            self.parts.listeners.touch(event.kind.value, None if everything else event.networks)

    async def review(self) -> None:
        """Look again at what was learned from neighbour tables, when its time is over."""
        while True:
            await asyncio.sleep(_REVIEW_EVERY_S)
            await self.parts.lookup.review()

    async def refresh_figures(self) -> None:
        """Read HAProxy's counters now and then, so that none is lost over a reload; keep its log short."""
        while True:
            if self.apps is not None:
                await self.apps.metrics.refresh()
            limit_log(self.parts.layout.haproxy_log)
            await asyncio.sleep(_FIGURES_EVERY_S)

    async def reload(self, allow_dropped: bool) -> SettingsReload:  # noqa: FBT001 - as `end`
        """Read the settings again; what can be taken over live or by a reload is.

        Returns once guests are answered by them: whoever gives a Nova its next secret must know when.
        """
        result, taken_over = self._begin_reload(allow_dropped=allow_dropped)
        if taken_over is None or (await asyncio.wait([taken_over], timeout=_TAKE_OVER_S))[0]:
            return result
        own = () if self.apps is None else self.apps.status.own_problems()
        problems = dict.fromkeys(problem.reason for problem in own)
        pending = ("the data plane has not confirmed it yet", *problems)
        return replace(result, haproxy_reloaded=False, pending=pending)

    def _begin_reload(
        self, *, allow_dropped: bool = False
    ) -> tuple[SettingsReload, asyncio.Task[None] | None]:
        self.notifier.reloading(int(self.parts.clock.monotonic() * 1e6))
        before, remade = self.parts.nova.backends(), False
        routing = self.parts.nova.routing
        guarding = GuardingChange(records=False, keys=False)

        def accept(after: Settings) -> None:
            nonlocal remade, guarding
            prepare_jail(after, self.parts.layout)
            guarding = self.parts.guarding.read(after)
            remade = self.parts.nova.read(after.nova)
            # Which is in every record that is compiled, as Nova's signatures are.
            remade |= after.documents.region != self.parts.holder.settings.documents.region

        try:
            result = self.parts.holder.reload(accept, allow_dropped=allow_dropped)
        finally:
            self.notifier.ready()
        result = with_contents(result, changed_secrets(routing, self.parts.nova.routing))
        if self.parts.nova.backends() != before:
            # Also where the settings are the same, and a file that they name is not.
            result = replace(result, haproxy_reloaded=True)
        if guarding.keys:
            result = with_contents(result, ("tokens.key_file",))
        if not (remade or guarding.records or guarding.keys or result.haproxy_reloaded):
            return result, None
        ticket = self.parts.records.resync() if remade or guarding.records else None
        return result, self._later(self._take_over(ticket, guarding))

    async def _take_over(self, ticket: int | None, guarding: GuardingChange) -> None:
        if guarding.keys:
            await self.parts.guarding.keys.told()
        # Rules that take another signature, or another set, find it in the records already.
        if ticket is not None:
            await self.parts.records.tickets.wait(ticket)
        await self.parts.nova.resolve()
        await self.parts.listeners.tickets.wait(self.parts.listeners.touch("settings changed"))

    def _later(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def follow_nova(self) -> None:
        """Reload when a name of Nova's leads to other addresses."""
        await self.parts.nova.follow(lambda: self.parts.listeners.touch("nova's addresses changed"))

    async def keep_keys(self) -> None:
        """Have HAProxy know the keys of session tokens."""
        await self.parts.guarding.keys.run(self.parts.records.applier)

    async def follow_unix(self) -> None:
        """Look after the unix listener's socket: no event of the kernel says that a path leads elsewhere."""
        while True:
            await asyncio.sleep(_REVIEW_EVERY_S)
            if self.parts.listeners.unix.changed():
                self.parts.listeners.touch("unix socket changed", ())

    def hang_up(self) -> None:
        """SIGHUP: as `imdsproxy reload`, but nobody waits for the answer."""
        try:
            result, _ = self._begin_reload()
        except ImdsproxyError as error:
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
    heartbeat: Heartbeat,
) -> None:
    """Run until told to stop; the data plane goes on unless it was to be stopped too.

    Raises:
        ConfigError: A setting cannot be used here.
        DataplaneError: HAProxy or the document server does not start, or the host refuses.
    """
    settings = holder.settings
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
    with (
        contextlib.closing(admin),
        contextlib.closing(thread),
        hold_directory(layout.state),
        _open_health(settings, heartbeat) as health,
    ):
        program = await read_program(settings.haproxy.binary)
        guarding = open_guarding(settings, layout)
        haproxy, applier = build_haproxy(settings, layout, program, clock)
        served = asyncio.Event()
        sources = build_sources(
            settings, clock, begin=served.wait, progress=(progress := Progress())
        )
        inventory = Inventory(source.name for source in sources.all)
        controller: _Controller

        def on_networks(networks: frozenset[NetworkId]) -> None:
            controller.parts.listeners.touch("networks changed", networks)

        def on_applied(keys: Iterable[AddressKey] | None) -> None:
            if keys is None:
                controller.parts.resolver.wake_all()
            else:
                named = frozenset(keys)
                controller.parts.resolver.wake(named)
                # A MAC has come: whatever address it has may be known by it.
                by_mac = {network for network, address in named if address.is_link_local}
                controller.parts.resolver.wake_networks(by_mac)

        def on_return(reason: str) -> None:
            structlog.get_logger().info("records compared again", reason=reason)
            controller.parts.records.resync()
            # All of them: who looked while HAProxy came back took its new sockets for somebody else's.
            controller.parts.listeners.touch(reason)

        mac_filters = build_mac_filters(layout, naming, thread, inventory, clock)
        hop_limits = build_hop_limits(layout, naming, thread)
        records = RecordLoop(
            inventory,
            applier,
            build_files(settings, layout),
            clock,
            on_networks,
            on_applied,
            mac_filters,
            hop_limits,
            lambda: nova.routing,
            guarding.book,
            build_rule_sets(layout, applier, clock),
            lambda: holder.settings.documents.region,
            progress=progress,
        )
        listeners = ListenerLoop(
            inventory,
            host,
            haproxy,
            layout,
            naming,
            clock,
            lambda: replace(build_spec(holder.settings, layout, nova), watched=watching.wanted),
            descriptor_limit(),
            lambda networks, observed, left_out, pids: controller.watch.expect(
                networks, observed, left_out=left_out, our_pids=pids
            ),
            ExporterPort(try_tcp_listen),
            mac_filters,
            hop_limits,
            kept=KeptNetworks(layout.networks, partial(write_atomic, mode=0o640)),
            unix=UnixListener(
                lambda: holder.settings.unix_listener, haproxy, SocketFiles().observe, clock
            ),
        )
        watching = Watching(
            haproxy, partial(_apply_watching, listeners), partial(_owner_of, inventory)
        )
        guard = HaproxyGuard(haproxy, on_return, listeners.touch)
        companion = build_companion(
            settings,
            layout,
            config=config,
            environment=environment,
        )
        lookup = Lookup(
            inventory,
            records,
            host,
            clock,
            lambda: holder.settings.resolver.learned_ttl_s,
            mac_filters,
            sources.look_up,
        )
        resolver = Resolver(lookup.look, lambda: _hold_limits(holder.settings), clock.monotonic)
        watch = HostWatch(
            thread,
            host.observer,
            naming,
            WatchPace(audits_per_s=max(0.01, float(settings.host.audit_per_second))),
        )
        parts = Parts(
            holder=holder,
            layout=layout,
            clock=clock,
            sources=sources,
            inventory=inventory,
            records=records,
            listeners=listeners,
            mac_filters=mac_filters,
            hop_limits=hop_limits,
            haproxy=haproxy,
            haproxy_version=str(program.version),
            guard=guard,
            companion=companion,
            documents=DocumentProbe(
                haproxy,
                build_files(settings, layout),
                partial(find_account, settings.documents.user, settings.documents.group),
                settings.documents.enabled,
            ),
            lookup=lookup,
            resolver=resolver,
            nova=nova,
            guarding=guarding,
            watching=watching,
            audit=Audit(lambda: holder.settings.audit, partial(_keep_worker, notifier)),
            counting=open_counting(haproxy, clock, lambda: holder.settings.tokens.one_in),
            started_at=clock.now().timestamp(),
            started=clock.monotonic(),
        )
        pairs = PairFollower(records, lookup, mac_filters, hop_limits, listeners, resolver, watch)
        pairs.connect()
        kept = kept_sockets(environment, KEPT_WORKERS, os.getpid())
        controller = _Controller(parts, notifier, watch, served, pairs, heartbeat, kept)
        try:
            await _live(controller, admin, health)
        finally:
            settings.admin_socket.unlink(missing_ok=True)


def _keep_worker(notifier: ServiceNotifier, worker: socket.socket) -> bool:
    try:
        return notifier.keep(KEPT_WORKERS, worker.fileno())
    except HostRefused as error:
        # Lines go on; those that nobody has read when this controller ends are lost.
        structlog.get_logger().warning("connection not kept", reason=error.message)
        return False


async def _apply_watching(listeners: ListenerLoop) -> None:
    ticket = listeners.touch("somebody watches, or nobody any more", frozenset())
    # Where it cannot be applied `status` says why; there is nothing to see then.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_WATCH_S):
            await listeners.tickets.wait(ticket)


def _owner_of(inventory: Inventory, network: str, address: str) -> str | None:
    try:
        owner = inventory.owner((NetworkId(network), normalise_address(ip_address(address))))
    except ValueError:
        return None
    return owner if isinstance(owner, str) else None


def _hold_limits(settings: Settings) -> HoldLimits:
    resolver = settings.resolver
    return HoldLimits(resolver.hold_s, resolver.max_held_per_network, resolver.max_held)


def _open_health(
    settings: Settings, heartbeat: Heartbeat
) -> contextlib.AbstractContextManager[HealthServer | None]:
    listen = settings.metrics.listen
    if listen is None:
        return contextlib.nullcontext()
    return HealthServer(open_tcp_socket(listen.host, listen.port), alive=heartbeat.alive)


async def _live(controller: _Controller, admin: socket.socket, health: HealthServer | None) -> None:
    """Start in order, serve until the end is asked for, and stop what is ours."""
    parts = controller.parts
    settings = parts.holder.settings
    loop = asyncio.get_running_loop()
    resolver_socket = open_sole_socket(
        parts.layout.resolver_socket, mode=0o660, owner=owner_of(None, settings.haproxy.group)
    )
    worker = owner_of(None, settings.haproxy.group)
    audit_socket = open_sole_socket(parts.layout.audit_socket, mode=0o660, owner=worker)
    last_socket = open_datagram_socket(parts.layout.audit_last_socket, mode=0o660, owner=worker)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, controller.ended.set)
    loop.add_signal_handler(signal.SIGHUP, controller.hang_up)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(controller.notifier.stopping)
        await stack.enter_async_context(controller.watch)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        tasks = [
            group.create_task(source.run(controller.publish), name=f"source-{source.name}")
            for source in parts.sources.all
        ]
        tasks.append(
            group.create_task(
                parts.audit.run(audit_socket, last_socket, controller.kept), name="audit"
            )
        )
        loading = group.create_task(_load_http(controller))
        try:
            await _start_data_plane(controller)
        finally:
            controller.served.set()
        tasks += [
            group.create_task(work(), name=work.__qualname__)
            for work in (
                parts.records.run,
                parts.listeners.run,
                parts.guard.run,
                parts.companion.run,
                parts.documents.run,
                parts.watching.run,
                controller.follow_host,
                controller.review,
                controller.follow_nova,
                controller.follow_unix,
                controller.keep_keys,
                *controller.pairs.work,
            )
        ]
        await asyncio.gather(loading, parts.documents.ask())
        from imdsproxy.controller.http import build_apps, load_admin, serve  # noqa: PLC0415 - it is there now

        apps = controller.apps = build_apps(
            parts, reload_settings=controller.reload, end=controller.end
        )
        resolving = group.create_task(serve(apps.resolver, resolver_socket))
        tasks.append(group.create_task(controller.refresh_figures()))
        make_admin = await asyncio.to_thread(load_admin)
        administering = group.create_task(serve(make_admin(apps), admin))
        if health is not None:
            health.reports = apps.health
        # What the sources have told mostly stays, so nobody looked for garbage until here (`cli.daemon`). To look
        # through it again and again takes 70 ms each time at 1,000 networks, and guests wait meanwhile.
        gc.collect()
        gc.freeze()
        gc.enable()
        release_memory()
        controller.heartbeat.starting = False
        controller.notifier.ready(f"{len(parts.inventory.networks)} networks")
        structlog.get_logger().info(
            "ready",
            networks=len(parts.inventory.networks),
            instances=len(parts.inventory.instances),
            admin=str(settings.admin_socket),
        )
        await controller.ended.wait()
        for task in (*tasks, administering):
            task.cancel()
        if controller.with_data_plane:
            # Who starts again what has ended is to be gone before it ends; the admin API may take its time.
            await asyncio.wait(tasks)
            await end_processes(parts.haproxy.launcher, parts.companion.launcher)
        # After HAProxy: while that runs, a request may be on its way on each connection that it keeps.
        resolving.cancel()
        if controller.with_data_plane:
            await sweep_host(
                parts.listeners.host, parts.listeners.naming, parts.mac_filters, parts.hop_limits
            )
            sweep_unix_socket(parts.layout.config, SocketFiles().observe)


async def _load_http(controller: _Controller) -> None:
    """In a thread, beside a HAProxy that reads its files; nothing that comes before is to share our processor."""
    there = (controller.parts.haproxy.starting, controller.served)
    waiting = [asyncio.ensure_future(one.wait()) for one in there]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()
    await asyncio.to_thread(importlib.import_module, "imdsproxy.controller.http")


async def _start_data_plane(controller: _Controller) -> None:
    """Adopt what runs; start what does not, with everything that the sources know by now."""
    log = structlog.get_logger()
    parts = controller.parts
    applier = parts.records.applier
    adopted = False
    await parts.hop_limits.preload()
    if applier.load():
        adopted = await parts.haproxy.adopt()
    found = parts.companion.read().parent
    try:
        # The document server takes its time to start; so does a look at a thousand namespaces.
        await asyncio.gather(parts.companion.ensure(), _look(parts))
        if adopted:
            log.info("haproxy adopted", master=_master(parts))
            parts.records.resync()
        else:
            await parts.haproxy.end_stray()
            # What an untold source knew is served on, by what it told before.
            told: dict[str, str | None] = {}
            if not parts.inventory.in_sync:
                told.update(applier.state.effective())
                parts.hop_limits.restrict(told)
            records = await parts.records.compile_all()
            if told:
                records = {**{key: value for key, value in told.items() if value}, **records}
            applier.write_all(records)
        await parts.listeners.first_round()
        # From the MAC filters that are still there: guests that are known by their MACs alone are known on.
        parts.lookup.recall()
    except DataplaneError:
        if found is None:
            # A document server that nobody can reach is not left behind.
            await parts.companion.launcher.stop()
        raise


def _master(parts: Parts) -> int | None:
    processes = parts.haproxy.processes
    return None if processes is None else processes.master


async def _look(parts: Parts) -> None:
    await parts.nova.resolve()
    await _wait_for_sources(parts)
    # Before anything is swept: guests behind routers are known on, as they were before a restart.
    parts.lookup.follow_routes()
    await parts.listeners.first_look()


async def _wait_for_sources(parts: Parts) -> None:
    known = -1
    while not parts.inventory.in_sync:
        # As long as records come in, nobody would be served sooner by a start without them.
        if known == len(parts.inventory.instances):
            structlog.get_logger().warning(
                "starting before all sources have told what they know",
                waiting_for=[name for name, there in parts.inventory.sources.items() if not there],
            )
            return
        known = len(parts.inventory.instances)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_SYNC_S):
                await parts.records.in_sync.wait()
