"""API of a hub: the routes of a host's admin API for the whole fleet, and the routes below `/fleet`.

HAProxy verifies the caller's certificate and sets headers (`fleet.members`); the API has no other listener. Every
answer with status ≥ 400 is a `ProblemBody`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fastapi import FastAPI

from imdsproxy.api.problems import ERRORS, new_app
from imdsproxy.hub.api.operations import Operations
from imdsproxy.hub.api.routes import records
from imdsproxy.hub.api.routes_enrolment import enrolment
from imdsproxy.hub.api.routes_fleet import fleet
from imdsproxy.hub.api.routes_grants import grants
from imdsproxy.hub.api.routes_guests import guests
from imdsproxy.hub.api.routes_identity import identity, issuer_keys
from imdsproxy.hub.hosts.in_force import InForce, Peers
from imdsproxy.hub.pki.enrolment import Enrolment
from imdsproxy.hub.store.writes import Writes

if TYPE_CHECKING:
    from imdsproxy.hub.parts import Hub


ROUTERS: Final = (
    (records, "/v1"),
    (guests, "/v1"),
    (grants, "/v1"),
    (fleet, "/fleet"),
    (enrolment, "/fleet"),
    (identity, "/fleet"),
    (issuer_keys, "/v1"),
)
"""All routers with the prefixes of their paths."""


def build_api(hub: Hub) -> FastAPI:
    replica = hub.replica
    restores = replica.restores
    keep, largest = restores.journal.keep, hub.settings.user_data_kib
    in_force = InForce(hub.streams, peers_of(hub), replica.expect)
    writes = Writes(
        hub.etcd, hub.state, hub.envelope, hub.clock, largest, levels=in_force.levels, keep=keep
    )
    operations = Operations(
        hub.etcd,
        hub.state,
        hub.streams,
        writes,
        in_force,
        restores,
        hub.clock,
        replica.complete,
        token_keys=hub.token_keys,
        authority=hub.authority,
        hub_problems=hub.problems,
        unready=hub.unready,
        unsigned=hub.unsigned,
    )
    app = operators_app(operations)
    app.state.hub = hub
    app.state.enrolment = Enrolment(
        hub.etcd, hub.authority, hub.clock, operations.holder_of, hub.state.value, keep
    )
    return app


def peers_of(hub: Hub) -> Peers:
    files = hub.files.hub, hub.files.ca_certificate
    return Peers(hub.state, hub.replica.name, hub.clock, files)


def operators_app(operations: Operations | None) -> FastAPI:
    """Build the application that `/openapi.json` describes.

    Args:
        operations: Operations for the routes; `None` to generate only the description.
    """
    app = new_app("imdsproxy hub API", "Networks, instances and the state of a fleet.")
    app.state.operations = operations
    for router, prefix in ROUTERS:
        app.include_router(router, prefix=prefix, responses=ERRORS)
    return app
