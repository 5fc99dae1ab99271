"""Devices, addresses, routes and neighbours of the calling thread's namespace.

Every function takes a `NetlinkSocket`, which belongs to the namespace where it was created, and blocks for some µs. If
the kernel refuses, it raises `NetlinkRefused` (an OSError). `network.listeners.apply` and `network.listeners.host`,
which know the purpose, convert that to a `HostRefused`.
"""

import array
import errno
import fcntl
import socket
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_interface
from pathlib import Path
from typing import Final

from imdsproxy.errors import Ignoring, refusing
from imdsproxy.host import nlmessages as nl
from imdsproxy.host.state import AddressState, Family, ObservedAddress, ObservedDevice
from imdsproxy.model.entities import METADATA_IPV4, METADATA_IPV6, IpAddress, MacAddress

# Types of messages and attributes, and flags, as in linux/{rtnetlink,if_link,if_addr,neighbour,net_namespace}.h.
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_GETROUTE, RTM_NEWNEIGH, RTM_GETNEIGH = 24, 26, 28, 30
RTM_NEWNSID, RTM_GETNSID = 88, 90

_IFINFO: Final = struct.Struct("=BxHiII")
_IFADDR: Final = struct.Struct("=BBBBI")
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_NDMSG: Final = struct.Struct("=BxxxiHBB")

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = (
    1,
    3,
    4,
    5,
    10,
    18,
)
_IFLA_IFALIAS, _IFLA_NET_NS_FD, _IFLA_EXT_MASK = 20, 28, 29
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_DATA, _VETH_PEER = 1, 2, 5, 1
_BRPORT_LEARNING, _BRPORT_ISOLATED, _BRPORT_LOCKED = 8, 33, 39
_SKIP_STATISTICS, _IFF_UP = 8, 1

_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_PROTO = 1, 2, 8, 11
_IFA_F_NODAD, _IFA_F_DADFAILED, _IFA_F_TENTATIVE = 0x02, 0x08, 0x40

_RTA_DST, _RTA_OIF = 1, 4
_TABLE_MAIN, _PROTO_STATIC, _SCOPE_UNIVERSE, _SCOPE_LINK, _UNICAST = 254, 4, 0, 253, 1
_FIB_MATCH: Final = 0x2000

_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_STALE, _NUD_PERMANENT = 0x04, 0x80
_NUD_UNKNOWN: Final = 0x01 | 0x20  # INCOMPLETE and FAILED have no address to rely on
_MANY: Final = 32
"""Number of items beyond which one dump of the whole table is cheaper: some thousand entries (gc_thresh3)."""

_NETNSA_NSID, _NETNSA_FD = 1, 3
_SIOCETHTOOL: Final = 0x8946
ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM = 0x16, 0x17
_MAC_BYTES: Final = 6

_METADATA: Final[dict[bytes, IpAddress]] = {
    METADATA_IPV4.packed: METADATA_IPV4,
    METADATA_IPV6.packed: METADATA_IPV6,
}


def _family_of(address: IpAddress) -> int:
    return socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6


def _mac(value: bytes | None) -> str:
    return value.hex(":") if value and len(value) == _MAC_BYTES else ""


def parse_link(payload: bytes) -> ObservedDevice:
    _, _, index, flags, _ = _IFINFO.unpack_from(payload)
    found = nl.parse_attributes(payload, _IFINFO.size)
    info = found.get(_IFLA_LINKINFO)
    return ObservedDevice(
        name=nl.string(found.get(_IFLA_IFNAME)),
        index=index,
        up=bool(flags & _IFF_UP),
        mtu=nl.number(found.get(_IFLA_MTU)),
        alias=nl.string(found.get(_IFLA_IFALIAS)),
        master=nl.number(found.get(_IFLA_MASTER)),
        kind=nl.string(nl.parse_attributes(info).get(_INFO_KIND)) if info else "",
        mac=_mac(found.get(_IFLA_ADDRESS)),
    )


@lru_cache(maxsize=32)
def _ask_link(*, index: int = 0, name: str | None = None, master: int | None = None) -> bytes:
    asked: dict[int, nl.Value] = {_IFLA_EXT_MASK: _SKIP_STATISTICS}
    asked |= {_IFLA_IFNAME: name, _IFLA_MASTER: master}
    return _IFINFO.pack(0, 0, index, 0, 0) + nl.pack_attributes(asked)


def find_link(
    channel: nl.NetlinkSocket, name: str | None = None, *, index: int = 0
) -> ObservedDevice | None:
    """Return the device with a name (up to 15 bytes) or an index; `None` if there is none."""
    question = _ask_link(index=index, name=name)
    found = channel.find(RTM_GETLINK, question, errno.ENODEV, errno.ENOENT, errno.ERANGE)
    return None if found is None else parse_link(found)


def list_links(channel: nl.NetlinkSocket, master: int | None = None) -> list[ObservedDevice]:
    """Return every device, ordered by index; with the index of a bridge, only the bridge's ports."""
    found = list(map(parse_link, channel.dump(RTM_GETLINK, _ask_link(master=master))))
    return found if master is None else [one for one in found if one.master == master]


def device_name(index: int) -> str:
    """Return the name of a device in the calling thread's namespace; empty if the index is unused."""
    with refusing(f"look up device {index}"), Ignoring(errno.ENXIO, errno.ENODEV):
        return socket.if_indextoname(index)
    return ""


def list_links_near(channel: nl.NetlinkSocket, names: Collection[str]) -> list[ObservedDevice]:
    """Return at least the devices with these names, their masters and their ports."""
    if len(names) > _MANY:
        return list_links(channel)
    found = [one for name in names if (one := find_link(channel, name)) is not None]
    masters = [find_link(channel, index=one.master) for one in found if one.master]
    ports = [port for one in found for port in list_links(channel, one.index)]
    return [*found, *ports, *(one for one in masters if one is not None)]


@dataclass(frozen=True, slots=True)
class BridgePort:
    """Port of a bridge.

    Attributes:
        learns: Name of the flag that stops MAC learning on the port; empty if the bridge learns there.
        isolated: Whether the port reaches no other isolated port.
    """

    device: ObservedDevice
    learns: str
    isolated: bool


def bridge_ports(channel: nl.NetlinkSocket, index: int) -> list[BridgePort]:
    """Return the ports of a bridge, with the flags that bind a guest to its MAC and isolate it from others."""
    ports: list[BridgePort] = []
    for message in channel.dump(RTM_GETLINK, _ask_link(master=index)):
        port = parse_link(message)
        if port.master != index:
            continue
        info = nl.parse_attributes(message, _IFINFO.size).get(_IFLA_LINKINFO, b"")
        flags = nl.parse_attributes(nl.parse_attributes(info).get(_INFO_SLAVE_DATA, b""))
        learns = "" if nl.number(flags.get(_BRPORT_LEARNING, b"\1")) else "learning off"
        word = "locked" if nl.number(flags.get(_BRPORT_LOCKED)) else learns
        ports.append(BridgePort(port, word, bool(nl.number(flags.get(_BRPORT_ISOLATED)))))
    return ports


def veth_ends(channel: nl.NetlinkSocket) -> dict[int, int]:
    """Map the index of each veth to the index of its other end, which may be in another namespace."""
    messages = channel.dump(RTM_GETLINK, _ask_link())
    found = ((parse_link(one), nl.parse_attributes(one, _IFINFO.size)) for one in messages)
    return {
        device.index: nl.number(attributes.get(_IFLA_LINK))
        for device, attributes in found
        if device.kind == "veth"
    }


def parse_address(payload: bytes, names: dict[int, str]) -> ObservedAddress | None:
    """Parse the address in a RTM_NEWADDR or RTM_DELADDR message; return `None` unless it is a metadata address.

    A device that is not in `names` is named by its index.
    """
    _, prefix, flags, _, index = _IFADDR.unpack_from(payload)
    found = nl.parse_attributes(payload, _IFADDR.size)
    address = _METADATA.get(found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS) or b"")
    if address is None:
        return None
    flags = nl.number(found.get(_IFA_FLAGS)) or flags
    state = AddressState.USABLE
    if flags & _IFA_F_DADFAILED:
        state = AddressState.DUPLICATE
    elif flags & _IFA_F_TENTATIVE:
        state = AddressState.TENTATIVE
    device = names.get(index, str(index))
    return ObservedAddress(device, address, prefix, state, nl.number(found.get(_IFA_PROTO)))


def metadata_addresses(
    channel: nl.NetlinkSocket, devices: Iterable[ObservedDevice], *, only: Collection[str] = ()
) -> list[ObservedAddress]:
    """Return the metadata addresses on all devices, or only on devices with these names."""
    names = {one.index: one.name for one in devices}
    wanted = [index for index, name in names.items() if name in only] if only else [0]
    found: list[ObservedAddress] = []
    for index in wanted:
        with Ignoring(errno.ENODEV):  # the device has gone meanwhile
            answers = channel.dump(RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, index))
            found += [one for answer in answers if (one := parse_address(answer, names))]
    return found


def default_routes(
    channel: nl.NetlinkSocket, devices: Iterable[ObservedDevice]
) -> frozenset[tuple[Family, str]]:
    names = {one.index: one.name for one in devices}
    found: set[tuple[Family, str]] = set()
    for family in Family:
        question = _RTMSG.pack(_family_of(family.metadata_address), 0, 0, 0, 0, 0, 0, 0, 0)
        for message in channel.dump(RTM_GETROUTE, question):
            _, prefix, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(message)
            device = _out_device(message)
            if device in names and (prefix, table, kind) == (0, _TABLE_MAIN, _UNICAST):
                found.add((family, names[device]))
    return frozenset(found)


def _out_device(message: bytes) -> int:
    return nl.number(nl.parse_attributes(message, _RTMSG.size).get(_RTA_OIF))


def route_device(channel: nl.NetlinkSocket, address: IpAddress) -> int:
    """Return the index of the device that the host's own packets to an address use; 0 without a route."""
    return _out_device(_route(channel, address, 0))


def route_length(channel: nl.NetlinkSocket, address: IpAddress) -> int:
    """Return the prefix length of the route that forwards packets to an address; 0 for none, or for a local address."""
    fields = _RTMSG.unpack_from(_route(channel, address, _FIB_MATCH))
    return int(fields[1]) if fields[7] == _UNICAST else 0


def _route(channel: nl.NetlinkSocket, address: IpAddress, flags: int) -> bytes:
    bits = 8 * len(address.packed)
    question = _RTMSG.pack(_family_of(address), bits, 0, 0, 0, 0, 0, 0, flags)
    question += nl.attribute(_RTA_DST, address.packed)
    found = channel.find(RTM_GETROUTE, question, errno.ENETUNREACH, errno.EHOSTUNREACH)
    return found or bytes(_RTMSG.size)


def neighbour_mac(
    channel: nl.NetlinkSocket, address: IpAddress, device: str | None
) -> MacAddress | None:
    """Return the MAC of an address in the neighbour table of one device, or of all devices.

    Return `None` if there is no MAC, or several: two devices may each have a guest with the same address.
    """
    if device is None:
        answers = channel.dump(RTM_GETNEIGH, _NDMSG.pack(_family_of(address), 0, 0, 0, 0))
    else:
        link = find_link(channel, device)
        answers = [] if link is None else _neighbour(channel, link.index, address)
    entries = (parse_neighbour(one) for one in answers)
    found = {one.mac for one in entries if one.packed == address.packed} - {None}
    return found.pop() if len(found) == 1 else None


def _neighbour(channel: nl.NetlinkSocket, index: int, address: IpAddress) -> list[bytes]:
    question = _NDMSG.pack(_family_of(address), index, 0, 0, 0)
    question += nl.attribute(_NDA_DST, address.packed)
    found = channel.find(RTM_GETNEIGH, question, errno.ENOENT, errno.ENODEV)
    return [] if found is None else [found]


def correct_neighbours(
    channel: nl.NetlinkSocket, index: int, macs: Mapping[IpAddress, MacAddress]
) -> None:
    """Correct neighbour entries that have another MAC; the kernel confirms the new entries at their next use.

    The kernel resolves unknown addresses itself, and permanent entries stay.
    """
    if len(macs) > _MANY:
        answers = channel.dump(RTM_GETNEIGH, _NDMSG.pack(0, 0, 0, 0, 0))
    else:
        answers = [one for address in macs for one in _neighbour(channel, index, address)]
    wanted = {address.packed: (address, mac) for address, mac in macs.items()}
    for found in map(parse_neighbour, answers):
        address, mac = wanted.get(found.packed, (None, None))
        if address is None or mac is None or found.index != index or found.permanent:
            continue
        if found.mac not in (None, mac):
            entry = _NDMSG.pack(_family_of(address), index, _NUD_STALE, 0, 0)
            lladdr = bytes.fromhex(mac.replace(":", ""))
            entry += nl.pack_attributes({_NDA_DST: address.packed, _NDA_LLADDR: lladdr})
            channel.change(RTM_NEWNEIGH, entry, nl.REPLACE)


@dataclass(frozen=True, slots=True)
class ObservedNeighbour:
    """Entry in a neighbour table, without MAC if no neighbour has answered; an operator makes permanent entries."""

    index: int
    packed: bytes
    mac: MacAddress | None
    permanent: bool = False


def parse_neighbour(payload: bytes) -> ObservedNeighbour:
    _, index, state, _, _ = _NDMSG.unpack_from(payload)
    found = nl.parse_attributes(payload, _NDMSG.size)
    mac = "" if state & _NUD_UNKNOWN else _mac(found.get(_NDA_LLADDR))
    return ObservedNeighbour(
        index,
        found.get(_NDA_DST, b""),
        MacAddress(mac) if mac else None,
        permanent=bool(state & _NUD_PERMANENT),
    )


def create_veth(
    channel: nl.NetlinkSocket,
    *,
    link: str,
    master: int | None,
    mtu: int | None,
    peer: str,
    peer_namespace: int,
) -> None:
    """Create a veth pair: `link` here and up, `peer` in another namespace.

    Args:
        master: Index of the bridge that gets `link` as a port; `None` for none.
        mtu: MTU of both ends, in bytes; `None` for the kernel's default.
        peer: Name of the other end, which is down at first and must be set up inside its namespace.
    """
    far: dict[int, nl.Value] = {_IFLA_IFNAME: peer, _IFLA_MTU: mtu, _IFLA_NET_NS_FD: peer_namespace}
    other = nl.attribute(_VETH_PEER | nl.NESTED, bytes(_IFINFO.size) + nl.pack_attributes(far))
    near: dict[int, nl.Value] = {
        _IFLA_IFNAME: link,
        _IFLA_MTU: mtu,
        _IFLA_MASTER: master,
        _IFLA_LINKINFO: {_INFO_KIND: "veth", _INFO_DATA | nl.NESTED: other},
    }
    up = _IFINFO.pack(0, 0, 0, _IFF_UP, _IFF_UP)
    channel.change(RTM_NEWLINK, up + nl.pack_attributes(near), nl.CREATE | nl.EXCL)


def set_link(
    channel: nl.NetlinkSocket,
    index: int,
    *,
    master: int | None = None,
    mtu: int | None = None,
    alias: str | None = None,
    mac: MacAddress | None = None,
) -> None:
    """Set a device up; change the given properties and keep the others."""
    address = None if mac is None else bytes.fromhex(mac.replace(":", ""))
    given: dict[int, nl.Value] = {
        _IFLA_ADDRESS: address,
        _IFLA_MASTER: master,
        _IFLA_MTU: mtu,
        _IFLA_IFALIAS: alias,
    }
    up = _IFINFO.pack(0, 0, index, _IFF_UP, _IFF_UP)
    channel.change(RTM_NEWLINK, up + nl.pack_attributes(given))


def delete_link(channel: nl.NetlinkSocket, index: int) -> None:
    """Remove a device; a veth's other end goes with it."""
    channel.change(RTM_DELLINK, _IFINFO.pack(0, 0, index, 0, 0))


def list_interfaces(channel: nl.NetlinkSocket, index: int) -> list[IPv4Interface | IPv6Interface]:
    found: list[IPv4Interface | IPv6Interface] = []
    for message in channel.dump(RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, index)):
        _, prefix, _, _, at = _IFADDR.unpack_from(message)
        values = nl.parse_attributes(message, _IFADDR.size)
        packed = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS) or b""
        # Some kernels ignore the index in the request.
        if at == index:
            found.append(ip_interface((packed, prefix)))
    return found


def add_address(
    channel: nl.NetlinkSocket, index: int, address: IpAddress, prefix: int, *, protocol: int
) -> None:
    """Add an address to a device, usable at once (nodad), marked with IFA_PROTO `protocol` (from Linux 5.18 on)."""
    # The kernel derives an IPv6 address's scope from its bits.
    flags = _IFA_F_NODAD if isinstance(address, IPv6Address) else 0
    payload = _IFADDR.pack(_family_of(address), prefix, flags, _SCOPE_UNIVERSE, index)
    packed, mark = address.packed, bytes((protocol,))
    payload += nl.pack_attributes({_IFA_LOCAL: packed, _IFA_ADDRESS: packed, _IFA_PROTO: mark})
    channel.change(RTM_NEWADDR, payload, nl.CREATE | nl.EXCL)


def remove_address(channel: nl.NetlinkSocket, index: int, address: IpAddress, prefix: int) -> None:
    payload = _IFADDR.pack(_family_of(address), prefix, 0, 0, index)
    channel.change(RTM_DELADDR, payload + nl.attribute(_IFA_LOCAL, address.packed))


def add_default_route(channel: nl.NetlinkSocket, index: int, family: Family) -> None:
    """Add a default route without a gateway on a device."""
    scope = _SCOPE_LINK if family is Family.IPV4 else _SCOPE_UNIVERSE
    kind = _family_of(family.metadata_address)
    route = _RTMSG.pack(kind, 0, 0, 0, _TABLE_MAIN, _PROTO_STATIC, scope, _UNICAST, 0)
    channel.change(
        RTM_NEWROUTE, route + nl.pack_attributes({_RTA_OIF: index}), nl.CREATE | nl.REPLACE
    )


def assign_nsid(channel: nl.NetlinkSocket, descriptor: int) -> int:
    """Return the id by which `channel`'s namespace knows another; assign one if there is none."""
    named = b"\0\0\0\0" + nl.pack_attributes({_NETNSA_FD: descriptor})
    with Ignoring(errno.EEXIST):
        channel.change(RTM_NEWNSID, named + nl.pack_attributes({_NETNSA_NSID: 0xFFFFFFFF}))
    answer = channel.find(RTM_GETNSID, named) or b""
    return nl.number(nl.parse_attributes(answer, 4).get(_NETNSA_NSID))


def has_ipv6(device: str) -> bool:
    """Return whether a device of the calling thread's namespace has IPv6. An MTU below 1280 removes the setting."""
    try:
        return Path(f"/proc/sys/net/ipv6/conf/{device}/disable_ipv6").read_text() == "0\n"
    except FileNotFoundError:
        return False


def ask_ethtool(device: str, command: int) -> int:
    """Read a device's TX checksum offload, or switch it off (linux/ethtool.h, `struct ethtool_value`)."""
    value = array.array("I", (command, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        request = struct.pack("@16sP", device.encode(), value.buffer_info()[0])
        fcntl.ioctl(channel.fileno(), _SIOCETHTOOL, request)
    return value[1]
