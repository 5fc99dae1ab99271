"""ASGI applications served inside the controller, on sockets that exist before anything else starts."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from imdsproxy.errors import HostRefused

__all__ = ["open_tcp_socket", "open_unix_socket", "serve"]

_BACKLOG = 1024


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the controller has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def open_unix_socket(
    path: Path, *, mode: int, owner: tuple[int, int] | None = None
) -> socket.socket:
    """A listening socket at `path`, in place at once and with its mode from the start.

    A socket that somebody still listens on is not taken away.

    Raises:
        HostRefused: The path is in use, too long, or the file system refuses.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _refuse_living(path)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        listener.bind(str(temporary))
        temporary.chmod(mode)
        if owner is not None:
            os.chown(temporary, *owner)
        listener.listen(_BACKLOG)
        temporary.rename(path)
    except OSError as error:
        listener.close()
        raise HostRefused(
            f"cannot listen on {path}: {error.strerror or error}",
            hint="a socket's path has at most 107 bytes" if len(str(path)) > 100 else "",  # noqa: PLR2004 - sun_path
        ) from error
    except HostRefused:
        listener.close()
        raise
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
    except OSError as error:
        listener.close()
        raise HostRefused(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


async def serve(app: Callable[..., Any], listener: socket.socket) -> None:
    """Serve until cancelled."""
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        lifespan="off",
        http="httptools",
        ws="none",
        server_header=False,
        date_header=False,
        timeout_keep_alive=90,
        timeout_graceful_shutdown=1,
        backlog=_BACKLOG,
    )
    server = _Server(config)
    await server.serve(sockets=[listener])
