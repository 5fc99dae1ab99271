"""Parts of a controller: each is built from earlier parts, and calls later ones when something happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from imdsproxy.config.changes import SettingsHolder
from imdsproxy.controller import build
from imdsproxy.controller.audit import KEPT_WORKERS, Audit
from imdsproxy.controller.companion import DocumentProbe
from imdsproxy.controller.compiler import CompiledIndex, RecordCompiler
from imdsproxy.controller.lookup import Lookup
from imdsproxy.controller.macs import Macs
from imdsproxy.controller.policy_store import PolicyStore
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.controller.rule_sets import RuleSets
from imdsproxy.controller.sources import build_sources
from imdsproxy.controller.token_counting import TokenCounting
from imdsproxy.controller.token_keys import TokenKeys
from imdsproxy.controller.traffic import Traffic
from imdsproxy.controller.watchdog import HaproxyWatchdog
from imdsproxy.controller.watching import Watching
from imdsproxy.documents.resolver import Resolver
from imdsproxy.documents.store import DiskFiles, PasswordStore
from imdsproxy.errors import HostRefused
from imdsproxy.fleet.guests import FLEET, FleetPolicies
from imdsproxy.haproxy.launch import HaproxyProgram, Launcher
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.haproxy.rules.model import DataplaneSpec
from imdsproxy.haproxy.unix_listener.listener import UnixListener
from imdsproxy.host.account import find_account, group_id
from imdsproxy.host.clock import Clock
from imdsproxy.host.events import NeighbourChange, watch_neighbours, watch_tables
from imdsproxy.host.notify import ServiceNotifier, kept_sockets
from imdsproxy.host.socket_file import SocketFiles
from imdsproxy.model.addresses import normalise_address
from imdsproxy.model.entities import NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey
from imdsproxy.network.anti_spoofing.claims import ForgedClaims
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.listeners.host import KeptNetworks, SystemHost
from imdsproxy.network.listeners.loop import ListenerLoop
from imdsproxy.network.ovn.host import OvnHost
from imdsproxy.network.planned import RouterTable
from imdsproxy.nova.upstream import NovaUpstream, NovaWatch
from imdsproxy.reconcile.part import Part
from imdsproxy.reconcile.progress import Progress

if TYPE_CHECKING:
    from imdsproxy.controller.fleet_passwords import FleetPasswords
    from imdsproxy.documents.resolver_app import Forward
    from imdsproxy.sources.fleet.source import FleetSource

UNCONFIRMED: Final = "the data plane has not confirmed it yet"
"""Why a change is not in force yet; the reasons that block it follow."""

_log: Final = structlog.get_logger()
_REVIEW_EVERY_S: Final = 1.0
_WATCH_S: Final = 10.0
_EXPIRE_EVERY_S: Final = 5.0
_FORWARD_S: Final = 900.0
"""Deadline for a HAProxy that hangs, in seconds; otherwise HAProxy's own deadlines end a forwarded request."""

_PAUSE_S: Final = 0.5
"""Pause after changes were lost, in seconds, so that a guest that floods us with changes does not keep us busy."""


class Controller:
    """All parts that serve known guests.

    Args:
        holder: Settings.
        clock: Clock of all parts.
        notifier: Service manager.
        nova: Nova's endpoint sets, with the secrets that the settings name.
        host: Host, with the thread that enters namespaces.
        program: HAProxy's program.
        config: Settings file from the command line.
        environment: Environment variables of the process.

    Attributes:
        served: Set once known guests are served; expensive work waits for it.
        ended: Set to end this process; with `with_data_plane` HAProxy and the document server end too.
        patching: Held from reading a record until its change is stored: two changes must not undo each other.
        claiming: Held from checking whether a listener is in use until its network is stored.
        overriding: Held while tokens are revoked, boots opened again, or keys replaced.
        kept: Workers' audit-log connections from the previous controller.
        started_at: Start of this controller in Unix time; `started` has the monotonic time.
    """

    def __init__(
        self,
        *,
        holder: SettingsHolder,
        clock: Clock,
        notifier: ServiceNotifier,
        nova: NovaUpstream,
        host: SystemHost,
        program: HaproxyProgram,
        config: Path | None,
        environment: Mapping[str, str],
    ) -> None:
        settings, layout = holder.settings, Layout.of(holder.settings)
        self.holder, self.layout, self.clock, self.notifier = holder, layout, clock, notifier
        self.nova, self.host = nova, host
        self.started_at, self.started = clock.now().timestamp(), clock.monotonic()
        self.served, self.ended = asyncio.Event(), asyncio.Event()
        self.patching, self.claiming, self.overriding = (asyncio.Lock() for _ in range(3))
        self.with_data_plane = False
        self.kept = kept_sockets(environment, KEPT_WORKERS, os.getpid())
        self.background: set[asyncio.Task[None]] = set()
        applier = RecordApplier(layout)
        launcher = Launcher(program.path, build.unit_of(settings.haproxy), layout)
        self.haproxy = Haproxy(program.path, launcher, applier, clock, version=program.version)
        self.nova_watch = NovaWatch(self.haproxy, nova.names)
        self.passwords = PasswordStore(layout.passwords)
        progress, group = Progress(), settings.documents.group
        reader = None if group is None else group_id(group)
        files = DiskFiles(layout.records, self.passwords, reader)
        self.sources = build_sources(settings, clock, self.served.wait, progress, host.drop_others)
        self.inventory = inventory = self.sources.inventory
        self.policy_store = PolicyStore(TokenKeys(layout), clock, inventory)
        self.policy_store.open(settings)
        self.mac_filters, self.hop_limits = build.build_filters(layout, host, inventory, clock)
        self.mac_filters.on_change = self.hop_limits.on_change = self._trust_changed
        self.mac_filters.on_missing = lambda one: self.touch("MAC filter is gone", (one,))
        self.hop_limits.on_need = lambda networks: self.touch("hop limits", networks)
        index = CompiledIndex(layout.compiled_index)
        sets = RuleSets(applier, clock)
        sets.load()
        self.records = RecordLoop(
            inventory,
            applier,
            RecordCompiler(
                inventory,
                files,
                index,
                lambda: holder.settings.documents.region,
                settings.documents.enabled,
            ),
            clock,
            lambda networks: self.touch("networks changed", networks),
            self._wake,
            self.mac_filters,
            self.hop_limits,
            sets,
            self.policy_store.keys,
            lambda: nova.routing,
            self.policy_store.book,
            self.policy_store.depart,
            self.policy_store.arrive,
            self.policy_store.save,
            progress=progress,
        )
        self.watching = Watching(self.haproxy, self._apply_watching, partial(_owner_of, inventory))
        self.listeners = ListenerLoop(
            inventory,
            host,
            self.haproxy,
            clock,
            self._spec,
            lambda: holder.settings.host.audit_per_second,
            self.mac_filters,
            self.hop_limits,
            settings.sources.neutron_namespaces.routers,
            kept=KeptNetworks(layout.networks),
            unix=UnixListener(
                lambda: holder.settings.unix_listener, self.haproxy, SocketFiles().observe, clock
            ),
        )
        self.touch = self.listeners.touch
        self.watch = self.listeners.watch
        self.watchdog = HaproxyWatchdog(self.haproxy, self._compare_again, self.touch)
        self.companion = build.build_companion(settings, layout, config, environment)
        account = partial(find_account, settings.documents.user, settings.documents.group)
        self.probe = DocumentProbe(self.companion, self.haproxy, files, account)
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
        self.forged_claims = ForgedClaims(self.mac_filters, clock)
        self.resolver = Resolver(
            self.lookup.look, lambda: holder.settings.resolver, clock.monotonic
        )
        self.macs = Macs(self.mac_filters, self.forged_claims, self.records, self.resolver)
        self.traffic = Traffic(self.haproxy, clock, lambda: holder.settings.limits)
        self.audit = Audit(lambda: holder.settings.audit, self._keep_worker)
        ovn = host.ovn = self.sources.ovn
        self.ovn = None if ovn is None else OvnHost(ovn, host, self.touch)
        fleet = self.sources.fleet
        self.fleet_passwords = None if fleet is None else _serve_hubs(self, fleet)
        self.counting = TokenCounting(
            self.haproxy, clock, lambda: holder.settings.tokens.one_in, layout.token_counts
        )

    def take_fleet(self, fleet: FleetPolicies) -> int:
        """Replace the fleet's policies; return the ticket that closes when they are in force.

        Call this before publishing the records that belong to the policies (`PolicyStore.take_fleet`).
        """
        change, records = self.policy_store.take_fleet(fleet), self.records
        if change.rules:
            records.resync()
        for instance in change.overrides:
            for key in records.addresses_of(instance):
                records.touch(key)
        return records.wake() if change else records.tickets.given

    def _trust_changed(self, networks: frozenset[NetworkId]) -> None:
        """Plan the guests of these networks again, because the rule by which they are trusted has changed."""
        self.records.touch_networks(networks)
        self.resolver.wake_networks(networks)

    def _wake(self, keys: Iterable[AddressKey] | None) -> None:
        named = None if keys is None else frozenset(keys)
        self.resolver.wake(named)
        # A new link-local address means a new MAC, by which other addresses in the network may be known.
        self.resolver.wake_networks({one for one, address in named or () if address.is_link_local})

    def _compare_again(self, reason: str) -> None:
        _log.info("records compared again", reason=reason)
        self.records.resync()
        # Check all networks: a look at the host while HAProxy restarted took its new sockets for another program's.
        self.touch(reason)

    def _spec(self) -> DataplaneSpec:
        spec = build.build_spec(self.holder.settings, self.layout, self.nova)
        of_fleet = FLEET in self.inventory.reports
        return replace(spec, watched=self.watching.wanted, fleet=of_fleet)

    async def _apply_watching(self) -> None:
        ticket = self.touch("watching begins or ends", frozenset())
        # If the configuration cannot be applied, `status` shows why, and the watch shows nothing.
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
            # The log goes on, but lines that are unread when this controller ends are lost.
            _log.warning("connection not kept", reason=error.message)
            return False

    @cached_property
    def forward(self) -> Forward:
        """Return the function that forwards a resolved request to HAProxy."""
        from imdsproxy.documents.resolver_app import (
            found_forwarder,
        )  # known guests do not wait for it

        return found_forwarder(str(self.layout.found_socket), _FORWARD_S)

    def parts(self) -> tuple[Part, ...]:
        """Return the parts that report, in the order of their problems."""
        optional = (self.ovn, self.sources.look_up, self.sources.fleet)
        return (
            self.sources,
            self.records,
            self.listeners,
            self.watchdog,
            self.probe,
            *(part for part in optional if part is not None),
            self.haproxy,
            self.policy_store.keys,
            self.records.compiler,
            self.nova,
            self.nova_watch,
            self.audit,
            self.counting,
            self.holder,
            self.listeners.unix,
            self.companion,
            self.resolver,
            self.macs,
            self.policy_store,
            self.traffic,
        )

    def end(self, *, data_plane: bool) -> None:
        """Request the end of the controller; the admin API finishes its open answers first."""
        self.with_data_plane = self.with_data_plane or data_plane
        self.ended.set()

    def work(self) -> tuple[Coroutine[object, object, None], ...]:
        """Return the tasks that run until the controller ends, to start once known guests are served."""
        return (
            self.records.run(),
            self.listeners.run(),
            self.watchdog.run(),
            self.companion.run(),
            self.probe.run(),
            self.watching.run(),
            self._follow_neighbours(),
            self._follow_tables(),
            self._expire(),
            self.watch.run(),
            self.nova.follow(lambda: self.touch("nova's addresses changed")),
            self.policy_store.keys.run(self.records.applier),
            self._review(),
            *(() if self.ovn is None else self.ovn.work()),
            *(() if self.fleet_passwords is None else (self.fleet_passwords.run(),)),
        )

    def _learned_key(self, change: NeighbourChange) -> AddressKey | None:
        """Return the address of the change if it is a learned one."""
        namespace = None if change.nsid is None else self.watch.namespace_of_id(change.nsid)
        if change.nsid is not None and namespace is None:
            return None
        network = self.mac_filters.network_at(namespace, change.index)
        key = None if network is None else (network, change.address)
        return key if key in self.records.learned else None

    async def _follow_neighbours(self) -> None:
        """Follow learned addresses through the neighbour table."""
        with watch_neighbours(lambda change: self._learned_key(change) is not None) as changes:
            async for change in changes:
                if change is None:
                    await self.lookup.review(everything=True)
                    await asyncio.sleep(_PAUSE_S)
                elif (key := self._learned_key(change)) is not None:
                    self.lookup.on_neighbour(key, change.mac)

    async def _follow_tables(self) -> None:
        """Create tables again that another program has removed, as `nft flush ruleset` does."""
        with watch_tables(self._own_tables) as removals:
            async for table in removals:
                self.mac_filters.lost(table)
                await self.hop_limits.lost(table)
                if await self.host.restore_tables(table):
                    self.touch("router's table is gone", ())

    @property
    def tables(self) -> tuple[MacFilters, HopLimits]:
        """Owners of our tables in nf_tables."""
        return self.mac_filters, self.hop_limits

    def _own_tables(self) -> set[str]:
        of_routers = (one.name_in(self.host.naming) for one in RouterTable)
        return {*self.mac_filters.tables(), self.hop_limits.kernel.table, *of_routers}

    async def _expire(self) -> None:
        """Withdraw MAC pairs of addresses without an owner."""
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            try:
                await self.mac_filters.expire()
            except HostRefused as error:
                _log.warning("pairs not withdrawn", error=error.message)

    async def _review(self) -> None:
        """Check learned addresses whose time has expired, and whether the path of the unix listener has changed.

        The kernel reports no event when a path leads to another file.
        """
        while True:
            await asyncio.sleep(_REVIEW_EVERY_S)
            if self.listeners.unix.changed():
                self.touch("unix socket changed", ())
            await self.lookup.review()


def _serve_hubs(controller: Controller, source: FleetSource) -> FleetPasswords:
    # Import late: most hosts belong to no fleet and need none of this.
    from imdsproxy.controller.fleet import FleetHost
    from imdsproxy.controller.fleet_passwords import FleetPasswords

    host = FleetHost(controller)
    source.confirm, source.answer = host.confirm, host.answer
    source.take_policies = controller.take_fleet
    group = controller.records.compiler.files.group
    passwords = FleetPasswords(controller.passwords, group, source.send_password)
    source.take_passwords = passwords.take
    return passwords


def _owner_of(inventory: Inventory, network: str, address: str) -> str | None:
    try:
        owner = inventory.owner((NetworkId(network), normalise_address(ip_address(address))))
    except ValueError:
        return None
    return owner if isinstance(owner, str) else None
