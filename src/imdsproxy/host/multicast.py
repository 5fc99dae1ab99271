"""What the kernel tells unasked: one netlink socket that hears every namespace with an id in ours.

NETLINK_LISTEN_ALL_NSID; `HostWatch` gives an id to those namespaces that are listened in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self, TypeVar

from imdsproxy.host.nlmessages import Message, iter_messages
from imdsproxy.host.refusal import host_refused
from imdsproxy.host.stream import Stream

_SOL_NETLINK: Final = 270
_LISTEN_ALL_NSID: Final = 8
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 4 * 1024 * 1024
_RECEIVE_BYTES: Final = 32 * 1024
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4)
_AT_ONCE: Final = 256
"""Datagrams taken before others have their turn: a guest can make the kernel tell a lot."""

T = TypeVar("T")


class Multicast(Stream[T], ABC):
    """An asynchronous context manager and iterator of what groups tell.

    Args:
        protocol: `socket.NETLINK_ROUTE` or NETLINK_NETFILTER (12).
        groups: Their numbers.
        about: What they tell of, for an error's message.

    Attributes:
        hears_all: Whether other namespaces are heard too (takes CAP_NET_BROADCAST).
    """

    def __init__(self, protocol: int, groups: Iterable[int], about: str) -> None:
        super().__init__()
        self._protocol = protocol
        self._groups = sum(1 << (group - 1) for group in groups)
        self._about = about
        self.hears_all = False

    @abstractmethod
    def parse(self, message: Message, nsid: int | None) -> Iterable[T]:
        """What a message says; `nsid` is the namespace's id, `None` for our own."""

    @abstractmethod
    def overflow(self) -> T:
        """What is told when messages were lost."""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            self._socket = socket.socket(socket.AF_NETLINK, flags, self._protocol)
            with contextlib.suppress(PermissionError):  # a small buffer overflows, and says so
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(_SOL_NETLINK, _LISTEN_ALL_NSID, 1)
                self.hears_all = True
            self._socket.bind((0, self._groups))
        except OSError as error:
            raise host_refused(f"watch {self._about}", error) from error
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

    def _ready(self) -> None:
        self._attempt(self._take)

    def _take(self) -> None:
        try:
            self._receive()
        except OSError as error:
            raise host_refused(f"hear of {self._about}", error) from error

    def _receive(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE_BYTES, _ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._tell(self.overflow())
                continue
            nsid = _nsid_of(ancillary)
            for kind, _, _, payload in iter_messages(data):
                for told in self.parse(Message(kind, payload), nsid):
                    self._tell(told)


def _nsid_of(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, value in ancillary:
        if (level, kind) == (_SOL_NETLINK, _LISTEN_ALL_NSID):
            (nsid,) = struct.unpack("=i", value[:4])
            return int(nsid) if nsid >= 0 else None
    return None
