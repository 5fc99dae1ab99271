"""`/livez`, `/readyz` and `/metrics`, on an address of the host that no guest reaches.

Three questions, three answers: is the controller's loop alive; do guests get what the sources say;
and how much of everything. Read-only, without authentication: nothing here is about a guest's
documents.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from prometheus_client.exposition import choose_encoder

from imdsproxy.core.wire import RETRY_AFTER_S

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry

    from imdsproxy.admin.reports import Readiness

__all__ = ["health_app"]

_Message: TypeAlias = MutableMapping[str, object]
_Scope: TypeAlias = MutableMapping[str, object]
_Receive: TypeAlias = Callable[[], Awaitable[_Message]]
_Send: TypeAlias = Callable[[_Message], Awaitable[None]]
HealthApp: TypeAlias = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    content_type: str
    body: bytes
    retry_after_s: int | None = None


def health_app(
    *,
    alive: Callable[[], bool],
    readiness: Callable[[], Readiness],
    registry: CollectorRegistry,
) -> HealthApp:
    """An ASGI application with the three routes.

    Args:
        alive: Whether the reconcile loop makes progress; off means that only a restart helps.
        readiness: In sync, last plan applied, a probe through HAProxy answered; and why not. What is wrong and no
            guest notices does not change the status.
        registry: What `/metrics` shows.
    """

    def answer(path: str, accept: str) -> _Answer:
        if path == "/livez":
            ok = alive()
            return _Answer(200 if ok else 503, _JSON, _json({"alive": ok}))
        if path == "/readyz":
            ready = readiness()
            body = _json(
                {
                    "ready": ready.ready,
                    "reasons": list(ready.reasons),
                    "degraded": list(ready.degraded),
                }
            )
            if ready.ready:
                return _Answer(200, _JSON, body)
            return _Answer(503, _JSON, body, RETRY_AFTER_S)
        if path == "/metrics":
            encode, content_type = choose_encoder(accept)
            return _Answer(200, content_type, encode(registry))
        routes = ["/livez", "/readyz", "/metrics"]
        return _Answer(404, _JSON, _json({"code": "not-found", "routes": routes}))

    async def app(scope: _Scope, _receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] not in {"GET", "HEAD"}:
            body = _json({"code": "method-not-allowed", "allowed": ["GET", "HEAD"]})
            await _send_answer(send, _Answer(405, _JSON, body), with_body=True)
            return
        told = answer(str(scope["path"]), _header(scope, b"accept"))
        await _send_answer(send, told, with_body=scope["method"] != "HEAD")

    return app


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _header(scope: _Scope, name: bytes) -> str:
    headers = scope["headers"]
    if isinstance(headers, list | tuple):
        for key, value in headers:
            if key == name:
                return str(value, "latin-1")
    return ""


async def _send_answer(send: _Send, answer: _Answer, *, with_body: bool) -> None:
    headers = [
        (b"content-type", answer.content_type.encode()),
        (b"content-length", str(len(answer.body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    if answer.retry_after_s is not None:
        headers.append((b"retry-after", str(answer.retry_after_s).encode()))
    if answer.status == 405:  # noqa: PLR2004 - RFC 9110 §15.5.6 wants the header with this one
        headers.append((b"allow", b"GET, HEAD"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body if with_body else b""})
