"""Routes below `/v1`: the routes of a host's admin API that make sense for a fleet, with the same bodies."""

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Annotated, Any, Final, TypeAlias

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, StreamingResponse

from imdsproxy.api import bodies
from imdsproxy.errors import RequestRefused, SourceUnavailable
from imdsproxy.fleet.layout import HostId, StoredInstance, View
from imdsproxy.fleet.stream import ItemKey
from imdsproxy.hub.api.callers import InstanceOf, Mover, NetworkOf, Operator, Reader, TermsOf, Uses
from imdsproxy.hub.api.operations import FleetWritten, Importing, Moved, Operations
from imdsproxy.hub.api.views import Wanted
from imdsproxy.hub.store import plan_changes, plan_records, scopes, transactions
from imdsproxy.hub.store.imports import Import
from imdsproxy.hub.store.plan_changes import choose_move
from imdsproxy.hub.store.transactions import Terms
from imdsproxy.hub.store.writes import TooMuch
from imdsproxy.model import matching
from imdsproxy.model.entities import InstanceId, Network
from imdsproxy.model.records import (
    INSTANCE,
    NETWORK,
    PLACED_TABLES,
    PlacedInstance,
    parse_placed,
)
from imdsproxy.reconcile.progress import Step

records = APIRouter()

_IMPORT_S: Final = 1.0
_AT_ONCE: Final = 40
"""Maximum number of records to store in one transaction."""


async def _instance_body(request: Request, operations: Uses, caller: Operator) -> object:
    find = caller.views(operations).find_network
    return bodies.name_networks(await bodies.read_json(request), find)


_InstanceBody: TypeAlias = Annotated[object, Depends(_instance_body)]


class MoveBody(BaseModel):
    """Step of a move; `now` does both steps."""

    model_config = ConfigDict(extra="forbid", strict=True)

    to: str | None = Field(
        default=None, description="The host that it moves to; may be omitted at the end of a move."
    )
    finish: bool = Field(default=False, description="The guest is there: no other host serves it.")
    cancel: bool = Field(default=False, description="The guest stays where it was.")
    now: bool = Field(
        default=False, description="Finish once the new host serves it, without a hypervisor."
    )


@records.get("/progress")
async def show_progress(operations: Uses, caller: Reader) -> list[Step]:
    """Show the progress of imports on this hub, for a client that waits for its answer."""
    return operations.progress(caller.scope)


@records.get("/networks", responses={200: {"model": list[bodies.NetworkView]}})
async def list_networks(operations: Uses, caller: Reader) -> JSONResponse:
    """List all networks, sorted by id."""
    views, reported = caller.views(operations), await caller.reported(operations)
    return bodies.RecordResponse([views.network(one, reported) for one in views.networks()])


@records.post("/networks", status_code=201, openapi_extra=bodies.takes(bodies.NetworkRecord))
async def add_network(
    body: bodies.JsonBody, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Add a network; refuse an id that exists."""
    return await _put_network(operations, bodies.read_network(body), _creating(terms))


@records.get("/networks/{network}", responses={200: {"model": bodies.NetworkView}})
async def show_network(network: NetworkOf, operations: Uses, caller: Reader) -> JSONResponse:
    """Show a network."""
    reported = await caller.reported(operations)
    return bodies.RecordResponse(caller.views(operations).network(network, reported))


@records.put("/networks/{network}", openapi_extra=bodies.takes(bodies.NetworkRecord))
async def put_network(
    network: str, body: bodies.JsonBody, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Add a network, or replace its whole record."""
    record = bodies.read_network(bodies.refuse_unlike(body, network))
    return await _put_network(operations, record, terms)


@records.patch("/networks/{network}", openapi_extra=bodies.takes(bodies.NetworkRecord))
async def patch_network(
    network: NetworkOf, body: bodies.JsonBody, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Change some keys of a network (RFC 7396: null removes a key)."""
    patch = bodies.read_patch(body, network, NETWORK)

    def plan(view: View) -> transactions.Transaction:
        known = transactions.read_network(view, network)
        if known is None or not scopes.in_scope(known[0].record, terms.scope):
            raise transactions.no_such("network", network)
        changed = bodies.read_network(bodies.merge_patch(known[0].record, patch))
        return plan_records.plan_put(view, [changed], [], terms)

    done = await operations.writes.write(plan)
    return await operations.confirm_network(done, network)


@records.delete("/networks/{network}")
async def remove_network(
    network: NetworkOf, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Remove a network; refuse this while instances have ports in the network."""
    done = await operations.writes.remove_network(network, terms)
    return await operations.confirm_network(done, network)


@records.get("/instances", responses={200: {"model": list[bodies.InstanceSummary]}})
async def list_instances(  # noqa: PLR0917 - FastAPI passes them by name
    operations: Uses,
    caller: Reader,
    text: bodies.SearchText = "",
    network: bodies.InNetwork = None,
    project: bodies.OfProject = None,
    host: Annotated[str | None, Query(description="Only those that are placed on it.")] = None,
) -> StreamingResponse:
    """List matching instances, sorted by id, without payloads; each is read when it is sent."""
    views, reported = caller.views(operations), await caller.reported(operations)
    chosen = None if network is None else views.find_network(network)
    wanted = Wanted(text, chosen, project, None if host is None else HostId(host))
    return bodies.stream_list(views.summaries(wanted, reported))


@records.get("/search/instances", responses={200: {"model": bodies.InstancePage}})
async def search_instances(  # noqa: PLR0917 - FastAPI passes them by name
    operations: Uses,
    caller: Reader,
    text: bodies.SearchText = "",
    network: bodies.InNetwork = None,
    after: bodies.AfterPage = None,
    limit: bodies.PageSize = 50,
) -> JSONResponse:
    """Search instances: matching instances sorted by id, in pages, without payloads."""
    views, reported = caller.views(operations), await caller.reported(operations)
    chosen = None if network is None else views.find_network(network)
    found = [one async for one, _, _ in views.instances(Wanted(text, chosen))]
    page = matching.cut_page(found, after, limit)
    shown = [views.summary(*views.stored(one), reported) for one in page.ids]
    return bodies.RecordResponse({"found": len(found), "instances": shown, "next": page.next})


@records.post("/instances", status_code=201, openapi_extra=bodies.takes(bodies.PlacedRecord))
async def add_instance(
    body: _InstanceBody, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Add an instance; refuse an id that exists."""
    return await _put_instance(operations, _read_instance(body), _creating(terms))


@records.get("/instances/{instance}", responses={200: {"model": bodies.InstanceView}})
async def show_instance(instance: InstanceOf, operations: Uses, caller: Reader) -> JSONResponse:
    """Show an instance; with user data and vendor data if the caller may read secrets."""
    views, reported = caller.views(operations), await caller.reported(operations)
    stored, _ = views.stored(instance)
    data = None
    if stored.user_data is not None and caller.reads_secrets:
        data = await operations.writes.read_blob(stored.user_data)
    shape = views.instance(instance, reported, data)
    if not caller.reads_secrets:
        shape["record"].pop("vendor_data", None)
    return bodies.RecordResponse(shape)


@records.put("/instances/{instance}", openapi_extra=bodies.takes(bodies.PlacedRecord))
async def put_instance(
    instance: str, body: _InstanceBody, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Add an instance, or replace its whole record; without `hosts` the instance stays on its hosts."""
    record = _read_instance(bodies.refuse_unlike(body, instance))
    return await _put_instance(operations, record, terms)


@records.patch("/instances/{instance}", openapi_extra=bodies.takes(bodies.PlacedRecord))
async def patch_instance(
    instance: InstanceOf, body: _InstanceBody, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Change some keys of an instance (RFC 7396: null removes a key, lists are replaced)."""
    patch = bodies.read_patch(body, instance, INSTANCE)

    def change(stored: StoredInstance) -> PlacedInstance:
        known = {**stored.record, "hosts": list(stored.hosts)}
        read: PlacedInstance = _read_instance(bodies.merge_patch(known, patch))
        return read

    done = await operations.writes.change(
        instance, change, terms, keeps_data="user_data" not in patch
    )
    record = (await operations.writes.find(instance, terms.scope)).record
    return await operations.confirm(done, _items_of(instance, record), instances=1)


@records.delete("/instances/{instance}")
async def remove_instance(
    instance: InstanceOf, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Remove an instance."""
    done = await operations.writes.remove_instance(instance, terms)
    return await operations.confirm(done, {f"instance/{instance}"}, instances=1)


@records.post("/instances/{instance}/move")
async def move_instance(
    instance: InstanceOf, body: MoveBody, operations: Uses, terms: TermsOf, _: Mover
) -> Moved:
    """Place an instance on a second host, then, once its guest has arrived, on that host alone."""
    if body.now + body.finish + body.cancel > 1:
        raise RequestRefused("a step of a move is one of `now`, `finish` and `cancel`")
    to = None if body.to is None else HostId(body.to)
    items = {f"instance/{instance}"}

    async def step(*, finish: bool, cancel: bool, request: str) -> FleetWritten:
        choose = choose_move(instance, to, finish=finish, cancel=cancel)
        named = replace(terms, request=request)
        done = await operations.writes.write(
            lambda view: plan_changes.plan_hosts(view, instance, choose, named)
        )
        return await operations.confirm(done, items, instances=1)

    written = await step(finish=body.finish, cancel=body.cancel, request=terms.request)
    if body.now and written.applied:
        written = await step(finish=True, cancel=False, request=f"{terms.request}+")
    serving = (await operations.writes.find(instance, terms.scope)).hosts
    return Moved(
        **{one.name: getattr(written, one.name) for one in fields(written)}, serving=serving
    )


@records.post("/records", openapi_extra=bodies.takes(bodies.RecordsBody))
async def put_records(
    request: Request,
    operations: Uses,
    caller: Operator,
    terms: TermsOf,
    create: bodies.Creates = False,  # noqa: FBT002 - FastAPI passes it by name
) -> FleetWritten | Importing:
    """Add or replace many networks and instances; up to forty all or none, if they fit into one transaction.

    The hub checks a larger import completely, then writes it in parts, even if the client disconnects:
    `/v1/imports/{name}` has the answer. To continue an interrupted import, send the same records again. A body of type
    `application/x-ndjson` has one record per line, and may have any length.
    """
    del caller
    networks, instances = await bodies.read_records(request, {}, PLACED_TABLES)
    placed: list[PlacedInstance] = [*instances]
    terms = _creating(terms) if create else terms
    items: set[ItemKey] = set()
    done = None
    if len(networks) + len(placed) <= _AT_ONCE:
        items = {f"instance/{one.id}" for one in placed} | {f"network/{one.id}" for one in networks}
        with contextlib.suppress(TooMuch):
            done = await operations.writes.put(networks, placed, terms, bulk=True)
    if done is None:
        one = Import(operations.writes, networks, placed, terms)
        one.name = await asyncio.to_thread(one.make_name)
        return await _imported(operations, operations.begin(one), terms.scope)
    return await operations.confirm(done, items, networks=len(networks), instances=len(placed))


@records.get("/imports/{name}")
async def show_import(name: str, operations: Uses, caller: Operator) -> FleetWritten | Importing:
    """Show the answer to a large import, or its progress."""
    known = operations.imports.get(name)
    if known is None or caller.scope not in {None, known[0].terms.scope}:
        raise SourceUnavailable(
            f"this hub does not know import {name}: it was started since",
            hint="send the same records again: what is stored is known",
        )
    return await _imported(operations, name, caller.scope)


async def _imported(
    operations: Operations, name: str, scope: str | None
) -> FleetWritten | Importing:
    task = operations.imports[name][1]
    if not (await asyncio.wait([task], timeout=_IMPORT_S))[0]:
        return Importing(name, operations.progress(scope))
    del operations.imports[name]
    return await task


async def _put_network(operations: Operations, record: Network, terms: Terms) -> FleetWritten:
    done = await operations.writes.put([record], [], terms)
    return await operations.confirm_network(done, record.id)


async def _put_instance(
    operations: Operations, record: PlacedInstance, terms: Terms
) -> FleetWritten:
    done = await operations.writes.put([], [record], terms)
    items = {f"instance/{record.id}", *(f"network/{one.network}" for one in record.ports)}
    return await operations.confirm(done, items, instances=1)


def _items_of(instance: InstanceId, record: Mapping[str, Any]) -> set[ItemKey]:
    ports = record.get("ports", [])
    return {f"instance/{instance}", *(f"network/{port['network']}" for port in ports)}


def _creating(terms: Terms) -> Terms:
    return replace(terms, create=True)


_read_instance: Any = partial(bodies.read_record, "instance", parse_placed)
