"""The admin socket while the controller starts: answers each request with 503 `starting` and the progress.

The module loads none of the admin API's libraries, so known guests do not wait for them.
"""

import asyncio
import json
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self

from imdsproxy.errors import Starting
from imdsproxy.model.wire import RETRY_AFTER_S
from imdsproxy.reconcile.progress import Step

_HEAD_BYTES: Final = 64 * 1024
_IDLE_S: Final = 10.0
_READ_SIZE: Final = 64 * 1024


class StartingServer:
    """Server on the admin socket until `end`, as an asynchronous context manager.

    Args:
        listener: The listening socket. It stays open: a client that connects between two servers waits for the next.
    """

    def __init__(
        self, listener: socket.socket, steps: Callable[[], Sequence[Step]] = tuple
    ) -> None:
        self.steps = steps
        self._listener = listener
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        # The server closes its socket at the end, so it gets its own descriptor.
        own = self._listener.dup()
        self._server = await asyncio.start_server(self._converse, sock=own, limit=_HEAD_BYTES)
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        await self.end()

    async def end(self) -> None:
        """Stop accepting connections; existing connections get their answer."""
        if self._server is None:
            return
        server, self._server = self._server, None
        for accepting in server.sockets:
            asyncio.get_running_loop().remove_reader(accepting.fileno())
        # asyncio loses a connection if its server is closed in the same turn of the loop.
        await asyncio.sleep(0)
        server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(
            TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
        ):
            try:
                async with asyncio.timeout(_IDLE_S):
                    await reader.readuntil(b"\r\n\r\n")
                writer.write(_render(self.steps()))
                # Closing now would cut off a client that still sends a body, before it reads the answer.
                while True:
                    async with asyncio.timeout(_IDLE_S):
                        if not await reader.read(_READ_SIZE):
                            break
            finally:
                writer.close()


def _render(steps: Sequence[Step]) -> bytes:
    error = Starting.at([asdict(step) for step in steps])
    body = {
        "status": error.http_status,
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "problems": [],
        "progress": [*error.steps],
    }
    raw = json.dumps(body).encode()
    status = HTTPStatus(error.http_status)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "Content-Type: application/problem+json\r\n"
        f"Content-Length: {len(raw)}\r\n"
        f"Retry-After: {RETRY_AFTER_S}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + raw
