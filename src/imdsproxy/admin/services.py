"""What routes use: the services behind the admin API, and the network or instance that a request names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias, cast

from fastapi import Depends, Request
from pydantic import Field

from imdsproxy.admin.guests import GuestService
from imdsproxy.admin.record_reports import RecordReports
from imdsproxy.admin.records import RecordService
from imdsproxy.admin.reports import StatusReport
from imdsproxy.admin.tokens import TokenService
from imdsproxy.app.watching import Watching
from imdsproxy.config.change import SettingsReload
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.progress import Progress
from imdsproxy.core.token_report import TokenReport

__all__ = ["NamedInstance", "NamedNetwork", "Services", "Uses"]


@dataclass(slots=True)
class Services:
    """Each route takes what it uses from here.

    Attributes:
        status: Everything at one moment.
        progress: Long work that is under way.
        render: HAProxy's configuration as it would be written now.
        reload: Reads the settings again, with `True` also where settings were dropped; returns once guests are
            answered by them, or says in `pending` why they are not yet.
        end: Ends the controller after the call is answered, and with `True` the data plane too.
    """

    reports: RecordReports
    records: RecordService
    guests: GuestService
    tokens: TokenService
    watching: Watching
    progress: Progress
    status: Callable[[], Awaitable[StatusReport]]
    token_report: Callable[[], Awaitable[TokenReport]]
    render: Callable[[], str]
    reload: Callable[[bool], Awaitable[SettingsReload]]
    end: Callable[[bool], None]


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
