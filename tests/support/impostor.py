"""A guest that takes its neighbour's address: it says so by ARP and ND all the time, listens to the wire, and asks."""

import contextlib
import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Self

from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import MacAddress
from support.guest import Background, Guest, Lost, inside
from support.lab import batch, ip

_ETH_P_ALL: Final = 3
_BROADCAST: Final = b"\xff" * 6
_ALL_NODES: Final = bytes.fromhex("333300000001")
_PAUSE_S: Final = 0.0005

FIN, SYN, RST, ACK = 1, 2, 4, 16
"""Flags of TCP."""


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _checksum(data: bytes) -> bytes:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def _arp(
    mac: bytes, address: bytes, target: bytes, *, answer: bool, to: bytes = _BROADCAST
) -> bytes:
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2 if answer else 1)
    return to + mac + b"\x08\x06" + head + mac + address + bytes(6) + target


def _neighbour_advertisement(mac: bytes, address: bytes, *, to: bytes = _ALL_NODES) -> bytes:
    # Unsolicited, with the flag that overrides what is known (RFC 4861 §4.4).
    body = b"\x88\0\0\0" + struct.pack("!I", 0x20000000) + address + b"\x02\x01" + mac
    # Its own address, as one sends that is not to be noticed.
    ends = link_local_of(MacAddress(mac.hex(":"))).packed, IPv6Address("ff02::1").packed
    return to + mac + _packet6(ends, 58, body, 2)


def _packet6(ends: tuple[bytes, bytes], protocol: int, body: bytes, at: int) -> bytes:
    """What follows the MACs in a frame of IPv6 with these addresses; its body has the checksum `at`."""
    pseudo = b"".join(ends) + struct.pack("!II", len(body), protocol)
    body = body[:at] + _checksum(pseudo + body) + body[at + 2 :]
    head = struct.pack("!IHBB", 6 << 28, len(body), protocol, 255)
    return b"\x86\xdd" + head + b"".join(ends) + body


def claim_frame(mac: str, address: str, to: bytes) -> bytes:
    """An answer by ARP or ND that nobody has asked for: the address is at this MAC."""
    packed = ip_address(address).packed
    if ":" in address:
        return _neighbour_advertisement(_mac(mac), packed, to=to)
    return _arp(_mac(mac), packed, socket.inet_aton("169.254.169.254"), answer=True, to=to)


def tcp_frame(
    *,
    mac: str,
    to: bytes,
    source: str,
    ports: tuple[int, int],
    flags: int,
    numbers: tuple[int, int] = (1, 0),
    tags: bytes = b"",
) -> bytes:
    """A frame with a TCP segment to the metadata address, VLAN tags and all.

    Args:
        numbers: Of sequence and acknowledgement.
    """
    sender = ip_address(source).packed
    tcp = struct.pack("!HHIIBBHHH", *ports, *numbers, 5 << 4, flags, 65000, 0, 0)
    if ":" in source:
        target = IPv6Address("fe80::a9fe:a9fe").packed
        return to + _mac(mac) + tags + _packet6((sender, target), 6, tcp, 16)
    target = socket.inet_aton("169.254.169.254")
    pseudo = sender + target + struct.pack("!BBH", 0, 6, len(tcp))
    tcp = tcp[:16] + _checksum(pseudo + tcp) + tcp[18:]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 1, 0, 64, 6, 0, sender, target)
    head = head[:10] + _checksum(head) + head[12:]
    return to + _mac(mac) + tags + b"\x08\x00" + head + tcp


def syn_frame(
    *, mac: str, to: bytes, source: str, ports: tuple[int, int], tags: bytes = b""
) -> bytes:
    """The same with a SYN."""
    return tcp_frame(mac=mac, to=to, source=source, ports=ports, flags=SYN, tags=tags)


def mac_of_service(guest: Guest, to: str) -> bytes:
    """Where a guest sends what is for the metadata address."""
    shown = ip("-j", "-n", guest.namespace, "neigh", "show", to, "dev", guest.device)
    (entry,) = json.loads(shown)
    return _mac(entry["lladdr"])


def open_wire(
    namespace: str, device: str, *, timeout_s: float, kind: int = socket.SOCK_RAW
) -> socket.socket:
    """Hears every frame of a device, also for other MACs."""
    # One for a protocol would hear nothing of a bridge's port: the bridge takes the frames before it.
    wire = inside(
        namespace, lambda: socket.socket(socket.AF_PACKET, kind, socket.htons(_ETH_P_ALL))
    )
    wire.bind((device, 0))
    wire.settimeout(timeout_s)
    return wire


@dataclass(slots=True)
class Tries:
    """What the impostor got: how often which status (`None`: no answer), and every body."""

    statuses: Counter[int | None] = field(default_factory=Counter)
    bodies: set[bytes] = field(default_factory=set)

    @property
    def count(self) -> int:
        return self.statuses.total()


class Impostor(Background):
    """While in its `with` block, a guest has addresses of a neighbour's.

    Args:
        guest: Who does it.
        addresses: The neighbour's.

    Attributes:
        heard: Every frame that came for its MAC.
    """

    def __init__(self, guest: Guest, *addresses: str) -> None:
        super().__init__(self._flood, self._listen)
        self.guest = guest
        self.addresses = addresses
        self.heard = bytearray()

    def __enter__(self) -> Self:
        lines = [
            f"address add {address}/64 dev eth0 nodad"
            if ":" in address
            else f"address add {address}/24 dev eth0"
            for address in self.addresses
        ]
        batch(self.guest.namespace, lines)
        self._wire = open_wire(self.guest.namespace, self.guest.device, timeout_s=0.1)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._wire.close()
        batch(
            self.guest.namespace,
            [
                f"address del {address}/{64 if ':' in address else 24} dev eth0"
                for address in self.addresses
            ],
        )

    def _frames(self) -> Iterator[bytes]:
        mac = _mac(self.guest.mac)
        metadata = socket.inet_aton("169.254.169.254")
        for address in self.addresses:
            found = ip_address(address)
            packed = found.packed
            if isinstance(found, IPv4Address):
                yield _arp(mac, packed, packed, answer=False)
                yield _arp(mac, packed, packed, answer=True)
                yield _arp(mac, packed, metadata, answer=False)
            else:
                yield _neighbour_advertisement(mac, packed)

    def _flood(self) -> None:
        frames = tuple(self._frames())
        while not self._stop.is_set():
            for frame in frames:
                with contextlib.suppress(OSError):
                    self._wire.send(frame)
            time.sleep(_PAUSE_S)

    def _listen(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                frame = self._wire.recv(65_536)
                if frame[:6] == _mac(self.guest.mac):
                    self.heard += frame

    def try_for(
        self, seconds: float, target: str, *, source: str, to: str, at_least: int = 0
    ) -> Tries:
        """Ask as fast as it goes, from the neighbour's address; for longer where it goes slowly.

        Args:
            at_least: How often, unless it takes ten times as long.
        """
        tries, start = Tries(), time.monotonic()
        while (passed := time.monotonic() - start) < seconds or (
            tries.count < at_least and passed < 10 * seconds
        ):
            status = None
            with contextlib.suppress(Lost):
                reply = self.guest.ask(target, to=to, source=source, timeout_s=0.1)
                status = reply.status
                if status == 200:
                    tries.bodies.add(reply.body)
            tries.statuses[status] += 1
        return tries
