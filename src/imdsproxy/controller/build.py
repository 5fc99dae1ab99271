"""Builders for parts of the controller, from settings; `imdsproxy stop --data-plane` uses some too."""

import os
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from imdsproxy.config.schema import Settings, Supervisor
from imdsproxy.controller.companion import Companion
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.process import link_jail_to_itself
from imdsproxy.haproxy.rules.model import DataplaneSpec, Limits
from imdsproxy.host.account import group_id
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import ensure_directory, write_atomic
from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.sockets import SocketOwners
from imdsproxy.model.entities import NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.wire import RETRY_AFTER_S
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.network.anti_spoofing.kernel import KernelHopLimits, KernelMacFilters, table_journal
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.listeners.host import SystemHost
from imdsproxy.nova.upstream import NovaUpstream
from imdsproxy.sources.ovn.source import OvnSource

_SYSTEMD = Path("/run/systemd/system")
_UNIT_DIRECTORIES = tuple(Path(root, "systemd/system") for root in ("/etc", "/usr/lib", "/lib"))


def unit_of(supervisor: Supervisor, unit: str) -> str | None:
    """Return the systemd unit that supervises a process, if any. `auto` uses systemd if it runs and has the unit."""
    taken = supervisor == "systemd"
    if supervisor == "auto" and _SYSTEMD.is_dir():
        taken = any((place / unit).exists() for place in _UNIT_DIRECTORIES)
    return unit if taken else None


def prepare_directories(settings: Settings, layout: Layout) -> None:
    """Create our directories, and the files that HAProxy's configuration names.

    Raises:
        HostRefused: The file system refuses, or an account in the settings does not exist.
        PrivilegeMissing: This process may not write there.
    """
    documents = settings.documents.group or settings.haproxy.group
    readable = (-1, group_id(documents))
    # HAProxy looks for namespaces below `netns_dir`, which must exist.
    for path in (layout.runtime, layout.jail, layout.namespace_links, settings.paths.netns_dir):
        ensure_directory(path, mode=0o755)
    if settings.limits.enabled:
        link_jail_to_itself(layout.jail)
    if unit_of(settings.haproxy.supervisor, settings.haproxy.unit) is not None:
        # The unit has its own mount namespace: later mounts appear there only if they are on a shared mount.
        NamespaceDirectory(settings.paths.netns_dir).prepare()
    for path in (layout.state, layout.records):
        ensure_directory(path, mode=0o750, owner=readable)
    answer = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        f"Retry-After: {RETRY_AFTER_S}\r\n"
        "Content-Length: 0\r\n"
        "Cache-Control: no-store\r\n\r\n"
    )
    write_atomic(layout.unavailable, answer.encode(), mode=0o644)
    write_atomic(layout.empty_map, b"", mode=0o644)
    write_atomic(layout.short_map, b"", mode=0o600)
    if settings.identity.enabled:
        write_atomic(layout.identity_map, b"", mode=0o600)
    write_atomic(layout.silence, b"", mode=0o644)


def build_thread(settings: Settings) -> NamespaceThread:
    """Return the thread that enters namespaces; the caller must close it at the end."""
    return NamespaceThread(NamespaceDirectory(settings.paths.netns_dir))


def build_host(
    settings: Settings,
    layout: Layout,
    thread: NamespaceThread,
    our_pids: Callable[[], Collection[int]] = tuple,
    ovn: OvnSource | None = None,
) -> SystemHost:
    naming = Naming(settings.host.name_prefix)
    owners = SocketOwners(config=layout.config)
    links, journal = layout.namespace_links, layout.managed_journal
    return SystemHost(
        thread, naming, links=links, journal=journal, owners=owners, our_pids=our_pids, ovn=ovn
    )


def build_filters(
    layout: Layout,
    host: SystemHost,
    inventory: Inventory,
    clock: Clock,
    touch: Callable[[str, Collection[NetworkId]], object] = lambda _reason, _networks: None,
) -> tuple[MacFilters, HopLimits]:
    """Return the MAC filters and hop limits of this host.

    Args:
        touch: Requests a round of the listeners; gets the reason and the networks.
    """
    mac_filters = MacFilters(
        KernelMacFilters(host.thread),
        inventory,
        host.naming,
        table_journal(layout.mac_filters_journal),
        clock,
        lambda network: touch("MAC filter is gone", (network,)),
    )
    kernel = KernelHopLimits(host.thread, f"{host.naming.prefix}-hops")
    journal = table_journal(layout.hops_journal)
    return mac_filters, HopLimits(kernel, journal, partial(touch, "hop limits"))


def build_spec(settings: Settings, layout: Layout, nova: NovaUpstream) -> DataplaneSpec:
    """Return the specification of HAProxy's configuration from the settings, without binds."""
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
        identity=settings.identity.enabled,
    )


def build_companion(
    settings: Settings, layout: Layout, config: Path | None, environment: Mapping[str, str]
) -> Companion:
    """Return the part that starts and watches the document server."""
    documents = settings.documents
    return Companion(
        layout.documents_pid,
        layout.documents_log,
        _command("documents", config),
        _environment(environment),
        unit_of(documents.supervisor, documents.unit),
        needed=documents.enabled,
    )


def build_identity_companions(
    settings: Settings, layout: Layout, config: Path | None, environment: Mapping[str, str]
) -> tuple[Companion, Companion]:
    """Return the supervisors of the process that gives identity tokens, and of the signer."""
    identity = settings.identity
    service = Companion(
        layout.identity_pid,
        layout.identity_log,
        _command("identity-server", config),
        _environment(environment),
        unit_of(identity.supervisor, identity.unit),
        needed=identity.enabled,
        title="identity server",
        area="identity",
    )
    signer = Companion(
        layout.signer_pid,
        layout.signer_log,
        _command("signer", config),
        _environment(environment),
        unit_of(identity.supervisor, identity.signer_unit),
        needed=identity.enabled and not settings.sources.fleet.enabled,
        title="signer of identity tokens",
        area="identity",
    )
    return service, signer


def _command(name: str, config: Path | None) -> tuple[str, ...]:
    option = () if config is None else ("--config", str(config.resolve()))
    return (sys.executable, "-m", "imdsproxy", *option, name)


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings in our environment, and the paths of programs and modules."""
    known = {
        name: value
        for name, value in environment.items()
        if name.startswith("IMDSPROXY_") or name == "PYTHONPATH"
    }
    return known | {"PATH": os.defpath, "LANG": "C.UTF-8"}
