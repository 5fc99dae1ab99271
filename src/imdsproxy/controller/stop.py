"""Ending the data plane, with a controller or after one: HAProxy, the document server, what we made on the host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.app.companion import CompanionLauncher
from imdsproxy.config.schema import Settings
from imdsproxy.controller.build import (
    Events,
    build_companion,
    build_hop_limits,
    build_host,
    build_launcher,
    build_layout,
    build_mac_filters,
)
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.inventory import Inventory
from imdsproxy.dataplane.launch import Launcher
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.host.clock import SystemClock
from imdsproxy.host.socket_file import SocketFiles
from imdsproxy.listeners.host import SystemHost
from imdsproxy.listeners.plan import plan_listeners
from imdsproxy.unix_listener.listener import sweep_unix_socket


async def end_processes(haproxy: Launcher, documents: CompanionLauncher) -> None:
    """End both; the one that keeps connections to the other first.

    Raises:
        DataplaneError: One does not end.
    """
    await haproxy.stop()
    await documents.stop()


async def sweep_host(host: SystemHost, mac_filters: MacFilters, hop_limits: HopLimits) -> None:
    """Remove every MAC filter, rule, namespace, link and address of ours, once they are no longer needed.

    Raises:
        DataplaneError: The host refuses.
    """
    await mac_filters.close_all()
    await hop_limits.close_all()
    observed = await host.observe((), (), everything=True)
    plan = plan_listeners({}, observed, host.naming, managed=host.managed())
    failures = await host.apply(plan.ops)
    host.apply_links({})
    await host.apply_arp_guard(frozenset())
    await host.apply_diversions(())
    if failures:
        problems = [Problem("host", one.reason, one.hint) for one in failures]
        raise HostRefused("not everything of ours could be taken away", problems=problems)


async def stop_data_plane(settings: Settings, environment: Mapping[str, str]) -> None:
    """The same without a controller, which may be dead.

    Raises:
        DataplaneError: A process does not end, or the host refuses.
    """
    layout = build_layout(settings)
    host = build_host(settings, layout, Naming(settings.host.name_prefix))
    companion = build_companion(
        settings,
        layout,
        config=None,
        environment=environment,
    )
    try:
        launcher = build_launcher(settings, layout, settings.haproxy.binary)
        await end_processes(launcher, companion.launcher)
        events = Events()
        mac_filters = build_mac_filters(layout, host, Inventory(), SystemClock(), events)
        await sweep_host(host, mac_filters, build_hop_limits(layout, host, events))
    finally:
        host.thread.close()
    _remove(
        layout.master_socket, layout.probe_socket, layout.resolver_socket, settings.admin_socket
    )
    sweep_unix_socket(layout.config, SocketFiles().observe)


def _remove(*paths: Path) -> None:
    """Remove sockets of processes that have ended."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise HostRefused(f"cannot remove {path}: {error.strerror}") from error
