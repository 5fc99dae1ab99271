"""Routes for a fleet's membership: hosts enrol and renew, operators invite and revoke."""

from typing import Annotated, TypeAlias, cast

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, parse_hub
from imdsproxy.fleet.members import LONGEST_INVITATION_S, SHORTEST_INVITATION_S, render_invitation
from imdsproxy.hub.api.callers import FleetOperator, OfHost, Uses
from imdsproxy.hub.pki.authority import MAX_REQUEST
from imdsproxy.hub.pki.enrolment import INVITATION_S, Certified, Enrolment
from imdsproxy.model.entities import ID_PATTERN

enrolment = APIRouter()

_Name = Annotated[str, Field(pattern=ID_PATTERN)]
_SigningRequest = Annotated[str, Field(max_length=MAX_REQUEST, description="PEM.")]


async def _enrolment(request: Request) -> Enrolment:
    return cast("Enrolment", request.app.state.enrolment)


_Uses: TypeAlias = Annotated[Enrolment, Depends(_enrolment)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class EnrolBody(_Body):
    """Request of a host to join."""

    host: _Name
    token: str = Field(max_length=128, description="Of its invitation; good once.")
    request: _SigningRequest


class RenewBody(_Body):
    """Request of a host to renew its certificate."""

    request: _SigningRequest


class InviteBody(_Body):
    """Host to invite."""

    host: _Name
    valid_s: float = Field(default=INVITATION_S, ge=SHORTEST_INVITATION_S, le=LONGEST_INVITATION_S)


class RevokeBody(_Body):
    """Host, operator or hub to revoke."""

    name: _Name


class InvitationShape(BaseModel):
    """Invitation for a host to join with."""

    host: str
    invitation: str = Field(description="For `imdsproxy fleet join`. A secret, good once.")


class RevokedShape(BaseModel):
    """Revision of a revocation, and the reason why the hub's journal lacks it."""

    name: str
    revision: int
    not_journaled: str | None = None


@enrolment.post("/enrol")
async def enrol(body: EnrolBody, enrolment: _Uses) -> Certified:
    """Issue a certificate to a host with an invitation's token."""
    return await enrolment.enrol(HostId(body.host), body.token, body.request)


@enrolment.post("/renew")
async def renew(body: RenewBody, caller: OfHost, enrolment: _Uses) -> Certified:
    """Issue the next certificate to a host that presents its current one."""
    return await enrolment.renew(caller.identity, body.request)


@enrolment.post("/invitations")
async def invite(
    body: InviteBody, operations: Uses, _: FleetOperator, enrolment: _Uses
) -> InvitationShape:
    """Create an invitation for a host: a string with a one-time token, the hubs' URLs and the CA's fingerprint."""
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
    """Revoke a host: hubs end its stream and refuse its certificate and token."""
    revision = await enrolment.revoke(HostId(body.name))
    problem = operations.restores.journal.problem
    return RevokedShape(name=body.name, revision=revision, not_journaled=problem)


@enrolment.post("/revoked-operators")
async def revoke_operator(
    body: RevokeBody, _: FleetOperator, enrolment: _Uses, operations: Uses
) -> RevokedShape:
    """Revoke an operator or hub: refuse all certificates of this name, including later ones."""
    revision = await enrolment.revoke_operator(body.name)
    problem = operations.restores.journal.problem
    return RevokedShape(name=body.name, revision=revision, not_journaled=problem)
