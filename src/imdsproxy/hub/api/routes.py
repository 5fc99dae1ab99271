"""Routes below `/v1`: the routes of a host's admin API that make sense for a fleet, with the same bodies."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from imdsproxy.api import bodies
from imdsproxy.api.record_routes import InstanceOf, RecordApi, add_record_routes
from imdsproxy.errors import NotFound, RequestRefused, SourceUnavailable
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId
from imdsproxy.hub.api.callers import Caller, FleetOperator, Operator, Reader, TermsOf, Uses
from imdsproxy.hub.api.fleet_records import (
    FleetOverrideChange,
    Moving,
    Reading,
    ReadingSecrets,
    open_reading,
    open_secrets,
    open_writing,
)
from imdsproxy.hub.api.operations import FleetWritten, Importing, Moved, Operations
from imdsproxy.hub.api.rotate_keys import FleetKeyRotation, rotate_keys
from imdsproxy.hub.api.views import Wanted
from imdsproxy.hub.store import plan_changes
from imdsproxy.hub.store.plan_changes import choose_move
from imdsproxy.hub.store.transactions import Terms
from imdsproxy.model.entities import ID_PATTERN
from imdsproxy.model.records import Refused
from imdsproxy.model.records.network import POLICY

records = APIRouter()


class MoveBody(BaseModel):
    """Step of a move; `now` does both steps."""

    model_config = ConfigDict(extra="forbid", strict=True)

    to: str | None = Field(
        default=None,
        pattern=ID_PATTERN,
        description="The new host; may be omitted at the end of a move.",
    )
    finish: bool = Field(default=False, description="The guest is there: no other host serves it.")
    cancel: bool = Field(default=False, description="The guest stays where it was.")
    now: bool = Field(
        default=False, description="Finish once the new host serves it, without a hypervisor."
    )


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    """Rules of a scope.

    Attributes:
        place: `fleet`, `host/ID` or `project/ID`.
    """

    place: str
    rules: Json
    revision: int


async def list_instances(
    store: Reading,
    text: bodies.SearchText = "",
    network: bodies.InNetwork = None,
    project: bodies.OfProject = None,
    host: Annotated[str | None, Query(description="Only instances placed on this host.")] = None,
) -> StreamingResponse:
    """List matching instances, sorted by id, without payloads; each is read when it is sent."""
    views, reported = store.views, await store.caller.reported(store.operations)
    chosen = None if network is None else views.find_network(network)
    wanted = Wanted(text, chosen, project, None if host is None else HostId(host))
    return bodies.stream_list(views.summaries(wanted, reported))


add_record_routes(
    records,
    RecordApi(
        list_instances=list_instances,
        instance=bodies.PlacedRecord,
        written=FleetWritten,
        many=FleetWritten | Importing,
        override=FleetOverrideChange,
        reads=[Depends(open_reading)],
        secrets=[Depends(open_secrets)],
        writes=[Depends(open_writing)],
    ),
)


@records.post("/instances/{instance}/move")
async def move_instance(store: Moving, instance: InstanceOf, body: MoveBody) -> Moved:
    """Place an instance on a second host, then, once its guest has arrived, on that host alone."""
    if body.now + body.finish + body.cancel > 1:
        raise RequestRefused("a step of a move is one of `now`, `finish` and `cancel`")
    operations, terms = store.operations, store.terms
    to = None if body.to is None else HostId(body.to)

    async def step(*, finish: bool, cancel: bool, request: str) -> FleetWritten:
        choose = choose_move(instance, to, finish=finish, cancel=cancel)
        named = replace(terms, request=request)
        done = await operations.writes.write(
            lambda view: plan_changes.plan_hosts(view, instance, choose, named)
        )
        return await operations.confirm(done, {f"instance/{instance}"}, instances=1)

    written = await step(finish=body.finish, cancel=body.cancel, request=terms.request)
    if body.now and written.applied:
        written = await step(finish=True, cancel=False, request=f"{terms.request}+")
    serving = (await operations.writes.find(instance, terms.scope)).hosts
    return Moved(
        **{one.name: getattr(written, one.name) for one in fields(written)}, serving=serving
    )


@records.get("/imports/{name}")
async def show_import(name: str, store: ReadingSecrets) -> FleetWritten | Importing:
    """Show the answer to a large import, or its progress."""
    known = store.operations.imports.get(name)
    if known is None or store.caller.scope not in {None, known[0].terms.scope}:
        raise SourceUnavailable(
            f"this hub does not know import {name}: it was started since",
            hint="send the same records again: the hub recognizes stored records",
        )
    return await store.await_import(name)


@records.post("/token-keys/rotate")
async def rotate_token_keys(operations: Uses, _: FleetOperator) -> FleetKeyRotation:
    """Sign session tokens with a new key of the fleet; existing tokens stay valid until they expire."""
    return await rotate_keys(operations)


@records.get("/policies")
async def list_policies(operations: Uses, caller: Reader) -> list[FleetPolicy]:
    """List the policies of all scopes that have rules."""
    places = (key.removeprefix(layout.POLICIES) for key in operations.state.keys(layout.POLICIES))
    found = [_policy(operations, one) for one in sorted(places) if _may_see(caller, one)]
    return [one for one in found if one.rules]


@records.get("/policies/{place:path}")
async def show_policy(place: str, operations: Uses, caller: Reader) -> FleetPolicy:
    """Show the rules of a scope: `fleet`, `host/ID` or `project/ID`."""
    if not _may_see(caller, _checked(place)):
        raise NotFound(f"there is no policy of {place}")
    return _policy(operations, place)


@records.patch("/policies/{place:path}", openapi_extra=bodies.takes(bodies.PolicyRecord))
async def patch_policy(
    _: Operator, place: str, body: bodies.JsonBody, operations: Uses, terms: TermsOf
) -> FleetWritten:
    """Change some rules of a scope (RFC 7396: null leaves a rule to less specific scopes)."""
    return await _put_policy(operations, place, body, terms)


@records.delete("/policies/{place:path}")
async def clear_policy(_: Operator, place: str, operations: Uses, terms: TermsOf) -> FleetWritten:
    """Clear all rules of a scope; less specific scopes apply."""
    return await _put_policy(operations, place, None, terms)


async def _put_policy(
    operations: Operations, place: str, patch: object, terms: Terms
) -> FleetWritten:
    def change(old: Mapping[str, Any]) -> Mapping[str, Any]:
        if patch is None:
            return {}
        merged = bodies.merge_patch(old, patch)
        read = POLICY.read(merged)
        if isinstance(read, Refused):
            raise RequestRefused("the policy is not acceptable", problems=read.problems)
        return POLICY.render(read)

    done = await operations.writes.put_policy(_checked(place), change, terms)
    item = f"policy/{place}"
    hosts = (
        frozenset(operations.state.enrolled())
        if place == "fleet"
        else operations.state.hosts_with(item)
    )
    if place.startswith("host/"):
        hosts = frozenset([HostId(place.removeprefix("host/"))])
    return await operations.confirm(replace(done, hosts=hosts), {item})


def _checked(place: str) -> str:
    scope, _, subject = place.partition("/")
    if place != "fleet" and not (scope in {"host", "project"} and codec.is_id(subject)):
        raise RequestRefused(
            f"{place} is not a scope of policies",
            hint="use fleet, host/ID or project/ID; policies of networks and instances are in their records",
        )
    return place


def _may_see(caller: Caller, place: str) -> bool:
    return caller.scope is None or place == f"project/{caller.scope}"


def _policy(operations: Operations, place: str) -> FleetPolicy:
    rules, revision = plan_changes.read_policy(operations.state.value, place)
    return FleetPolicy(place, dict(rules), revision)
