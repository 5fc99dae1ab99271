"""What the source asks of Neutron, and what it takes from the answers.

Every part of a port that a tenant may write (`device_id`, `device_owner`) is text that somebody else chose;
so is, for this program, every part of an answer. What is not of its form is refused here.

Neutron's own words: the API reference's "Ports" (https://docs.openstack.org/api-ref/network/v2/), and
`neutron_lib/constants.py` for the owners of ports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlencode

from imdsproxy.core.addresses import link_local_of, normalise_address
from imdsproxy.core.model import ID_PATTERN, InstanceId, IpAddress, MacAddress, NetworkId
from imdsproxy.core.records.moments import unix_time_of
from imdsproxy.errors import Problem, SourceUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MAX_VALUES",
    "ROUTER_OWNERS",
    "NeutronClient",
    "NeutronPort",
    "PortQuery",
    "QueryTimedOut",
    "parse_ports",
    "render_query",
]

ROUTER_OWNERS: Final = (
    "network:router_interface",
    "network:ha_router_replicated_interface",
    "network:router_interface_distributed",
)
"""Owners of a router's ports in the networks that it joins."""

MAX_VALUES: Final = 32
"""Values of one filter in one query. A uWSGI as it comes takes 4 KiB for a request's variables, and has the
query among them twice; 32 ids of 40 bytes leave room for the token."""

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


class QueryTimedOut(SourceUnavailable):
    """Neutron did not answer in time."""


@dataclass(frozen=True, slots=True)
class NeutronPort:
    """A port as Neutron tells of it.

    Attributes:
        addresses: Of `fixed_ips`; pairs allowed beside them are anybody's to claim, and do not count.
        device: Whose port it is: an instance's id, a router's, or empty.
        owner: What kind of thing that is, as `compute:nova` or `network:dhcp`.
        project: The port's own, which is not always that of the instance it names.
        host: Where it is bound; `None` where that was not asked or not told.
        created_at: When it was made, Unix time; `None` where that was not told or is no time. No tenant can write it.
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
        """The device, where that is an instance (see `serves`)."""
        return InstanceId(self.device)

    @property
    def serves(self) -> bool:
        """Somebody behind it may be told of an instance: it has one, and is no service of Neutron's."""
        return bool(self.device) and not self.owner.startswith(_SERVICE) and self.problem() is None

    def has(self, address: IpAddress) -> bool:
        """It has the address, or the MAC that the link-local address is made of."""
        return address in self.addresses or (
            self.mac is not None and address == link_local_of(self.mac)
        )

    def problem(self) -> Problem | None:
        """Why it can get nothing although it names a device; `None` where that is not so."""
        if not self.device or self.owner.startswith(_SERVICE):
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
    """Ports to be told of: every filter that is there must hold, by one of its values.

    Attributes:
        host: Where they are bound.
        limit: How many at most, in order of their ids; `None` for all.
        after: The id that the page before ended with.
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


class NeutronClient(Protocol):
    """Neutron's list of ports.

    An answer may hold more than what was asked for: a Neutron that does not know a filter ignores it.
    """

    async def ports(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        """The ports, in Neutron's order.

        Raises:
            QueryTimedOut: It takes too long.
            SourceUnavailable: It cannot be reached, refuses, or answers what cannot be understood.
        """

    async def close(self) -> None:
        """Let go of connections and threads; queries that are on their way are given up."""


def render_query(query: PortQuery) -> str:
    """The query's part of the URL, after the question mark."""
    return urlencode([*_filters(query), *(("fields", field) for field in _fields(query))])


def _fields(query: PortQuery) -> tuple[str, ...]:
    return _FIELDS if query.host is None else (*_FIELDS, _HOST_FIELD)


def _filters(query: PortQuery) -> Iterator[tuple[str, str]]:
    for name, values in (
        ("id", query.ids),
        ("network_id", query.networks),
        ("mac_address", query.macs),
        ("device_id", query.devices),
        ("device_owner", query.owners),
    ):
        for value in values:
            yield name, value
    for address in query.addresses:
        yield "fixed_ips", f"ip_address={address}"
    if query.host is not None:
        yield _HOST_FIELD, query.host
    if query.limit is not None:
        # By ids: what is made or taken away meanwhile then moves no port to another page.
        yield from (("limit", str(query.limit)), ("sort_key", "id"), ("sort_dir", "asc"))
    if query.after is not None:
        yield "marker", query.after


def parse_ports(answer: object) -> tuple[NeutronPort, ...]:
    """The ports in an answer's JSON.

    Raises:
        ValueError: It is no such answer.
    """
    rows = answer.get("ports") if isinstance(answer, Mapping) else None
    if not isinstance(rows, list):
        raise ValueError("it has no list of ports")  # noqa: TRY004 - what is wrong is what it says
    return tuple(_parse_port(row) for row in rows)


def _parse_port(row: object) -> NeutronPort:
    if not isinstance(row, Mapping):
        raise ValueError("a port is no object")  # noqa: TRY004 - as above
    port_id = _text(row, "id")
    if _PORT_ID.fullmatch(port_id) is None:
        raise ValueError("a port has no id")
    mac = _text(row, "mac_address").lower()
    project = _text(row, "project_id") or _text(row, "tenant_id")
    host = row.get(_HOST_FIELD)
    created_at = row.get("created_at")
    return NeutronPort(
        id=port_id,
        network=NetworkId(_text(row, "network_id")),
        mac=MacAddress(mac) if _MAC.fullmatch(mac) else None,
        addresses=tuple(_addresses(row.get("fixed_ips"))),
        device=_text(row, "device_id"),
        owner=_text(row, "device_owner"),
        project=project,
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
        # Not a guest's own: every host has them, and a record of one would name whoever asks from here.
        if not (address.is_unspecified or address.is_loopback or address.is_multicast):
            yield address
