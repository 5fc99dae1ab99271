"""The composition root: every part of the controller made from the settings, and the events between them."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Generic, TypeVar

from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.kernel import KernelHopLimits, KernelMacFilters, TableJournal
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.app.companion import Companion, CompanionLauncher, SpawnCompanion, UnitCompanion
from imdsproxy.app.kept_maps import KeptMaps
from imdsproxy.app.policy_store import OverrideFile, PolicyStore
from imdsproxy.app.rule_sets import RuleSets
from imdsproxy.app.token_keys import TokenKeys
from imdsproxy.config.schema import Settings, Supervisor
from imdsproxy.core.haproxy.model import DataplaneSpec, Limits
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.timing import Progress
from imdsproxy.core.wire import RETRY_AFTER_S
from imdsproxy.dataplane.haproxy import Haproxy, link_jail_to_itself
from imdsproxy.dataplane.launch import HaproxyProgram, Launcher, SpawnLauncher, SystemdLauncher
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.master import MasterClient
from imdsproxy.dataplane.records import RecordApplier, Writer
from imdsproxy.host.account import group_id
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import ensure_directory, write_atomic
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.sockets import SocketOwners
from imdsproxy.listeners.host import SystemHost
from imdsproxy.listeners.observe import HostObserver
from imdsproxy.nova.upstream import NovaUpstream
from imdsproxy.serving.pidfile import read_pids
from imdsproxy.serving.store import DiskFiles, PasswordStore
from imdsproxy.sources.api import Source
from imdsproxy.sources.libvirt.client import SystemLibvirt
from imdsproxy.sources.libvirt.source import LibvirtSource
from imdsproxy.sources.neutron.client import NeutronRest
from imdsproxy.sources.neutron.source import NeutronSource
from imdsproxy.sources.sqlite.source import SqliteSource

_What = TypeVar("_What")


class Event(Generic[_What]):
    """Calls its subscribers at once, in the order in which they subscribed."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[_What], object]] = []

    def subscribe(self, subscriber: Callable[[_What], object]) -> None:
        """Call it each time from now on."""
        self._subscribers.append(subscriber)

    def __call__(self, what: _What) -> None:
        """Tell every subscriber."""
        for subscriber in self._subscribers:
            subscriber(what)


class Events:
    """Every event between parts.

    Attributes:
        networks_changed: Networks that came, changed or went.
        records_applied: Addresses whose records are in force now; `None` stands for all of them.
        haproxy_returned: HAProxy runs again, or with a worker that we did not start; the reason.
        haproxy_failed: HAProxy does not start with the configuration on disk; the reason.
        trust_changed: Networks whose guests are trusted by another rule than before.
        filter_removed: A network whose MAC filter another program has removed.
        hop_limits_needed: Networks whose listeners need the rule for hop limits, or no longer do.
    """

    def __init__(self) -> None:
        self.networks_changed: Event[frozenset[NetworkId]] = Event()
        self.records_applied: Event[Iterable[AddressKey] | None] = Event()
        self.haproxy_returned: Event[str] = Event()
        self.haproxy_failed: Event[str] = Event()
        self.trust_changed: Event[frozenset[NetworkId]] = Event()
        self.filter_removed: Event[NetworkId] = Event()
        self.hop_limits_needed: Event[frozenset[NetworkId]] = Event()


_SYSTEMD = Path("/run/systemd/system")
_UNIT_DIRECTORIES = (
    Path("/etc/systemd/system"),
    Path("/usr/lib/systemd/system"),
    Path("/lib/systemd/system"),
)
_CLOUDS_FILE = Path("/etc/openstack/clouds.yaml")


def build_layout(settings: Settings) -> Layout:
    """Where everything is."""
    return Layout(
        runtime=settings.paths.runtime_dir,
        state=settings.paths.state_dir,
        documents_workers=settings.documents.workers if settings.documents.enabled else 0,
        chroot=settings.haproxy.chroot,
    )


def under_systemd(choice: Supervisor, unit: str) -> bool:
    """Whether a unit of systemd supervises; `auto` takes it where it runs and knows the unit."""
    if choice != "auto":
        return choice == "systemd"
    return _SYSTEMD.is_dir() and any((place / unit).exists() for place in _UNIT_DIRECTORIES)


def prepare_directories(settings: Settings, layout: Layout) -> None:
    """Make our directories, and the files that HAProxy's configuration names.

    Raises:
        HostRefused: The file system refuses, or an account of the settings does not exist.
        PrivilegeMissing: We may not write there.
    """
    documents = settings.documents.group or settings.haproxy.group
    readable = (-1, group_id(documents))
    ensure_directory(layout.runtime, mode=0o755)
    ensure_directory(layout.jail, mode=0o755)
    prepare_jail(settings, layout)
    ensure_directory(layout.namespace_links, mode=0o755)
    # HAProxy looks for namespaces below it, through a path that must exist.
    ensure_directory(settings.paths.netns_dir, mode=0o755)
    if under_systemd(settings.haproxy.supervisor, settings.haproxy.unit):
        # Its unit has mounts of its own: of those made later only what is on a shared one comes in.
        NamespaceDirectory(settings.paths.netns_dir).prepare()
    ensure_directory(layout.state, mode=0o750, owner=readable)
    ensure_directory(layout.records, mode=0o750, owner=readable)
    answer = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        f"Retry-After: {RETRY_AFTER_S}\r\n"
        "Content-Length: 0\r\n"
        "Cache-Control: no-store\r\n\r\n"
    )
    write_atomic(layout.unavailable, answer.encode(), mode=0o644)
    write_atomic(layout.empty_map, b"", mode=0o644)
    write_atomic(layout.short_map, b"", mode=0o600)
    write_atomic(layout.silence, b"", mode=0o644)


def prepare_jail(settings: Settings, layout: Layout) -> None:
    """Have in the worker's root directory what the settings need there beside sockets.

    Raises:
        HostRefused: The file system refuses.
    """
    if settings.limits.enabled:
        link_jail_to_itself(layout.jail)


def build_haproxy(
    settings: Settings, layout: Layout, program: HaproxyProgram, clock: Clock
) -> tuple[Haproxy, RecordApplier]:
    """HAProxy and its records."""
    write: Writer = partial(write_atomic, mode=0o640)
    master = MasterClient(layout.master_socket)
    applier = RecordApplier(master, layout.base_map, layout.overlay_map, write)
    launcher = build_launcher(settings, layout, program.path)
    return Haproxy(program.path, layout, launcher, master, applier, write, clock), applier


def build_launcher(settings: Settings, layout: Layout, program: str) -> Launcher:
    """How HAProxy's master comes up and goes down here."""
    master = MasterClient(layout.master_socket)
    if under_systemd(settings.haproxy.supervisor, settings.haproxy.unit):
        return SystemdLauncher(settings.haproxy.unit, layout, master)
    return SpawnLauncher(program, layout, master)


def build_host(settings: Settings, layout: Layout, naming: Naming) -> SystemHost:
    """The host; close its thread at the end."""
    thread = NamespaceThread(NamespaceDirectory(settings.paths.netns_dir))
    return SystemHost(
        thread,
        naming,
        observer=HostObserver(thread, naming, SocketOwners(config=layout.config)),
        links=layout.namespace_links,
        journal=layout.managed_journal,
    )


def build_mac_filters(
    layout: Layout, host: SystemHost, inventory: Inventory, clock: Clock, events: Events
) -> MacFilters:
    """The MAC filters of this host."""
    write = partial(write_atomic, mode=0o600)
    journal = TableJournal(layout.gates_journal, write, "netdev")
    return MacFilters(
        KernelMacFilters(host.thread),
        inventory,
        host.naming,
        journal,
        clock,
        events.trust_changed,
        events.filter_removed,
    )


def build_hop_limits(layout: Layout, host: SystemHost, events: Events) -> HopLimits:
    """The hop limits of this host."""
    write = partial(write_atomic, mode=0o600)
    kernel = KernelHopLimits(host.thread, f"{host.naming.prefix}-hops")
    journal = TableJournal(layout.hops_journal, write, "inet")
    return HopLimits(kernel, journal, events.trust_changed, events.hop_limits_needed)


def build_rule_sets(layout: Layout, applier: RecordApplier, clock: Clock) -> RuleSets:
    """What has HAProxy know path rules, with what an earlier controller left.

    Raises:
        HostRefused: Its file cannot be read, or written.
    """
    sets = RuleSets(applier, layout.path_rules_map, partial(write_atomic, mode=0o640), clock)
    sets.load()
    return sets


def build_kept_maps(layout: Layout) -> KeptMaps:
    """HAProxy's maps as of the last stop."""
    maps = (layout.base_map, layout.overlay_map, layout.path_rules_map)
    return KeptMaps(layout.kept_maps, maps, partial(write_atomic, mode=0o640))


def open_policy_store(settings: Settings, layout: Layout) -> PolicyStore:
    """What guests may read, with the keys where HAProxy finds them; the first one is made where there is none.

    Raises:
        SecretUnreadable: The keys cannot be used.
        HostRefused: A file cannot be written, or what operators did cannot be read.
    """
    # A revocation that a power cut takes back would make tokens good again.
    write = partial(write_atomic, mode=0o600, durable=True)
    keys = TokenKeys(layout.token_keys, layout.token_keys_map, write, SystemRandom().randbytes)
    policy_store = PolicyStore(keys, OverrideFile(layout.guards, write))
    policy_store.read(settings)
    policy_store.overrides.load()
    keys.write_map()
    return policy_store


def build_files(settings: Settings, layout: Layout) -> DiskFiles:
    """Compiled records, readable by the document server's group."""
    group = settings.documents.group
    return DiskFiles(
        layout.records, PasswordStore(layout.passwords), None if group is None else group_id(group)
    )


def build_spec(settings: Settings, layout: Layout, nova: NovaUpstream) -> DataplaneSpec:
    """HAProxy's configuration as the settings have it, without binds."""
    listen = settings.metrics.haproxy_listen
    return DataplaneSpec(
        binds=(),
        paths=layout.haproxy_paths(),
        limits=Limits(
            maxconn=settings.haproxy.maxconn,
            nbthread=settings.haproxy.nbthread,
            maxconn_per_network=settings.haproxy.maxconn_per_network,
            cache_mb=settings.haproxy.cache_mb,
            max_object_bytes=settings.haproxy.max_object_kib * 1024,
            hold_s=settings.resolver.hold_s,
            hard_stop_after_s=settings.haproxy.hard_stop_after_s,
            fair=settings.limits.enabled,
            requests_per_s=settings.limits.requests_per_s,
            burst=settings.limits.burst,
            connections=settings.limits.connections,
            body_bytes=settings.limits.body_kib * 1024,
        ),
        user=settings.haproxy.user,
        group=settings.haproxy.group,
        exporter=None if listen is None else str(listen),
        nova=nova.backends(),
        nova_times=nova.times,
        count_reads=settings.tokens.one_in,
        audit=settings.audit.one_in,
    )


@dataclass(frozen=True, slots=True)
class Sources:
    """All that are enabled.

    Attributes:
        writable: The one that the admin API writes to.
        look_up: The one that is asked for addresses that were not reported.
    """

    all: tuple[Source, ...]
    writable: SqliteSource | None = field(default=None)
    look_up: NeutronSource | None = field(default=None)


def build_sources(
    settings: Settings,
    clock: Clock,
    *,
    begin: Callable[[], Awaitable[object]],
    progress: Progress | None = None,
) -> Sources:
    """The sources that the settings enable.

    Args:
        settings: Which, and how.
        clock: For what is known for a time, and since when.
        begin: Waited for before a source does what is not urgent.
        progress: Where sources say how far long work is.
    """
    found: list[Source] = []
    writable: SqliteSource | None = None
    if settings.sources.sqlite.enabled:
        writable = SqliteSource(
            settings.store_path, now=lambda: clock.now().timestamp(), progress=progress
        )
        found.append(writable)
    if settings.sources.file.enabled:
        # With its reader of YAML a sixteenth of a start, and off by default.
        from imdsproxy.sources.file.source import FileSource  # noqa: PLC0415 - see above

        # Guests keep their documents over a restart that finds a record file broken.
        kept = settings.paths.state_dir / "last-good.sqlite"
        found.append(FileSource(settings.sources.file.directory, last_good=kept, progress=progress))
    neutron: NeutronSource | None = None
    if settings.sources.neutron.enabled:
        neutron = NeutronSource(
            NeutronRest(settings.sources.neutron),
            settings.paths.state_dir / "neutron.sqlite",
            settings.sources.neutron,
            clock=clock,
            random=SystemRandom().random,
            begin=begin,
        )
        found.append(neutron)
    if settings.sources.libvirt.enabled:
        libvirt = settings.sources.libvirt
        found.append(LibvirtSource(SystemLibvirt(libvirt.uri), libvirt))
    return Sources(tuple(found), writable, neutron)


def build_companion(
    settings: Settings,
    layout: Layout,
    *,
    config: Path | None,
    environment: Mapping[str, str],
) -> Companion:
    """What starts the document server, and watches it."""
    pid_file = layout.documents_pid
    launcher: CompanionLauncher
    if under_systemd(settings.documents.supervisor, settings.documents.unit):
        launcher = UnitCompanion(settings.documents.unit)
    else:
        launcher = SpawnCompanion(
            documents_arguments(config),
            layout.documents_log,
            pid_file,
            _own_environment(environment),
        )
    return Companion(launcher, partial(read_pids, pid_file), needed=settings.documents.enabled)


def documents_arguments(config: Path | None) -> Sequence[str]:
    """The command line of a document server with the same settings."""
    option = () if config is None else ("--config", str(config.resolve()))
    return (sys.executable, "-m", "imdsproxy", *option, "documents")


def _own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process of ours is to know of our environment: the settings in it, and where programs and modules are."""
    kept = {
        name: value
        for name, value in environment.items()
        if name.startswith("IMDSPROXY_") or name == "PYTHONPATH"
    }
    return {**kept, "PATH": os.defpath, "LANG": "C.UTF-8"}
