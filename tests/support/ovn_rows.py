"""Rows of OVN's Port_Binding: an instance's port, and its network's metadata port."""

from dataclasses import replace
from typing import Final

from imdsproxy.model.entities import NetworkId
from imdsproxy.sources.ovn.ports import OvnKnown, PortBinding, SouthboundView

HERE: Final = "c1"
NETWORK: Final = NetworkId("11111111-0000-4000-8000-000000000001")
IDS: Final = {
    "neutron:network_name": f"neutron-{NETWORK}",
    "neutron:device_id": "vm-1",
    "neutron:device_owner": "compute:nova",
    "neutron:project_id": "p1",
    "neutron:cidrs": "10.0.0.5/24 fd00::5/64",
}
PORT: Final = PortBinding(
    port="port-1",
    kind="",
    macs=("fa:16:3e:00:00:05 10.0.0.5 fd00::5",),
    chassis=HERE,
    additional=frozenset(),
    requested=("host-1",),
    external_ids=IDS,
)
METADATA: Final = replace(
    PORT,
    port="port-m",
    kind="localport",
    chassis="",
    requested=(),
    external_ids={
        **IDS,
        "neutron:device_id": f"ovnmeta-{NETWORK}",
        "neutron:device_owner": "network:distributed",
        "neutron:cidrs": "10.0.0.2/24",
        "neutron:mtu": "1442",
    },
)


def view(*rows: PortBinding, chassis: str | None = HERE) -> SouthboundView:
    return SouthboundView(chassis, frozenset({"host-1"}), rows)


def known(*rows: PortBinding) -> OvnKnown:
    found = OvnKnown()
    found.update(view(*rows))
    return found
