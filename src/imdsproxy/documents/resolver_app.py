"""ASGI application of the resolver: it identifies the guest and sends the request back to HAProxy, which answers.

The resolver forwards a guest's first request, and any request without a Content-Length, to HAProxy's frontend `found`,
with the record that HAProxy's maps lack. So HAProxy alone handles policy, tokens, endpoints, health, TLS, deadlines and
retries. The resolver passes the answer to the guest byte for byte.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Final, TypeAlias, cast
from weakref import WeakValueDictionary

import httpcore
import structlog

from imdsproxy.documents import http
from imdsproxy.documents.dialects.respond import Answer, Header, refusal, retry_later
from imdsproxy.documents.resolver import Resolver
from imdsproxy.model import wire
from imdsproxy.model.entities import NetworkId, Scope
from imdsproxy.model.identity import Denial
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.wire import MISMATCH_TEXT, UNKNOWN_TEXT, MapRecord, render_map_value

_OURS: Final = "x-imdsproxy-"
_PASSED_ON: Final = frozenset({wire.HEADER_FORWARDED, wire.HEADER_AUDIENCE, wire.HEADER_NONCE})
_REFUSED: Final = wire.HEADER_REFUSED.encode("ascii"), b"1"
_UNAVAILABLE: Final = 503
_CHANGES_NOTHING: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT"})
_BODILESS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_HOP_BY_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding"})


@dataclass(frozen=True, slots=True)
class GuestRequest:
    """Complete request of a guest, with its origin.

    Attributes:
        target: Path and query as the guest sent them.
        headers: The guest's headers that HAProxy passed on, and HAProxy's own.
        port: The guest's port, if the kernel has not yet checked the address together with its MAC.
        by_operator: Whether an operator sent the request; it then uses none of the network's share, and does not count
            as the guest's.
    """

    key: AddressKey
    method: str
    target: bytes
    headers: tuple[Header, ...] = ()
    body: bytes = b""
    scope: Scope | None = None
    port: int | None = None
    by_operator: bool = False


Forward: TypeAlias = Callable[[MapRecord, GuestRequest, http.Send], Awaitable[None]]
"""Function that sends a request to HAProxy and the answer to the guest; 503 if HAProxy gives no answer."""


def resolver_app(resolver: Resolver, forward: Forward) -> http.AsgiApp:
    async def app(scope: http.Scope, receive: http.Receive, send: http.Send) -> None:
        request = _parse_request(scope)
        if request is None:
            # Only HAProxy can reach this socket; a request without an identity is HAProxy's own check.
            status = 200 if scope["raw_path"] == http.LIVENESS_PATH else 400
            await http.send_answer(refusal(status), send)
            return
        body = await http.read_body(receive)
        if isinstance(body, Answer):
            await _refuse(request, body, send)
        elif body is not None:
            # HAProxy may already have answered 503. If a POST were still sent then, it would arrive twice.
            await http.while_there(receive, answer(replace(request, body=body), send))

    async def answer(request: GuestRequest, send: http.Send) -> None:
        outcome = await resolver.resolve(request.key, request.scope, request.port)
        if isinstance(outcome, Denial):
            await _refuse(request, _deny(outcome, request.method), send)
        elif request.port is not None and request.method not in _CHANGES_NOTHING:
            # The sender is not verified yet. After the verification the guest sends the request again.
            await _refuse(request, retry_later(), send)
        else:
            await forward(outcome, request, send)

    return app


async def _refuse(request: GuestRequest, answer: Answer, send: http.Send) -> None:
    if request.port is not None:
        # The answer has no data of an instance, so the MAC filter lets it through to any MAC.
        answer = replace(answer, headers=(*answer.headers, _REFUSED))
    await http.send_answer(answer, send)


def _deny(denial: Denial, method: str) -> Answer:
    status = denial.status
    if status == _UNAVAILABLE:
        return retry_later()
    # Clients request tokens with PUT, and some take any body for a token.
    if method == "PUT":
        return refusal(status)
    answer = refusal(status, text=MISMATCH_TEXT if denial is Denial.MISMATCH else UNKNOWN_TEXT)
    return replace(answer, body=b"") if method == "HEAD" else answer


def _parse_request(scope: http.Scope) -> GuestRequest | None:
    """Parse HAProxy's request without its body; return `None` if a header of ours is missing or repeated."""
    headers = tuple(cast("Iterable[Header]", scope["headers"]))
    text = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    sent = [(name, value) for name, value in text if name.startswith(_OURS)]
    ours = dict(sent)
    if len(ours) < len(sent) or not {wire.HEADER_NETWORK, wire.HEADER_ADDRESS} <= ours.keys():
        return None
    target, port = ours.get(wire.HEADER_TARGET, ""), ours.get(wire.HEADER_UNVERIFIED)
    try:
        return GuestRequest(
            (NetworkId(ours[wire.HEADER_NETWORK]), ip_address(ours[wire.HEADER_ADDRESS])),
            cast("str", scope["method"]),
            target.encode("latin-1") or cast("bytes", scope["raw_path"]),
            headers,
            scope=Scope(ours[wire.HEADER_SCOPE]) if wire.HEADER_SCOPE in ours else None,
            port=None if port is None else int(port),
        )
    except ValueError:
        return None


@dataclass(slots=True)
class CollectedAnswer:
    """Answer that is collected instead of sent on; `take` is its `send`."""

    status: int = 0
    headers: tuple[Header, ...] = ()
    body: bytearray = field(default_factory=bytearray)

    async def take(self, message: MutableMapping[str, object]) -> None:
        if message["type"] == "http.response.start":
            self.status = cast("int", message["status"])
            self.headers = tuple(cast("Iterable[Header]", message["headers"]))
        else:
            self.body += cast("bytes", message["body"])


def found_forwarder(socket: str, timeout_s: float, *, per_network: int = 16) -> Forward:
    """Return a function that forwards requests to HAProxy's frontend `found`, whose own deadlines are shorter.

    A guest that reads slowly can occupy a connection as long as it likes. So each network has a limited share of the
    connections, and its further requests wait for one.
    """
    # No keep-alive: such connections would stay with a worker that drains after a reload, and misses are rare.
    pool = httpcore.AsyncConnectionPool(
        uds=socket, max_connections=256, max_keepalive_connections=0, retries=0
    )
    limits = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)
    shares: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def forward(record: MapRecord, request: GuestRequest, send: http.Send) -> None:
        network, started = "" if request.by_operator else request.key[0], False
        asked = pool.stream(
            request.method,
            httpcore.URL(scheme=b"http", host=b"haproxy", port=80, target=request.target),
            headers=list(_headers(record, request)),
            content=request.body or None,
            extensions={"timeout": limits},
        )
        try:
            async with (
                shares.setdefault(network, asyncio.Semaphore(per_network)),
                asked as response,
            ):
                sent = ((name.lower(), value) for name, value in response.headers)
                headers = [one for one in sent if one[0].decode("latin-1") not in _HOP_BY_HOP]
                started, status = True, response.status
                await send({"type": "http.response.start", "status": status, "headers": headers})
                async for chunk in response.aiter_stream():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            reason = f"{type(error).__name__}: {error}"
            structlog.get_logger().warning(
                "haproxy did not answer a forwarded request", error=reason
            )
            if started:
                # The answer is incomplete, and the guest must notice: the server closes its connection.
                raise
            await http.send_answer(retry_later(), send)

    return forward


def _headers(record: MapRecord, request: GuestRequest) -> Iterable[tuple[str | bytes, str | bytes]]:
    for name, value in request.headers:
        text = name.decode("latin-1")
        if text in _PASSED_ON or not (
            text.startswith(_OURS) or text in _HOP_BY_HOP or text == "content-length"
        ):
            yield name, value
    yield wire.HEADER_RECORD, render_map_value(record)
    yield wire.HEADER_NETWORK, request.key[0]
    yield wire.HEADER_ADDRESS, str(request.key[1])
    if request.by_operator:
        yield wire.HEADER_OPERATOR, "yes"
    if request.body or request.method not in _BODILESS:
        yield "content-length", str(len(request.body))
