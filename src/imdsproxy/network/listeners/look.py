"""Observation of one namespace: devices, addresses, listening sockets and the results of trial binds."""

import contextlib
import errno
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from imdsproxy.errors import Ignoring
from imdsproxy.host import netlink
from imdsproxy.host.names import Naming
from imdsproxy.host.nftables import INET, NetfilterSocket
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.sockets import L3_PROXY_PORT, SOCK_DIAG, listening_sockets, try_bind
from imdsproxy.host.state import (
    REDIRECTED,
    AddressState,
    Family,
    ListeningSocket,
    NamespaceRef,
    ObservedAddress,
    ObservedDevice,
    ObservedEnd,
    ObservedNamespace,
)
from imdsproxy.model.entities import METADATA_IPV4, METADATA_PORT
from imdsproxy.model.wire import REDIRECTED_PORT
from imdsproxy.network.listeners.rules import ROUTER_COMMENT
from imdsproxy.network.ovn.plan import network_of
from imdsproxy.network.planned import LOOPBACK, RouterTable
from imdsproxy.sources.neutron_namespaces.records import router_of
from imdsproxy.sources.ovn.ports import devices_of

_DMI: Final = Path("/sys/class/dmi/id")

# The same strings as in cloud-init's ds-identify.
_SIGNS: Final[Mapping[str, tuple[str, ...]]] = {
    "sys_vendor": (
        *("Akamai", "Alibaba Cloud", "Amazon EC2", "DigitalOcean", "Google", "Hetzner"),
        *("OpenStack Foundation", "Vultr", "e24cloud"),
    ),
    "product_name": ("Exoscale", "Google Compute Engine", "OpenStack Compute", "OpenStack Nova"),
    "chassis_asset_tag": (
        "7783-7084-3265-9085-8269-3286-77",  # Microsoft Azure's
        *("HUAWEICLOUD", "OpenTelekomCloud", "OracleCloud.com"),
    ),
}
_HOST_ROUTE: Final = 32

REDIRECTED_PORTS: Final = (REDIRECTED_PORT, L3_PROXY_PORT)

_TRIES: Final = 3


def look(
    naming: Naming,
    ref: NamespaceRef | None,
    wanted: set[str | None],
    near: Collection[str] = (),
) -> ObservedNamespace:
    """Observe the thread's current namespace.

    Args:
        ref: The namespace; `None` for the host's own.
        wanted: Devices of interest; if empty, only objects that may be ours are observed.
        near: Observe only these devices and those related to them; if empty, all devices.
    """
    with NetlinkSocket() as channel:
        devices, addresses = _devices_and_addresses(channel, near)
        own = ref is not None and naming.is_namespace(ref.name)
        routes = netlink.default_routes(channel, devices.values()) if own else frozenset()
        metadata = _own_metadata(channel) if ref is None else ""
        end = None if ref is None else _look_at_end(channel, ref.name, devices)
    sockets: list[ListeningSocket] = []
    of_router = REDIRECTED in wanted or (ref is not None and router_of(ref.name) is not None)
    if wanted or near or not (own or ref is None):
        with NetlinkSocket(SOCK_DIAG) as channel:
            ports = REDIRECTED_PORTS if REDIRECTED in wanted else (METADATA_PORT,)
            sockets = listening_sockets(channel, ports)
    return ObservedNamespace(
        ref=ref,
        devices=devices,
        addresses=addresses,
        default_routes=routes,
        sockets=tuple(sockets),
        trials=dict(_trials(wanted, addresses, devices)),
        own_metadata=metadata,
        end=end,
        tables=_find_tables(naming) if of_router else frozenset(),
    )


def _look_at_end(
    channel: NetlinkSocket, namespace: str, devices: Mapping[str, ObservedDevice]
) -> ObservedEnd | None:
    """Observe the device of OVN's network in the thread's current namespace; `None` in another namespace."""
    network = network_of(namespace)
    device = None if network is None else devices.get(devices_of(network)[1])
    if device is None:
        return None
    with Ignoring(errno.ENODEV):  # another program is removing the device
        return ObservedEnd(
            frozenset(netlink.list_interfaces(channel, device.index)),
            ipv6=netlink.has_ipv6(device.name),
            has_checksums=not netlink.ask_ethtool(device.name, netlink.ETHTOOL_GTXCSUM),
        )
    return None


def _find_tables(naming: Naming) -> frozenset[str]:
    """Return our tables of the current form in the thread's current namespace, which is a router's."""
    names = (one.name_in(naming) for one in RouterTable)
    # If the kernel has no such tables, the operation that creates them reports the reason.
    with contextlib.suppress(OSError), NetfilterSocket() as channel:
        return frozenset(name for name in names if channel.comment(name, INET) == ROUTER_COMMENT)
    return frozenset()


def _devices_and_addresses(
    channel: NetlinkSocket, near: Collection[str]
) -> tuple[dict[str, ObservedDevice], tuple[ObservedAddress, ...]]:
    """Return devices and addresses of nearly the same moment: every address is on one of the devices."""
    for _ in range(_TRIES):
        links = netlink.list_links_near(channel, near) if near else netlink.list_links(channel)
        devices = {one.name: one for one in links}
        addresses = tuple(netlink.metadata_addresses(channel, links, only=near))
        known = tuple(one for one in addresses if one.device in devices)
        if len(known) == len(addresses):
            break
        # A device was created between the two queries: query again.
    return devices, known


def _trials(
    wanted: set[str | None],
    addresses: tuple[ObservedAddress, ...],
    devices: dict[str, ObservedDevice],
) -> Iterator[tuple[tuple[Family, str | None], int]]:
    for family in Family if REDIRECTED in wanted else ():
        error = try_bind(family, None, port=REDIRECTED_PORT, address=family.any_address)
        yield (family, REDIRECTED), error
    usable = [one for one in addresses if one.state is AddressState.USABLE]
    if any(one.address == Family.IPV4.metadata_address for one in usable):
        for device in sorted(wanted, key=str):
            if device is None or device in devices:
                yield (Family.IPV4, device), try_bind(Family.IPV4, device)
    for one in usable:
        carries = one.address == Family.IPV6.metadata_address and one.device != LOOPBACK
        if carries and (None in wanted or one.device in wanted):
            index = devices[one.device].index
            yield (Family.IPV6, one.device), try_bind(Family.IPV6, one.device, index)


def _own_metadata(channel: NetlinkSocket) -> str:
    """Describe the sign that the host itself uses a metadata service; empty without a sign."""
    for name, known in _SIGNS.items():
        try:
            value = (_DMI / name).read_text(errors="replace").strip()
        except OSError:
            continue  # not every machine has SMBIOS, and not every field may be read
        if value in known:
            return f"its SMBIOS says {value}"
    if netlink.route_length(channel, METADATA_IPV4) == _HOST_ROUTE:
        return f"it has a route to {METADATA_IPV4}"
    return ""
