"""`instance add --from-libvirt`: a record's keys out of a domain, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from imdsproxy.core.records import Refused
from imdsproxy.errors import RequestRefused
from imdsproxy.sources.libvirt.client import read_domain
from imdsproxy.sources.libvirt.records import NetworkXml
from imdsproxy.sources.libvirt.xml import (
    Domain,
    DomainInterface,
    LibvirtNetwork,
    parse_domain,
    parse_libvirt_network,
)

if TYPE_CHECKING:
    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.core.records import Json

_Shape = Mapping[str, object]


def import_domain(daemon: AdminClient, uri: str, name: str, network: str | None) -> dict[str, Json]:
    """The keys of an instance's record, `id` among them, as the source `libvirt` would have them.

    Args:
        daemon: Asked which networks there are.
        uri: Libvirt's daemon.
        name: The domain's name or UUID.
        network: Where its one interface is; without it each is in the network that is reached through its bridge.

    Raises:
        RequestRefused: Its metadata is not understood, or its network is not known here.
    """
    text, described = read_domain(uri, name)
    domain = parse_domain(text)
    if isinstance(domain, Refused):
        raise RequestRefused(f"libvirt's XML of {name} is no XML", problems=domain.problems)
    if domain.problems:
        raise RequestRefused(
            f"the metadata of domain {domain.name} is not acceptable", problems=domain.problems
        )
    ports = _ports(domain, _networks(described), _Known.of(daemon), network)
    return {"id": domain.uuid, "name": domain.name, **domain.keys, "ports": list(ports)}


class _Known:
    """The daemon's networks: all ids, and those that are reached through a device of the host."""

    def __init__(self, ids: frozenset[str], by_device: Mapping[str, str]) -> None:
        self.ids = ids
        self.by_device = by_device

    @classmethod
    def of(cls, daemon: AdminClient) -> _Known:
        shapes = cast("Sequence[_Shape]", daemon.get("/v1/networks"))
        records = [cast("_Shape", shape["record"]) for shape in shapes]
        by_device = {
            str(device): str(record["id"])
            for record in records
            for kind, device in cast("_Shape", record["listener"]).items()
            if kind in ("interface", "bridge")
        }
        return cls(frozenset(str(record["id"]) for record in records), by_device)


def _networks(described: Sequence[NetworkXml]) -> dict[str, LibvirtNetwork]:
    parsed = (parse_libvirt_network(each.text, active=each.active) for each in described)
    return {each.name: each for each in parsed if isinstance(each, LibvirtNetwork)}


def _ports(
    domain: Domain,
    networks: Mapping[str, LibvirtNetwork],
    known: _Known,
    network: str | None,
) -> list[dict[str, Json]]:
    if not domain.interfaces:
        raise RequestRefused(
            f"domain {domain.name} has no network card on a bridge of this host",
            hint="its guest does not reach the host; macvtap and user mode do not either",
        )
    if network is not None and len(domain.interfaces) > 1:
        raise RequestRefused(
            f"domain {domain.name} has {len(domain.interfaces)} network cards, and --network is one",
            hint="leave it out, or name each card with --port network=NET,mac=MAC",
        )
    return [_port(domain, each, networks, known, network) for each in domain.interfaces]


def _port(
    domain: Domain,
    interface: DomainInterface,
    networks: Mapping[str, LibvirtNetwork],
    known: _Known,
    network: str | None,
) -> dict[str, Json]:
    plugged = networks.get(interface.network or "")
    device = interface.bridge if plugged is None else plugged.bridge
    found = network or known.by_device.get(device or "")
    if found is None and interface.network in known.ids:
        found = interface.network
    if found is None:
        hint = "--network NET says where"
        if device is not None:
            hint = f"`imdsproxy network add --bridge {device}` makes one; --network NET says where else"
        where = device or interface.network
        raise RequestRefused(
            f"no network is reached through {where}, where {domain.name} has its card {interface.mac}",
            hint=hint,
        )
    port: dict[str, Json] = {"network": found, "mac": interface.mac}
    hosts = () if plugged is None else plugged.hosts
    addresses: list[Json] = [where for mac, where in hosts if mac == interface.mac.lower()]
    return {**port, "addresses": addresses} if addresses else port
