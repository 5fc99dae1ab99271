"""HTTP for our own servers: reading and answering requests of ASGI 3 applications, and uvicorn's protocol.

`uvicorn.Server` wakes ten times a second and installs signal handlers. This module only listens and, at the end, drains
connections.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, MutableMapping
from functools import partial
from typing import Any, BinaryIO, Final, TypeAlias, cast

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from imdsproxy.documents.compiled import Blob
from imdsproxy.documents.dialects.respond import Answer, refusal

Scope: TypeAlias = Mapping[str, object]
Message: TypeAlias = MutableMapping[str, object]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[..., Awaitable[None]]
"""ASGI application; FastAPI, Starlette and our own code name the three arguments differently."""

BODY_LIMIT: Final = 64 * 1024
"""Maximum size of a request's body, in bytes; the largest useful body is a password of 1,020."""

LIVENESS_PATH: Final = b"/livez"
"""Path that is answered 200 for a request that names no instance: HAProxy's check."""

_CHUNK: Final = 256 * 1024
_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 300
"""Time until an idle connection is closed, in seconds: longer than HAProxy's, so that HAProxy closes first."""

_TOGETHER: Final = 64 * 1024
_READ_SIZE: Final = 16 * 1024
_INTERIM: Final = b"HTTP/1.1 100 "
_INTERIM_LENGTH: Final = len(_INTERIM)
_GRACE_S: Final = 1.0
_LINGER_S: Final = 1.0
_DRAIN_POLL_S: Final = 0.02


async def read_body(receive: Receive) -> bytes | Answer | None:
    """Read the request's whole body, however it is framed, of at most `BODY_LIMIT` bytes.

    Return a 413 answer if the body is longer, `None` if the client disconnected early.
    """
    parts: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = cast("bytes", message.get("body", b""))
        length += len(part)
        if length > BODY_LIMIT:
            return refusal(413)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def while_there(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run work for a client whose body was read, until the work is done or the client has disconnected."""
    doing = asyncio.create_task(work)
    leaving = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not doing.done():
            doing.cancel()
        await asyncio.wait((doing, leaving))
    if not doing.cancelled():
        doing.result()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_answer(answer: Answer, send: Send, file: BinaryIO | None = None) -> None:
    """Send an answer; the file of a `Blob` is read only as fast as the client takes it, and closed afterwards."""
    headers = list(answer.headers)
    head = {"type": "http.response.start", "status": answer.status, "headers": headers}
    if isinstance(answer.body, bytes):
        await send(head)
        await send({"type": "http.response.body", "body": answer.body})
    elif file is not None:
        with file:
            await send(head)
            await _send_part(file, answer.body, send)


async def _send_part(file: BinaryIO, part: Blob, send: Send) -> None:
    file.seek(part.offset)
    left = part.length
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise EOFError(f"a compiled record ends {left} bytes early")
        left -= len(chunk)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class _WholeAnswers:
    """Transport that sends an answer's head and body together.

    uvicorn writes them separately. If the worker is killed in between, HAProxy has a partial answer that it can neither
    finish nor request from another worker. Writing both together also saves a system call.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._parts: list[bytes] = []
        self._length = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Hold data until `flush`, unless it is long, or an interim answer that the client waits for."""
        self._parts.append(bytes(data))
        self._length += len(data)
        if self._length > _TOGETHER or data[:_INTERIM_LENGTH] == _INTERIM:
            self.flush()

    def flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._length = 0
            self._transport.write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


class _Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        if hasattr(transport, "max_size"):
            # asyncio allocates a buffer of 256 KiB for each read, which malloc gets from the kernel and returns. That
            # takes a third of a request's time. HAProxy sends at most 16 KiB at once.
            transport.max_size = _READ_SIZE
        self._whole = _WholeAnswers(transport)
        super().connection_made(cast("asyncio.Transport", self._whole))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # uvicorn adds trailers to the headers of the current request. Headers come from HAProxy, but trailers from the
        # guest, so drop the trailers.
        self.headers = []

    def on_response_complete(self) -> None:
        self._whole.flush()
        super().on_response_complete()


@contextlib.asynccontextmanager
async def serving(app: AsgiApp, listener: socket.socket, *, grace_s: float) -> AsyncIterator[None]:
    """Answer requests on a listening socket, which is closed at the end.

    At the end it accepts no connections, and open requests get `grace_s` seconds to finish. An idle connection may have
    a request on its way. So idle connections stay open for a moment: such a request still gets its answer, which asks
    the client to close.
    """
    config, state, loop = _config(app), ServerState(), asyncio.get_running_loop()
    protocol = partial(_Protocol, config=config, server_state=state, app_state={})
    server = await loop.create_server(protocol, sock=listener, backlog=_BACKLOG)
    try:
        yield
    finally:
        state.default_headers = [(b"connection", b"close")]
        deadline = loop.time() + grace_s
        # A client may have found the socket a moment ago and connect only now.
        await asyncio.sleep(_DRAIN_POLL_S)
        for accepting in server.sockets:
            loop.remove_reader(accepting.fileno())
        # asyncio loses a connection if the server closes in the same turn of the loop in which it was accepted.
        await asyncio.sleep(0)
        server.close()
        # A newly accepted connection is registered only after a turn of the loop.
        await asyncio.sleep(_DRAIN_POLL_S)
        await _drain(state, min(loop.time() + _LINGER_S, deadline))
        for connection in list(state.connections):
            connection.shutdown()
        await _drain(state, deadline)
        for task in list(state.tasks):
            task.cancel()


def _config(app: AsgiApp) -> Config:
    config = Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        # At lower levels uvicorn writes a line for each malformed request, so a guest, who writes the trailers, could
        # flood the log.
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    config.load()
    return config


async def _drain(state: ServerState, deadline: float) -> None:
    loop = asyncio.get_running_loop()
    while state.connections and loop.time() < deadline:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(_DRAIN_POLL_S)


async def serve(app: AsgiApp, listener: socket.socket) -> None:
    async with serving(app, listener, grace_s=_GRACE_S):
        await asyncio.Event().wait()
