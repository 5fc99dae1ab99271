"""A guest that opens connections, sends nothing, and each second reopens connections that were closed.

usage: python -m bench.idle NETWORK SECONDS CONNECTIONS
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import time
from collections.abc import Sequence

from bench.lab import Lab

__all__ = ["main"]

_METADATA = ("169.254.169.254", 80)
_AGAIN_S = 1.0


def _open(lab: Lab, network: str, selector: selectors.BaseSelector) -> None:
    connection = lab.socket(network)
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        connection.connect(_METADATA)
    selector.register(connection, selectors.EVENT_READ)


def main(argv: Sequence[str]) -> int:
    """Hold the connections, then print how many were opened."""
    network, seconds, wanted = argv[0], float(argv[1]), int(argv[2])
    lab, selector, opened = Lab(), selectors.DefaultSelector(), 0
    end = time.perf_counter() + seconds
    due = 0.0
    while (now := time.perf_counter()) < end:
        if now >= due:
            due = now + _AGAIN_S
            while len(selector.get_map()) < wanted:
                _open(lab, network, selector)
                opened += 1
        # A connection that sends nothing becomes readable only at its end.
        for key, _ in selector.select(max(0.0, due - now)):
            selector.unregister(key.fileobj)
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
    sys.stdout.write(f"{opened} opened\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
