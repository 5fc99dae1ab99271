"""The resolver as an ASGI application: who is it, then the answer that HAProxy cannot give yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import cast

from imdsproxy.core.documents.respond import DocumentRequest, Header
from imdsproxy.core.inventory import AddressKey
from imdsproxy.core.model import NetworkId
from imdsproxy.core.model import Scope as IdScope
from imdsproxy.core.wire import (
    HEADER_ADDRESS,
    HEADER_NETWORK,
    HEADER_SCOPE,
    HEADER_TARGET,
    UNKNOWN_TEXT,
)
from imdsproxy.serving.asgi import (
    LIVENESS_PATH,
    AsgiApp,
    BodyTooLarge,
    Receive,
    Scope,
    Send,
    Unfinished,
    read_body,
    send_answer,
)
from imdsproxy.serving.documents import Answer, DocumentService, refusal, retry_later
from imdsproxy.serving.forward import Forwarder, NovaRequest
from imdsproxy.serving.resolver import Refused, Resolver

__all__ = ["resolver_app"]

_NETWORK = HEADER_NETWORK.encode("ascii")
_ADDRESS = HEADER_ADDRESS.encode("ascii")
_SCOPE = HEADER_SCOPE.encode("ascii")
_TARGET = HEADER_TARGET.encode("ascii")
_OURS = b"x-imdsproxy-"
_UNAVAILABLE = 503


def resolver_app(resolver: Resolver, service: DocumentService, forwarder: Forwarder) -> AsgiApp:
    """The application behind HAProxy's backend `resolver`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the resolver does not speak {scope['type']}")
        answer = await _answer(resolver, service, scope, receive)
        if isinstance(answer, NovaRequest):
            await forwarder.forward(answer, send)
        elif answer is not None:
            await send_answer(answer, send)

    return app


async def _answer(
    resolver: Resolver, service: DocumentService, scope: Scope, receive: Receive
) -> Answer | NovaRequest | None:
    headers = tuple(cast("Iterable[Header]", scope["headers"]))
    told = _told(headers)
    path = cast("bytes", scope["raw_path"])
    if told is None:
        # Only HAProxy can reach this socket; without an identity it is HAProxy's own check.
        return refusal(200) if path == LIVENESS_PATH else refusal(400)
    method = cast("str", scope["method"])
    body = await read_body(receive)
    if isinstance(body, BodyTooLarge):
        return refusal(413)
    if isinstance(body, Unfinished):
        return None
    outcome = await resolver.resolve(told.key, told.scope)
    if isinstance(outcome, Refused):
        return retry_later() if outcome.status == _UNAVAILABLE else _unknown(method)
    if outcome.nova is not None:
        address = str(told.key[1])
        return NovaRequest(outcome.nova, address, method, told.target or path, headers, body)
    return await service.answer(outcome.instance, DocumentRequest(method, path, body))


def _unknown(method: str) -> Answer:
    # PUT is how tokens are asked for, and some clients take any body for one.
    if method == "PUT":
        return refusal(404)
    answer = refusal(404, text=UNKNOWN_TEXT)
    return replace(answer, body=b"") if method == "HEAD" else answer


@dataclass(frozen=True, slots=True)
class _Told:
    """What HAProxy says of a request."""

    key: AddressKey
    scope: IdScope | None
    target: bytes | None


def _told(headers: Iterable[Header]) -> _Told | None:
    ours = {name: value for name, value in headers if name.startswith(_OURS)}
    network, address = ours.get(_NETWORK), ours.get(_ADDRESS)
    if network is None or address is None:
        return None
    try:
        key = NetworkId(network.decode("latin-1")), ip_address(address.decode("latin-1"))
    except ValueError:
        return None
    word = ours.get(_SCOPE)
    return _Told(key, None if word is None else IdScope(word.decode("latin-1")), ours.get(_TARGET))
