"""The parts of a controller: each is made of those before it, and then they subscribe to each other's events."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import structlog

from imdsproxy.app.audit import KEPT_WORKERS, Audit
from imdsproxy.app.companion import DocumentProbe
from imdsproxy.app.compiler import CompiledIndex, RecordCompiler
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.app.token_report import open_counting
from imdsproxy.app.watchdog import HaproxyWatchdog
from imdsproxy.app.watching import Watching
from imdsproxy.config.changes import SettingsHolder
from imdsproxy.controller.build import (
    Events,
    build_companion,
    build_files,
    build_haproxy,
    build_hop_limits,
    build_kept_maps,
    build_mac_filters,
    build_rule_sets,
    build_sources,
    build_spec,
    open_policy_store,
)
from imdsproxy.controller.follow_kernel import PairFollower
from imdsproxy.controller.reload import SettingsReloader
from imdsproxy.core.addresses import normalise_address
from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.timing import Progress
from imdsproxy.dataplane.launch import HaproxyProgram
from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import HostRefused
from imdsproxy.host.account import find_account
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import write_atomic
from imdsproxy.host.notify import ServiceNotifier, kept_sockets
from imdsproxy.host.process import descriptor_limit
from imdsproxy.host.socket_file import SocketFiles
from imdsproxy.host.sockets import try_tcp_listen
from imdsproxy.listeners.host import SystemHost
from imdsproxy.listeners.loop import ExporterPort, ListenerLoop
from imdsproxy.listeners.settle import KeptNetworks
from imdsproxy.listeners.watch import HostWatch, WatchPace
from imdsproxy.nova.upstream import NovaUpstream
from imdsproxy.serving.resolver import Resolver
from imdsproxy.unix_listener.listener import UnixListener

_REVIEW_EVERY_S: Final = 1.0
_WATCH_S: Final = 10.0


class Controller:
    """All that it takes to serve guests that are known.

    Args:
        holder: The settings.
        layout: Where everything is.
        clock: For everything.
        notifier: The service manager.
        nova: With the secrets that the settings name.
        host: With its thread that enters namespaces.
        program: HAProxy's.
        config: The settings file that was named on the command line.
        environment: The process's variables.

    Attributes:
        served: Set once known guests are served: what takes the processor's time waits for it.
        ended: Set to end this process; with `with_data_plane` HAProxy and the document server end too.
        kept: Connections of workers for the audit log, from the controller before this one.
        started_at: When this controller started, Unix time; `started` by the monotonic clock.
    """

    def __init__(
        self,
        *,
        holder: SettingsHolder,
        layout: Layout,
        clock: Clock,
        notifier: ServiceNotifier,
        nova: NovaUpstream,
        host: SystemHost,
        program: HaproxyProgram,
        config: Path | None,
        environment: Mapping[str, str],
    ) -> None:
        settings, naming, thread = holder.settings, host.naming, host.thread
        self.holder, self.layout, self.clock, self.notifier = holder, layout, clock, notifier
        self.nova, self.host = nova, host
        self.started_at, self.started = clock.now().timestamp(), clock.monotonic()
        self.served, self.ended = asyncio.Event(), asyncio.Event()
        self.with_data_plane = False
        self.kept = kept_sockets(environment, KEPT_WORKERS, os.getpid())
        events, progress, files = Events(), Progress(), build_files(settings, layout)
        self.policy_store = open_policy_store(settings, layout)
        self.haproxy, applier = build_haproxy(settings, layout, program, clock)
        self.haproxy_version = str(program.version)
        self.sources = build_sources(settings, clock, begin=self.served.wait, progress=progress)
        self.inventory = inventory = Inventory(source.name for source in self.sources.all)
        self.mac_filters = build_mac_filters(layout, host, inventory, clock, events)
        self.hop_limits = build_hop_limits(layout, host, events)
        index = CompiledIndex(layout.compiled_index)
        self.records = RecordLoop(
            inventory,
            applier,
            RecordCompiler(inventory, files, index, lambda: holder.settings.documents.region),
            clock,
            events.networks_changed,
            events.records_applied,
            self.mac_filters,
            self.hop_limits,
            lambda: nova.routing,
            self.policy_store.book,
            build_rule_sets(layout, applier, clock),
            build_kept_maps(layout),
            progress=progress,
        )
        self.watching = Watching(self.haproxy, self._apply_watching, partial(_owner_of, inventory))
        self.listeners = ListenerLoop(
            inventory,
            host,
            self.haproxy,
            layout,
            naming,
            clock,
            self._spec,
            descriptor_limit(),
            lambda networks, observed, left_out, pids: self.watch.expect(
                networks, observed, left_out=left_out, our_pids=pids
            ),
            ExporterPort(try_tcp_listen),
            self.mac_filters,
            self.hop_limits,
            kept=KeptNetworks(layout.networks, partial(write_atomic, mode=0o640)),
            unix=UnixListener(
                lambda: holder.settings.unix_listener, self.haproxy, SocketFiles().observe, clock
            ),
        )
        self.watch = HostWatch(
            thread,
            host.observer,
            naming,
            self.listeners.touch,
            WatchPace(audits_per_s=max(0.01, float(settings.host.audit_per_second))),
        )
        self.watchdog = HaproxyWatchdog(
            self.haproxy, events.haproxy_returned, events.haproxy_failed
        )
        self.companion = build_companion(settings, layout, config=config, environment=environment)
        account = partial(find_account, settings.documents.user, settings.documents.group)
        self.probe = DocumentProbe(self.haproxy, files, account, settings.documents.enabled)
        self.lookup = Lookup(
            inventory,
            self.records,
            host.neighbour,
            clock,
            lambda: holder.settings.resolver.learned_ttl_s,
            self.mac_filters,
            self.sources.look_up,
            self._is_followed,
        )
        self.resolver = Resolver(
            self.lookup.look, lambda: self.holder.settings.resolver, clock.monotonic
        )
        self.audit = Audit(lambda: holder.settings.audit, self._keep_worker)
        self.counting = open_counting(self.haproxy, clock, lambda: holder.settings.tokens.one_in)
        self.reloader = SettingsReloader(
            holder, layout, clock, notifier, nova, self.policy_store, self.records, self.listeners
        )
        self.follower = PairFollower(
            self.records, self.lookup, self.mac_filters, self.hop_limits, self.watch
        )
        self._subscribe(events)

    def _subscribe(self, events: Events) -> None:
        touch = self.listeners.touch
        events.networks_changed.subscribe(partial(touch, "networks changed"))
        events.records_applied.subscribe(self._wake)
        events.haproxy_returned.subscribe(self._compare_again)
        # All networks: a look at the host while HAProxy came back took its new sockets for another program's.
        events.haproxy_returned.subscribe(touch)
        events.haproxy_failed.subscribe(touch)
        events.trust_changed.subscribe(self.follower.plan_again)
        events.trust_changed.subscribe(self.resolver.wake_networks)
        events.filter_removed.subscribe(lambda network: touch("MAC filter is gone", (network,)))
        events.hop_limits_needed.subscribe(partial(touch, "hop limits"))

    def _wake(self, keys: Iterable[AddressKey] | None) -> None:
        if keys is None:
            self.resolver.wake_all()
            return
        named = frozenset(keys)
        self.resolver.wake(named)
        # A MAC has come: whatever address it has may be known by it.
        self.resolver.wake_networks({one for one, address in named if address.is_link_local})

    def _compare_again(self, reason: str) -> None:
        structlog.get_logger().info("records compared again", reason=reason)
        self.records.resync()

    def _spec(self) -> DataplaneSpec:
        spec = build_spec(self.holder.settings, self.layout, self.nova)
        return replace(spec, watched=self.watching.wanted)

    async def _apply_watching(self) -> None:
        ticket = self.listeners.touch("watching begins or ends", frozenset())
        # Where it cannot be applied `status` says why; there is nothing to see then.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WATCH_S):
                await self.listeners.tickets.wait(ticket)

    def _is_followed(self, key: AddressKey) -> bool:
        namespace = self.mac_filters.namespace_of(key[0])
        return self.mac_filters.is_up(key[0]) and self.watch.is_watched(namespace)

    def _keep_worker(self, worker: socket.socket) -> bool:
        try:
            return self.notifier.keep(KEPT_WORKERS, worker.fileno())
        except HostRefused as error:
            # Lines go on; those that are not read when this controller ends are lost.
            structlog.get_logger().warning("connection not kept", reason=error.message)
            return False

    def end(self, data_plane: bool) -> None:  # noqa: FBT001 - as `Services.end`
        """Ask for the end; the admin API gives the answers that it has begun before it ends."""
        self.with_data_plane = data_plane
        self.ended.set()

    @property
    def work(self) -> tuple[Callable[[], Coroutine[object, object, None]], ...]:
        """What runs as long as the controller does, once known guests are served."""
        return (
            self.records.run,
            self.listeners.run,
            self.watchdog.run,
            self.companion.run,
            self.probe.run,
            self.watching.run,
            self.follower.follow_neighbours,
            self.follower.follow_tables,
            self.follower.expire,
            self.watch.run,
            self._follow_nova,
            self._keep_keys,
            self._review,
        )

    async def _follow_nova(self) -> None:
        """Reload when a name of Nova's leads to other addresses."""
        await self.nova.follow(lambda: self.listeners.touch("nova's addresses changed"))

    async def _keep_keys(self) -> None:
        """Keep the keys of session tokens in HAProxy."""
        await self.policy_store.keys.run(self.records.applier)

    async def _review(self) -> None:
        """Read again what was learned from neighbour tables when its time is over, and look at the unix listener.

        No event of the kernel says that a path leads elsewhere.
        """
        while True:
            await asyncio.sleep(_REVIEW_EVERY_S)
            if self.listeners.unix.changed():
                self.listeners.touch("unix socket changed", ())
            await self.lookup.review()


def _owner_of(inventory: Inventory, network: str, address: str) -> str | None:
    try:
        owner = inventory.owner((NetworkId(network), normalise_address(ip_address(address))))
    except ValueError:
        return None
    return owner if isinstance(owner, str) else None
