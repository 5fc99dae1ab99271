"""The resolver as an ASGI application: who is it, then back to HAProxy, which answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import cast

from imdsproxy.core.documents.respond import Header
from imdsproxy.core.identity import Denial
from imdsproxy.core.model import NetworkId
from imdsproxy.core.model import Scope as IdScope
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.wire import (
    HEADER_ADDRESS,
    HEADER_NETWORK,
    HEADER_REFUSED,
    HEADER_SCOPE,
    HEADER_TARGET,
    HEADER_UNVERIFIED,
    MISMATCH_TEXT,
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
    while_there,
)
from imdsproxy.serving.documents import Answer, refusal, retry_later
from imdsproxy.serving.forward import Forwarder, FoundRequest
from imdsproxy.serving.resolver import Resolver

_NETWORK = HEADER_NETWORK.encode("ascii")
_ADDRESS = HEADER_ADDRESS.encode("ascii")
_SCOPE = HEADER_SCOPE.encode("ascii")
_TARGET = HEADER_TARGET.encode("ascii")
_UNVERIFIED = HEADER_UNVERIFIED.encode("ascii")
_REFUSED = HEADER_REFUSED.encode("ascii"), b"1"
_OURS = b"x-imdsproxy-"
_UNAVAILABLE = 503
_CHANGES_NOTHING = frozenset({"GET", "HEAD", "OPTIONS", "PUT"})


def resolver_app(resolver: Resolver, forwarder: Forwarder) -> AsgiApp:
    """The application behind HAProxy's backend `resolver`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the resolver does not speak {scope['type']}")
        headers = tuple(cast("Iterable[Header]", scope["headers"]))
        origin = _parse_origin(headers)
        if origin is None:
            # Only HAProxy can reach this socket; without an identity it is HAProxy's own check.
            await send_answer(refusal(200 if scope["raw_path"] == LIVENESS_PATH else 400), send)
            return
        body = await read_body(receive)
        if isinstance(body, BodyTooLarge):
            await send_answer(_to_any_mac(origin, refusal(413)), send)
        elif not isinstance(body, Unfinished):
            asked = _Asked(
                origin,
                cast("str", scope["method"]),
                cast("bytes", scope["raw_path"]),
                headers,
                body,
            )
            # HAProxy may have answered 503 by then, and a POST that is sent all the same would arrive twice.
            await while_there(receive, answer(asked, send))

    async def answer(asked: _Asked, send: Send) -> None:
        origin, method = asked.origin, asked.method
        outcome = await resolver.resolve(origin.key, origin.scope, origin.port)
        if isinstance(outcome, Denial):
            await send_answer(_to_any_mac(origin, _refuse(outcome, method)), send)
        elif origin.port is not None and method not in _CHANGES_NOTHING:
            # The sender is not verified. Once it is, the request comes again.
            await send_answer(_to_any_mac(origin, retry_later()), send)
        else:
            network, address = origin.key
            target = origin.target or asked.path
            found = FoundRequest(
                outcome.record, network, str(address), method, target, asked.headers, asked.body
            )
            await forwarder.forward(found, send)

    return app


def _refuse(denial: Denial, method: str) -> Answer:
    status = denial.status
    if status == _UNAVAILABLE:
        return retry_later()
    # PUT is how tokens are asked for, and some clients take any body for one.
    if method == "PUT":
        return refusal(status)
    answer = refusal(status, text=MISMATCH_TEXT if denial is Denial.MISMATCH else UNKNOWN_TEXT)
    return replace(answer, body=b"") if method == "HEAD" else answer


def _to_any_mac(origin: _Origin, answer: Answer) -> Answer:
    """Mark an answer that holds nothing of an instance, so that the MAC filter lets it through to any MAC."""
    if origin.port is None:
        return answer
    return replace(answer, headers=(*answer.headers, _REFUSED))


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a request comes from, by HAProxy's headers."""

    key: AddressKey
    scope: IdScope | None
    target: bytes | None
    port: int | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A guest's whole request."""

    origin: _Origin
    method: str
    path: bytes
    headers: tuple[Header, ...]
    body: bytes


def _parse_origin(headers: Iterable[Header]) -> _Origin | None:
    sent = [(name, value) for name, value in headers if name.startswith(_OURS)]
    ours = dict(sent)
    if len(ours) < len(sent):
        # HAProxy sends each once.
        return None
    network, address = ours.get(_NETWORK), ours.get(_ADDRESS)
    if network is None or address is None:
        return None
    word, port = ours.get(_SCOPE), ours.get(_UNVERIFIED)
    try:
        return _Origin(
            (NetworkId(network.decode("latin-1")), ip_address(address.decode("latin-1"))),
            None if word is None else IdScope(word.decode("latin-1")),
            ours.get(_TARGET),
            None if port is None else int(port),
        )
    except ValueError:
        return None
