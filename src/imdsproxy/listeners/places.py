"""Namespace and devices of each kind of listener. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.model import BridgeListener, InterfaceListener, NamespaceListener, Network


@dataclass(frozen=True, slots=True)
class Place:
    """Where a network is listened for.

    Attributes:
        namespace: By name; `None` for the host's own.
        device: In that namespace; `None` for all.
        host_devices: The devices of the host's own namespace that it depends on.
        bridge: The one of them that is a bridge to attach to, if any.
    """

    namespace: str | None
    device: str | None
    host_devices: tuple[str, ...] = ()
    bridge: str | None = None


def place_of(network: Network, naming: Naming) -> Place:
    """Where a network is listened for, whether or not it is there."""
    match network.listener:
        case NamespaceListener(namespace=namespace, device=device):
            return Place(namespace, device)
        case InterfaceListener(device=device):
            return Place(None, device, (device,))
        case BridgeListener(bridge=bridge):
            link = naming.link(network.id)
            inside = naming.namespace(network.id)
            return Place(inside, naming.inner_device, (bridge, link), bridge)
