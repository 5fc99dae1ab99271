"""An ASGI application on a unix socket: uvicorn's HTTP protocol without its process handling.

`uvicorn.Server` wakes ten times a second and takes over signals; this only listens and, at the end, drains.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final, cast

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from imdsproxy.serving.asgi import AsgiApp

_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 300
"""Longer than HAProxy keeps an idle connection to a server, so that it is HAProxy who closes."""

_TOGETHER: Final = 64 * 1024
_READ_SIZE: Final = 16 * 1024
_INTERIM: Final = b"HTTP/1.1 100 "
_INTERIM_LENGTH: Final = len(_INTERIM)
_LINGER_S: Final = 1.0
_DRAIN_POLL_S: Final = 0.02


class _WholeAnswers(asyncio.Transport):
    """A transport that sends an answer's head and body together.

    uvicorn writes them apart. A worker killed in between would leave a begun answer, which HAProxy can neither
    finish nor ask of another worker. It is one system call less, too.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._parts: list[bytes] = []
        self._length = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it until `flush`, unless it is long, or what the client waits for before it goes on."""
        self._parts.append(bytes(data))
        self._length += len(data)
        if self._length > _TOGETHER or data[:_INTERIM_LENGTH] == _INTERIM:
            self.flush()

    def flush(self) -> None:
        """Send what is kept, in one piece."""
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._length = 0
            self._transport.write(data)

    def close(self) -> None:
        """Send what is left, then close."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        """Take no more from the client."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take more from the client."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> object:
        """What the socket's transport says."""
        return self._transport.get_extra_info(name, default)


class _Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        if hasattr(transport, "max_size"):
            # asyncio makes a buffer of 256 KiB for each read, which malloc fetches from the kernel and gives back
            # again and again: a third of a request's time. HAProxy sends at most 16 KiB at once.
            transport.max_size = _READ_SIZE
        self._whole = _WholeAnswers(transport)
        super().connection_made(self._whole)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # uvicorn adds trailers to the headers of the request that is being answered. Headers are HAProxy's word, and
        # trailers the guest's: they are dropped.
        self.headers = []

    def on_response_complete(self) -> None:
        self._whole.flush()
        super().on_response_complete()


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

    def _protocol(self) -> _Protocol:
        return _Protocol(config=self._config, server_state=self._state, app_state={})

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
        while self._state.connections and loop.time() < deadline:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(_DRAIN_POLL_S)
