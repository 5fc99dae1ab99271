"""`/v1/status` and the rest that is about the daemon and its guests, not about records."""

from __future__ import annotations

import os
from ipaddress import ip_address
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, PlainTextResponse

from imdsproxy.admin.bodies import DocumentBody
from imdsproxy.admin.dependencies import NamedInstance, NamedNetwork, Uses
from imdsproxy.admin.refusals import ERRORS
from imdsproxy.admin.reports import Explanation, StatusReport
from imdsproxy.admin.shapes import document_shape
from imdsproxy.admin.tokens import GuardChange, KeyRotation
from imdsproxy.config.change import SettingsReload
from imdsproxy.core.addresses import normalise_address
from imdsproxy.core.haproxy.watching import WatchReport
from imdsproxy.core.model import IpAddress
from imdsproxy.core.progress import Step
from imdsproxy.core.token_report import TokenReport
from imdsproxy.errors import Problem, RequestRefused

router = APIRouter(prefix="/v1", responses=ERRORS)

_Address = Annotated[str, Query(description="The guest's address, as its packets carry it.")]
_Path = Annotated[str | None, Query(description="Also what the policy says to a GET of it.")]
_Probe = Annotated[
    bool, Query(description="Also send a GET of it, as the guest would, and say the status.")
]


class DocumentView(BaseModel):
    """The answer that a guest gets."""

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
    """Sent before it happens; `controller` is the pid to wait for."""

    stopping: list[str]
    controller: int


@router.get("/status")
async def show_status(services: Uses) -> StatusReport:
    """Everything at one moment."""
    return await services.status()


@router.get("/progress")
async def show_progress(services: Uses) -> list[Step]:
    """Long work that is under way; for a client that waits for its answer."""
    return list(services.progress.steps)


@router.get("/explain")
async def explain(
    network: NamedNetwork,
    address: _Address,
    services: Uses,
    path: _Path = None,
    probe: _Probe = False,  # noqa: FBT002 - FastAPI passes it by name
) -> Explanation:
    """Who has this address in this network, why, from which source, and what it gets."""
    _refuse_relative(path)
    return await services.guests.explain(network, _ip(address), path, probe=probe)


@router.get("/instances/{instance}/explain")
async def explain_instance(
    instance: NamedInstance,
    services: Uses,
    path: _Path = None,
    probe: _Probe = False,  # noqa: FBT002 - FastAPI passes it by name
) -> list[Explanation]:
    """The same of each address that the instance is known by."""
    _refuse_relative(path)
    return await services.guests.explain_instance(instance, path, probe=probe)


@router.get("/documents", responses={200: {"model": DocumentView}})
async def get_document(
    network: NamedNetwork,
    address: _Address,
    path: Annotated[str, Query(description="As the guest would write it, with its query.")],
    services: Uses,
) -> JSONResponse:
    """The answer that this guest gets to `GET path`."""
    _refuse_relative(path)
    return JSONResponse(document_shape(await services.guests.get(network, _ip(address), path)))


@router.get("/watch")
async def watch(
    services: Uses,
    cursor: Annotated[int | None, Query(description="The one of the answer before.")] = None,
    network: Annotated[str | None, Query(description="Only of this network.")] = None,
    instance: Annotated[str | None, Query(description="Only of this instance.")] = None,
) -> WatchReport:
    """What guests asked for and were answered since `cursor`; HAProxy tells while this is asked every few seconds."""
    return await services.watching.read(
        cursor,
        network=None if network is None else services.reports.network_id(network),
        instance=None if instance is None else services.reports.instance_id(instance),
    )


@router.get("/token-report")
async def token_report(services: Uses) -> TokenReport:
    """Guests and clients that still read without session tokens, and what required tokens leave open."""
    return await services.token_report()


@router.get("/haproxy-configuration", response_class=PlainTextResponse)
async def render(services: Uses) -> str:
    """HAProxy's configuration as it would be written now; nothing is touched."""
    return services.render()


@router.post("/reload")
async def reload(services: Uses, body: ReloadBody | None = None) -> SettingsReload:
    """Read the settings again and take over what can be; a broken or emptied file changes nothing."""
    return await services.reload(body is not None and body.allow_dropped)


@router.post("/stop", status_code=202)
async def stop(body: StopBody, services: Uses) -> Stopping:
    """End the controller, or with `data_plane` HAProxy and the document server too."""
    services.end(body.data_plane)
    ending = ["controller", *(["haproxy", "documents"] if body.data_plane else [])]
    return Stopping(stopping=ending, controller=os.getpid())


@router.post("/instances/{instance}/revoke-tokens")
async def revoke_tokens(instance: NamedInstance, services: Uses) -> GuardChange:
    """Revoke the instance's tokens; new ones are valid."""
    return await services.tokens.revoke(instance)


@router.post("/instances/{instance}/reopen")
async def reopen_instance(instance: NamedInstance, services: Uses) -> GuardChange:
    """Let the instance's boot begin now: what is locked after the boot is open until that is over again."""
    return await services.tokens.reopen(instance)


@router.post("/token-keys/rotate")
async def rotate_token_keys(services: Uses) -> KeyRotation:
    """Let a new key sign session tokens; existing tokens stay valid until they expire."""
    return await services.tokens.rotate()


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
