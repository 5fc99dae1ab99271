"""What routes are given: the services, and the network or instance that a request names."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias, cast

from fastapi import Depends, Request
from pydantic import Field

from imdsproxy.admin.services import Services
from imdsproxy.core.model import InstanceId, NetworkId


async def _services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


Uses: TypeAlias = Annotated[Services, Depends(_services)]

_NAMED: Final = Field(description="Its id, or its name where no other has that.")


async def _network_id(network: Annotated[str, _NAMED], services: Uses) -> NetworkId:
    return services.reports.network_id(network)


async def _instance_id(instance: Annotated[str, _NAMED], services: Uses) -> InstanceId:
    return services.reports.instance_id(instance)


NamedNetwork: TypeAlias = Annotated[NetworkId, Depends(_network_id)]
"""The `network` of the path or the query, by id or by name."""

NamedInstance: TypeAlias = Annotated[InstanceId, Depends(_instance_id)]
