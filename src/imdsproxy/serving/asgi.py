"""The document server as an ASGI application (ASGI 3, HTTP only)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, MutableMapping
from typing import Any, Final, TypeAlias, cast

import structlog

from imdsproxy.core.documents import DocumentRequest
from imdsproxy.core.documents.respond import Header
from imdsproxy.core.model import ID_PATTERN, InstanceId
from imdsproxy.core.wire import HEADER_INSTANCE, HEADER_REVISION, PROBE_INSTANCE
from imdsproxy.serving.documents import Answer, DocumentService, refusal, retry_later

Scope: TypeAlias = Mapping[str, object]
Message: TypeAlias = MutableMapping[str, object]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_LIMIT: Final = 64 * 1024
"""Bytes of a request's body; the largest that means anything is a password of 1,020."""

LIVENESS_PATH: Final = b"/livez"
"""Answered 200 to a request that names no instance: HAProxy's check."""

_CHUNK: Final = 256 * 1024
_INSTANCE_HEADER: Final = HEADER_INSTANCE.encode("ascii")
_REVISION_HEADER: Final = HEADER_REVISION.encode("ascii")
_INSTANCE_ID: Final = re.compile(f"{ID_PATTERN}|{re.escape(PROBE_INSTANCE)}".encode())
_BODILESS: Final = frozenset({"GET", "HEAD"})


class BodyTooLarge:
    """The body is longer than the limit."""


class Unfinished:
    """The client went away before its body was complete."""


def documents_app(service: DocumentService) -> AsgiApp:
    """The application that answers for the instances that HAProxy names in its headers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the document server does not speak {scope['type']}")
        try:
            answer = await _answer(service, scope, receive)
        except Exception:  # noqa: BLE001 - logged; a fault of ours is answered like one that goes away
            # A 500 ends boots: cloud-init's OpenStack source comes again only on 503.
            structlog.get_logger().exception("a request failed", path=repr(scope["raw_path"]))
            answer = retry_later()
        if answer is not None:
            await send_answer(answer, send)

    return app


async def _answer(service: DocumentService, scope: Scope, receive: Receive) -> Answer | None:
    headers = cast("Iterable[Header]", scope["headers"])
    path = cast("bytes", scope["raw_path"])
    instances = [value for name, value in headers if name == _INSTANCE_HEADER]
    if not instances and path == LIVENESS_PATH:
        return refusal(200)
    if len(instances) != 1 or not _INSTANCE_ID.fullmatch(instances[0]):
        return refusal(400)
    method = cast("str", scope["method"])
    body = b"" if method in _BODILESS else await read_body(receive)
    if isinstance(body, BodyTooLarge):
        return refusal(413)
    if isinstance(body, Unfinished):
        return None
    return await service.answer(
        InstanceId(instances[0].decode("ascii")),
        DocumentRequest(method, path, body),
        revision=_revision(headers),
    )


def _revision(headers: Iterable[Header]) -> str | None:
    return next(
        (value.decode("latin-1") for name, value in headers if name == _REVISION_HEADER), None
    )


async def read_body(receive: Receive, limit: int = BODY_LIMIT) -> bytes | BodyTooLarge | Unfinished:
    """The request's whole body, however it is framed; at most `limit` bytes of it are ever held."""
    parts: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return Unfinished()
        part = cast("bytes", message.get("body", b""))
        length += len(part)
        if length > limit:
            return BodyTooLarge()
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


async def send_answer(answer: Answer, send: Send) -> None:
    """Send an answer; of a file only so much is in memory as the client has not yet taken."""
    start: Message = {
        "type": "http.response.start",
        "status": answer.status,
        "headers": list(answer.headers),
    }
    if isinstance(answer.body, bytes):
        await send(start)
        await send({"type": "http.response.body", "body": answer.body})
        return
    with answer.body.file as file:
        await send(start)
        file.seek(answer.body.offset)
        left = answer.body.length
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise EOFError(f"a compiled record ends {left} bytes early")
            left -= len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
