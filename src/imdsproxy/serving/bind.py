"""The sockets that our own servers listen on. Apart from them: a socket is made before a server is loaded."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from imdsproxy.errors import HostRefused
from imdsproxy.host.refusal import host_refused

_BACKLOG: Final = 2048


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
        listener.listen(_BACKLOG)
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
