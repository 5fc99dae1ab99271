"""The networks: each a namespace with the metadata address and its guests' addresses on the loopback device.

Guest and metadata service share a namespace, so only HAProxy and the kernel's loopback are measured. If the way from
guest to host counts too, a guest is plugged in: in a namespace of its own, behind a veth link.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv6Address
from pathlib import Path
from typing import Final

from imdsproxy.host.namespaces import DEFAULT_DIRECTORY, NamespaceDirectory, NamespaceThread
from imdsproxy.host.netlink import add_address, find_link, set_link
from imdsproxy.host.nlmessages import CREATE, REPLACE, NetlinkSocket, pack_attributes
from imdsproxy.model.entities import METADATA_IPV4, METADATA_IPV6

__all__ = ["DEVICE", "GUESTS", "OVN_IDS", "PLUGGED", "PREFIX", "Lab", "guest", "network_name"]

PREFIX: Final = "imdsb-"
OVN_IDS: Final = "be9c"
"""First characters of the ids of OVN's networks."""
DEVICE: Final = "imdsb0"
GUESTS: Final = IPv4Interface("10.0.0.0/16")
"""The whole range is local in every network, so a client can use any address in it."""

PLUGGED: Final = IPv4Interface("10.1.0.5/24")
"""Address of a guest behind a link, in every network."""

_RTM_NEWLINK: Final = 16
_RTM_NEWROUTE: Final = 24
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_IFINFO: Final = struct.Struct("=BxHiII")
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
_LOCAL: Final = 255
_KERNEL: Final = 2
_HOST: Final = 254
_LOOPBACK: Final = 1


def network_name(number: int) -> str:
    """Return the name of a network and of its namespace."""
    return f"{PREFIX}{number}"


def guest(number: int) -> str:
    """Return the address of a guest; all networks have the same addresses."""
    return str(GUESTS.network[5 + number])


class Lab:
    """Creator of namespaces and of sockets in them; also removes the namespaces.

    Attributes:
        names: The existing namespaces.
    """

    def __init__(self, directory: Path = DEFAULT_DIRECTORY) -> None:
        self._directory = NamespaceDirectory(directory)
        self._thread = NamespaceThread(self._directory)
        self.names: list[str] = []

    def sweep(self) -> int:
        """Remove every namespace with the prefix; return their number."""
        left = [name for name in self._directory.names() if name.startswith(PREFIX)]
        for name in left:
            self._directory.delete(name)
        self.names.clear()
        return len(left)

    def grow(self, count: int, *, ipv6: bool = True) -> None:
        """Create networks until there are `count`; new networks have IPv6 unless disabled."""
        for number in range(len(self.names), count):
            self.add(network_name(number), ipv6=ipv6)

    def add(self, name: str, *, ipv6: bool = True) -> None:
        """Create one more network, of any name with the prefix."""
        self._thread.create_now(name)
        with self._thread.inside(name):
            _furnish(ipv6=ipv6)
        self.names.append(name)

    def plug(self, name: str, mac: str = "") -> str:
        """Plug in a guest behind a veth link, unless there is one; return the guest's namespace.

        Args:
            name: The network's name.
            mac: The guest's MAC; by default, the kernel's choice.

        Raises:
            subprocess.CalledProcessError: The link could not be made.
        """
        own = f"{name}-guest"
        if own in self._directory.names():
            return own
        self._thread.create_now(own)
        address = f"address {mac} " if mac else ""
        host = PLUGGED.network[1]
        for words in (
            f"-n {own} link add eth0 {address}type veth peer name plug0 netns {name}",
            f"-n {name} address add {host}/{PLUGGED.network.prefixlen} dev plug0",
            f"-n {name} link set plug0 up",
            f"-n {own} address add {PLUGGED} dev eth0",
            f"-n {own} link set eth0 up",
            f"-n {own} route add {METADATA_IPV4}/32 via {host}",
        ):
            subprocess.run(["/usr/sbin/ip", *words.split()], check=True, capture_output=True)
        return own

    def add_host(self, name: str) -> None:
        """Create a namespace for a host, with only a loopback device; replace an existing one."""
        if name in self._directory.names():
            self._directory.delete(name)
        self._thread.create_now(name)
        with self._thread.inside(name), NetlinkSocket() as channel:
            set_link(channel, _LOOPBACK)

    def add_bridge(self, host: str, name: str) -> None:
        """Create a bridge of a host.

        Raises:
            subprocess.CalledProcessError: The bridge could not be made.
        """
        plain = "forward_delay 0 stp_state 0 mcast_snooping 0"
        _ip(host, f"link add {name} type bridge {plain}", f"link set {name} up")

    def plug_at(self, host: str, bridge: str, name: str, *, mac: str, lines: Sequence[str]) -> None:
        """Create a guest on a bridge of a host.

        Args:
            host: The host's namespace.
            bridge: The bridge.
            name: The guest's namespace.
            mac: The guest's MAC, on `eth0`.
            lines: Further lines of ip(8) in its namespace.

        Raises:
            subprocess.CalledProcessError: The guest could not be made.
        """
        self._thread.create_now(name)
        outer = f"g{name.removeprefix(host)}"
        peer = f"peer name eth0 address {mac} netns {name}"
        _ip(host, f"link add {outer} master {bridge} type veth {peer}", f"link set {outer} up")
        _ip(name, "link set eth0 up", *lines)

    def join(self, host: str, bridge: str, device: str) -> bool:
        """Attach a device to a bridge of a host; return whether the device exists."""
        with self._thread.inside(host), NetlinkSocket() as channel:
            link = find_link(channel, device)
        if link is None:
            return False
        if not link.master:
            with contextlib.suppress(subprocess.CalledProcessError):  # the device has gone again
                _ip(host, f"link set {device} master {bridge}")
        return True

    def has(self, host: str, device: str) -> bool:
        """Return whether a host has a device."""
        with self._thread.inside(host), NetlinkSocket() as channel:
            return find_link(channel, device) is not None

    def socket(self, name: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Return an unconnected IPv4 socket of a network."""
        with self._thread.inside(name):
            return socket.socket(socket.AF_INET, kind)

    def close(self) -> None:
        """Remove all networks."""
        self.sweep()
        self._thread.close()


def _ip(namespace: str, *lines: str) -> None:
    subprocess.run(
        ["/usr/sbin/ip", "-n", namespace, "-batch", "-"],
        input="\n".join(lines),
        text=True,
        check=True,
        capture_output=True,
    )


def _furnish(*, ipv6: bool) -> None:
    with NetlinkSocket() as channel:
        set_link(channel, _LOOPBACK)
        add_address(channel, _LOOPBACK, METADATA_IPV4, 32, protocol=0)
        add_address(channel, _LOOPBACK, IPv4Address(guest(0)), GUESTS.network.prefixlen, protocol=0)
        _prefer_source(channel, IPv4Address(guest(0)))
        if ipv6:
            _add_device(channel)


def _prefer_source(channel: NetlinkSocket, source: IPv4Address) -> None:
    """Make the first guest the sender of requests to the metadata address that choose no source."""
    payload = _RTMSG.pack(socket.AF_INET, 32, 0, 0, _LOCAL, _KERNEL, _HOST, 2, 0)
    payload += pack_attributes(
        {_RTA_DST: METADATA_IPV4.packed, _RTA_OIF: _LOOPBACK, _RTA_PREFSRC: source.packed}
    )
    channel.change(_RTM_NEWROUTE, payload, CREATE | REPLACE)


def _add_device(channel: NetlinkSocket) -> None:
    """Create a veth pair with both ends here: the kernel's smallest device with a link-local address."""
    kind = pack_attributes({3: DEVICE, 18: {1: "veth"}})
    channel.change(_RTM_NEWLINK, _IFINFO.pack(0, 0, 0, 1, 1) + kind, CREATE)
    link = find_link(channel, DEVICE)
    if link is not None:
        address: IPv6Address = METADATA_IPV6
        add_address(channel, link.index, address, 64, protocol=0)
