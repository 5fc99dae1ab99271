"""HTTP for our own servers: answers, what an ASGI application (ASGI 3) reads and sends, and uvicorn's protocol.

`uvicorn.Server` wakes ten times a second and takes over signals; this only listens and, at the end, drains.
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

from imdsproxy.core.compiled import Blob
from imdsproxy.core.documents.respond import Answer, refusal

Scope: TypeAlias = Mapping[str, object]
Message: TypeAlias = MutableMapping[str, object]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[..., Awaitable[None]]
"""FastAPI's, Starlette's and our own spell the three arguments each in their way."""

BODY_LIMIT: Final = 64 * 1024
"""Bytes of a request's body; the largest that means anything is a password of 1,020."""

LIVENESS_PATH: Final = b"/livez"
"""Answered 200 to a request that names no instance: HAProxy's check."""

_CHUNK: Final = 256 * 1024
_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 300
"""Longer than HAProxy keeps an idle connection to a server, so that it is HAProxy who closes."""

_TOGETHER: Final = 64 * 1024
_READ_SIZE: Final = 16 * 1024
_INTERIM: Final = b"HTTP/1.1 100 "
_INTERIM_LENGTH: Final = len(_INTERIM)
_GRACE_S: Final = 1.0
_LINGER_S: Final = 1.0
_DRAIN_POLL_S: Final = 0.02


async def read_body(receive: Receive) -> bytes | Answer | None:
    """The request's whole body, however it is framed; at most `BODY_LIMIT` bytes of it are ever held.

    413 where it is longer, `None` where the client went away before it was complete.
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
    """Do something for a client whose body was read, until it is done or the client has gone away."""
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
    """Send an answer; of a file only so much is in memory as the client has not yet taken.

    Args:
        answer: What to send.
        send: Takes ASGI's messages.
        file: What an answer's `Blob` is of; it is closed.
    """
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
    """A transport that sends an answer's head and body together.

    uvicorn writes them apart. A worker killed in between would leave a begun answer, which HAProxy can neither
    finish nor ask of another worker. It is one system call less, too.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
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

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


class _Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        if hasattr(transport, "max_size"):
            # asyncio makes a buffer of 256 KiB for each read, which malloc fetches from the kernel and gives back
            # again and again: a third of a request's time. HAProxy sends at most 16 KiB at once.
            transport.max_size = _READ_SIZE
        self._whole = _WholeAnswers(transport)
        super().connection_made(cast("asyncio.Transport", self._whole))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # uvicorn adds trailers to the headers of the request that is being answered. Headers are HAProxy's word, and
        # trailers the guest's: they are dropped.
        self.headers = []

    def on_response_complete(self) -> None:
        self._whole.flush()
        super().on_response_complete()


@contextlib.asynccontextmanager
async def serving(app: AsgiApp, listener: socket.socket, *, grace_s: float) -> AsyncIterator[None]:
    """Answer requests on a listening socket, which is closed at the end.

    Then no more are accepted, and those that have begun have so long to finish. A connection on which nothing is asked
    just then may have a request on its way: for a moment it gets its answer, which also asks the client to close,
    before idle ones are closed from here.
    """
    config, state, loop = _config(app), ServerState(), asyncio.get_running_loop()
    protocol = partial(_Protocol, config=config, server_state=state, app_state={})
    server = await loop.create_server(protocol, sock=listener, backlog=_BACKLOG)
    try:
        yield
    finally:
        state.default_headers = [(b"connection", b"close")]
        deadline = loop.time() + grace_s
        # A client may have found the socket a moment ago and be connected only now.
        await asyncio.sleep(_DRAIN_POLL_S)
        for accepting in server.sockets:
            loop.remove_reader(accepting.fileno())
        # asyncio loses a connection whose server is closed in the turn of the loop in which it was accepted.
        await asyncio.sleep(0)
        server.close()
        # A connection that has just been accepted is among those known only after a turn of the loop.
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
        # Below that uvicorn writes a line for each request that is no proper HTTP: as many as a guest likes, who writes
        # the trailers.
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
    """`serving` until cancelled."""
    async with serving(app, listener, grace_s=_GRACE_S):
        await asyncio.Event().wait()
