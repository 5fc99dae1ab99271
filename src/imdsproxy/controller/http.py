"""What others ask of the controller by HTTP: the resolver, the admin API, health and metrics.

To import all of it takes as long as everything else that happens before guests are served. They do not wait for it:
nothing that is needed to serve the known ones may import this module.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias, cast

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import CollectorRegistry

from imdsproxy import __version__
from imdsproxy.admin.collector import metrics_registry
from imdsproxy.admin.explain import Explainer
from imdsproxy.admin.figures import Figures
from imdsproxy.admin.health import HealthReports
from imdsproxy.admin.instance_reports import InstanceReports
from imdsproxy.admin.records import Writes
from imdsproxy.admin.status import ControllerOperations
from imdsproxy.admin.tokens import GuardWrites
from imdsproxy.app.limited import LimitWatch
from imdsproxy.app.nova_watch import NovaWatch
from imdsproxy.config.change import SettingsReload
from imdsproxy.controller.parts import Parts
from imdsproxy.errors import Problem
from imdsproxy.serving.asgi import AsgiApp
from imdsproxy.serving.forward import FoundForwarder
from imdsproxy.serving.listen import HttpListener
from imdsproxy.serving.passwords import PasswordStore
from imdsproxy.serving.pidfile import read_pids
from imdsproxy.serving.resolver_app import resolver_app

__all__ = ["AnyAsgiApp", "Face", "build_face", "load_admin", "serve"]

AnyAsgiApp: TypeAlias = Callable[..., Awaitable[None]]
"""FastAPI's, Starlette's and our own spell the three arguments each in their way."""

_GRACE_S: Final = 1.0

_FORWARD_S: Final = 900.0
"""HAProxy's own deadlines end a forwarded request; this is for a HAProxy that hangs."""


@dataclass(frozen=True, slots=True)
class Face:
    """Made of a controller's parts.

    Attributes:
        resolver: The application behind HAProxy's backend `resolver`.
        health: Health and metrics.
    """

    operations: ControllerOperations
    figures: Figures
    resolver: AnyAsgiApp
    health: HealthReports


def build_face(
    parts: Parts,
    *,
    reload_settings: Callable[[bool], Awaitable[SettingsReload]],
    end: Callable[[bool], None],
) -> Face:
    """Make it.

    Args:
        parts: Those of the controller.
        reload_settings: Reads the settings again, with `True` also where settings were dropped; returns once
            guests are answered by them.
        end: Ends the controller, and with `True` the data plane too.
    """
    forwarder = FoundForwarder(str(parts.layout.found_socket), _FORWARD_S)
    companion, nova = parts.companion, parts.nova

    def documents_problem() -> Problem | None:
        return companion.failure or parts.documents.problem

    operations = ControllerOperations(
        version=__version__,
        pid=os.getpid(),
        clock=parts.clock,
        started_at=parts.started_at,
        started=parts.started,
        inventory=parts.inventory,
        records=parts.records,
        listeners=parts.listeners,
        haproxy=parts.haproxy,
        haproxy_version=parts.haproxy_version,
        guard=parts.guard,
        lookup=parts.lookup,
        mac_filters=parts.mac_filters,
        mismatched=parts.resolver.counts.mismatched,
        nova=nova,
        nova_watch=NovaWatch(parts.haproxy, lambda: (one.name for one in nova.routing.sets)),
        limit_watch=LimitWatch(parts.haproxy, parts.clock, lambda: parts.holder.settings.limits),
        explainer=Explainer(
            parts.inventory,
            parts.records,
            parts.listeners,
            parts.haproxy,
            parts.lookup,
            documents_needed=companion.needed,
            documents_problem=documents_problem,
        ),
        forwarder=forwarder,
        sources=parts.sources.all,
        instance_reports=InstanceReports(
            parts.inventory, parts.records, parts.listeners, companion.needed
        ),
        writes=Writes(
            parts.inventory,
            parts.records,
            parts.listeners,
            parts.sources.writable,
            lambda: operations.unapplied(),  # noqa: PLW0108 - made here
        ),
        guard_writes=GuardWrites(
            parts.inventory,
            parts.records,
            parts.guarding,
            parts.clock,
            lambda: operations.unapplied(),  # noqa: PLW0108 - made here
        ),
        documents_pids=lambda: read_pids(parts.layout.documents_pid).pids,
        documents_problem=documents_problem,
        documents_restarts=lambda: companion.restarts,
        documents_needed=companion.needed,
        passwords=PasswordStore(parts.layout.passwords),
        watching=parts.watching,
        audit=parts.audit,
        counting=parts.counting,
        settings_problems=lambda: parts.holder.problems,
        settings=lambda: parts.holder.settings,
        reload_settings=reload_settings,
        end=end,
    )
    figures = Figures(operations, parts.resolver, parts.sources.look_up)
    registry = metrics_registry(
        figures.take, network_series=lambda: parts.holder.settings.metrics.network_series
    )
    return Face(
        operations,
        figures,
        resolver_app(parts.resolver, forwarder),
        HealthReports(operations.readiness, partial(_metrics, registry)),
    )


def _metrics(registry: CollectorRegistry, accept: str) -> tuple[str, bytes]:
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


def load_admin() -> Callable[[Face], AnyAsgiApp]:
    """Import the admin API, which takes longest of all; what makes it."""
    from imdsproxy.admin.api import admin_app  # noqa: PLC0415 - the resolver does not wait for it

    return lambda face: admin_app(face.operations, version=__version__)


async def serve(app: AnyAsgiApp, listener: socket.socket) -> None:
    """Serve until cancelled, then let what has begun come to its end."""
    server = HttpListener(cast("AsgiApp", app))
    await server.open(listener)
    try:
        await asyncio.Event().wait()
    finally:
        await server.close(grace_s=_GRACE_S)
