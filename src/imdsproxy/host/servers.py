"""The sockets that our own servers listen on. Apart from them: a socket is made before a server is loaded."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from imdsproxy.errors import HostRefused
from imdsproxy.host.refusal import host_refused

_BACKLOG: Final = 128
_UNIX_BACKLOG: Final = 2048


def open_sole_socket(path: Path, *, mode: int, owner: tuple[int, int]) -> socket.socket:
    """A listening unix socket that is not taken away from a living process.

    Args:
        path: Where clients find it.
        mode: Permission bits.
        owner: User and group ids, -1 to leave one.

    Raises:
        HostRefused: Another process listens there, or it cannot be bound.
        PrivilegeMissing: This process may not do that there.
    """
    _refuse_living(path)
    listener = open_unix_socket(path, mode=mode)
    try:
        os.chown(path, *owner)
    except OSError as error:
        listener.close()
        raise host_refused(f"give {path} to its owner", error) from error
    return listener


def open_datagram_socket(path: Path, *, mode: int, owner: tuple[int, int]) -> socket.socket:
    """A unix socket for datagrams, in place of whatever was there.

    Args:
        path: Where clients find it.
        mode: Permission bits.
        owner: User and group ids, -1 to leave one.

    Raises:
        HostRefused: It cannot be bound.
        PrivilegeMissing: This process may not do that there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        path.chmod(mode)
        os.chown(path, *owner)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise host_refused(f"listen on {path}", error) from error
    return listener


def _refuse_living(path: Path) -> None:
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise HostRefused(f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError as error:
            raise host_refused(f"find out who listens on {path}", error) from error
    raise HostRefused(
        f"another process listens on {path}", hint="is another controller running? imdsproxy status"
    )


def open_tcp_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        HostRefused: The address is not there, or the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise host_refused(f"listen on {host} port {port}", error) from error
    return listener


def open_unix_socket(path: Path, *, mode: int, group: int | None = None) -> socket.socket:
    """A listening stream socket at `path`, there at once with its mode and group.

    It takes the place of whatever socket was there: connections go to the new one from one moment to the next.

    Args:
        path: Where clients find it; the directory must exist.
        mode: Permission bits; a client needs to write.
        group: The group id; `None` leaves this process's.

    Raises:
        HostRefused: It cannot be bound there.
        PrivilegeMissing: This process may not do that there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        temporary.unlink(missing_ok=True)
        listener.bind(os.fspath(temporary))
        if group is not None:
            os.chown(temporary, -1, group)
        temporary.chmod(mode)
        listener.listen(_UNIX_BACKLOG)
        listener.setblocking(False)
        temporary.replace(path)
    except OSError as error:
        listener.close()
        with suppress(OSError):
            temporary.unlink()
        if error.errno is None:
            raise HostRefused(
                f"cannot listen on {path}: {error}",
                hint="a unix socket's path has at most 107 bytes: choose a shorter runtime directory",
            ) from error
        raise host_refused(f"listen on {path}", error) from error
    return listener
