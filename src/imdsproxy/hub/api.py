"""The API of a hub: for operators the routes of a host's admin API, for the whole fleet, and those of `fleet`.

HAProxy has verified who asks, and says so in headers (`core.fleet.identity`); it listens nowhere else. Every answer
from 400 up is one `ProblemBody`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fastapi import FastAPI

from imdsproxy.admin.problems import ERRORS, new_app
from imdsproxy.hub.enrolment import Enrolment
from imdsproxy.hub.operations import Operations
from imdsproxy.hub.peers import Peers
from imdsproxy.hub.routes import records
from imdsproxy.hub.routes_enrolment import enrolment
from imdsproxy.hub.routes_fleet import fleet
from imdsproxy.hub.routes_grants import grants
from imdsproxy.hub.routes_guests import guests
from imdsproxy.hub.writes import Writes

if TYPE_CHECKING:
    from imdsproxy.hub.hub import Hub


ROUTERS: Final = (
    (records, "/v1"),
    (guests, "/v1"),
    (grants, "/v1"),
    (fleet, "/fleet"),
    (enrolment, "/fleet"),
)
"""All routes, and how their paths begin."""


def build_api(hub: Hub) -> FastAPI:
    """The application of a hub."""
    replica = hub.replica
    restores = replica.restores
    keep, largest = restores.journal.keep, hub.settings.user_data_kib
    writes = Writes(hub.etcd, hub.state, hub.envelope, hub.clock, largest, keep=keep)
    operations = Operations(
        hub.etcd,
        hub.state,
        hub.streams,
        writes,
        peers_of(hub),
        restores,
        hub.clock,
        replica.complete,
    )
    writes.levels = operations.in_force.levels
    operations.token_keys, operations.unready = hub.token_keys, hub.unready
    operations.authority, operations.loop_failures = hub.authority, hub.background.failures
    app = operators_app(operations)
    app.state.hub = hub
    app.state.enrolment = Enrolment(
        hub.etcd, hub.authority, hub.clock, operations.holder_of, hub.state.value, keep
    )
    return app


def peers_of(hub: Hub) -> Peers:
    """The other hubs, as this one asks them."""
    files = hub.files.hub, hub.files.ca_certificate
    return Peers(hub.state, hub.replica.name, hub.clock, files)


def operators_app(operations: Operations | None) -> FastAPI:
    """The application; `/openapi.json` describes it.

    Args:
        operations: What its routes use; `None` where it is only described.
    """
    app = new_app("imdsproxy hub API", "Networks, instances and the state of a fleet.")
    app.state.operations = operations
    for router, prefix in ROUTERS:
        app.include_router(router, prefix=prefix, responses=ERRORS)
    return app
