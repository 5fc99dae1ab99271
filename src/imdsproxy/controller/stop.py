"""Ending the data plane, with a controller or after one: HAProxy, the document server, what we made on the host."""

from __future__ import annotations

from collections.abc import Mapping

from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.app.companion import Companion
from imdsproxy.config.schema import Settings
from imdsproxy.controller.build import (
    build_companion,
    build_filters,
    build_host,
    build_launcher,
)
from imdsproxy.core.inventory import Inventory
from imdsproxy.dataplane.launch import Launcher
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.master import MasterClient
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.host.clock import SystemClock
from imdsproxy.host.files import remove_file
from imdsproxy.host.socket_file import SocketFiles
from imdsproxy.listeners.host import SystemHost
from imdsproxy.listeners.plan import plan_listeners
from imdsproxy.unix_listener.listener import sweep_unix_socket


async def end_processes(haproxy: Launcher, documents: Companion) -> None:
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
    layout = Layout.of(settings)
    host = build_host(settings, layout)
    companion = build_companion(settings, layout, None, environment)
    master = MasterClient(layout.master_socket)
    try:
        launcher = build_launcher(settings, layout, settings.haproxy.binary, master)
        await end_processes(launcher, companion)
        await sweep_host(host, *build_filters(layout, host, Inventory(), SystemClock()))
    finally:
        host.thread.close()
    sockets = (layout.master_socket, layout.probe_socket, layout.resolver_socket)
    for path in (*sockets, settings.admin_socket):
        remove_file(path, f"remove {path}")
    sweep_unix_socket(layout.config, SocketFiles().observe)
