"""An ASGI application on a unix socket: uvicorn's HTTP protocol without its process handling.

`uvicorn.Server` wakes ten times a second and takes over signals; this only listens and, at the end, drains.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from imdsproxy.errors import HostRefused
from imdsproxy.host.refusal import host_refused
from imdsproxy.serving.asgi import AsgiApp

__all__ = ["HttpListener", "open_unix_socket"]

_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 300
"""Longer than HAProxy keeps an idle connection to a server, so that it is HAProxy who closes."""

_LINGER_S: Final = 0.3
_DRAIN_POLL_S: Final = 0.02


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


class HttpListener:
    """Serves one application on any number of sockets within the running loop."""

    def __init__(self, app: AsgiApp) -> None:
        self._config = Config(
            cast("object", app),  # type: ignore[arg-type] # its own alias wants its own TypedDicts
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        self._config.load()
        self._state = ServerState()
        self._servers: list[asyncio.Server] = []

    async def open(self, listener: socket.socket) -> None:
        """Accept connections of a listening socket; it is closed by `close`."""
        loop = asyncio.get_running_loop()
        self._servers.append(
            await loop.create_server(self._protocol, sock=listener, backlog=_BACKLOG)
        )

    def _protocol(self) -> HttpToolsProtocol:
        return HttpToolsProtocol(config=self._config, server_state=self._state, app_state={})

    async def close(self, *, grace_s: float) -> None:
        """Accept no more, let requests finish for so long, then end what is left.

        A connection on which nothing is asked just now may have a request on its way: for a moment it gets its
        answer, which also asks the client to close, before idle ones are closed from here.
        """
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._state.default_headers = [(b"connection", b"close")]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        # A connection that has just been accepted is among those known only after a turn of the loop.
        await asyncio.sleep(_DRAIN_POLL_S)
        await self._drain(min(loop.time() + _LINGER_S, deadline))
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._drain(deadline)
        for task in list(self._state.tasks):
            task.cancel()

    async def _drain(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while self._state.connections and loop.time() < deadline:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(_DRAIN_POLL_S)
