"""What others ask of the controller by HTTP: the resolver, the admin API, health and metrics.

To import all of it takes as long as everything else that happens before guests are served. They do not wait for it:
nothing that is needed to serve the known ones may import this module.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias, cast

from imdsproxy import __version__
from imdsproxy.admin.guests import GuestService
from imdsproxy.admin.record_reports import RecordReports
from imdsproxy.admin.records import RecordService
from imdsproxy.admin.services import Services
from imdsproxy.admin.tokens import TokenService
from imdsproxy.controller.controller import Controller
from imdsproxy.controller.metrics import Metrics
from imdsproxy.controller.reload import reload_settings
from imdsproxy.controller.status import Status
from imdsproxy.nova.upstream import NovaWatch
from imdsproxy.serving.http import AsgiApp, HttpListener
from imdsproxy.serving.resolver_app import FoundForwarder, resolver_app
from imdsproxy.serving.store import PasswordStore

AnyAsgiApp: TypeAlias = Callable[..., Awaitable[None]]
"""FastAPI's, Starlette's and our own spell the three arguments each in their way."""

_GRACE_S: Final = 1.0

_FORWARD_S: Final = 900.0
"""HAProxy's own deadlines end a forwarded request; this is for a HAProxy that hangs."""


def build_apps(controller: Controller) -> tuple[Services, Metrics, AnyAsgiApp]:
    """What is behind the admin API, metrics, and the application behind HAProxy's backend `resolver`."""
    one, records, listeners = controller, controller.records, controller.listeners
    inventory = one.inventory
    needed, passwords = one.companion.needed, PasswordStore(one.layout.passwords)
    forward = FoundForwarder(str(one.layout.found_socket), _FORWARD_S).forward
    status = Status(one, NovaWatch(one.haproxy, one.nova.names))
    services = Services(
        RecordReports(inventory, records, listeners, needed),
        RecordService(inventory, records, listeners, one.sources.writable, status.unapplied),
        GuestService(one.lookup, listeners, forward, passwords, needed, status.documents_problem),
        TokenService(records, one.policy_store, status.unapplied),
        one.watching,
        status.report,
        partial(one.counting.report, inventory, records.policies),
        partial(reload_settings, one, status.own_problems),
        one.end,
    )
    return services, Metrics(one, status), resolver_app(one.resolver, forward)


def load_admin(services: Services) -> AnyAsgiApp:
    """Import the admin API, which takes longest of all, and make it."""
    from imdsproxy.admin.api import admin_app  # noqa: PLC0415 - the resolver does not wait for it

    return admin_app(services, version=__version__)


async def serve(app: AnyAsgiApp, listener: socket.socket) -> None:
    """Serve until cancelled, then let what has begun come to its end."""
    server = HttpListener(cast("AsgiApp", app))
    await server.open(listener)
    try:
        await asyncio.Event().wait()
    finally:
        await server.close(grace_s=_GRACE_S)
