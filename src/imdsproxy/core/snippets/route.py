"""How a guest's packet for 169.254.169.254 comes to where it is answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TypeAlias, assert_never

from imdsproxy.core.model import (
    METADATA_IPV4,
    BridgeListener,
    InterfaceListener,
    IpAddress,
    NamespaceListener,
    Network,
)


@dataclass(frozen=True, slots=True)
class NoRoute:
    """None is needed: what guests send to their gateway is answered on the device."""

    device: str


@dataclass(frozen=True, slots=True)
class OnLink:
    """The address is a neighbour on the link and must be told to guests, by DHCP or by hand.

    Attributes:
        gateway: The guests' own default gateway: who is given option 121 no longer looks at option 3
            (RFC 3442), so it has to be in there too. `None` where there is none.
        gateway_unknown: The network's record names no subnet. With a gateway, perhaps nothing is needed.
        any_gateway: It need not be this host.
    """

    device: str
    gateway: IPv4Address | None
    gateway_unknown: bool = False
    any_gateway: bool = False

    @property
    def classless_routes(self) -> str:
        """DHCP option 121 as dnsmasq writes it: pairs of destination and gateway, 0.0.0.0 for on-link."""
        routes = [f"{METADATA_IPV4}/32,0.0.0.0"]
        if self.gateway is not None:
            routes.append(f"0.0.0.0/0,{self.gateway}")
        return ",".join(routes)


@dataclass(frozen=True, slots=True)
class SomebodyElses:
    """Who made the namespace has to lead guests there (Neutron's DHCP announces the route)."""

    namespace: str


Route: TypeAlias = NoRoute | OnLink | SomebodyElses


def plan_route(network: Network, host_has: Callable[[IpAddress], bool]) -> Route:
    """How a guest of the network reaches the metadata address.

    Args:
        network: The network's record; its first IPv4 subnet's gateway counts.
        host_has: Whether an address is one of the host's own.
    """
    subnet = next(
        (one for one in network.subnets if one.cidr.version == METADATA_IPV4.version), None
    )
    gateway = None if subnet is None else subnet.gateway
    via = gateway if isinstance(gateway, IPv4Address) else None
    match network.listener:
        case InterfaceListener(device):
            if via is not None and host_has(via):
                return NoRoute(device)
            return OnLink(device, via, gateway_unknown=subnet is None)
        case BridgeListener(bridge):
            if via is not None:
                # `listeners.nft_scripts` leads there what is for the gateway, whoever that is.
                return NoRoute(bridge)
            return OnLink(bridge, None, gateway_unknown=subnet is None, any_gateway=True)
        case NamespaceListener(namespace):
            return SomebodyElses(namespace)
    assert_never(network.listener)
