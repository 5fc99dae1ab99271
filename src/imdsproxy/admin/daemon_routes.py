"""`/v1/status` and the rest that is about the daemon and its guests, not about records."""

from __future__ import annotations

import os
from ipaddress import ip_address
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, PlainTextResponse

from imdsproxy.admin.bodies import DocumentBody
from imdsproxy.admin.dependencies import NamedInstance, NamedNetwork, Ops, answers
from imdsproxy.admin.operations import Explanation, TokenReport, WatchReport
from imdsproxy.admin.reports import StatusReport
from imdsproxy.admin.shapes import to_json
from imdsproxy.config.change import SettingsReload
from imdsproxy.core.addresses import normalise_address
from imdsproxy.core.model import IpAddress
from imdsproxy.core.progress import Step
from imdsproxy.errors import Problem, RequestRefused

__all__ = ["router"]

router = APIRouter(prefix="/v1")

_Address = Annotated[str, Query(description="The guest's address, as its packets carry it.")]
_Path = Annotated[str | None, Query(description="Also what the policy says to a GET of it.")]
_Probe = Annotated[
    bool, Query(description="Also send a GET of it, as the guest would, and say the status.")
]


class DocumentView(BaseModel):
    """What a guest would be told."""

    status: int
    headers: list[list[str]]
    body: DocumentBody


class StopBody(BaseModel):
    """What is to end."""

    model_config = ConfigDict(extra="forbid", strict=True)

    data_plane: bool = False


class ReloadBody(BaseModel):
    """What may go."""

    model_config = ConfigDict(extra="forbid", strict=True)

    allow_dropped: bool = Field(
        default=False,
        description="Accept that settings files were emptied or removed, and that every policy, or every `deny`, is "
        "missing.",
    )


class Stopping(BaseModel):
    """Said before it happens; `controller` is the pid to wait for."""

    stopping: list[str]
    controller: int


@router.get("/status", responses=answers(StatusReport))
async def show_status(operations: Ops) -> JSONResponse:
    """Everything at one moment."""
    return JSONResponse(to_json(await operations.status()))


@router.get("/progress", responses=answers(list[Step]))
async def show_progress(operations: Ops) -> JSONResponse:
    """What is under way that takes long; whoever waits for an answer may ask meanwhile."""
    return JSONResponse(to_json(operations.progress()))


@router.get("/explain", responses=answers(Explanation))
async def explain(
    network: NamedNetwork,
    address: _Address,
    operations: Ops,
    path: _Path = None,
    probe: _Probe = False,  # noqa: FBT002 - FastAPI passes it by name
) -> JSONResponse:
    """Who has this address in this network, why, from which source, and what it gets."""
    _refuse_relative(path)
    return JSONResponse(to_json(await operations.explain(network, _ip(address), path, probe=probe)))


@router.get("/instances/{instance}/explain", responses=answers(list[Explanation]))
async def explain_instance(
    instance: NamedInstance,
    operations: Ops,
    path: _Path = None,
    probe: _Probe = False,  # noqa: FBT002 - FastAPI passes it by name
) -> JSONResponse:
    """The same of each address that the instance is known by."""
    _refuse_relative(path)
    return JSONResponse(to_json(await operations.explain_instance(instance, path, probe=probe)))


@router.get("/documents", responses=answers(DocumentView))
async def get_document(
    network: NamedNetwork,
    address: _Address,
    path: Annotated[str, Query(description="As the guest would write it, with its query.")],
    operations: Ops,
) -> JSONResponse:
    """What this guest would be told for `GET path`."""
    _refuse_relative(path)
    answer = await operations.get(network, _ip(address), path)
    return JSONResponse(to_json(answer))


@router.get("/watch", responses=answers(WatchReport))
async def watch(
    operations: Ops,
    cursor: Annotated[int | None, Query(description="The one that was told before.")] = None,
    network: Annotated[str | None, Query(description="Only of this network.")] = None,
    instance: Annotated[str | None, Query(description="Only of this instance.")] = None,
) -> JSONResponse:
    """What guests asked for and were answered since `cursor`; HAProxy tells while this is asked every few seconds."""
    told = await operations.watch(
        cursor,
        network=None if network is None else operations.network_id(network),
        instance=None if instance is None else operations.instance_id(instance),
    )
    return JSONResponse(to_json(told))


@router.get("/token-report", responses=answers(TokenReport))
async def token_report(operations: Ops) -> JSONResponse:
    """Guests and clients that still read without session tokens, and what required tokens leave open."""
    return JSONResponse(to_json(await operations.token_report()))


@router.get(
    "/haproxy-configuration",
    response_class=PlainTextResponse,
    responses=answers(None) | {200: {"content": {"text/plain": {}}}},
)
async def render(operations: Ops) -> PlainTextResponse:
    """HAProxy's configuration as it would be written now; nothing is touched."""
    return PlainTextResponse(await operations.render())


@router.post("/reload", responses=answers(SettingsReload))
async def reload(operations: Ops, body: ReloadBody | None = None) -> JSONResponse:
    """Read the settings again and take over what can be; a broken or emptied file changes nothing."""
    allow_dropped = body is not None and body.allow_dropped
    return JSONResponse(to_json(await operations.reload(allow_dropped=allow_dropped)))


@router.post("/stop", status_code=202, responses=answers(Stopping, status=202))
async def stop(body: StopBody, operations: Ops) -> JSONResponse:
    """End the controller, or with `data_plane` HAProxy and the document server too."""
    await operations.stop(data_plane=body.data_plane)
    ending = ["controller", *(["haproxy", "documents"] if body.data_plane else [])]
    return JSONResponse({"stopping": ending, "controller": os.getpid()}, 202)


def _ip(text: str) -> IpAddress:
    try:
        return normalise_address(ip_address(text))
    except ValueError as error:
        raise _refused("address", f"{text} is no IP address", "10.0.0.5 or 2001:db8::5") from error


def _refuse_relative(path: str | None) -> None:
    if path is not None and not path.startswith("/"):
        raise _refused("path", f"{path} does not begin with /", "/latest/meta-data/")


def _refused(field: str, reason: str, hint: str) -> RequestRefused:
    return RequestRefused(reason, problems=[Problem(field, reason, hint=hint)])
