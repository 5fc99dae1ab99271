"""What others ask of the controller by HTTP: the resolver, the admin API, health and metrics.

To import all of it takes as long as everything else that happens before guests are served. They do not wait for it:
nothing that is needed to serve the known ones may import this module.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias, cast

from imdsproxy import __version__
from imdsproxy.admin.explain import Explainer
from imdsproxy.admin.guests import GuestService
from imdsproxy.admin.health import HealthReports
from imdsproxy.admin.metrics import Metrics
from imdsproxy.admin.record_reports import RecordReports
from imdsproxy.admin.records import RecordService
from imdsproxy.admin.services import Services
from imdsproxy.admin.status import StatusService
from imdsproxy.admin.tokens import TokenService
from imdsproxy.app.limited import LimitWatch
from imdsproxy.config.change import SettingsReload
from imdsproxy.controller.parts import Parts
from imdsproxy.nova.watch import NovaWatch
from imdsproxy.serving.asgi import AsgiApp
from imdsproxy.serving.forward import FoundForwarder
from imdsproxy.serving.listen import HttpListener
from imdsproxy.serving.passwords import PasswordStore
from imdsproxy.serving.resolver_app import resolver_app

__all__ = ["AnyAsgiApp", "HttpApps", "build_apps", "load_admin", "serve"]

AnyAsgiApp: TypeAlias = Callable[..., Awaitable[None]]
"""FastAPI's, Starlette's and our own spell the three arguments each in their way."""

_GRACE_S: Final = 1.0

_FORWARD_S: Final = 900.0
"""HAProxy's own deadlines end a forwarded request; this is for a HAProxy that hangs."""


@dataclass(frozen=True, slots=True)
class HttpApps:
    """Made of a controller's parts.

    Attributes:
        services: Behind the admin API.
        resolver: The application behind HAProxy's backend `resolver`.
        health: Health and metrics.
    """

    status: StatusService
    services: Services
    metrics: Metrics
    resolver: AnyAsgiApp
    health: HealthReports


def build_apps(
    parts: Parts,
    *,
    reload_settings: Callable[[bool], Awaitable[SettingsReload]],
    end: Callable[[bool], None],
) -> HttpApps:
    """Make them.

    Args:
        parts: Those of the controller.
        reload_settings: See `Services.reload`.
        end: See `Services.end`.
    """
    forwarder = FoundForwarder(str(parts.layout.found_socket), _FORWARD_S)
    status = StatusService(
        settings=parts.holder,
        clock=parts.clock,
        started_at=parts.started_at,
        started=parts.started,
        inventory=parts.inventory,
        sources=parts.sources.all,
        records=parts.records,
        listeners=parts.listeners,
        haproxy=parts.haproxy,
        haproxy_version=parts.haproxy_version,
        guard=parts.guard,
        mac_filters=parts.mac_filters,
        mismatched=parts.resolver.counts.mismatched,
        nova=parts.nova,
        nova_watch=NovaWatch(parts.haproxy, parts.nova.names),
        limit_watch=LimitWatch(parts.haproxy, parts.clock, lambda: parts.holder.settings.limits),
        companion=parts.companion,
        probe=parts.documents,
        guarding=parts.guarding,
        audit=parts.audit,
    )
    inventory, records, listeners = parts.inventory, parts.records, parts.listeners
    needed = parts.companion.needed
    services = Services(
        RecordReports(inventory, records, listeners, needed),
        RecordService(inventory, records, listeners, parts.sources.writable, status.unapplied),
        GuestService(
            inventory,
            records,
            parts.lookup,
            Explainer(
                inventory,
                records,
                listeners,
                parts.haproxy,
                parts.lookup,
                documents_needed=needed,
                documents_problem=status.documents_problem,
            ),
            forwarder,
            PasswordStore(parts.layout.passwords),
        ),
        TokenService(inventory, records, parts.guarding, parts.clock, status.unapplied),
        parts.watching,
        records.progress,
        status.report,
        partial(parts.counting.report, inventory, records.policies),
        listeners.render,
        reload_settings,
        end,
    )
    metrics = Metrics(
        status,
        parts.counting,
        parts.resolver,
        parts.sources.look_up,
        lambda: parts.holder.settings.metrics.network_series,
    )
    return HttpApps(
        status,
        services,
        metrics,
        resolver_app(parts.resolver, forwarder),
        HealthReports(status.readiness, metrics.expose),
    )


def load_admin() -> Callable[[HttpApps], AnyAsgiApp]:
    """Import the admin API, which takes longest of all; what makes it."""
    from imdsproxy.admin.api import admin_app  # noqa: PLC0415 - the resolver does not wait for it

    return lambda apps: admin_app(apps.services, version=__version__)


async def serve(app: AnyAsgiApp, listener: socket.socket) -> None:
    """Serve until cancelled, then let what has begun come to its end."""
    server = HttpListener(cast("AsgiApp", app))
    await server.open(listener)
    try:
        await asyncio.Event().wait()
    finally:
        await server.close(grace_s=_GRACE_S)
