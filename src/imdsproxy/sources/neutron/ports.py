"""Neutron's ports: queries, parsing of answers, and the instances made from ports.

Tenants can write `device_id` and `device_owner`, so this module trusts no part of an answer and refuses invalid values.

Sources: the API reference's "Ports" (https://docs.openstack.org/api-ref/network/v2/), and `neutron_lib/constants.py`
for the owners of ports.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlencode

from imdsproxy.errors import Problem
from imdsproxy.model.addresses import link_local_of, normalise_address
from imdsproxy.model.entities import (
    ID_PATTERN,
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    NetworkId,
    Port,
    Upstream,
)
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.records.values import unix_time_of

ROUTER_OWNERS: Final = (
    "network:router_interface",
    "network:ha_router_replicated_interface",
    "network:router_interface_distributed",
)
"""Owners of a router's ports in its networks."""

MAX_VALUES: Final = 32
"""Maximum number of values of one filter in one query. By default uWSGI accepts 4 KiB of request variables, which
contain the query twice; 32 ids of 40 bytes leave room for the token."""

_SERVICE: Final = "network:"
_FORM: Final = re.compile(ID_PATTERN)
_MAC: Final = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_PORT_ID: Final = re.compile(r"[\x21-\x7e]{1,64}")
_FIELDS: Final = (
    "id",
    "network_id",
    "mac_address",
    "fixed_ips",
    "device_id",
    "device_owner",
    "project_id",
    "created_at",
)
_HOST_FIELD: Final = "binding:host_id"
_SHOWN: Final = 80


@dataclass(frozen=True, slots=True)
class NeutronPort:
    """Port as Neutron describes it.

    Attributes:
        addresses: Addresses in `fixed_ips`. Allowed address pairs do not count: any port of the network may claim them.
        device: Id of the instance, router or service that the port belongs to, or empty.
        owner: Kind of device, as `compute:nova` or `network:dhcp`.
        host: Host to which the port is bound; `None` if not queried or not answered.
        created_at: Creation in Unix time; `None` if missing or not valid. Tenants cannot write it.
    """

    id: str
    network: NetworkId
    mac: MacAddress | None
    addresses: tuple[IpAddress, ...]
    device: str
    owner: str
    project: str
    host: str | None = None
    created_at: int | None = None

    @property
    def instance(self) -> InstanceId:
        """The device, if it is an instance (see `serves`)."""
        return InstanceId(self.device)

    @property
    def serves(self) -> bool:
        """Whether this is an instance's port with valid ids, so that its guest gets documents."""
        return self.names_instance and self.problem() is None

    @property
    def names_instance(self) -> bool:
        """Whether this is an instance's port, even if its ids are not valid."""
        return bool(self.device) and not self.owner.startswith(_SERVICE)

    @property
    def keys(self) -> frozenset[AddressKey]:
        """The port's addresses in its network, including the link-local address derived from its MAC."""
        derived = () if self.mac is None else (link_local_of(self.mac),)
        return frozenset((self.network, address) for address in (*self.addresses, *derived))

    def problem(self) -> Problem | None:
        """Return why the guest gets no documents although the port names an instance; else `None`."""
        if not self.names_instance:
            return None
        for field, value in (
            ("device_id", self.device),
            ("project_id", self.project),
            ("network_id", self.network),
        ):
            if _FORM.fullmatch(value) is None:
                shown = ascii(value if len(value) <= _SHOWN else value[:_SHOWN] + "…")
                return Problem(
                    f"ports.{self.id}.{field}",
                    f"{shown} is no id that Nova could know",
                    "1 to 64 of A-Z a-z 0-9 . _ - that begin with a letter or digit; until then the port's "
                    "guest gets 404",
                )
        return None


@dataclass(frozen=True, slots=True)
class PortQuery:
    """Filters of a list of ports. All given filters must match, each by one of its values.

    Attributes:
        limit: Maximum number of ports, in order of their ids; `None` for all.
    """

    ids: tuple[str, ...] = ()
    networks: tuple[NetworkId, ...] = ()
    addresses: tuple[IpAddress, ...] = ()
    macs: tuple[MacAddress, ...] = ()
    devices: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    host: str | None = None
    limit: int | None = None
    after: str | None = None


def render_query(query: PortQuery) -> str:
    parameters: dict[str, object] = {
        "id": query.ids,
        "network_id": query.networks,
        "mac_address": query.macs,
        "device_id": query.devices,
        "device_owner": query.owners,
        "fixed_ips": [f"ip_address={address}" for address in query.addresses],
    }
    fields = [*_FIELDS]
    if query.host is not None:
        parameters[_HOST_FIELD] = query.host
        fields.append(_HOST_FIELD)
    if query.limit is not None:
        # Sort by id, so that ports created or deleted meanwhile do not move others to another page.
        parameters |= {"limit": query.limit, "sort_key": "id", "sort_dir": "asc"}
    if query.after is not None:
        parameters["marker"] = query.after
    return urlencode({**parameters, "fields": fields}, doseq=True)


def parse_ports(answer: object) -> tuple[NeutronPort, ...]:
    """Parse the ports in an answer's JSON. Raises `ValueError`: the answer is not a list of ports."""
    rows = answer.get("ports") if isinstance(answer, Mapping) else None
    if not isinstance(rows, list):
        raise ValueError("it has no list of ports")  # noqa: TRY004 - an answer is not a caller's mistake
    return tuple(_parse_port(row) for row in rows)


def _parse_port(row: object) -> NeutronPort:
    if not isinstance(row, Mapping):
        raise ValueError("a port is no object")  # noqa: TRY004 - as above
    port_id = _text(row, "id")
    if _PORT_ID.fullmatch(port_id) is None:
        raise ValueError("a port has no id")
    mac = _text(row, "mac_address").lower()
    host = row.get(_HOST_FIELD)
    created_at = row.get("created_at")
    return NeutronPort(
        id=port_id,
        network=NetworkId(_text(row, "network_id")),
        mac=MacAddress(mac) if _MAC.fullmatch(mac) else None,
        addresses=tuple(_addresses(row.get("fixed_ips"))),
        device=_text(row, "device_id"),
        owner=_text(row, "device_owner"),
        project=_text(row, "project_id") or _text(row, "tenant_id"),
        host=host if isinstance(host, str) else None,
        created_at=unix_time_of(created_at) if isinstance(created_at, str) else None,
    )


def _text(row: Mapping[object, object], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"a port's {name} is no text")  # noqa: TRY004 - as above
    return value


def _addresses(fixed: object) -> Iterator[IpAddress]:
    if not isinstance(fixed, list):
        return
    for one in fixed:
        text = one.get("ip_address") if isinstance(one, Mapping) else None
        if not isinstance(text, str):
            raise ValueError("a port's fixed_ips have no ip_address")  # noqa: TRY004 - as above
        address = normalise_address(ip_address(text))
        # Every host has such addresses; a record with one would name this host as the guest.
        if not (address.is_unspecified or address.is_loopback or address.is_multicast):
            yield address


def render_port(port: NeutronPort) -> dict[str, object]:
    """Render a port in the form of Neutron's own answer, without its host."""
    created_at = port.created_at
    return {
        "id": port.id,
        "network_id": port.network,
        "mac_address": port.mac,
        "fixed_ips": [{"ip_address": str(address)} for address in port.addresses],
        "device_id": port.device,
        "device_owner": port.owner,
        "project_id": port.project,
        "created_at": None
        if created_at is None
        else datetime.fromtimestamp(created_at, UTC).isoformat(),
    }


def plan_instance(
    instance: InstanceId, ports: tuple[NeutronPort, ...], *, created_at: int | None = None
) -> Instance | None:
    """Make the record of an instance whose documents Nova has, from its known ports.

    Any tenant can write any instance's id on a port. So each port keeps its own project, and requests to Nova name that
    project: Nova answers 404 if the instance belongs to another project (OSSA-2013-033). The instance's own project,
    taken from the first port, then has no meaning.

    The instance is as old as its oldest port ever seen. A port added or removed later must not start the boot anew. A
    port older than the instance only shortens the boot.

    Args:
        created_at: Creation time in the earlier record, in Unix time.
    """
    if not ports:
        return None
    project = ports[0].project
    times = (created_at, *(port.created_at for port in ports))
    return Instance(
        id=instance,
        name=instance,
        hostname=instance,
        project=project,
        ports=tuple(
            Port(
                port.network,
                port.mac,
                port.addresses,
                project=None if port.project == project else port.project,
            )
            for port in ports
        ),
        upstream=Upstream.NOVA,
        created_at=min((time for time in times if time is not None), default=None),
    )
