"""Packets as a guest's device gets them: hop limit, DSCP and content."""

import socket
import struct
from dataclasses import dataclass
from typing import Self

from support.guest import Guest
from support.impostor import open_wire
from support.patience import patience


@dataclass(frozen=True, slots=True)
class Packet:
    limit: int
    dscp: int
    tcp: bytes


class Wire:
    """Packets that come in by a guest's device."""

    def __init__(self, guest: Guest) -> None:
        self._socket = open_wire(
            guest.namespace, guest.device, timeout_s=5 * patience(), kind=socket.SOCK_DGRAM
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def seen(self, text: bytes) -> Packet:
        """Return the next packet that came in with this text."""
        while True:
            data, (_, _, kind, *_) = self._socket.recvfrom(65_536)
            packet = _parse(data)
            if kind != socket.PACKET_OUTGOING and packet is not None and text in packet.tcp:
                return packet


def _parse(data: bytes) -> Packet | None:
    version = data[0] >> 4
    if version == 4 and data[9] == socket.IPPROTO_TCP:
        return Packet(data[8], data[1] >> 2, data[(data[0] & 15) * 4 :])
    if version == 6 and data[6] == socket.IPPROTO_TCP:
        return Packet(data[7], (struct.unpack(">H", data[:2])[0] >> 6) & 63, data[40:])
    return None
