"""What every route of the admin API is given, and how its answers and bodies are described."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, cast

from fastapi import Depends, Request
from pydantic import Field

from imdsproxy.admin.operations import Operations
from imdsproxy.admin.refusals import ProblemBody
from imdsproxy.core.model import InstanceId, NetworkId

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["NamedInstance", "NamedNetwork", "Ops", "Patching", "Responses", "answers", "takes"]

Responses: TypeAlias = "dict[int | str, dict[str, Any]]"


async def _operations(request: Request) -> Operations:
    return cast("Operations", request.app.state.operations)


async def _patching(request: Request) -> asyncio.Lock:
    return cast("asyncio.Lock", request.app.state.patching)


Ops: TypeAlias = Annotated[Operations, Depends(_operations)]


_NAMED: Final = Field(description="Its id, or its name where no other has that.")


async def _network_id(network: Annotated[str, _NAMED], operations: Ops) -> NetworkId:
    return operations.network_id(network)


async def _instance_id(instance: Annotated[str, _NAMED], operations: Ops) -> InstanceId:
    return operations.instance_id(instance)


NamedNetwork: TypeAlias = Annotated[NetworkId, Depends(_network_id)]
"""The `network` of the path or the query, by id or by name."""

NamedInstance: TypeAlias = Annotated[InstanceId, Depends(_instance_id)]

Patching: TypeAlias = Annotated[asyncio.Lock, Depends(_patching)]
"""Held from reading a record until its change is stored: two PATCHes must not undo each other."""


def answers(model: object, *, status: int = 200) -> Responses:
    """A route's responses for OpenAPI: its own, and the one shape of all errors."""
    errors = {"description": "What is wrong, with the fields", "model": ProblemBody}
    return {status: {"model": model}, "4XX": errors, "5XX": errors}


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """A route's body for OpenAPI; the routes read and check it themselves."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
