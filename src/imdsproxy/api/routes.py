"""Routes below `/v1`: read and check records, then call the controller's parts."""

import os
from typing import Annotated, TypeAlias, cast

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, StreamingResponse

from imdsproxy.api import (
    bodies,
    guests,
    identity,
    identity_check,
    identity_uses,
    status,
    tokens,
)
from imdsproxy.api.answers import Written
from imdsproxy.api.host_records import HostRecords
from imdsproxy.api.record_routes import InstanceOf, NetworkOf, RecordApi, add_record_routes
from imdsproxy.api.records import report_usage
from imdsproxy.config.changes import SettingsReload
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.reload import reload_settings
from imdsproxy.controller.token_report import InstanceTokens, TokenReport
from imdsproxy.errors import Problem, RequestRefused
from imdsproxy.haproxy.rules.limits import Usage
from imdsproxy.haproxy.rules.request_log import WatchReport
from imdsproxy.issuer.check import Chain
from imdsproxy.issuer.rotation import IssuerKeys
from imdsproxy.model.entities import InstanceId, NetworkId


async def _parts(request: Request) -> Parts:
    return cast("Parts", request.app.state.parts)


_Uses: TypeAlias = Annotated[Parts, Depends(_parts)]


async def open_store(request: Request, parts: _Uses) -> HostRecords:
    """Open the host's records for routes of `record_routes`."""
    store = HostRecords(parts)
    request.state.store = store
    return store


_Store: TypeAlias = Annotated[HostRecords, Depends(open_store)]

router = APIRouter(dependencies=[Depends(open_store)])

_Address = Annotated[str, Query(description="The guest's address, as its packets carry it.")]
_Path = Annotated[
    str | None,
    Query(
        description="Also show the policy's decision on a GET of this path, or on the request for identity there."
    ),
]
_Probe = Annotated[
    bool, Query(description="Also send a GET of the path as the guest would, and show the status.")
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
async def show_status(parts: _Uses) -> status.StatusReport:
    """Show the state of the daemon at one moment."""
    return await status.report_status(parts)


@router.get("/explain")
async def explain(
    network: NetworkOf,
    address: _Address,
    parts: _Uses,
    path: _Path = None,
    probe: _Probe = False,  # noqa: FBT002 - FastAPI passes it by name
) -> guests.Explanation:
    """Show which instance owns this address in this network, why, by which source, and with which answer."""
    _refuse_relative(path)
    return await guests.explain(parts, (network, bodies.read_address(address)), path, probe=probe)


@router.get("/instances/{instance}/explain")
async def explain_instance(
    instance: InstanceOf,
    parts: _Uses,
    path: _Path = None,
    probe: _Probe = False,  # noqa: FBT002 - FastAPI passes it by name
) -> list[guests.Explanation]:
    """Explain each address of the instance."""
    _refuse_relative(path)
    known = guests.list_addresses(parts, instance)
    return [await guests.explain(parts, key, path, probe=probe) for key in known]


@router.get("/instances/{instance}/identity-check")
async def check_identity(
    instance: InstanceOf,
    audience: Annotated[str, Query(description="Audience of the token that is tried.")],
    parts: _Uses,
    network: Annotated[
        str | None, Query(description="The network by which the instance asks.")
    ] = None,
) -> Chain:
    """Check each link between the instance and a verifier of its identity tokens, until one fails."""
    asked = None if network is None else NetworkId(network)
    return await identity_check.check_identity(parts, InstanceId(instance), audience, asked)


@router.get("/instances/{instance}/identity")
async def show_identity(instance: InstanceOf, parts: _Uses) -> identity_uses.IdentityUses:
    """Show which identity tokens the instance may request, and the last answer for each audience, without any token."""
    return await identity_uses.report_uses(parts, instance)


@router.get("/documents", response_model_exclude_unset=True)
async def get_document(
    network: NetworkOf,
    address: _Address,
    path: Annotated[str, Query(description="The path as the guest writes it, with its query.")],
    parts: _Uses,
    instance: Annotated[
        str | None, Query(description="Refuse unless this instance has the address.")
    ] = None,
) -> bodies.DocumentView:
    """Show the answer that the guest at this address gets to `GET path`."""
    _refuse_relative(path)
    owner = None if instance is None else InstanceId(instance)
    return await guests.get_document(parts, (network, bodies.read_address(address)), path, owner)


@router.get("/watch")
async def watch(
    store: _Store,
    cursor: Annotated[int | None, Query(description="`cursor` of the previous answer.")] = None,
    network: Annotated[str | None, Query(description="Only requests in this network.")] = None,
    instance: Annotated[str | None, Query(description="Only requests of this instance.")] = None,
) -> WatchReport:
    """Show guests' requests and answers since `cursor`. HAProxy reports them while a client polls every few seconds."""
    of_network = None if network is None else store.find_network(network)
    of_instance = None if instance is None else store.find_instance(instance)
    return await store.parts.watching.read(cursor, network=of_network, instance=of_instance)


@router.get("/token-report")
async def token_report(
    store: _Store,
    days: Annotated[
        int, Query(ge=1, le=7, description="Days in which no guest may have read without a token.")
    ] = 7,
    network: Annotated[str | None, Query(description="A verdict on this network alone.")] = None,
    project: Annotated[str | None, Query(description="A verdict on this project alone.")] = None,
) -> TokenReport:
    """Show which guests still read without session tokens, what requiring them leaves open, and the advice."""
    parts, scope = store.parts, None
    if network is not None:
        scope = ("network", str(store.find_network(network)))
    elif project is not None:
        scope = ("project", project)
    policies = parts.records.policies
    return await parts.counting.report_tokens(parts.inventory, policies, days, scope)


@router.get("/haproxy-configuration", response_class=PlainTextResponse)
async def render(parts: _Uses) -> str:
    """Render HAProxy's configuration as it would be written now, without writing it."""
    return parts.listeners.render()


@router.post("/reload")
async def reload(parts: _Uses, body: ReloadBody | None = None) -> SettingsReload:
    """Reload the settings and apply all that need no restart. A broken or emptied file is refused."""
    return await reload_settings(parts, allow_dropped=body is not None and body.allow_dropped)


@router.post("/release")
async def release_networks(body: ReleaseBody, store: _Store) -> ReleaseBody:
    """Stop listening in these networks until the controller restarts; open connections are answered."""
    networks = [store.find_network(one) for one in body.networks]
    await store.parts.listeners.release_networks(networks)
    return body


@router.post("/stop", status_code=202)
async def stop(body: StopBody, parts: _Uses) -> Stopping:
    """Stop the controller; with `data_plane` stop HAProxy and the document server too."""
    parts.ending.request(data_plane=body.data_plane)
    ending = ["controller", *(["haproxy", "documents"] if body.data_plane else [])]
    return Stopping(stopping=ending, controller=os.getpid())


@router.post("/token-keys/rotate")
async def rotate_token_keys(parts: _Uses) -> tokens.KeyRotation:
    """Sign session tokens with a new key; existing tokens stay valid until they expire."""
    return await tokens.rotate_keys(parts)


@router.get("/identity/keys")
async def list_issuer_keys(parts: _Uses) -> IssuerKeys:
    """List the keys of the issuer of identity tokens, the signing key first."""
    return await identity.list_keys(parts)


@router.post("/identity/rotate")
async def rotate_issuer_keys(body: bodies.RotateBody, parts: _Uses) -> IssuerKeys:
    """Publish the next key of the issuer, which signs later; with `compromised` replace all keys at once."""
    return await identity.rotate_keys(parts, compromised=body.compromised)


async def list_instances(
    store: _Store,
    text: bodies.SearchText = "",
    network: bodies.InNetwork = None,
    project: bodies.OfProject = None,
) -> StreamingResponse:
    """List matching instances by id, without payloads; each instance as it is when it is sent."""
    chosen = None if network is None else store.find_network(network)
    ids = await store.match_instances(text, chosen, project)
    return bodies.stream_list(store.report_instances(ids))


add_record_routes(
    router,
    RecordApi(
        list_instances=list_instances,
        instance=bodies.InstanceRecord,
        written=Written,
        many=Written,
        override=tokens.OverrideChange,
    ),
)


@router.get("/instances/{instance}/tokens")
async def show_tokens(instance: InstanceOf, parts: _Uses) -> InstanceTokens:
    """Show how the instance reads without session tokens, and whether tokens can be required."""
    policies = parts.records.policies
    return await parts.counting.report_instance(parts.inventory, policies, instance)


@router.get("/instances/{instance}/usage")
async def show_usage(instance: InstanceOf, parts: _Uses) -> Usage | None:
    """Show the instance's requests and limits; null if limits are disabled or HAProxy does not answer."""
    return await report_usage(parts, instance)


def _refuse_relative(path: str | None) -> None:
    if path is not None and not path.startswith("/"):
        problem = Problem("path", f"{path} does not begin with /", hint="/latest/meta-data/")
        raise RequestRefused(problem.reason, problems=[problem])
