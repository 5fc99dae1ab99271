"""The addresses that the host has on one of its devices."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Final

from imdsproxy.core.model import IpAddress
from imdsproxy.host.netlink import RTM_GETADDR, find_link
from imdsproxy.host.nlmessages import NetlinkSocket, parse_attributes

__all__ = ["device_addresses"]

_IFADDR: Final = struct.Struct("=BBBBI")
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2


def device_addresses(device: str) -> tuple[IpAddress, ...]:
    """Every address on a device of the caller's namespace; none where there is no such device.

    Raises:
        OSError: The kernel refuses.
    """
    with NetlinkSocket() as channel:
        link = find_link(channel, device)
        if link is None:
            return ()
        answers = channel.dump(RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, link.index))
        found = []
        for answer in answers:
            parts = parse_attributes(answer.payload, _IFADDR.size)
            packed = parts.get(_IFA_LOCAL) or parts.get(_IFA_ADDRESS)
            # Old kernels take no notice of the index in the question, and tell of all devices.
            if packed is not None and _IFADDR.unpack_from(answer.payload)[4] == link.index:
                found.append(ip_address(packed))
        return tuple(found)
