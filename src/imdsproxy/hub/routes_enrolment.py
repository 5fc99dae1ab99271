"""The routes by which hosts come into a fleet and out of it: for hosts to enrol and renew, for operators the rest."""

from typing import Annotated, TypeAlias, cast

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.identity import (
    LONGEST_INVITATION_S,
    SHORTEST_INVITATION_S,
    render_invitation,
)
from imdsproxy.core.fleet.layout import HostId
from imdsproxy.core.fleet.values import parse_hub
from imdsproxy.core.model import ID_PATTERN
from imdsproxy.hub.authority import MAX_REQUEST
from imdsproxy.hub.callers import FleetOperator, OfHost, Uses
from imdsproxy.hub.enrolment import INVITATION_S, Certified, Enrolment

enrolment = APIRouter()

_Name = Annotated[str, Field(pattern=ID_PATTERN)]
_SigningRequest = Annotated[str, Field(max_length=MAX_REQUEST, description="PEM.")]


async def _enrolment(request: Request) -> Enrolment:
    return cast("Enrolment", request.app.state.enrolment)


_Uses: TypeAlias = Annotated[Enrolment, Depends(_enrolment)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class EnrolBody(_Body):
    """What a host sends that joins."""

    host: _Name
    token: str = Field(max_length=128, description="Of its invitation; good once.")
    request: _SigningRequest


class RenewBody(_Body):
    """What a host sends that renews its certificate."""

    request: _SigningRequest


class InviteBody(_Body):
    """Which host is invited."""

    host: _Name
    valid_s: float = Field(default=INVITATION_S, ge=SHORTEST_INVITATION_S, le=LONGEST_INVITATION_S)


class RevokeBody(_Body):
    """Which host, or which operator or hub, is not accepted any more."""

    name: _Name


class InvitationShape(BaseModel):
    """What a host joins with."""

    host: str
    invitation: str = Field(description="For `imdsproxy fleet join`. A secret, good once.")


class RevokedShape(BaseModel):
    """From which revision on it is so, and why the hub's journal does not have it yet."""

    name: str
    revision: int
    not_journaled: str | None = None


@enrolment.post("/enrol")
async def enrol(body: EnrolBody, enrolment: _Uses) -> Certified:
    """For a host with a token: its certificate."""
    return await enrolment.enrol(HostId(body.host), body.token, body.request)


@enrolment.post("/renew")
async def renew(body: RenewBody, caller: OfHost, enrolment: _Uses) -> Certified:
    """For a host with a certificate: the next one."""
    return await enrolment.renew(caller.identity, body.request)


@enrolment.post("/invitations")
async def invite(
    body: InviteBody, operations: Uses, _: FleetOperator, enrolment: _Uses
) -> InvitationShape:
    """A one-time token for a host, in a string with what else it needs."""
    urls = [
        parse_hub(found[0]).url
        for key in operations.state.keys(layout.HUBS)
        if (found := operations.state.value(key)) is not None
    ]
    made = await enrolment.invite(HostId(body.host), sorted(urls), body.valid_s)
    return InvitationShape(host=body.host, invitation=render_invitation(made))


@enrolment.post("/revoked-hosts")
async def revoke_host(
    body: RevokeBody, _: FleetOperator, enrolment: _Uses, operations: Uses
) -> RevokedShape:
    """Accept a host no more: its stream is cut, its certificate and token are no longer good."""
    revision = await enrolment.revoke(HostId(body.name))
    problem = operations.restores.journal.problem
    return RevokedShape(name=body.name, revision=revision, not_journaled=problem)


@enrolment.post("/revoked-operators")
async def revoke_operator(
    body: RevokeBody, _: FleetOperator, enrolment: _Uses, operations: Uses
) -> RevokedShape:
    """Accept no certificate of this name of an operator or hub any more, also none that is made later."""
    revision = await enrolment.revoke_operator(body.name)
    problem = operations.restores.journal.problem
    return RevokedShape(name=body.name, revision=revision, not_journaled=problem)
