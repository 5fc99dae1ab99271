"""Requests that come back from the resolver to HAProxy: a guest's first one, and what has no Content-Length.

They are handed to HAProxy's frontend `found` with the record that its maps do not have yet, so that policy, tokens,
endpoints, health, TLS, deadlines and retries are HAProxy's alone. What comes back goes to the guest byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

import httpcore
import structlog

from imdsproxy.core.documents.respond import Header
from imdsproxy.core.wire import (
    HEADER_ADDRESS,
    HEADER_FORWARDED,
    HEADER_NETWORK,
    HEADER_OPERATOR,
    HEADER_RECORD,
)
from imdsproxy.serving.asgi import Send, send_answer
from imdsproxy.serving.documents import retry_later

_OURS: Final = b"x-imdsproxy-"
_FORWARDED: Final = HEADER_FORWARDED.encode("ascii")
_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"content-length"}
)
_BODILESS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class FoundRequest:
    """A guest's request and the record that says where it goes.

    Attributes:
        record: The map value (`core.wire.MapRecord`).
        address: The guest's, as text.
        target: Path and query as the guest sent them.
        headers: What HAProxy let through of the guest's.
        network: Where it asks from.
        by_operator: It takes nothing of the network's share, and is not counted as the guest's.
    """

    record: str
    network: str
    address: str
    method: str
    target: bytes
    headers: tuple[Header, ...]
    body: bytes
    by_operator: bool = False


class Forwarder(Protocol):
    """Sends a request to HAProxy and the answer to the guest."""

    async def forward(self, request: FoundRequest, send: Send) -> None:
        """Always answers: 503 where no answer can be had."""
        ...


@dataclass(slots=True)
class CollectedAnswer:
    """An answer that is looked at instead of sent on; `take` is its `send`."""

    status: int = 0
    headers: tuple[Header, ...] = ()
    body: bytearray = field(default_factory=bytearray)

    async def take(self, message: MutableMapping[str, object]) -> None:
        """One of ASGI's messages."""
        if message["type"] == "http.response.start":
            self.status = cast("int", message["status"])
            self.headers = tuple(cast("Iterable[Header]", message["headers"]))
        else:
            self.body += cast("bytes", message["body"])


@dataclass(slots=True)
class FoundForwarder:
    """By HAProxy's frontend `found`.

    A guest that reads its answer slowly keeps a connection as long as it likes. So no network has more than its
    share of them at once; what else it asks waits for these.

    Args:
        socket: Its path.
        timeout_s: The longest that HAProxy may take; it has deadlines of its own, which are shorter.
        per_network: A network's share of the connections.
    """

    socket: str
    timeout_s: float
    per_network: int = 16
    _pool: httpcore.AsyncConnectionPool = field(init=False)
    _shares: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    _askers: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # Kept connections would stay with a worker that drains after a reload; a miss is rare.
        self._pool = httpcore.AsyncConnectionPool(
            uds=self.socket, max_connections=256, max_keepalive_connections=0, retries=0
        )

    async def forward(self, request: FoundRequest, send: Send) -> None:
        """Send the request; then pass head and body on as they come."""
        async with self._share("" if request.by_operator else request.network):
            await self._forward(request, send)

    @contextlib.asynccontextmanager
    async def _share(self, network: str) -> AsyncIterator[None]:
        share = self._shares.setdefault(network, asyncio.Semaphore(self.per_network))
        self._askers[network] += 1
        try:
            async with share:
                yield
        finally:
            self._askers[network] -= 1
            if not self._askers[network]:
                del self._askers[network], self._shares[network]

    async def _forward(self, request: FoundRequest, send: Send) -> None:
        started = False
        limits = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout_s)
        try:
            async with self._pool.stream(
                request.method,
                httpcore.URL(scheme=b"http", host=b"haproxy", port=80, target=request.target),
                headers=list(_headers(request)),
                content=request.body or None,
                extensions={"timeout": limits},
            ) as response:
                headers = [
                    (name.lower(), value)
                    for name, value in response.headers
                    if name.lower() not in {b"connection", b"keep-alive", b"transfer-encoding"}
                ]
                started = True
                await send(
                    {"type": "http.response.start", "status": response.status, "headers": headers}
                )
                async for chunk in response.aiter_stream():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            structlog.get_logger().warning(
                "request not handed to haproxy", error=f"{type(error).__name__}: {error}"
            )
            if started:
                # The guest must see that the answer is not whole: the server closes its connection.
                raise
            await send_answer(retry_later(), send)


def _headers(request: FoundRequest) -> Iterable[Header]:
    for name, value in request.headers:
        if name == _FORWARDED or (not name.startswith(_OURS) and name not in _HOP_BY_HOP):
            yield name, value
    yield HEADER_RECORD.encode(), request.record.encode()
    yield HEADER_NETWORK.encode(), request.network.encode()
    yield HEADER_ADDRESS.encode(), request.address.encode()
    if request.by_operator:
        yield HEADER_OPERATOR.encode(), b"yes"
    if request.body or request.method not in _BODILESS:
        yield b"content-length", b"%d" % len(request.body)
