"""Listening sockets of our own servers, in a module of their own, so that a socket can be opened before a server."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from imdsproxy.errors import DataplaneError, HostRefused, host_refused
from imdsproxy.host.files import Owner

_BACKLOG: Final = 128
_UNIX_BACKLOG: Final = 2048


@contextmanager
def _listener(family: int, kind: int, place: str) -> Iterator[socket.socket]:
    """Yield a socket for the block to bind; make the socket non-blocking afterwards, or close it on failure."""
    listener = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    try:
        yield listener
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno is None:
            raise HostRefused(
                f"cannot listen on {place}: {error}",
                hint="a unix socket's path has at most 107 bytes: choose a shorter runtime directory",
            ) from error
        raise host_refused(f"listen on {place}", error) from error


def open_tcp_socket(host: str, port: int) -> socket.socket:
    """Open a listening TCP socket; raise `HostRefused` if the address does not exist, or the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _listener(family, socket.SOCK_STREAM, f"{host} port {port}") as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    return listener


def try_tcp_listen(host: str, port: int) -> str | None:
    """Return why an address of the host cannot be listened on now, alone (no SO_REUSEPORT); `None` if it can."""
    try:
        open_tcp_socket(host, port).close()
    except DataplaneError as error:
        return error.message
    return None


def open_unix_socket(
    path: Path, *, mode: int, owner: Owner | None = None, kind: int = socket.SOCK_STREAM
) -> socket.socket:
    """Open a socket at `path`, which appears with its mode and owner set; a stream socket listens.

    The new socket replaces an existing one atomically: from then on connections go to the new socket. An owner id of -1
    stays this process's. Raises `HostRefused` if the socket cannot be bound there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _listener(socket.AF_UNIX, kind, str(path)) as listener:
        try:
            temporary.unlink(missing_ok=True)
            listener.bind(os.fspath(temporary))
            if owner is not None:
                os.chown(temporary, *owner)
            temporary.chmod(mode)
            if kind == socket.SOCK_STREAM:
                listener.listen(_UNIX_BACKLOG)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
    return listener
