"""Routes for identity tokens: hosts request tokens of their guests, verifiers read documents, operators rotate keys."""

from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from imdsproxy.api.bodies import RotateBody
from imdsproxy.errors import NotFound, SourceUnavailable
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.members import IDENTITY_DOCUMENT_PATH, IDENTITY_PATH, ISSUER_PATH
from imdsproxy.hub.api.callers import FleetOperator, FleetReader, OfHost, Uses
from imdsproxy.hub.hosts.issuer import Asked, FleetIssuer
from imdsproxy.issuer.claims import Refusal
from imdsproxy.issuer.exchange import MOST_AT_ONCE, render_shape
from imdsproxy.issuer.rotation import IssuerKeys
from imdsproxy.model.entities import ID_PATTERN, InstanceId, NetworkId

_PREFIX_LENGTH = len("/fleet")

identity, issuer_keys = APIRouter(), APIRouter()

_Name = Annotated[str, Field(pattern=ID_PATTERN)]


async def _issuer(request: Request) -> FleetIssuer:
    issuer = cast("FleetIssuer | None", request.app.state.hub.issuer)
    if issuer is None:
        raise NotFound("this hub gives no identity tokens", hint="identity.enabled")
    return issuer


_Issuer = Annotated[FleetIssuer, Depends(_issuer)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TokenBody(_Body):
    """Request for one token."""

    instance: _Name
    network: _Name
    audience: str = Field(max_length=128)
    nonce: str | None = Field(default=None, max_length=256)
    project: _Name | None = None


class TokensBody(_Body):
    """Requests of a host."""

    tokens: list[TokenBody] = Field(min_length=1, max_length=MOST_AT_ONCE)


class DocumentBody(_Body):
    """Request for the document of a guest."""

    instance: _Name
    network: _Name


class TokensShape(BaseModel):
    """Answers in the order of the requests, and the hub's time (Unix time)."""

    now: float
    answers: list[dict[str, object]]


@identity.post(IDENTITY_PATH[_PREFIX_LENGTH:], include_in_schema=False)
async def give_tokens(
    body: TokensBody,
    operations: Uses,
    caller: OfHost,
    issuer: _Issuer,
) -> TokensShape:
    """Sign tokens for guests that the fleet has placed on the calling host."""
    asked = [
        Asked(
            InstanceId(one.instance), NetworkId(one.network), one.audience, one.nonce, one.project
        )
        for one in body.tokens
    ]
    answers = await issuer.sign(HostId(caller.identity.name), asked)
    return TokensShape(
        now=operations.clock.now().timestamp(), answers=[render_shape(one) for one in answers]
    )


@identity.post(IDENTITY_DOCUMENT_PATH[_PREFIX_LENGTH:], include_in_schema=False)
async def give_document(
    body: DocumentBody,
    operations: Uses,
    caller: OfHost,
    issuer: _Issuer,
) -> dict[str, object]:
    """Sign the document of a guest that the fleet has placed on the calling host."""
    instance, network = InstanceId(body.instance), NetworkId(body.network)
    found = await issuer.sign_document(HostId(caller.identity.name), instance, network)
    now = operations.clock.now().timestamp()
    if isinstance(found, Refusal):
        return {"now": now, "refused": found.value}
    return {"now": now, "documents": found}


@identity.get(f"{ISSUER_PATH[_PREFIX_LENGTH:]}/{{path:path}}", include_in_schema=False)
async def show_document(path: str, issuer: _Issuer) -> Response:
    """Show a document of the issuer, to anybody; HAProxy keeps the route from the fleet's own address."""
    documents = issuer.documents()
    if not documents:
        raise SourceUnavailable("the issuer has no key yet")
    found = documents.get(f"/{path}")
    if found is None:
        raise NotFound("the issuer has no such document")
    return Response(found[1], media_type=found[0])


@issuer_keys.get("/identity/keys")
async def list_issuer_keys(_: FleetReader, issuer: _Issuer) -> IssuerKeys:
    """List the keys of the issuer of identity tokens, the signing key first."""
    return issuer.describe()


@issuer_keys.post("/identity/rotate")
async def rotate_issuer_keys(
    body: RotateBody, operations: Uses, _: FleetOperator, issuer: _Issuer
) -> IssuerKeys:
    """Publish the next key of the issuer, which signs later; with `compromised` replace all keys at once."""
    return await issuer.rotate(operations.writes, compromised=body.compromised)
