"""A DHCP client that asks once and looks at the options (RFC 2131, RFC 3442); for use inside a namespace."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Final

_COOKIE: Final = bytes((99, 130, 83, 99))
_BROADCAST: Final = 0x8000
_WANTED: Final = (1, 3, 6, 121)
_TRANSACTION: Final = 0x1ADD5


def ask_options(device: str, mac: str, *, timeout_s: float = 0.5) -> dict[int, bytes] | None:
    """The options of the first offer that comes; `None` when none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        client.settimeout(timeout_s)
        client.bind(("", 68))
        client.sendto(_discover(mac), ("255.255.255.255", 67))
        try:
            offer = client.recv(4096)
        except TimeoutError:
            return None
    return dict(_options(offer[240:]))


def classless_routes(option: bytes) -> list[tuple[IPv4Network, IPv4Address]]:
    """Option 121's destinations and their gateways."""
    routes = []
    while option:
        prefix = option[0]
        octets = (prefix + 7) // 8
        destination = int.from_bytes(option[1 : 1 + octets].ljust(4, b"\0"))
        gateway = IPv4Address(option[1 + octets : 5 + octets])
        routes.append((IPv4Network((destination, prefix)), gateway))
        option = option[5 + octets :]
    return routes


def _discover(mac: str) -> bytes:
    hardware = bytes(int(octet, 16) for octet in mac.split(":"))
    head = struct.pack("!BBBBIHH16x16s", 1, 1, 6, 0, _TRANSACTION, 0, _BROADCAST, hardware)
    options = bytes((53, 1, 1, 55, len(_WANTED), *_WANTED, 255))
    return head + bytes(64 + 128) + _COOKIE + options


def _options(raw: bytes) -> Iterator[tuple[int, bytes]]:
    while raw and raw[0] != 255:
        if raw[0] == 0:
            raw = raw[1:]
            continue
        length = raw[1]
        yield raw[0], raw[2 : 2 + length]
        raw = raw[2 + length :]
