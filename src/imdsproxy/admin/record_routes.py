"""`/v1/networks`, `/v1/instances` and `/v1/records`: read and change what is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse

from imdsproxy.admin.bodies import (
    PASSWORD,
    InstanceRecord,
    InstanceSummary,
    InstanceView,
    NetworkRecord,
    NetworkView,
    PasswordBody,
    RecordsBody,
    merge_patch,
    name_networks,
    read_instance,
    read_json,
    read_lines,
    read_network,
    read_records,
    refuse_unclearable,
    refuse_unlike,
)
from imdsproxy.admin.dependencies import NamedInstance, NamedNetwork, Uses
from imdsproxy.admin.records import Written
from imdsproxy.admin.refusals import ERRORS
from imdsproxy.admin.shapes import (
    JsonObject,
    bytes_shape,
    instance_shape,
    instance_summary,
    network_shape,
)
from imdsproxy.core.model import InstanceId
from imdsproxy.core.records import INSTANCE, NETWORK, render_record
from imdsproxy.errors import NotFound

_Report = TypeVar("_Report")

router = APIRouter(prefix="/v1", responses=ERRORS)


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """A route's body for OpenAPI; the routes read and check it themselves."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.get("/networks", responses={200: {"model": list[NetworkView]}})
async def list_networks(services: Uses) -> JSONResponse:
    """Every network, by id."""
    return await _listed(services.reports.networks(), network_shape)


@router.post(
    "/networks",
    status_code=201,
    openapi_extra=_takes(NetworkRecord),
)
async def add_network(request: Request, services: Uses) -> Written:
    """Add a network; refused when there is one of this id."""
    network = read_network(await read_json(request))
    return await services.records.put_network(network, create=True)


@router.get("/networks/{network}", responses={200: {"model": NetworkView}})
async def show_network(network: NamedNetwork, services: Uses) -> JSONResponse:
    """One network."""
    return JSONResponse(network_shape(services.reports.network(network)))


@router.put("/networks/{network}", openapi_extra=_takes(NetworkRecord))
async def put_network(network: str, request: Request, services: Uses) -> Written:
    """Add a network, or replace its whole record."""
    body = refuse_unlike(await read_json(request), network)
    return await services.records.put_network(read_network(body))


@router.patch("/networks/{network}", openapi_extra=_takes(NetworkRecord))
async def patch_network(network: NamedNetwork, request: Request, services: Uses) -> Written:
    """Change some keys of a network (RFC 7396: null takes a key away)."""
    patch = refuse_unlike(await read_json(request), network)
    refuse_unclearable(patch, NETWORK)
    async with services.records.patching:
        known = services.reports.network(network)
        body = merge_patch(render_record(known.network), patch)
        return await services.records.put_network(read_network(body))


@router.delete("/networks/{network}")
async def remove_network(network: NamedNetwork, services: Uses) -> Written:
    """Remove a network; refused while instances have ports in it."""
    return await services.records.remove_network(network)


@router.get("/instances", responses={200: {"model": list[InstanceSummary]}})
async def list_instances(
    services: Uses,
    network: Annotated[str | None, Query(description="Only those with a port in it.")] = None,
) -> JSONResponse:
    """Every instance, by id, without payloads."""
    chosen = None if network is None else services.reports.network_id(network)
    return await _listed(services.reports.instances(chosen), instance_summary)


@router.post(
    "/instances",
    status_code=201,
    openapi_extra=_takes(InstanceRecord),
)
async def add_instance(request: Request, services: Uses) -> Written:
    """Add an instance; refused when there is one of this id."""
    instance = read_instance(name_networks(await read_json(request), services.reports))
    return await services.records.put_instance(instance, create=True)


@router.get("/instances/{instance}", responses={200: {"model": InstanceView}})
async def show_instance(instance: NamedInstance, services: Uses) -> JSONResponse:
    """One instance, payloads included."""
    return JSONResponse(instance_shape(services.reports.instance(instance)))


@router.put("/instances/{instance}", openapi_extra=_takes(InstanceRecord))
async def put_instance(instance: str, request: Request, services: Uses) -> Written:
    """Add an instance, or replace its whole record."""
    body = refuse_unlike(name_networks(await read_json(request), services.reports), instance)
    return await services.records.put_instance(read_instance(body))


@router.patch("/instances/{instance}", openapi_extra=_takes(InstanceRecord))
async def patch_instance(instance: NamedInstance, request: Request, services: Uses) -> Written:
    """Change some keys of an instance (RFC 7396: null takes a key away, lists are replaced).

    `password: null` forgets the password that its guest posted.
    """
    patch = refuse_unlike(name_networks(await read_json(request), services.reports), instance)
    refuse_unclearable(patch, INSTANCE, PASSWORD)
    clears_password = patch.get(PASSWORD, "") is None
    if clears_password:
        del patch[PASSWORD]
    async with services.records.patching:
        known = services.reports.instance(instance)
        body = merge_patch(render_record(known.instance), patch)
        changed = read_instance(body)
        # A password is no part of the record, which may be another source's.
        unchanged = clears_password and patch.keys() == {"id"}
        written = (
            Written(instances=1) if unchanged else await services.records.put_instance(changed)
        )
        if clears_password:
            await services.guests.clear_password(instance)
        return written


@router.get("/instances/{instance}/password", responses={200: {"model": PasswordBody}})
async def show_password(instance: NamedInstance, services: Uses) -> JSONResponse:
    """The password that its guest posted, as it was posted: encrypted with the instance's key."""
    password = await services.guests.read_password(instance)
    if password is None:
        raise _no_password(instance)
    return JSONResponse({"instance": instance, "password": bytes_shape(password)})


@router.delete("/instances/{instance}/password")
async def clear_password(instance: NamedInstance, services: Uses) -> Written:
    """Forget that password, so that the guest can post another."""
    if not await services.guests.clear_password(instance):
        raise _no_password(instance)
    return Written(instances=1)


@router.delete("/instances/{instance}")
async def remove_instance(instance: NamedInstance, services: Uses) -> Written:
    """Remove an instance."""
    return await services.records.remove_instance(instance)


@router.post("/records", openapi_extra=_takes(RecordsBody))
async def put_records(
    request: Request,
    services: Uses,
    create: Annotated[bool, Query(description="Refuse ids that are there.")] = False,  # noqa: FBT002 - FastAPI passes it by name
) -> Written:
    """Add or replace many networks and instances: all of them, or none.

    A body of type `application/x-ndjson` has a record a line, `{"network": {…}}` or `{"instance": {…}}`, and may be of
    any length. It is answered when all of it is in force, which may take minutes: `/v1/progress` says how far it is.
    """
    if request.headers.get("content-type") == "application/x-ndjson":
        networks, packed = await read_lines(request)
        written = await services.records.put_records(networks, packed.values(), create=create)
    else:
        records = await read_records(await read_json(request))
        written = await services.records.put_records(
            [network for _, network in records.networks],
            [instance for _, instance in records.instances],
            create=create,
        )
    return written


def _no_password(instance: InstanceId) -> NotFound:
    return NotFound(
        f"the guest of instance {instance} has posted no password",
        hint="a guest posts it to /openstack/latest/password; Nova keeps those of its own instances",
    )


async def _listed(
    reports: Sequence[_Report], shape: Callable[[_Report], JsonObject]
) -> JSONResponse:
    """A list rendered in a thread: the loop has guests waiting in the resolver."""
    return await asyncio.to_thread(lambda: JSONResponse([shape(report) for report in reports]))
