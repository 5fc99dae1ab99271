"""Health server: `/livez`, `/readyz` and `/metrics`, on an address of the host that no guest reaches.

The three answer whether the process's event loop is alive, whether guests get what the sources report, and all figures.
The server is read-only and needs no authentication: no answer has a guest's documents. A thread answers, so the server
works from the beginning of a start, and while that loop is stuck.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Self

from imdsproxy.model.wire import RETRY_AFTER_S

if TYPE_CHECKING:
    import socket

    from imdsproxy.api.exposition import Exposed

_ROUTES: Final = ("/livez", "/readyz", "/metrics")
_END: Final = b"\r\n\r\n"
# The pattern scans no run of spaces twice, which would block the interpreter and the controller.
_ACCEPT: Final = re.compile("^accept:(.*)", re.IGNORECASE | re.MULTILINE)
_HEAD_S: Final = 5.0
_HEAD_BYTES: Final = 16 * 1024
_REPORT_S: Final = 5.0


class HealthServer:
    """Server in a thread of its own, as a context manager.

    Args:
        listener: A listening TCP socket; closed at the end.
        alive: Returns whether the process's loop makes progress; called in the thread.

    Attributes:
        reports: Metrics and readiness, read in the process's loop; unset while the process starts.
    """

    def __init__(
        self, listener: socket.socket, *, alive: Callable[[], bool], who: str = "the controller"
    ) -> None:
        self.reports: Exposed | None = None
        self._listener, self._alive, self._who = listener, alive, who
        self._asked, self._own = asyncio.get_running_loop(), asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._own.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._own) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._converse, sock=self._listener, limit=_HEAD_BYTES)
        await self._over.wait()
        server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client that sends no request, or does not read its answer, is disconnected.
        with suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
            try:
                async with asyncio.timeout(_HEAD_S):
                    try:
                        head = (await reader.readuntil(_END)).decode("latin-1")
                    except asyncio.LimitOverrunError:
                        head = ""
                answer = await self._answer(head)
                end = answer.index(_END) + len(_END) if head.startswith("HEAD ") else None
                writer.write(answer[:end])
                async with asyncio.timeout(_HEAD_S):
                    await writer.drain()
            finally:
                writer.close()

    async def _answer(self, head: str) -> bytes:
        method, target, *_ = f"{head}  ".split(" ", 2)
        path = target.partition("?")[0]
        if not path:
            return _reply(HTTPStatus.BAD_REQUEST, {"code": "bad-request"})
        if method not in {"GET", "HEAD"}:
            # RFC 9110 §15.5.6 requires the header.
            refusal = {"code": "method-not-allowed", "allowed": ["GET", "HEAD"]}
            return _reply(HTTPStatus.METHOD_NOT_ALLOWED, refusal, header="Allow: GET, HEAD\r\n")
        if path not in _ROUTES:
            return _reply(HTTPStatus.NOT_FOUND, {"code": "not-found", "routes": _ROUTES})
        if path == "/livez":
            alive = self._alive()
            status = HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE
            return _reply(status, {"alive": alive})
        reason = f"{self._who} is starting"
        if self.reports is not None:
            accept = _ACCEPT.search(head)
            report = self._report(self.reports, path, "" if accept is None else accept[1].strip())
            waiting = asyncio.run_coroutine_threadsafe(report, self._asked)
            with suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_S):
                    return await asyncio.wrap_future(waiting)
            reason = f"{self._who}'s event loop does not answer"
        return _readiness(reason)

    async def _report(self, reports: Exposed, path: str, accept: str) -> bytes:
        """Read a report; runs in the process's loop."""
        if path == "/metrics":
            await reports.prepare()
            content_type, text = reports.expose(accept)
            return _reply(HTTPStatus.OK, text, content_type)
        found = reports.readiness()
        return _readiness(*found.reasons, ready=found.ready, degraded=found.degraded)


def _readiness(*reasons: str, ready: bool = False, degraded: tuple[str, ...] = ()) -> bytes:
    body = {"ready": ready, "reasons": reasons, "degraded": degraded}
    if ready:
        return _reply(HTTPStatus.OK, body)
    header = f"Retry-After: {RETRY_AFTER_S}\r\n"
    return _reply(HTTPStatus.SERVICE_UNAVAILABLE, body, header=header)


def _reply(
    status: HTTPStatus, body: object, content_type: str = "application/json", header: str = ""
) -> bytes:
    if not isinstance(body, bytes):
        body = json.dumps(body, ensure_ascii=False).encode() + b"\n"
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"{header}"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + body
