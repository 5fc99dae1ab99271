"""Parts of a controller, made once in one order, and the loops over several of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from imdsproxy.config.changes import SettingsHolder
from imdsproxy.config.schema import Settings
from imdsproxy.controller import build
from imdsproxy.controller.audit import KEPT_WORKERS, Audit
from imdsproxy.controller.companion import Companion, DocumentProbe
from imdsproxy.controller.compiler import CompiledIndex, RecordCompiler
from imdsproxy.controller.lookup import Lookup
from imdsproxy.controller.macs import Macs
from imdsproxy.controller.policy_store import PolicyStore
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.controller.rule_sets import RuleSets
from imdsproxy.controller.sources import Sources, add_fleet, build_sources
from imdsproxy.controller.token_counting import TokenCounting
from imdsproxy.controller.token_keys import TokenKeys
from imdsproxy.controller.traffic import Traffic
from imdsproxy.controller.watchdog import HaproxyWatchdog
from imdsproxy.controller.watching import Watching
from imdsproxy.documents.resolver import Resolver, WaitingGuests
from imdsproxy.documents.store import DiskFiles, PasswordStore
from imdsproxy.errors import HostRefused
from imdsproxy.fleet.guests import FLEET
from imdsproxy.haproxy.launch import HaproxyProgram, Launcher
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.haproxy.rules.model import DataplaneSpec
from imdsproxy.haproxy.unix_listener.listener import UnixListener
from imdsproxy.host.account import find_account, group_id
from imdsproxy.host.clock import Clock
from imdsproxy.host.events import NeighbourChange, watch_neighbours, watch_tables
from imdsproxy.host.namespaces import NamespaceThread
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
from imdsproxy.network.listeners.loop import ListenerLoop, ListenerRequests
from imdsproxy.network.listeners.watch import HostWatch
from imdsproxy.network.ovn.host import OvnHost
from imdsproxy.network.planned import RouterTable
from imdsproxy.nova.upstream import NovaUpstream, NovaWatch
from imdsproxy.reconcile.part import Part
from imdsproxy.reconcile.progress import Progress
from imdsproxy.sources.ovn.source import OvnSource

if TYPE_CHECKING:
    from imdsproxy.controller.fleet_passwords import FleetPasswords
    from imdsproxy.controller.identity import IdentityHost
    from imdsproxy.documents.resolver_app import Forward

_log: Final = structlog.get_logger()
_REVIEW_EVERY_S: Final = 1.0
_WATCH_S: Final = 10.0
_EXPIRE_EVERY_S: Final = 5.0
_FORWARD_S: Final = 900.0
"""Deadline for a HAProxy that hangs, in seconds; otherwise HAProxy's own deadlines end a forwarded request."""

_PAUSE_S: Final = 0.5
"""Pause after changes were lost, in seconds, so that a guest that floods us with changes does not keep us busy."""


@dataclass(slots=True)
class Ending:
    """End of this process.

    Attributes:
        with_data_plane: HAProxy and the document server end too.
    """

    requested: asyncio.Event = field(default_factory=asyncio.Event)
    with_data_plane: bool = False

    def request(self, *, data_plane: bool) -> None:
        """Request the end of the controller; the admin API finishes its open answers first."""
        self.with_data_plane = self.with_data_plane or data_plane
        self.requested.set()


@dataclass(frozen=True)
class Parts:
    """All parts that serve known guests.

    Attributes:
        served: Set once known guests are served; expensive work waits for it.
        patching: Held from reading a record until its change is stored: two changes must not undo each other.
        claiming: Held from checking whether a listener is in use until its network is stored.
        overriding: Held while tokens are revoked, boots opened again, or keys replaced.
        kept: Workers' audit-log connections from the previous controller.
        started_at: Start of this controller in Unix time; `started` has the monotonic time.
    """

    holder: SettingsHolder
    layout: Layout
    clock: Clock
    notifier: ServiceNotifier
    nova: NovaUpstream
    host: SystemHost
    haproxy: Haproxy
    nova_watch: NovaWatch
    passwords: PasswordStore
    sources: Sources
    policy_store: PolicyStore
    mac_filters: MacFilters
    hop_limits: HopLimits
    records: RecordLoop
    watching: Watching
    listeners: ListenerLoop
    watchdog: HaproxyWatchdog
    companion: Companion
    probe: DocumentProbe
    lookup: Lookup
    resolver: Resolver
    forged_claims: ForgedClaims
    macs: Macs
    traffic: Traffic
    audit: Audit
    counting: TokenCounting
    ovn: OvnHost | None
    fleet_passwords: FleetPasswords | None
    identity: IdentityHost | None
    served: asyncio.Event
    kept: tuple[socket.socket, ...]
    started_at: float
    started: float
    ending: Ending = field(default_factory=Ending)
    patching: asyncio.Lock = field(default_factory=asyncio.Lock)
    claiming: asyncio.Lock = field(default_factory=asyncio.Lock)
    overriding: asyncio.Lock = field(default_factory=asyncio.Lock)
    background: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def companions(self) -> tuple[Companion, ...]:
        of_identity = self.identity
        return (
            self.companion,
            *(() if of_identity is None else (of_identity.service, of_identity.signer)),
        )

    @property
    def inventory(self) -> Inventory:
        return self.sources.inventory

    @property
    def touch(self) -> Callable[..., int]:
        return self.listeners.touch

    @property
    def watch(self) -> HostWatch:
        return self.listeners.watch

    @cached_property
    def forward(self) -> Forward:
        # Known guests do not wait for the module.
        from imdsproxy.documents.resolver_app import found_forwarder

        return found_forwarder(str(self.layout.found_socket), _FORWARD_S)

    def all(self) -> tuple[Part, ...]:
        """Return the parts that report, in the order of their problems."""
        optional = (self.ovn, self.sources.look_up, self.sources.fleet, self.identity)
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
            self.resolver,
            self.macs,
            self.policy_store,
            self.traffic,
        )

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
            *self._work_of_fleet(),
            *(() if self.identity is None else (self.identity.run(),)),
        )

    def _work_of_fleet(self) -> tuple[Coroutine[object, object, None], ...]:
        passwords, fleet = self.fleet_passwords, self.sources.fleet
        if passwords is None or fleet is None:
            return ()
        return (passwords.run(fleet.send_password),)

    def _learned_key(self, change: NeighbourChange) -> AddressKey | None:
        namespace = None if change.nsid is None else self.watch.namespace_of_id(change.nsid)
        if change.nsid is not None and namespace is None:
            return None
        network = self.mac_filters.network_at(namespace, change.index)
        key = None if network is None else (network, change.address)
        return key if key in self.records.learned else None

    async def _follow_neighbours(self) -> None:
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
        return self.mac_filters, self.hop_limits

    def _own_tables(self) -> set[str]:
        of_routers = (one.name_in(self.host.naming) for one in RouterTable)
        return {*self.mac_filters.tables(), self.hop_limits.kernel.table, *of_routers}

    async def _expire(self) -> None:
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


def build_parts(
    *,
    holder: SettingsHolder,
    clock: Clock,
    notifier: ServiceNotifier,
    nova: NovaUpstream,
    thread: NamespaceThread,
    program: HaproxyProgram,
    config: Path | None,
    environment: Mapping[str, str],
    progress: Progress,
) -> Parts:
    """Make all parts; each is made of earlier ones.

    Args:
        nova: Nova's endpoint sets, with the secrets that the settings name.

    Raises:
        SecretUnreadable: The token keys cannot be used.
        HostRefused: A file cannot be written, or the operators' overrides cannot be read.
    """
    settings, layout = holder.settings, Layout.of(holder.settings)
    served = asyncio.Event()
    applier = RecordApplier(layout)
    unit = build.unit_of(settings.haproxy.supervisor, settings.haproxy.unit)
    launcher = Launcher(program.path, unit, layout)
    haproxy = Haproxy(program.path, launcher, applier, clock, version=program.version)
    ovn_source = OvnSource(settings.sources.ovn) if settings.sources.ovn.enabled else None
    host = build.build_host(settings, layout, thread, our_pids=lambda: haproxy.pids, ovn=ovn_source)
    requests, waiting = ListenerRequests(host), WaitingGuests()
    sources = build_sources(
        settings, clock, served.wait, progress, host.drop_others, ovn=ovn_source
    )
    inventory = sources.inventory
    policy_store = PolicyStore(TokenKeys(layout), clock, inventory)
    policy_store.open(settings)
    mac_filters, hop_limits = build.build_filters(layout, host, inventory, clock, requests.touch)
    passwords, group = PasswordStore(layout.passwords), settings.documents.group
    reader = None if group is None else group_id(group)
    files = DiskFiles(layout.records, passwords, reader)
    sets = RuleSets(applier, clock)
    sets.load()
    identity = _build_identity(
        settings,
        layout,
        config,
        environment,
        touch=requests.touch,
        clock=clock,
        applier=applier,
    )
    records = RecordLoop(
        inventory,
        applier,
        RecordCompiler(
            inventory,
            files,
            CompiledIndex(layout.compiled_index),
            lambda: holder.settings.documents.region,
            settings.documents.enabled,
        ),
        clock,
        partial(requests.touch, "networks changed"),
        waiting.wake_changed,
        mac_filters,
        hop_limits,
        sets,
        policy_store.keys,
        lambda: nova.routing,
        policy_store.book,
        policy_store.depart,
        policy_store.arrive,
        policy_store.save,
        subjects=None if identity is None else identity.subjects,
        progress=progress,
    )
    watching = Watching(haproxy, partial(_apply_watching, requests), partial(_owner_of, inventory))

    def spec() -> DataplaneSpec:
        spec = build.build_spec(holder.settings, layout, nova)
        issuer = None if identity is None else identity.documents.frontend(holder.settings)
        return replace(
            spec, watched=watching.wanted, fleet=FLEET in inventory.reports, issuer=issuer
        )

    def trust_changed(networks: frozenset[NetworkId]) -> None:
        # The rule by which the networks' guests are trusted has changed.
        records.touch_networks(networks)
        waiting.wake_networks(networks)

    listeners = ListenerLoop(
        inventory,
        requests,
        haproxy,
        clock,
        spec,
        lambda: holder.settings.host.audit_per_second,
        mac_filters,
        hop_limits,
        settings.sources.neutron_namespaces.routers,
        kept=KeptNetworks(layout.networks),
        unix=UnixListener(
            lambda: holder.settings.unix_listener, haproxy, SocketFiles().observe, clock
        ),
        on_trust=trust_changed,
    )

    def compare_again(reason: str) -> None:
        _log.info("records compared again", reason=reason)
        records.resync()
        # Check all networks: a look at the host while HAProxy restarted took its new sockets for another program's.
        requests.touch(reason)

    def is_followed(key: AddressKey) -> bool:
        namespace = mac_filters.namespace_of(key[0])
        return mac_filters.is_up(key[0]) and listeners.watch.is_watched(namespace)

    watchdog = HaproxyWatchdog(haproxy, compare_again, requests.touch)
    companion = build.build_companion(settings, layout, config, environment)
    account = partial(find_account, settings.documents.user, group)
    probe = DocumentProbe(companion, haproxy, files, account)
    lookup = Lookup(
        inventory,
        records,
        host.neighbour,
        clock,
        lambda: holder.settings.resolver.learned_ttl_s,
        mac_filters,
        sources.look_up,
        is_followed,
    )
    resolver = Resolver(
        lookup.look, lambda: holder.settings.resolver, clock.monotonic, waiting=waiting
    )
    forged_claims = ForgedClaims(mac_filters, clock)
    fleet_passwords: FleetPasswords | None = None
    if settings.sources.fleet.enabled:
        # Import late: most hosts belong to no fleet and need none of this.
        from imdsproxy.controller.fleet import FleetHost
        from imdsproxy.controller.fleet_passwords import FleetPasswords

        fleet_passwords = FleetPasswords(passwords, reader)
        of_fleet = FleetHost(
            inventory, policy_store, records, listeners, watchdog, probe, settings.admin_socket
        )
        sources = add_fleet(sources, settings, clock, of_fleet, fleet_passwords)
    return Parts(
        holder=holder,
        layout=layout,
        clock=clock,
        notifier=notifier,
        nova=nova,
        host=host,
        haproxy=haproxy,
        nova_watch=NovaWatch(haproxy, nova.names),
        passwords=passwords,
        sources=sources,
        policy_store=policy_store,
        mac_filters=mac_filters,
        hop_limits=hop_limits,
        records=records,
        watching=watching,
        listeners=listeners,
        watchdog=watchdog,
        companion=companion,
        probe=probe,
        lookup=lookup,
        resolver=resolver,
        forged_claims=forged_claims,
        macs=Macs(mac_filters, forged_claims, records, resolver),
        traffic=Traffic(haproxy, clock, lambda: holder.settings.limits),
        audit=Audit(lambda: holder.settings.audit, partial(_keep_worker, notifier)),
        counting=TokenCounting(
            haproxy, clock, lambda: holder.settings.tokens.one_in, layout.token_counts
        ),
        ovn=None if ovn_source is None else OvnHost(ovn_source, host, requests.touch),
        fleet_passwords=fleet_passwords,
        identity=identity,
        served=served,
        kept=tuple(kept_sockets(environment, KEPT_WORKERS, os.getpid())),
        started_at=clock.now().timestamp(),
        started=clock.monotonic(),
    )


def _build_identity(
    settings: Settings,
    layout: Layout,
    config: Path | None,
    environment: Mapping[str, str],
    *,
    touch: Callable[..., object],
    clock: Clock,
    applier: RecordApplier,
) -> IdentityHost | None:
    """Return the part for identity tokens; `None` if they are off, and no process of an earlier run is left."""
    if not (settings.identity.enabled or layout.identity_pid.exists()):
        return None
    # Import late: most hosts give no identity tokens.
    from imdsproxy.controller.identity import build_identity

    companions = build.build_identity_companions(settings, layout, config, environment)
    return build_identity(settings, layout, companions, touch=touch, clock=clock, applier=applier)


async def _apply_watching(requests: ListenerRequests) -> None:
    ticket = requests.touch("watching begins or ends", frozenset())
    # If the configuration cannot be applied, `status` shows why, and the watch shows nothing.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_WATCH_S):
            await requests.tickets.wait(ticket)


def _keep_worker(notifier: ServiceNotifier, worker: socket.socket) -> bool:
    try:
        return notifier.keep(KEPT_WORKERS, worker.fileno())
    except HostRefused as error:
        # The log goes on, but lines that are unread when this controller ends are lost.
        _log.warning("connection not kept", reason=error.message)
        return False


def _owner_of(inventory: Inventory, network: str, address: str) -> str | None:
    try:
        owner = inventory.owner((NetworkId(network), normalise_address(ip_address(address))))
    except ValueError:
        return None
    return owner if isinstance(owner, str) else None
