"""Guests for snippets."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from imdsproxy.core.model import (
    BridgeListener,
    Dialect,
    Listener,
    MacAddress,
    Network,
    NetworkId,
    Subnet,
)
from imdsproxy.core.snippets import Guest, Nic, plan_route

MAC = MacAddress("52:54:00:12:34:56")
UUID = "ac7e3c7e-1111-4222-8333-444455556666"


def network(
    listener: Listener | None = None, cidr: str = "10.0.0.0/24", gateway: str | None = "10.0.0.1"
) -> Network:
    subnets = (Subnet(ip_network(cidr), None if gateway is None else ip_address(gateway)),)
    return Network(
        NetworkId("lan"), listener or BridgeListener("br0"), subnets=subnets if cidr else ()
    )


def nic(of: Network | None = None, *, mac: MacAddress | None = MAC, here: bool = False) -> Nic:
    of = of or network()
    bridge = of.listener.bridge if isinstance(of.listener, BridgeListener) else "virbr0"
    return Nic(of.id, mac, bridge, plan_route(of, lambda _: here))


def guest(*nics: Nic, uuid: str = UUID, name: str = "web-1") -> Guest:
    return Guest(name, uuid, frozenset(Dialect), nics or (nic(),))
