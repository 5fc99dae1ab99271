"""What crosses the devices of a network namespace, frame by frame."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final

from support.guest import inside

_EVERY_PROTOCOL: Final = 3
_SO_RCVBUFFORCE: Final = 33
_BUFFER: Final = 64 << 20
_LARGEST: Final = 1 << 17


@contextlib.contextmanager
def tapped(namespace: str, take: Callable[[bytes], None]) -> Iterator[None]:
    """Have every frame of a namespace, in a thread of its own."""
    done = threading.Event()

    def open_socket() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        made.settimeout(0.1)
        return made

    def read(tap: socket.socket) -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                take(tap.recv(_LARGEST))

    tap: socket.socket = inside(namespace, open_socket)
    thread = threading.Thread(target=read, args=(tap,))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        tap.close()
