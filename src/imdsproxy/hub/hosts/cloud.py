"""Guests of Nova on a host, as Nova and Neutron know them: proof that a host asks for tokens of its own guests.

Neutron alone proves too little: a tenant can write any instance's id on a port (OSSA-2013-033). So Nova says which
instances a host runs and whose they are, and Neutron, by ports of the same project, in which networks they are.

Source: the API references' "List Servers Detailed" (https://docs.openstack.org/api-ref/compute/) and "Ports".
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import urlencode

from imdsproxy.config.identity import CloudSettings
from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import SourceUnavailable
from imdsproxy.fleet.layout import HostId
from imdsproxy.model.entities import Instance, InstanceId
from imdsproxy.model.records.values import unix_time_of
from imdsproxy.sources.neutron.client import NEUTRON, NeutronClient, Place, RestClient, Service
from imdsproxy.sources.neutron.ports import NeutronPort, PortQuery, plan_instance

_SECTION: Final = "identity.openstack"
_NOVA: Final = Service(
    "Nova", "compute", "/v2.1", _SECTION, "compute_endpoint", "every project's servers"
)
_NEUTRON: Final = replace(NEUTRON, section=_SECTION, endpoint_key="network_endpoint")
_THREADS: Final = 4
_PAGE: Final = 500
_MISS_S: Final = 2.0
"""Seconds until an instance that was not there is looked for again: a captured host may invent instances."""


@dataclass(frozen=True, slots=True)
class Server:
    """Instance as Nova describes it."""

    id: InstanceId
    project: str
    host: str
    availability_zone: str | None
    created_at: int | None


def parse_servers(answer: object) -> tuple[Server, ...]:
    """Parse the servers in an answer's JSON, without those that are on no host; raise `ValueError` if it is no list."""
    rows = answer.get("servers") if isinstance(answer, Mapping) else None
    if not isinstance(rows, list):
        raise ValueError("it has no list of servers")  # noqa: TRY004 - an answer is not a caller's mistake
    found = []
    for row in rows:
        values = row if isinstance(row, Mapping) else {}
        server, project = values.get("id"), values.get("tenant_id")
        if not isinstance(server, str) or not isinstance(project, str):
            raise ValueError("a server has no id or no project")  # noqa: TRY004 - as above
        host, zone = values.get("OS-EXT-SRV-ATTR:host"), values.get("OS-EXT-AZ:availability_zone")
        if isinstance(host, str):
            created = unix_time_of(str(values.get("created")))
            shown = zone if isinstance(zone, str) and zone else None
            found.append(Server(InstanceId(server), project, host, shown, created))
    return tuple(found)


def plan_placed(
    host: HostId, servers: Iterable[Server], ports: Sequence[NeutronPort]
) -> dict[InstanceId, Instance]:
    """Return the records of the instances that Nova has on a host, with the ports that Neutron has bound there.

    A port of another project than the instance's is left out: its tenant has written the instance's id on it.
    """
    of_instance: dict[str, list[NeutronPort]] = {}
    for port in ports:
        if port.serves and port.host == host:
            of_instance.setdefault(port.device, []).append(port)
    found = {}
    for server in servers:
        own = tuple(one for one in of_instance.get(server.id, ()) if one.project == server.project)
        planned = plan_instance(server.id, own) if server.host == host else None
        if planned is not None:
            found[server.id] = replace(
                planned, availability_zone=server.availability_zone, created_at=server.created_at
            )
    return found


@dataclass(frozen=True, slots=True)
class _Known:
    at: float
    instances: Mapping[InstanceId, Instance]


@dataclass(slots=True)
class CloudGuests:
    """Guests of Nova by host, read at most once in `fresh_s` seconds for each host.

    Args:
        list_servers: Returns Nova's servers on a host; raises `SourceUnavailable`.
        list_ports: Returns Neutron's ports on a host; raises `SourceUnavailable`.

    Attributes:
        failure: Reason why the last read failed; `None` after a success.
    """

    list_servers: Callable[[HostId], Awaitable[Sequence[Server]]]
    list_ports: Callable[[HostId], Awaitable[Sequence[NeutronPort]]]
    fresh_s: float
    monotonic: Callable[[], float]
    failure: str | None = None
    _known: dict[HostId, _Known] = field(default_factory=dict)
    _turns: dict[HostId, asyncio.Lock] = field(default_factory=dict)

    async def find(self, host: HostId, instance: InstanceId) -> Instance | None:
        """Return the record of an instance on a host; `None` if Nova or Neutron does not have it there.

        Raises:
            SourceUnavailable: Nova or Neutron does not answer.
        """
        async with self._turns.setdefault(host, asyncio.Lock()):
            known = self._known.get(host)
            age_s = self.fresh_s if known is None else self.monotonic() - known.at
            has = known is not None and instance in known.instances
            if known is None or age_s >= (self.fresh_s if has else min(_MISS_S, self.fresh_s)):
                known = self._known[host] = await self._read(host)
            return known.instances.get(instance)

    async def _read(self, host: HostId) -> _Known:
        now = self.monotonic()
        try:
            servers, ports = await asyncio.gather(self.list_servers(host), self.list_ports(host))
        except SourceUnavailable as error:
            self.failure = error.message
            self._known.pop(host, None)
            raise
        self.failure = None
        return _Known(now, plan_placed(host, servers, ports))


def open_cloud(settings: CloudSettings, monotonic: Callable[[], float]) -> CloudGuests:
    """Return the guests of a cloud; the first question connects."""
    timeout_s = settings.timeout_s
    place = Place(settings.cloud, settings.clouds_path, settings.compute_endpoint, timeout_s)
    nova = RestClient(_NOVA, place, _THREADS)
    of_neutron = NeutronSourceSettings(
        cloud=settings.cloud,
        clouds_file=settings.clouds_file,
        endpoint=settings.network_endpoint,
        timeout_s=timeout_s,
        max_queries=_THREADS,
    )
    neutron = NeutronClient(of_neutron, _NEUTRON)

    async def list_servers(host: HostId) -> list[Server]:
        found: list[Server] = []
        query: dict[str, object] = {"all_tenants": 1, "host": host, "limit": _PAGE}
        while True:
            answer = await nova.get(f"/servers/detail?{urlencode(query)}")
            try:
                page = parse_servers(answer)
            except ValueError as error:
                raise nova.misunderstood(error) from error
            found += page
            if len(answer["servers"]) < _PAGE:
                return found
            query["marker"] = answer["servers"][-1]["id"]

    return CloudGuests(
        list_servers,
        lambda host: neutron.ports(PortQuery(host=host)),
        settings.proof_s,
        monotonic,
    )
