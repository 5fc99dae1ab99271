"""`instance add --from-libvirt`: a record's keys out of a domain, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imdsproxy.errors import RequestRefused
from imdsproxy.sources.libvirt.source import read_domain
from imdsproxy.sources.libvirt.xml import Domain, DomainInterface

if TYPE_CHECKING:
    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.core.records import Json


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
    domain, networks = read_domain(uri, name)
    if domain.problems:
        raise RequestRefused(
            f"the metadata of domain {domain.name} is not acceptable", problems=domain.problems
        )
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
    records = [shape["record"] for shape in daemon.get("/v1/networks")]
    by_id = {record["id"]: record["id"] for record in records}
    by_device = {
        device: record["id"]
        for record in records
        for kind, device in record["listener"].items()
        if kind in {"interface", "bridge"}
    }
    ports: list[Json] = []
    for interface in domain.interfaces:
        plugged = networks.get(interface.network or "")
        device = interface.bridge if plugged is None else plugged.bridge
        where = network or by_device.get(device) or by_id.get(interface.network)
        if where is None:
            raise _unknown_network(domain, interface, device)
        port: dict[str, Json] = {"network": where, "mac": interface.mac}
        hosts = () if plugged is None else plugged.hosts
        addresses: list[Json] = [at for mac, at in hosts if mac == interface.mac.lower()]
        ports.append(port | {"addresses": addresses} if addresses else port)
    return {"id": domain.uuid, "name": domain.name, **domain.keys, "ports": ports}


def _unknown_network(
    domain: Domain, interface: DomainInterface, device: str | None
) -> RequestRefused:
    hint = "--network NET says where"
    if device is not None:
        hint = f"`imdsproxy network add --bridge {device}` makes one; --network NET says where else"
    where = device or interface.network
    return RequestRefused(
        f"no network is reached through {where}, where {domain.name} has its card {interface.mac}",
        hint=hint,
    )
