"""Routes below `/v1/grants`: permissions of operators limited to a project."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path

from imdsproxy.api import bodies
from imdsproxy.errors import NotFound
from imdsproxy.fleet import layout
from imdsproxy.fleet.codec import Json
from imdsproxy.hub.api.callers import FleetOperator, Reader, TermsOf, Uses
from imdsproxy.hub.api.operations import FleetWritten, Operations
from imdsproxy.hub.store.scopes import read_grant
from imdsproxy.hub.store.transactions import Terms
from imdsproxy.model.entities import ID_PATTERN
from imdsproxy.model.records.grant import GRANT, NO_GRANT, Grant

grants = APIRouter()

_Project = Annotated[str, Path(pattern=ID_PATTERN, description="The project's id.")]


@dataclass(frozen=True, slots=True)
class ProjectGrant:
    """Grant of a project.

    Attributes:
        revision: Revision of the grant; 0 if the project never had any.
    """

    project: str
    grant: Json
    revision: int


@grants.get("/grants")
async def list_grants(operations: Uses, caller: Reader) -> list[ProjectGrant]:
    """List all projects with a grant; operators of one project see their own."""
    keys = sorted(operations.state.keys(layout.GRANTS))
    projects = (key.removeprefix(layout.GRANTS) for key in keys)
    shown = (_show(operations, one) for one in projects if caller.scope in {None, one})
    return [one for one in shown if one.grant]


@grants.get("/grants/{project}")
async def show_grant(project: _Project, operations: Uses, caller: Reader) -> ProjectGrant:
    """Show the grant of a project."""
    if caller.scope not in {None, project}:
        raise NotFound(f"there is no grant of project {project}")
    return _show(operations, project)


@grants.put("/grants/{project}", openapi_extra=bodies.takes(bodies.GrantRecord))
async def put_grant(
    _: FleetOperator, project: _Project, body: bodies.JsonBody, operations: Uses, terms: TermsOf
) -> FleetWritten:
    """Replace the grant of a project. Existing records that needed a larger grant stay as they are."""
    read = bodies.read_record("grant", GRANT.read, body)
    return await _put(operations, project, read, terms)


@grants.delete("/grants/{project}")
async def clear_grant(
    _: FleetOperator, project: _Project, operations: Uses, terms: TermsOf
) -> FleetWritten:
    """Remove the grant of a project; existing records stay as they are."""
    return await _put(operations, project, NO_GRANT, terms)


async def _put(operations: Operations, project: str, grant: Grant, terms: Terms) -> FleetWritten:
    return operations.written(await operations.writes.put_grant(project, lambda _: grant, terms))


def _show(operations: Operations, project: str) -> ProjectGrant:
    grant, revision = read_grant(operations.state.value, project)
    return ProjectGrant(project, GRANT.render(grant), revision)
