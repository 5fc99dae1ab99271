"""This chassis in Open vSwitch's database: names, OVN's location, and bridge ports (ovn-controller(8))."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

NETWORK_KEY: Final = "imdsproxy-network"
"""Key that marks our interfaces in Open vSwitch's database. They survive a reboot; their devices do not."""


@dataclass(frozen=True, slots=True)
class BridgePort:
    """Port of a bridge with one interface.

    Attributes:
        interface_id: `external_ids:iface-id`, the logical port; empty without one.
        network: `external_ids:imdsproxy-network`, the network that this interface of ours serves; else empty.
    """

    bridge: str
    interface_id: str
    network: str = ""


@dataclass(frozen=True, slots=True)
class LocalChassis:
    """This chassis, from ovn-controller's configuration.

    Attributes:
        name: `external_ids:system-id`; empty while Open vSwitch has none.
        hostname: `external_ids:hostname`, Neutron's name of the host.
        southbound: `external_ids:ovn-remote`.
        bridge: Integration bridge; `br-int` by default.
        datapath: `datapath_type` of the bridge: `netdev` is in user space; `None` without the bridge.
        ports: Ports by device name.
    """

    name: str
    hostname: str
    southbound: str
    bridge: str
    datapath: str | None
    ports: Mapping[str, BridgePort] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """Names of this chassis in OVN and Neutron."""
        return frozenset(filter(None, (self.name, self.hostname)))
