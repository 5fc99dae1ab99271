"""The resolver as an ASGI application: who is it, then the answer that HAProxy cannot give yet."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from typing import cast

from imdsproxy.core.documents.respond import DocumentRequest, Header
from imdsproxy.core.inventory import AddressKey
from imdsproxy.core.model import NetworkId
from imdsproxy.core.wire import HEADER_ADDRESS, HEADER_NETWORK
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
from imdsproxy.serving.resolver import Refused, Resolver

__all__ = ["resolver_app"]

_NETWORK = HEADER_NETWORK.encode("ascii")
_ADDRESS = HEADER_ADDRESS.encode("ascii")
_UNAVAILABLE = 503


def resolver_app(resolver: Resolver, service: DocumentService) -> AsgiApp:
    """The application behind HAProxy's backend `resolver`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the resolver does not speak {scope['type']}")
        answer = await _answer(resolver, service, scope, receive)
        if answer is not None:
            await send_answer(answer, send)

    return app


async def _answer(
    resolver: Resolver, service: DocumentService, scope: Scope, receive: Receive
) -> Answer | None:
    key = _key(cast("Iterable[Header]", scope["headers"]))
    path = cast("bytes", scope["raw_path"])
    if key is None:
        # Only HAProxy can reach this socket; without an identity it is HAProxy's own check.
        return refusal(200) if path == LIVENESS_PATH else refusal(400)
    method = cast("str", scope["method"])
    body = await read_body(receive)
    if isinstance(body, BodyTooLarge):
        return refusal(413)
    if isinstance(body, Unfinished):
        return None
    outcome = await resolver.resolve(key)
    if isinstance(outcome, Refused):
        return retry_later() if outcome.status == _UNAVAILABLE else refusal(outcome.status)
    return await service.answer(outcome.instance, DocumentRequest(method, path, body))


def _key(headers: Iterable[Header]) -> AddressKey | None:
    network: str | None = None
    address: str | None = None
    for name, value in headers:
        if name == _NETWORK:
            network = value.decode("latin-1")
        elif name == _ADDRESS:
            address = value.decode("latin-1")
    if network is None or address is None:
        return None
    try:
        return NetworkId(network), ip_address(address)
    except ValueError:
        return None
