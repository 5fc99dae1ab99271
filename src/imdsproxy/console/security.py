"""Outer layer of the console: checks each request before routing, and adds security headers to each response."""

from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imdsproxy.console.access import COOKIE, Access, refuse_foreign

HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    # With `no-referrer`, browsers would send `Origin: null` with forms.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Headers of every response, including refusals."""

_KEPT: Final = "private, max-age=3600"
"""Cache header of scripts and styles, which contain no session data; caching helps over slow ssh connections."""

_NO_SESSION: Final = (
    "This page needs the session of `imdsproxy console`.\n\n"
    "Its link works once, for five minutes, in one browser. Run the command again for another.\n"
)


class Secured:
    """ASGI middleware that admits only the session's own requests."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_headers(message, kept=message["status"] == HTTPStatus.OK and is_file)
            await send(message)

        if scope["type"] != "http":
            return
        is_file = scope["path"].startswith(f"/{self._access.place}/static/")
        refusal = self._refuse(Request(scope))
        answer = self._app if refusal is None else refusal
        await answer(scope, receive, send_with_headers)

    def _refuse(self, request: Request) -> Response | None:
        access = self._access
        opens = request.url.path == f"/{access.place}/open" and request.method == "GET"
        foreign = refuse_foreign(request.method, _by_name(request.headers), opens=opens)
        if foreign is not None:
            return PlainTextResponse(f"Refused: {foreign}.\n", 403)
        if opens:
            return None
        if access.has_session(request.cookies.get(COOKIE)):
            access.see()
            return None
        return PlainTextResponse(_NO_SESSION, 403)


def _by_name(headers: Headers) -> dict[str, str]:
    # Join repeated headers: `a, b` equals no expected value.
    found: dict[str, str] = {}
    for name, value in headers.items():
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _add_headers(message: MutableMapping[str, Any], *, kept: bool) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in HEADERS.items():
        headers[name] = value
    if kept:
        headers["cache-control"] = _KEPT
