"""How the guests of a Linux bridge are reached: the kind of listener that goes with it."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address

from imdsproxy.core.model import METADATA_IPV4, BridgeListener, InterfaceListener, IpAddress

__all__ = ["listener_of_bridge"]


def listener_of_bridge(
    bridge: str, host_addresses: Iterable[IpAddress]
) -> InterfaceListener | BridgeListener:
    """The listener for the guests of a bridge.

    Where the host has an IPv4 address on the bridge, it is the guests' neighbour and mostly their gateway (a NAT
    network of libvirt): a packet to 169.254.169.254 is sent to the host's MAC, and only the host itself can take
    it. Where it has none nobody routes, and two such bridges may use the same range: that needs a namespace.

    Args:
        bridge: Its device's name.
        host_addresses: The addresses that the host has on it; our own there does not count.
    """
    own = (each for each in host_addresses if each != METADATA_IPV4)
    if any(isinstance(address, IPv4Address) for address in own):
        return InterfaceListener(bridge)
    return BridgeListener(bridge)
