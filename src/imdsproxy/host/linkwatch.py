"""Notices devices and metadata addresses as they come, change and go, here and in other namespaces.

One netlink socket hears the host's own namespace and every other one that has an id in it
(NETLINK_LISTEN_ALL_NSID); `HostWatch` gives an id to those that are listened in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from imdsproxy.errors import DataplaneError
from imdsproxy.host.netlink import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_NEWADDR,
    RTM_NEWLINK,
    address_index,
    parse_address,
    parse_link,
)
from imdsproxy.host.nlmessages import iter_messages
from imdsproxy.host.refusal import host_refused

__all__ = ["LinkChange", "LinkWatch"]

_SOL_NETLINK: Final = 270
_LISTEN_ALL_NSID: Final = 8
_GROUPS: Final = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 4 * 1024 * 1024
_RECEIVE_BYTES: Final = 32 * 1024
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4)


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


class LinkWatch:
    """Events of links and metadata addresses. An asynchronous context manager and iterator.

    Attributes:
        hears_all: Whether other namespaces are heard too (takes CAP_NET_BROADCAST).
    """

    def __init__(self) -> None:
        self._changes: asyncio.Queue[LinkChange | DataplaneError] = asyncio.Queue()
        self.hears_all = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            self._socket = socket.socket(socket.AF_NETLINK, flags, socket.NETLINK_ROUTE)
            with contextlib.suppress(PermissionError):  # a small buffer overflows, and says so
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
                self.hears_all = True
            self._socket.bind((0, _GROUPS))
        except OSError as error:
            raise host_refused("watch the host's devices", error) from error
        self._loop.add_reader(self._socket.fileno(), self._ready)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> LinkChange:
        change = await self._changes.get()
        if isinstance(change, DataplaneError):
            raise change
        return change

    def _ready(self) -> None:
        # What fails in here would only reach the event loop's log: the iterator raises it.
        try:
            self._take()
        except DataplaneError as error:
            self._changes.put_nowait(error)
        except OSError as error:
            self._changes.put_nowait(host_refused("hear of the host's devices", error))

    def _take(self) -> None:
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE_BYTES, _ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._changes.put_nowait(LinkChange(None, "", overflow=True))
                continue
            nsid = _nsid_of(ancillary)
            for device, master in _devices(data, local=nsid is None):
                self._changes.put_nowait(LinkChange(nsid, device, master=master))


def _nsid_of(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, value in ancillary:
        if (level, kind) == (_SOL_NETLINK, _LISTEN_ALL_NSID):
            (nsid,) = struct.unpack("=i", value[:4])
            return int(nsid) if nsid >= 0 else None
    return None


def _devices(data: bytes, *, local: bool) -> Iterator[tuple[str, int | None]]:
    for kind, _, _, payload in iter_messages(data):
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            link = parse_link(payload)
            # A port that leaves its bridge is told as one that is deleted, by family AF_BRIDGE.
            yield link.name, link.master if kind == RTM_NEWLINK else 0
        elif kind in (RTM_NEWADDR, RTM_DELADDR) and parse_address(payload, {}) is not None:
            yield (_name_of(address_index(payload)) if local else ""), None


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENODEV):
            raise host_refused(f"look up device {index}", error) from error
        return ""
