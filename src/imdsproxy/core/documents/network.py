"""A port's addresses in the two forms that guests configure themselves from.

Only ports with a MAC are listed: cloud-init matches by it, and gives up the whole data source on an OpenStack
link that it cannot match. A port without addresses, or with one in no known subnet, is configured by
DHCP, or by the router's advertisements: without a prefix length it cannot be set.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import ip_network
from typing import Final

from imdsproxy.core.compiled import DocumentAddress, DocumentPort, DocumentRecord
from imdsproxy.core.documents.tree import JsonValue

_ANYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - a route's destination, not a bind
"""By `is_ipv6`."""


def is_ipv6(address: DocumentAddress) -> bool:
    """Of the two families."""
    return ":" in address["ip"]


def ports_with_mac(record: DocumentRecord) -> Iterator[tuple[int, DocumentPort, str]]:
    """The ports that have a MAC of their own, with their number and the MAC."""
    seen: set[str] = set()
    for number, port in enumerate(record["ports"]):
        mac = port["mac"]
        if mac is not None and mac not in seen:
            seen.add(mac)
            yield number, port, mac


def render_network_data(record: DocumentRecord) -> dict[str, JsonValue] | None:
    """`network_data.json` as Nova makes it (`nova/virt/netutils.py`), one network for each address.

    `None` when there is nothing to match a NIC by: no document lets cloud-init fall back to DHCP, an empty one
    makes it configure nothing.
    """
    links: list[JsonValue] = []
    networks: list[JsonValue] = []
    services: list[JsonValue] = []
    for number, port, mac in ports_with_mac(record):
        link = f"interface{number}"
        links.append(
            {
                "id": link,
                "vif_id": str(uuid.uuid5(uuid.UUID(record["uuid"]), mac)),
                "type": "phy",
                "mtu": port["mtu"],
                "ethernet_mac_address": mac,
            }
        )
        for network in _networks(port):
            entry: dict[str, JsonValue] = {"id": f"network{len(networks)}", "link": link}
            networks.append(entry | {"network_id": port["network"]} | network)
        services.extend(
            service
            for address in port["addresses"]
            for service in _dns(address)
            if service not in services
        )
    if not links:
        return None
    return {"links": links, "networks": networks, "services": services}


def _networks(port: DocumentPort) -> Iterator[dict[str, JsonValue]]:
    asked: set[bool] = set()
    routed: set[bool] = set()
    for address in port["addresses"]:
        ipv6 = is_ipv6(address)
        if address["cidr"] is None:
            if ipv6 not in asked:
                yield {"type": "ipv6_slaac" if ipv6 else "ipv4_dhcp"}
            asked.add(ipv6)
            continue
        routes: list[JsonValue] = []
        if address["gateway"] is not None and ipv6 not in routed:
            routed.add(ipv6)
            everything = _ANYWHERE[ipv6]
            routes.append(
                {"network": everything, "netmask": everything, "gateway": address["gateway"]}
            )
        yield {
            "type": "ipv6" if ipv6 else "ipv4",
            "ip_address": address["ip"],
            "netmask": _netmask(address["cidr"]),
            "routes": routes,
            "services": _dns(address),
        }
    if not port["addresses"]:
        yield {"type": "ipv4_dhcp"}


def _dns(address: DocumentAddress) -> list[JsonValue]:
    return [{"type": "dns", "address": server} for server in address["dns"]]


@lru_cache(maxsize=4096)
def _netmask(cidr: str) -> str:
    return str(ip_network(cidr).netmask)


def render_network_config(record: DocumentRecord) -> dict[str, JsonValue] | None:
    """NoCloud's `network-config`, version 2, matched by MAC; `None` when no port has one.

    There is no `set-name`: the guest keeps the names it has. A further port's default route gives way to the
    first one's by its metric.
    """
    ethernets: dict[str, JsonValue] = {}
    for number, port, mac in ports_with_mac(record):
        ethernets[f"interface{number}"] = _ethernet(port, mac, metric=100 * (number + 1))
    if not ethernets:
        return None
    return {"version": 2, "ethernets": ethernets}


def _ethernet(port: DocumentPort, mac: str, *, metric: int) -> dict[str, JsonValue]:
    known = [address for address in port["addresses"] if address["cidr"] is not None]
    unknown = {is_ipv6(address) for address in port["addresses"] if address["cidr"] is None}
    result: dict[str, JsonValue] = {"match": {"macaddress": mac}}
    if port["mtu"] is not None:
        result["mtu"] = port["mtu"]
    result["dhcp4"] = False in unknown or not port["addresses"]
    result["dhcp6"] = True in unknown
    if known:
        result["addresses"] = [f"{a['ip']}/{str(a['cidr']).rpartition('/')[2]}" for a in known]
    gateways = {is_ipv6(a): a["gateway"] for a in reversed(known) if a["gateway"] is not None}
    if gateways:
        result["routes"] = [
            {"to": f"{_ANYWHERE[ipv6]}/0", "via": gateway, "metric": metric}
            for ipv6, gateway in sorted(gateways.items())
        ]
    if servers := dict.fromkeys(server for a in known for server in a["dns"]):
        result["nameservers"] = {"addresses": list(servers)}
    return result
