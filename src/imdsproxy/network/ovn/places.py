"""Observation, creation and removal of the namespaces of OVN's networks and their veth pairs, in idempotent steps.

If a process is killed between two steps, the next observation finds the remains: a namespace gets its name and our mark
together, both ends of the pair are created together, and a namespace loses its name last. All functions run in the
namespaces' thread.
"""

import array
import contextlib
import errno
import fcntl
import socket
import struct
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

from imdsproxy.errors import Ignoring, host_refused
from imdsproxy.host import netlink
from imdsproxy.host.namespaces import MISSING, NamespaceMissing, NamespaceThread
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.sockets import SOCK_DIAG, listening_sockets
from imdsproxy.model.entities import NetworkId
from imdsproxy.network.endpoints import LOOPBACK
from imdsproxy.network.names import Naming
from imdsproxy.network.ovn.plan import (
    NAMESPACE_PREFIX,
    MetadataPlace,
    SeenPlace,
    device_of_namespace,
    is_metadata_namespace,
    plan_interface,
)
from imdsproxy.sources.ovn.ports import IpInterface, devices_of

_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GTXCSUM: Final = 0x16
_ETHTOOL_STXCSUM: Final = 0x17

_HALF_MADE_S: Final = 10.0
"""Seconds after which a file without a namespace counts as abandoned by the program that created it."""


def look_at_places(
    thread: NamespaceThread, naming: Naming, *, skip: Collection[str] = ()
) -> dict[str, SeenPlace]:
    """Observe the namespaces of OVN's networks; return them by name.

    Args:
        thread: Thread that enters namespaces; the calling thread.
        naming: Names and marks of our own objects.
        skip: Names of namespaces to skip.

    Raises:
        DataplaneError: The host refuses.
    """
    found: dict[str, SeenPlace] = {}
    with NetlinkSocket() as outside:
        for name in thread.directory.names():
            if is_metadata_namespace(name) and name not in skip:
                found[name] = _look(thread, naming, outside, name)
    return found


def _look(thread: NamespaceThread, naming: Naming, outside: NetlinkSocket, name: str) -> SeenPlace:
    network = NetworkId(name.removeprefix(NAMESPACE_PREFIX))
    outer_name, inner_name = devices_of(network)
    outer = netlink.find_link(outside, outer_name)
    try:
        with thread.inside(name), NetlinkSocket() as channel:
            loopback = netlink.find_link(channel, LOOPBACK)
            ours = loopback is not None and naming.owner_of(loopback.alias) == network
            inner = netlink.find_link(channel, inner_name)
            with NetlinkSocket(SOCK_DIAG) as sockets:
                listened = bool(listening_sockets(sockets))
            if inner is None:
                return SeenPlace(outer=outer, is_ours=ours, is_listened=listened)
            return SeenPlace(
                inner,
                outer,
                frozenset(map(plan_interface, netlink.list_interfaces(channel, inner.index))),
                ipv6=_has_ipv6(inner_name),
                has_checksums=not _ask_ethtool(inner_name, _ETHTOOL_GTXCSUM),
                is_ours=ours,
                is_listened=listened,
            )
    except NamespaceMissing:
        return SeenPlace(outer=outer, is_ours=_is_abandoned(Path(thread.directory.file(name))))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise host_refused(f"look at namespace {name}", error) from error
        # Another program is removing the device.
        return SeenPlace(outer=outer)


def _is_abandoned(file: Path) -> bool:
    try:
        return time.time() - file.stat().st_mtime > _HALF_MADE_S
    except MISSING:
        return False


def _has_ipv6(device: str) -> bool:
    """Return whether a device of the calling thread's namespace has IPv6. An MTU below 1280 removes the setting."""
    try:
        return Path(f"/proc/sys/net/ipv6/conf/{device}/disable_ipv6").read_text() == "0\n"
    except FileNotFoundError:
        return False


def make_place(thread: NamespaceThread, naming: Naming, place: MetadataPlace) -> None:
    """Create a network's missing parts, and leave the rest unchanged.

    Raises:
        DataplaneError, OSError: The host refuses.
    """
    thread.create_now(place.namespace, lambda: _mark(naming, place.network))
    with thread.inside(place.namespace), NetlinkSocket() as channel:
        loopback = netlink.find_link(channel, LOOPBACK)
        if loopback is not None and not loopback.up:
            netlink.set_link(channel, loopback.index)
        inside = netlink.find_link(channel, place.inner)
    opened = thread.directory.open(place.namespace)
    with contextlib.closing(opened), NetlinkSocket() as channel:
        outside = netlink.find_link(channel, place.outer)
        if outside is not None and inside is None:
            netlink.delete_link(channel, outside.index)
        if outside is None or inside is None:
            if outside is None and inside is not None:
                _delete_inner(thread, place)
            netlink.create_veth(
                channel,
                link=place.outer,
                master=None,
                mtu=place.mtu,
                peer=place.inner,
                peer_namespace=opened.descriptor,
            )
        elif not outside.up or (place.mtu is not None and outside.mtu != place.mtu):
            netlink.set_link(channel, outside.index, mtu=place.mtu)
    with thread.inside(place.namespace), NetlinkSocket() as channel:
        _set_up_inner(channel, naming, place)


def _mark(naming: Naming, network: NetworkId) -> None:
    with NetlinkSocket() as channel:
        loopback = netlink.find_link(channel, LOOPBACK)
        if loopback is not None:
            netlink.set_link(channel, loopback.index, alias=naming.alias(network))


def _delete_inner(thread: NamespaceThread, place: MetadataPlace) -> None:
    """Delete the inner device of a pair whose other end is not on this host."""
    with thread.inside(place.namespace), NetlinkSocket() as channel:
        inside = netlink.find_link(channel, place.inner)
        if inside is not None:
            netlink.delete_link(channel, inside.index)


def _set_up_inner(channel: NetlinkSocket, naming: Naming, place: MetadataPlace) -> None:
    inside = netlink.find_link(channel, place.inner)
    if inside is None:
        raise host_refused(f"find {place.inner}", OSError(errno.ENODEV, "No such device"))
    if place.in_user_space:
        # In user space nothing computes the checksums that the kernel leaves to a NIC.
        _ask_ethtool(place.inner, _ETHTOOL_STXCSUM)
    mac = None if inside.mac == place.mac else place.mac
    netlink.set_link(channel, inside.index, mtu=place.mtu, mac=mac)
    _set_addresses(channel, inside.index, place.addresses(ipv6=_has_ipv6(place.inner)), naming)


def _set_addresses(
    channel: NetlinkSocket, index: int, wanted: frozenset[IpInterface], naming: Naming
) -> None:
    for _ in range(2):
        # The kernel removes all addresses of a subnet with the first one: the second pass adds them again.
        present = {plan_interface(one): one for one in netlink.list_interfaces(channel, index)}
        for one in sorted(wanted - present.keys(), key=str):
            with Ignoring(errno.EEXIST):  # the kernel has added its own link-local address
                prefix, protocol = one.network.prefixlen, naming.protocol
                netlink.add_address(channel, index, one.ip, prefix, protocol=protocol)
        for planned, one in present.items():
            if planned not in wanted:
                with Ignoring(errno.EADDRNOTAVAIL):
                    netlink.remove_address(channel, index, one.ip, one.network.prefixlen)


def remove_place(thread: NamespaceThread, naming: Naming, name: str) -> None:
    """Remove a namespace and its veth pair.

    Raises:
        DataplaneError, OSError: The host refuses.
    """
    with contextlib.suppress(NamespaceMissing), thread.inside(name):
        _mark(naming, NetworkId(name.removeprefix(NAMESPACE_PREFIX)))
    with NetlinkSocket() as channel:
        link = netlink.find_link(channel, device_of_namespace(name))
        if link is not None:
            netlink.delete_link(channel, link.index)
    thread.directory.delete(name)


def _ask_ethtool(device: str, command: int) -> int:
    """Read a device's TX checksum offload, or switch it off (linux/ethtool.h, `struct ethtool_value`).

    The device is in the calling thread's namespace.
    """
    value = array.array("I", (command, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        request = struct.pack("@16sP", device.encode(), value.buffer_info()[0])
        fcntl.ioctl(channel.fileno(), _SIOCETHTOOL, request)
    return value[1]
