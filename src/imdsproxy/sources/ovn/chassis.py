"""This chassis in Open vSwitch's database: its names, where OVN is, and what is plugged in (ovn-controller(8))."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

NETWORK_KEY: Final = "imdsproxy-network"
"""Marks the interfaces in Open vSwitch's database that we look after: they outlive a boot, their devices do not."""


@dataclass(frozen=True, slots=True)
class BridgePort:
    """A port of a bridge with one interface.

    Attributes:
        interface_id: `external_ids:iface-id`, the logical port that it is; empty without one.
        network: `external_ids:imdsproxy-network`, the network that we have it for; empty for all others.
    """

    bridge: str
    interface_id: str
    network: str = ""


@dataclass(frozen=True, slots=True)
class LocalChassis:
    """This chassis as ovn-controller is configured.

    Attributes:
        name: `external_ids:system-id`; empty while Open vSwitch has none.
        hostname: `external_ids:hostname`, which Neutron calls the host.
        southbound: `external_ids:ovn-remote`.
        bridge: The integration bridge, `br-int` where none is named.
        datapath: The bridge's `datapath_type`: `netdev` is in user space; `None` without the bridge.
        ports: By the names of their devices.
    """

    name: str
    hostname: str
    southbound: str
    bridge: str
    datapath: str | None
    ports: Mapping[str, BridgePort] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """By which OVN and Neutron call it."""
        return frozenset(filter(None, (self.name, self.hostname)))
