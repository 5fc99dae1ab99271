"""The OpenStack dialect: `/openstack`, as `nova/api/metadata/base.py` serves it."""

import uuid
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import ip_network
from typing import Final

from imdsproxy.documents.compiled import DocumentPort, DocumentRecord
from imdsproxy.documents.dialects import tree
from imdsproxy.documents.dialects.tree import JsonValue, Node

VERSIONS: Final = (
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
    "2020-10-14",
    "2025-04-04",
    "latest",
)
"""Versions, oldest first. `latest` is also the greatest as a text."""

_FOLSOM, _GRIZZLY, _HAVANA, _LIBERTY, _NEWTON_ONE, _NEWTON_TWO, *_ = VERSIONS
_VICTORIA: Final = VERSIONS[-3]


def _make_meta_data(record: DocumentRecord, version: str) -> Node:
    keys = tree.named_keys(record)
    described: list[JsonValue] = [
        {"name": name, "type": "ssh", "data": key} for name, key in keys.items()
    ]
    fields: tuple[tuple[str, str, JsonValue], ...] = (
        (_FOLSOM, "hostname", record["hostname"]),
        (_FOLSOM, "name", record["name"]),
        (_FOLSOM, "launch_index", 0),
        (_FOLSOM, "availability_zone", record["availability_zone"]),
        (_LIBERTY, "project_id", record["project"]),
        (_NEWTON_ONE, "devices", []),
        (_VICTORIA, "dedicated_cpus", []),
    )
    document: dict[str, JsonValue] = {"uuid": record["uuid"]}
    if record["tags"]:
        document["meta"] = {**dict(record["tags"])}
    if keys:
        document |= {"public_keys": {**keys}, "keys": described}
    document |= {name: value for since, name, value in fields if version >= since}
    kind = tree.Kind.SEEDED if version >= _GRIZZLY else tree.Kind.FIXED
    return tree.json_document(document, kind)


def _make_network_data(record: DocumentRecord, _version: str) -> Node | None:
    """Build network_data.json as Nova does (`nova/virt/netutils.py`), one network for each address.

    `None` if there is no MAC to match a NIC: without the document cloud-init falls back to DHCP, while an empty
    document makes it configure nothing.
    """
    ports = list(tree.ports_with_mac(record))
    links: list[JsonValue] = [
        {
            "id": f"interface{number}",
            "vif_id": str(uuid.uuid5(uuid.UUID(record["uuid"]), mac)),
            "type": "phy",
            "mtu": port["mtu"],
            "ethernet_mac_address": mac,
        }
        for number, port, mac in ports
    ]
    found = [
        {"link": f"interface{number}", "network_id": port["network"], **network}
        for number, port, _ in ports
        for network in _describe_networks(port)
    ]
    networks: list[JsonValue] = [
        {"id": f"network{index}", **network} for index, network in enumerate(found)
    ]
    addresses = (address for _, port, _ in ports for address in port["addresses"])
    services = _describe_dns(
        dict.fromkeys(server for address in addresses for server in address["dns"])
    )
    document: JsonValue = {"links": links, "networks": networks, "services": services}
    return tree.json_document(document) if links else None


def _describe_networks(port: DocumentPort) -> Iterator[dict[str, JsonValue]]:
    """Yield the networks of a port; a port without addresses uses DHCP.

    An address outside all known subnets is configured by DHCP or router advertisements too, because its prefix length
    is unknown.
    """
    asked: set[bool] = set()
    routed: set[bool] = set()
    for address in port["addresses"]:
        ipv6 = tree.is_ipv6(address)
        if address["cidr"] is None:
            if ipv6 not in asked:
                yield {"type": "ipv6_slaac" if ipv6 else "ipv4_dhcp"}
            asked.add(ipv6)
            continue
        routes: list[JsonValue] = []
        if address["gateway"] is not None and ipv6 not in routed:
            routed.add(ipv6)
            everything = tree.ANYWHERE[ipv6]
            routes.append(
                {"network": everything, "netmask": everything, "gateway": address["gateway"]}
            )
        yield {
            "type": "ipv6" if ipv6 else "ipv4",
            "ip_address": address["ip"],
            "netmask": _netmask(address["cidr"]),
            "routes": routes,
            "services": _describe_dns(address["dns"]),
        }
    if not port["addresses"]:
        yield {"type": "ipv4_dhcp"}


def _describe_dns(servers: Iterable[str]) -> list[JsonValue]:
    return [{"type": "dns", "address": server} for server in servers]


@lru_cache(maxsize=4096)
def _netmask(cidr: str) -> str:
    return str(ip_network(cidr).netmask)


def _vendor(record: DocumentRecord) -> dict[str, JsonValue]:
    return tree.vendor_object(record["vendor_data"])


FILES: Final[tree.Rows] = (
    (_FOLSOM, "meta_data.json", _make_meta_data),
    (_FOLSOM, "user_data", tree.user_data),
    (_GRIZZLY, "password", lambda *_: Node(b"", kind=tree.Kind.POSTED)),
    (_HAVANA, "vendor_data.json", lambda record, _: tree.json_document(_vendor(record))),
    (_LIBERTY, "network_data.json", _make_network_data),
    # Under `static`, as in Nova, so that cloud-init does not run it a second time.
    (
        _NEWTON_TWO,
        "vendor_data2.json",
        lambda record, _: tree.json_document({"static": _vendor(record)}),
    ),
)
"""Everything below `/openstack/VERSION`, in Nova's order."""
