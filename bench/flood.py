"""A guest that invents source addresses, as a program with an interpreter of its own.

usage: python -m bench.flood NETWORK SECONDS CONNECTIONS_PER_S AT_ONCE
"""

from __future__ import annotations

import collections
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.lab import GUESTS, Lab

__all__ = ["main"]

_METADATA = ("169.254.169.254", 80)
_REQUEST = b"GET /latest/meta-data/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"
_FIRST = 0x8000
_SIZE = 0x7000


@dataclass(slots=True)
class _Flood:
    lab: Lab
    network: str
    selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    open: int = 0
    number: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    def begin(self) -> None:
        """Open one more connection, from an address without an owner."""
        self.number += 1
        connection = self.lab.socket(self.network)
        connection.setblocking(False)
        address = GUESTS.network[_FIRST + self.number % _SIZE]
        try:
            connection.bind((str(address), 0))
            connection.connect_ex(_METADATA)
        except OSError:
            self.counts["refused"] += 1
            connection.close()
            return
        self.open += 1
        self.selector.register(connection, selectors.EVENT_WRITE)

    def step(self, timeout_s: float) -> None:
        """Continue all connections that are ready."""
        for key, _ in self.selector.select(timeout_s):
            connection = key.fileobj
            if isinstance(connection, socket.socket):
                self._advance(connection, key.events)

    def _advance(self, connection: socket.socket, events: int) -> None:
        try:
            if events == selectors.EVENT_WRITE:
                connection.send(_REQUEST)
                self.selector.modify(connection, selectors.EVENT_READ)
                return
            self.counts[connection.recv(4096)[9:12].decode("ascii", "replace") or "closed"] += 1
        except OSError:
            self.counts["broken"] += 1
        self.selector.unregister(connection)
        connection.close()
        self.open -= 1


def main(argv: Sequence[str]) -> int:
    """Flood, then print the counts of answers."""
    network, seconds, rate, at_once = argv[0], float(argv[1]), float(argv[2]), int(argv[3])
    flood = _Flood(Lab(), network)
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < seconds:
        while flood.open < at_once and flood.number < now * rate:
            flood.begin()
        flood.step(0.001)
    sys.stdout.write(f"{flood.number} {dict(flood.counts)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
