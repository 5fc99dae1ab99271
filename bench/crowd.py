"""Many guests of a network that send one request each, at the same moment."""

from __future__ import annotations

import collections
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.lab import Lab

__all__ = ["Crowd", "ask_at_once"]

_RECEIVE: Final = 65536


@dataclass(frozen=True, slots=True)
class Crowd:
    """Outcome of a crowd.

    Attributes:
        statuses: Counts by status, `broken` for a connection that ended without an answer.
        seconds: Seconds of each 200, from the common start.
    """

    statuses: Mapping[str, int]
    seconds: Sequence[float]

    @property
    def share(self) -> float:
        """Share of guests that were answered 200."""
        return self.statuses.get("200", 0) / max(1, sum(self.statuses.values()))


def ask_at_once(
    lab: Lab,
    network: str,
    addresses: Sequence[str],
    path: str,
    *,
    port: int = 80,
    patience_s: float = 20.0,
) -> Crowd:
    """Send one request on a new connection from each address; the server closes after its answer.

    Args:
        lab: The lab with the network.
        network: The network's name.
        addresses: One address for each guest; addresses may repeat.
        path: The requested path.
        port: The port of the metadata address.
        patience_s: Seconds after which a guest without an answer counts as broken.
    """
    request = f"GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n".encode()
    opened: list[socket.socket] = []
    for address in addresses:
        one = lab.socket(network)
        one.setblocking(False)
        one.bind((address, 0))
        opened.append(one)
    statuses: collections.Counter[str] = collections.Counter()
    seconds: list[float] = []
    received: dict[int, bytes] = {}
    with selectors.DefaultSelector() as selector:
        began = time.perf_counter()
        for one in opened:
            one.connect_ex(("169.254.169.254", port))
            selector.register(one, selectors.EVENT_WRITE)
        while selector.get_map() and time.perf_counter() - began < patience_s:
            for key, events in selector.select(0.5):
                one = _socket_of(key)
                data = _advance(one, events, request, selector)
                if data is None:
                    continue
                if data:
                    received[key.fd] = received.get(key.fd, b"") + data
                    continue
                status = received.pop(key.fd, b"")[9:12].decode("ascii", "replace") or "broken"
                statuses[status] += 1
                if status == "200":
                    seconds.append(time.perf_counter() - began)
                selector.unregister(one)
        statuses["broken"] += len(selector.get_map())
    for one in opened:
        one.close()
    return Crowd(dict(+statuses), seconds)


def _socket_of(key: selectors.SelectorKey) -> socket.socket:
    """Return the socket of a selector's key."""
    assert isinstance(key.fileobj, socket.socket)  # noqa: S101 - for the type checker
    return key.fileobj


def _advance(
    one: socket.socket, events: int, request: bytes, selector: selectors.BaseSelector
) -> bytes | None:
    """Continue one connection; return received bytes, empty at the end, or `None` after sending."""
    try:
        if events & selectors.EVENT_WRITE:
            one.send(request)
            selector.modify(one, selectors.EVENT_READ)
            return None
        return one.recv(_RECEIVE)
    except OSError:
        return b""
