"""`/v1/networks`, `/v1/instances` and `/v1/records`: read and change what is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request
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
from imdsproxy.admin.dependencies import (
    NamedInstance,
    NamedNetwork,
    Ops,
    Patching,
    answers,
    takes,
)
from imdsproxy.admin.operations import Written
from imdsproxy.admin.shapes import (
    JsonObject,
    instance_shape,
    instance_summary,
    network_shape,
    to_json,
)
from imdsproxy.core.model import InstanceId
from imdsproxy.core.records import render_record
from imdsproxy.errors import NotFound

__all__ = ["router"]

_Report = TypeVar("_Report")

router = APIRouter(prefix="/v1")


@router.get("/networks", responses=answers(list[NetworkView]))
async def list_networks(operations: Ops) -> JSONResponse:
    """Every network, by id."""
    return await _listed(await operations.list_networks(), network_shape)


@router.post(
    "/networks",
    status_code=201,
    responses=answers(Written, status=201),
    openapi_extra=takes(NetworkRecord),
)
async def add_network(request: Request, operations: Ops) -> JSONResponse:
    """Add a network; refused when there is one of this id."""
    network = read_network(await read_json(request))
    return JSONResponse(to_json(await operations.put_network(network, create=True)), 201)


@router.get("/networks/{network}", responses=answers(NetworkView))
async def show_network(network: NamedNetwork, operations: Ops) -> JSONResponse:
    """One network."""
    return JSONResponse(network_shape(await operations.get_network(network)))


@router.put("/networks/{network}", responses=answers(Written), openapi_extra=takes(NetworkRecord))
async def put_network(network: str, request: Request, operations: Ops) -> JSONResponse:
    """Add a network, or replace its whole record."""
    body = refuse_unlike(await read_json(request), network)
    return JSONResponse(to_json(await operations.put_network(read_network(body))))


@router.patch("/networks/{network}", responses=answers(Written), openapi_extra=takes(NetworkRecord))
async def patch_network(
    network: NamedNetwork, request: Request, operations: Ops, patching: Patching
) -> JSONResponse:
    """Change some keys of a network (RFC 7396: null takes a key away)."""
    patch = refuse_unlike(await read_json(request), network)
    refuse_unclearable(patch, NetworkRecord)
    async with patching:
        known = await operations.get_network(network)
        body = merge_patch(render_record(known.network), patch)
        return JSONResponse(to_json(await operations.put_network(read_network(body))))


@router.delete("/networks/{network}", responses=answers(Written))
async def remove_network(network: NamedNetwork, operations: Ops) -> JSONResponse:
    """Remove a network; refused while instances have ports in it."""
    return JSONResponse(to_json(await operations.remove_network(network)))


@router.get("/instances", responses=answers(list[InstanceSummary]))
async def list_instances(
    operations: Ops,
    network: Annotated[str | None, Query(description="Only those with a port in it.")] = None,
) -> JSONResponse:
    """Every instance, by id, without payloads."""
    chosen = None if network is None else operations.network_id(network)
    return await _listed(await operations.list_instances(chosen), instance_summary)


@router.post(
    "/instances",
    status_code=201,
    responses=answers(Written, status=201),
    openapi_extra=takes(InstanceRecord),
)
async def add_instance(request: Request, operations: Ops) -> JSONResponse:
    """Add an instance; refused when there is one of this id."""
    instance = read_instance(name_networks(await read_json(request), operations))
    return JSONResponse(to_json(await operations.put_instance(instance, create=True)), 201)


@router.get("/instances/{instance}", responses=answers(InstanceView))
async def show_instance(instance: NamedInstance, operations: Ops) -> JSONResponse:
    """One instance, payloads included."""
    return JSONResponse(instance_shape(await operations.get_instance(instance)))


@router.put(
    "/instances/{instance}", responses=answers(Written), openapi_extra=takes(InstanceRecord)
)
async def put_instance(instance: str, request: Request, operations: Ops) -> JSONResponse:
    """Add an instance, or replace its whole record."""
    body = refuse_unlike(name_networks(await read_json(request), operations), instance)
    return JSONResponse(to_json(await operations.put_instance(read_instance(body))))


@router.patch(
    "/instances/{instance}", responses=answers(Written), openapi_extra=takes(InstanceRecord)
)
async def patch_instance(
    instance: NamedInstance, request: Request, operations: Ops, patching: Patching
) -> JSONResponse:
    """Change some keys of an instance (RFC 7396: null takes a key away, lists are replaced).

    `password: null` forgets the password that its guest posted.
    """
    patch = refuse_unlike(name_networks(await read_json(request), operations), instance)
    refuse_unclearable(patch, InstanceRecord, PASSWORD)
    clears_password = patch.get(PASSWORD, "") is None
    if clears_password:
        del patch[PASSWORD]
    async with patching:
        known = await operations.get_instance(instance)
        body = merge_patch(render_record(known.instance), patch)
        changed = read_instance(body)
        # A password is no part of the record, which may be another source's.
        unchanged = clears_password and patch.keys() == {"id"}
        written = Written(instances=1) if unchanged else await operations.put_instance(changed)
        if clears_password:
            await operations.clear_password(instance)
        return JSONResponse(to_json(written))


@router.get("/instances/{instance}/password", responses=answers(PasswordBody))
async def show_password(instance: NamedInstance, operations: Ops) -> JSONResponse:
    """The password that its guest posted, as it was posted: encrypted with the instance's key."""
    password = await operations.read_password(instance)
    if password is None:
        raise _no_password(instance)
    return JSONResponse({"instance": instance, "password": to_json(password)})


@router.delete("/instances/{instance}/password", responses=answers(Written))
async def clear_password(instance: NamedInstance, operations: Ops) -> JSONResponse:
    """Forget that password, so that the guest can post another."""
    if not await operations.clear_password(instance):
        raise _no_password(instance)
    return JSONResponse(to_json(Written(instances=1)))


@router.delete("/instances/{instance}", responses=answers(Written))
async def remove_instance(instance: NamedInstance, operations: Ops) -> JSONResponse:
    """Remove an instance."""
    return JSONResponse(to_json(await operations.remove_instance(instance)))


@router.post("/records", responses=answers(Written), openapi_extra=takes(RecordsBody))
async def put_records(
    request: Request,
    operations: Ops,
    create: Annotated[bool, Query(description="Refuse ids that are there.")] = False,  # noqa: FBT002 - FastAPI passes it by name
) -> JSONResponse:
    """Add or replace many networks and instances: all of them, or none.

    A body of type `application/x-ndjson` has a record a line, `{"network": {…}}` or `{"instance": {…}}`, and may be of
    any length. It is answered when all of it is in force, which may take minutes: `/v1/progress` says how far it is.
    """
    if request.headers.get("content-type") == "application/x-ndjson":
        networks, packed = await read_lines(request)
        written = await operations.put_records(networks, packed.values(), create=create)
    else:
        records = await read_records(await read_json(request))
        written = await operations.put_records(
            [network for _, network in records.networks],
            [instance for _, instance in records.instances],
            create=create,
        )
    return JSONResponse(to_json(written))


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
