"""Routes below `/v1`: read and check records, then call the controller's parts."""

import os
from functools import partial
from typing import Annotated, TypeAlias, cast

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from imdsproxy.api import bodies, guests, records, search, status, tokens, usage
from imdsproxy.api.answers import Written
from imdsproxy.config.changes import SettingsReload
from imdsproxy.controller.controller import Controller
from imdsproxy.controller.reload import reload_settings
from imdsproxy.controller.token_report import InstanceTokens, TokenReport
from imdsproxy.errors import NotFound, Problem, RequestRefused
from imdsproxy.haproxy.rules.limits import Usage
from imdsproxy.haproxy.rules.request_log import WatchReport
from imdsproxy.host.turns import in_turns
from imdsproxy.model import matching
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.packed import PackedInstances
from imdsproxy.model.records import INSTANCE, NETWORK, parse_instance, render_record
from imdsproxy.reconcile.progress import Step

router = APIRouter()


async def _controller(request: Request) -> Controller:
    return cast("Controller", request.app.state.controller)


_Uses: TypeAlias = Annotated[Controller, Depends(_controller)]


async def _network_id(network: bodies.Named, controller: _Uses) -> NetworkId:
    return records.find_network(controller.inventory, network)


async def _instance_id(instance: bodies.Named, controller: _Uses) -> InstanceId:
    return records.find_instance(controller.inventory, instance)


async def _instance_body(request: Request, controller: _Uses) -> object:
    find = partial(records.find_network, controller.inventory)
    return bodies.name_networks(await bodies.read_json(request), find)


_InstanceBody: TypeAlias = Annotated[object, Depends(_instance_body)]
_Network: TypeAlias = Annotated[NetworkId, Depends(_network_id)]
_Instance: TypeAlias = Annotated[InstanceId, Depends(_instance_id)]
_Address = Annotated[str, Query(description="The guest's address, as its packets carry it.")]
_Path = Annotated[str | None, Query(description="Also what the policy says to a GET of it.")]
_Probe = Annotated[
    bool, Query(description="Also send a GET of it, as the guest would, and say the status.")
]


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StopBody(_Order):
    """Option to stop the data plane too."""

    data_plane: bool = False


class ReloadBody(_Order):
    """Losses of settings that the operator accepts."""

    allow_dropped: bool = Field(
        default=False,
        description="Accept that settings files were emptied or removed, and that every policy, or every `deny`, is "
        "missing.",
    )


class ReleaseBody(_Order):
    """Networks in which another process shall listen."""

    networks: list[str]


class Stopping(BaseModel):
    """Processes that will stop; the answer is sent first. `controller` is the pid to wait for."""

    stopping: list[str]
    controller: int


@router.get("/status")
async def show_status(controller: _Uses) -> status.StatusReport:
    """Show the state of the daemon at one moment."""
    return await status.report_status(controller)


@router.get("/progress")
async def show_progress(controller: _Uses) -> list[Step]:
    """List long work in progress, for a client that waits for its answer."""
    return list(controller.records.progress.steps)


@router.get("/explain")
async def explain(
    network: _Network,
    address: _Address,
    controller: _Uses,
    path: _Path = None,
    probe: _Probe = False,  # noqa: FBT002 - FastAPI passes it by name
) -> guests.Explanation:
    """Show which instance owns this address in this network, why, by which source, and with which answer."""
    _refuse_relative(path)
    return await guests.explain(
        controller, (network, bodies.read_address(address)), path, probe=probe
    )


@router.get("/instances/{instance}/explain")
async def explain_instance(
    instance: _Instance,
    controller: _Uses,
    path: _Path = None,
    probe: _Probe = False,  # noqa: FBT002 - FastAPI passes it by name
) -> list[guests.Explanation]:
    """Explain each address of the instance."""
    _refuse_relative(path)
    known = guests.list_addresses(controller, instance)
    return [await guests.explain(controller, key, path, probe=probe) for key in known]


@router.get("/documents", response_model_exclude_unset=True)
async def get_document(
    network: _Network,
    address: _Address,
    path: Annotated[str, Query(description="As the guest would write it, with its query.")],
    controller: _Uses,
    instance: Annotated[
        str | None, Query(description="Refuse unless the address is this instance's.")
    ] = None,
) -> bodies.DocumentView:
    """Show the answer that the guest at this address gets to `GET path`."""
    _refuse_relative(path)
    owner = None if instance is None else InstanceId(instance)
    return await guests.get_document(
        controller, (network, bodies.read_address(address)), path, owner
    )


@router.get("/watch")
async def watch(
    controller: _Uses,
    cursor: Annotated[int | None, Query(description="The one of the answer before.")] = None,
    network: Annotated[str | None, Query(description="Only of this network.")] = None,
    instance: Annotated[str | None, Query(description="Only of this instance.")] = None,
) -> WatchReport:
    """Show guests' requests and answers since `cursor`. HAProxy reports them while a client polls every few seconds."""
    inventory = controller.inventory
    of_network = None if network is None else records.find_network(inventory, network)
    of_instance = None if instance is None else records.find_instance(inventory, instance)
    return await controller.watching.read(cursor, network=of_network, instance=of_instance)


@router.get("/token-report")
async def token_report(
    controller: _Uses,
    days: Annotated[
        int, Query(ge=1, le=7, description="For so long no guest may have read without one.")
    ] = 7,
    network: Annotated[str | None, Query(description="A verdict on this network alone.")] = None,
    project: Annotated[str | None, Query(description="A verdict on this project alone.")] = None,
) -> TokenReport:
    """Show which guests still read without session tokens, what requiring them leaves open, and the advice."""
    inventory, scope = controller.inventory, None
    if network is not None:
        scope = ("network", str(records.find_network(inventory, network)))
    elif project is not None:
        scope = ("project", project)
    policies = controller.records.policies
    return await controller.counting.report_tokens(inventory, policies, days, scope)


@router.get("/haproxy-configuration", response_class=PlainTextResponse)
async def render(controller: _Uses) -> str:
    """Render HAProxy's configuration as it would be written now, without writing it."""
    return controller.listeners.render()


@router.post("/reload")
async def reload(controller: _Uses, body: ReloadBody | None = None) -> SettingsReload:
    """Reload the settings and apply all that need no restart. A broken or emptied file is refused."""
    return await reload_settings(controller, allow_dropped=body is not None and body.allow_dropped)


@router.post("/release")
async def release_networks(body: ReleaseBody, controller: _Uses) -> ReleaseBody:
    """Stop listening in these networks until the controller restarts; open connections are answered."""
    found = [records.find_network(controller.inventory, one) for one in body.networks]
    await controller.listeners.release_networks(found)
    return body


@router.post("/stop", status_code=202)
async def stop(body: StopBody, controller: _Uses) -> Stopping:
    """Stop the controller; with `data_plane` stop HAProxy and the document server too."""
    controller.end(data_plane=body.data_plane)
    ending = ["controller", *(["haproxy", "documents"] if body.data_plane else [])]
    return Stopping(stopping=ending, controller=os.getpid())


@router.post("/instances/{instance}/revoke-tokens")
async def revoke_tokens(instance: _Instance, controller: _Uses) -> tokens.OverrideChange:
    """Revoke the instance's tokens; tokens issued later are valid."""
    return await tokens.revoke_tokens(controller, instance)


@router.post("/instances/{instance}/reopen")
async def reopen_instance(instance: _Instance, controller: _Uses) -> tokens.OverrideChange:
    """Begin the instance's boot again: access that ends with the boot is open until the new boot is over."""
    return await tokens.reopen_boot(controller, instance)


@router.post("/token-keys/rotate")
async def rotate_token_keys(controller: _Uses) -> tokens.KeyRotation:
    """Sign session tokens with a new key; existing tokens stay valid until they expire."""
    return await tokens.rotate_keys(controller)


@router.get("/networks", responses={200: {"model": list[bodies.NetworkView]}})
async def list_networks(controller: _Uses) -> StreamingResponse:
    """List networks by id."""
    return bodies.stream_list(in_turns(records.report_networks(controller)))


@router.post("/networks", status_code=201, openapi_extra=bodies.takes(bodies.NetworkRecord))
async def add_network(body: bodies.JsonBody, controller: _Uses) -> Written:
    """Add a network; refused if the id exists."""
    return await records.put_records(controller, [bodies.read_network(body)], [], create=True)


@router.get("/networks/{network}", responses={200: {"model": bodies.NetworkView}})
async def show_network(network: _Network, controller: _Uses) -> JSONResponse:
    """Show a network."""
    return bodies.RecordResponse(records.report_network(controller, network))


@router.put("/networks/{network}", openapi_extra=bodies.takes(bodies.NetworkRecord))
async def put_network(network: str, body: bodies.JsonBody, controller: _Uses) -> Written:
    """Add a network, or replace its whole record."""
    record = bodies.read_network(bodies.refuse_unlike(body, network))
    return await records.put_records(controller, [record], [])


@router.patch("/networks/{network}", openapi_extra=bodies.takes(bodies.NetworkRecord))
async def patch_network(network: _Network, body: bodies.JsonBody, controller: _Uses) -> Written:
    """Change some keys of a network (RFC 7396: null removes a key)."""
    patch = bodies.read_patch(body, network, NETWORK)
    async with controller.patching:
        known = render_record(records.report_network(controller, network)["record"])
        changed = bodies.read_network(bodies.merge_patch(known, patch))
        return await records.put_records(controller, [changed], [])


@router.delete("/networks/{network}")
async def remove_network(network: _Network, controller: _Uses) -> Written:
    """Remove a network; refused while instances have ports in it."""
    return await records.remove_network(controller, network)


@router.get("/instances", responses={200: {"model": list[bodies.InstanceSummary]}})
async def list_instances(
    controller: _Uses,
    text: bodies.SearchText = "",
    network: bodies.InNetwork = None,
    project: bodies.OfProject = None,
) -> StreamingResponse:
    """List matching instances by id, without payloads; each instance as it is when it is sent."""
    inventory = controller.inventory
    chosen = None if network is None else records.find_network(inventory, network)
    found = await search.find_instances(inventory, text, chosen, project)
    return bodies.stream_list(in_turns(records.report_instances(controller, found)))


@router.get("/search/instances", responses={200: {"model": bodies.InstancePage}})
async def search_instances(
    controller: _Uses,
    text: bodies.SearchText = "",
    network: bodies.InNetwork = None,
    after: bodies.AfterPage = None,
    limit: bodies.PageSize = 50,
) -> JSONResponse:
    """List matching instances by id, page by page, without payloads."""
    inventory = controller.inventory
    chosen = None if network is None else records.find_network(inventory, network)
    found = await search.find_instances(inventory, text, chosen)
    page = matching.cut_page(found, after, limit)
    shown = [one async for one in in_turns(records.report_instances(controller, page.ids))]
    return bodies.RecordResponse({"found": len(found), "instances": shown, "next": page.next})


@router.post("/instances", status_code=201, openapi_extra=bodies.takes(bodies.InstanceRecord))
async def add_instance(body: _InstanceBody, controller: _Uses) -> Written:
    """Add an instance; refused if the id exists."""
    return await records.put_records(controller, [], [_read_instance(body)], create=True)


@router.get("/instances/{instance}", responses={200: {"model": bodies.InstanceView}})
async def show_instance(instance: _Instance, controller: _Uses) -> JSONResponse:
    """Show an instance with its payloads."""
    return bodies.RecordResponse(records.report_instance(controller, instance))


@router.put("/instances/{instance}", openapi_extra=bodies.takes(bodies.InstanceRecord))
async def put_instance(instance: str, body: _InstanceBody, controller: _Uses) -> Written:
    """Add an instance, or replace its whole record."""
    record = _read_instance(bodies.refuse_unlike(body, instance))
    return await records.put_records(controller, [], [record])


@router.patch("/instances/{instance}", openapi_extra=bodies.takes(bodies.InstanceRecord))
async def patch_instance(instance: _Instance, body: _InstanceBody, controller: _Uses) -> Written:
    """Change some keys of an instance (RFC 7396: null removes a key, lists are replaced).

    `password: null` forgets the password that the guest posted.
    """
    patch = bodies.read_patch(body, instance, INSTANCE, bodies.PASSWORD)
    clears_password = patch.get(bodies.PASSWORD, "") is None
    if clears_password:
        del patch[bodies.PASSWORD]
    async with controller.patching:
        known = render_record(records.report_instance(controller, instance)["record"])
        changed = _read_instance(bodies.merge_patch(known, patch))
        # A password is not part of the record, which may belong to another source.
        written = Written(instances=1)
        if not (clears_password and patch.keys() == {"id"}):
            written = await records.put_records(controller, [], [changed])
        if clears_password:
            await guests.clear_password(controller, instance)
        return written


@router.get("/instances/{instance}/password", response_model_exclude_unset=True)
async def show_password(instance: _Instance, controller: _Uses) -> bodies.PasswordBody:
    """Show the password as the guest posted it: encrypted with the instance's key."""
    password = await guests.read_password(controller, instance)
    if password is None:
        raise _no_password(instance)
    return bodies.PasswordBody(instance=instance, password=bodies.DocumentBody.of(password))


@router.delete("/instances/{instance}/password")
async def clear_password(instance: _Instance, controller: _Uses) -> Written:
    """Forget the posted password, so that the guest can post another."""
    if not await guests.clear_password(controller, instance):
        raise _no_password(instance)
    return Written(instances=1)


@router.get("/instances/{instance}/tokens")
async def show_tokens(instance: _Instance, controller: _Uses) -> InstanceTokens:
    """Show how the instance reads without session tokens, and whether tokens can be required."""
    policies = controller.records.policies
    return await controller.counting.report_instance(controller.inventory, policies, instance)


@router.get("/instances/{instance}/usage")
async def show_usage(instance: _Instance, controller: _Uses) -> Usage | None:
    """Show the instance's requests and limits; null if limits are disabled or HAProxy does not answer."""
    return await usage.report_usage(controller, instance)


@router.delete("/instances/{instance}")
async def remove_instance(instance: _Instance, controller: _Uses) -> Written:
    """Remove an instance."""
    return await records.remove_instance(controller, instance)


@router.post("/records", openapi_extra=bodies.takes(bodies.RecordsBody))
async def put_records(
    request: Request,
    controller: _Uses,
    create: bodies.Creates = False,  # noqa: FBT002 - FastAPI passes it by name
) -> Written:
    """Add or replace many networks and instances: all or none.

    A body of type `application/x-ndjson` has one record a line, `{"network": {…}}` or `{"instance": {…}}`, and may be
    of any length. The answer comes when all records are in force, which may take minutes: `/v1/progress` shows the
    progress.
    """
    networks, instances = await bodies.read_records(request, PackedInstances())
    return await records.put_records(controller, networks, instances, create=create, bulk=True)


_read_instance = partial(bodies.read_record, "instance", parse_instance)


def _no_password(instance: InstanceId) -> NotFound:
    return NotFound(
        f"the guest of instance {instance} has posted no password",
        hint="a guest posts it to /openstack/latest/password; Nova keeps those of its own instances",
    )


def _refuse_relative(path: str | None) -> None:
    if path is not None and not path.startswith("/"):
        problem = Problem("path", f"{path} does not begin with /", hint="/latest/meta-data/")
        raise RequestRefused(problem.reason, problems=[problem])
