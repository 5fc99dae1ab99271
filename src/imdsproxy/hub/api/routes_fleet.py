"""Routes below `/fleet`: hosts and hubs, revisions in force, and requests between hubs."""

import base64
import uuid
from dataclasses import replace
from typing import Annotated, Final

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from imdsproxy.api.answers import Written
from imdsproxy.documents.dialects.respond import PASSWORD_LIMIT
from imdsproxy.errors import NotFound, RequestRefused
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.members import Role
from imdsproxy.fleet.stream import ALIVE_PATH
from imdsproxy.hub.api.ask import ask_here
from imdsproxy.hub.api.callers import (
    Admits,
    Caller,
    FleetOperator,
    FleetReader,
    OfHost,
    OfHub,
    Reader,
    Uses,
)
from imdsproxy.hub.api.operations import FleetHost, FleetStatus, FleetWritten, no_such_host
from imdsproxy.hub.api.reseal import Resealed, reseal
from imdsproxy.hub.store.plan_changes import choose_departure, plan_hosts
from imdsproxy.hub.store.transactions import no_such
from imdsproxy.hub.store.writes import Done
from imdsproxy.model.entities import ID_PATTERN, InstanceId

fleet = APIRouter()

_SETTLE_S: Final = 5.0
_Id = Annotated[str, Field(pattern=ID_PATTERN)]


class WaitBody(BaseModel):
    """Revision that must be in force, and the hosts to wait for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    revision: int = Field(ge=0)
    hosts: list[_Id] | None = Field(default=None, description="Null for every enrolled host.")
    timeout_s: float = Field(default=60.0, ge=0, le=3600)


class AppliedBody(BaseModel):
    """Request of another hub to wait for hosts that may be connected to this hub; see `WaitBody`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    hosts: list[_Id]
    revision: int = Field(default=0, ge=0)
    items: list[str] | None = None
    within_s: float = Field(default=0.0, ge=0, le=60)
    incarnation: int = Field(default=0, ge=0)


class ResealBody(BaseModel):
    """Position from which to continue."""

    model_config = ConfigDict(extra="forbid", strict=True)

    after: str = Field(default="", description="`after` of the previous answer.")


class AskBody(BaseModel):
    """Request to the admin API of a host."""

    model_config = ConfigDict(extra="forbid", strict=True)

    host: _Id
    path: str
    method: str


class LeaveBody(BaseModel):
    """Instance that has left a host, or did not arrive there."""

    model_config = ConfigDict(extra="forbid", strict=True)

    instance: _Id = Field(description="Its id.")
    cancel: bool = Field(default=False, description="Its guest was to come here, and has not.")


class PasswordPost(BaseModel):
    """Password that the guest of an instance posted to a host."""

    model_config = ConfigDict(extra="forbid", strict=True)

    instance: _Id = Field(description="Its id.")
    password: str = Field(max_length=2 * PASSWORD_LIMIT, description="In base64.")


class LeftShape(BaseModel):
    """Answer to a host: whether the instance is no longer placed there."""

    left: bool


@fleet.get("/status")
async def show_fleet(
    operations: Uses,
    _: Annotated[Caller, Depends(Admits(Role.OPERATOR, Role.READER, all_projects=True))],
) -> FleetStatus:
    """Show the status of the fleet."""
    return await operations.report()


@fleet.get("/hosts")
async def list_hosts(operations: Uses, _: FleetReader) -> list[FleetHost]:
    """List all hosts, with their acknowledged revisions and failed items."""
    return await operations.report_hosts()


@fleet.post("/wait")
async def wait(body: WaitBody, operations: Uses, caller: Reader) -> FleetWritten:
    """Wait until a revision is in force on these hosts; return the pending hosts.

    For an operator of one project, only the project's records count.
    """
    views = caller.views(operations)
    hosts = views.placed_hosts()
    if body.hosts is not None:
        hosts = frozenset(map(HostId, body.hosts))
        known = views.hosts()
        for host in sorted(hosts - known):
            if caller.scope is not None:
                raise no_such_host(host)
            operations.refuse_unknown(host)
    pending = await operations.in_force.wait(
        hosts, body.revision, views.items_on(hosts), body.timeout_s
    )
    return operations.written(Done(body.revision, hosts, caller.scope), pending)


@fleet.post("/accept-restore")
async def accept_restore(operations: Uses, _: FleetOperator) -> FleetWritten:
    """Accept the contents of etcd after a restore: hosts remove items that etcd lacks.

    Memberships, revocations and operator overrides that etcd had lost stay in force; the warnings name them.
    """
    # Hosts get values with the acceptance if the hub puts them back before it.
    await operations.restores.settle(_SETTLE_S)
    revision, regained = await operations.writes.accept_restore()
    done = Done(revision, frozenset(operations.state.enrolled()))
    warnings = tuple(f"{whose} {what}" for whose, what in regained.items())
    return replace(await operations.confirm(done, None), warnings=warnings)


@fleet.post("/reseal")
async def reseal_secrets(body: ResealBody, operations: Uses, _: FleetOperator) -> Resealed:
    """Make all hubs seal with this hub's newest key, then reseal existing secrets for some seconds."""
    return await reseal(operations, body.after)


@fleet.get(ALIVE_PATH.removeprefix("/fleet"), include_in_schema=False)
async def show_alive(operations: Uses) -> JSONResponse:
    """Show that this hub does not hang; operators and hubs ask this before slow requests.

    The answer has the hub's clock (Unix time), and whether the hub signs identity tokens, if its settings give any.
    Any certificate of the fleet may ask, so the answer has no reason.
    """
    now = operations.clock.now().timestamp()
    return JSONResponse({"now": now, "unsigned": operations.unsigned() is not None})


@fleet.get("/envelope", include_in_schema=False)
async def show_envelope(operations: Uses, _: OfHub) -> JSONResponse:
    """Show other hubs the fingerprints of the keys with which this hub opens secrets."""
    return JSONResponse(operations.writes.envelope.report())


@fleet.get("/applied", include_in_schema=False)
async def show_applied(operations: Uses, _: OfHub) -> JSONResponse:
    """Show other hubs the acknowledged revisions of this hub's hosts."""
    return JSONResponse(operations.in_force.report())


@fleet.post("/applied", include_in_schema=False)
async def wait_here(body: AppliedBody, operations: Uses, _: OfHub) -> JSONResponse:
    """Wait for a revision on this hub's hosts; show other hubs the pending hosts, with reasons."""
    asked = [HostId(one) for one in body.hosts]
    found = await operations.in_force.here(
        asked, body.revision, body.items, body.within_s, body.incarnation
    )
    return JSONResponse(found)


@fleet.post("/ask", include_in_schema=False)
async def ask(body: AskBody, operations: Uses, _: OfHub) -> JSONResponse:
    """Pass a request of another hub on to a host of this hub."""
    answer = await ask_here(operations, HostId(body.host), body.path, body.method)
    return JSONResponse(answer or {})


@fleet.post("/leave", include_in_schema=False)
async def leave(body: LeaveBody, operations: Uses, caller: OfHost) -> LeftShape:
    """Remove the calling host from an instance: its guest has migrated away, or did not arrive."""
    host, instance = HostId(caller.identity.name), InstanceId(body.instance)
    # Check the copy first: a host must not cause reads of etcd for other hosts' instances.
    if instance not in operations.state.instances_on(host):
        raise no_such("instance", instance)
    decide = choose_departure(instance, host, cancel=body.cancel)
    remaining: tuple[HostId, ...] = ()

    def choose(hosts: tuple[HostId, ...]) -> tuple[HostId, ...]:
        nonlocal remaining
        remaining = decide(hosts)
        return remaining

    terms = operations.writes.terms(uuid.uuid4().hex)
    await operations.writes.write(lambda view: plan_hosts(view, instance, choose, terms))
    return LeftShape(left=host not in remaining)


@fleet.post("/password", include_in_schema=False)
async def keep_password(body: PasswordPost, operations: Uses, caller: OfHost) -> Written:
    """Store a password that the guest of an instance on the calling host has posted."""
    host, instance = HostId(caller.identity.name), InstanceId(body.instance)
    if instance not in operations.state.instances_on(host):
        raise no_such("instance", instance)
    try:
        password = base64.b64decode(body.password, validate=True)
    except ValueError:
        password = b""
    if not 0 < len(password) <= PASSWORD_LIMIT:
        raise RequestRefused(f"a password has 1 to {PASSWORD_LIMIT} bytes")
    await operations.passwords.keep(instance, host, password)
    return Written(instances=1)


@fleet.get("/blob/{sha256}", include_in_schema=False)
async def show_blob(sha256: str, operations: Uses, caller: OfHost) -> Response:
    """Send user data of an instance that is placed on the calling host."""
    if not operations.state.has_blob(HostId(caller.identity.name), sha256):
        raise NotFound(f"no instance on this host has user data {sha256}")
    data = await operations.writes.read_blob(layout.UserData(sha256, 0))
    return Response(data, media_type="application/octet-stream")
