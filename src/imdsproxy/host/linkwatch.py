"""Notices devices and metadata addresses as they come, change and go, here and in other namespaces."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from imdsproxy.host.multicast import Multicast
from imdsproxy.host.netlink import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_NEWADDR,
    RTM_NEWLINK,
    address_index,
    parse_address,
    parse_link,
)
from imdsproxy.host.nlmessages import Message
from imdsproxy.host.refusal import host_refused

_GROUPS: Final = (1, 5, 9)
"""RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR."""


@dataclass(frozen=True, slots=True)
class LinkChange:
    """Something has changed.

    Attributes:
        nsid: The id of the namespace; `None` for the host's own.
        device: Name of the device; empty when it is gone or unknown.
        master: Index of the bridge that it is a port of; 0 for none, and `None` where that was not told.
        overflow: Events were lost: everything may have changed.
    """

    nsid: int | None
    device: str
    overflow: bool = False
    master: int | None = None


class LinkWatch(Multicast[LinkChange]):
    """Events of links and metadata addresses."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE, _GROUPS, "the host's devices")

    def parse(self, message: Message, nsid: int | None) -> Iterator[LinkChange]:
        """See `Multicast.parse`."""
        kind, payload = message.kind, message.payload
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            link = parse_link(payload)
            # A port that leaves its bridge is told as one that is deleted, by family AF_BRIDGE.
            yield LinkChange(nsid, link.name, master=link.master if kind == RTM_NEWLINK else 0)
        elif kind in (RTM_NEWADDR, RTM_DELADDR) and parse_address(payload, {}) is not None:
            yield LinkChange(nsid, _name_of(address_index(payload)) if nsid is None else "")

    def overflow(self) -> LinkChange:
        """See `Multicast.overflow`."""
        return LinkChange(None, "", overflow=True)


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENODEV):
            raise host_refused(f"look up device {index}", error) from error
        return ""
