"""ASGI application of the console: routes, forms, and pages for the daemon's errors."""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from imdsproxy.api.client import AdminClient
from imdsproxy.console.access import COOKIE, TOKEN, Access
from imdsproxy.console.forms import Sent
from imdsproxy.console.pages import Console
from imdsproxy.console.security import Secured
from imdsproxy.console.views import documents, editing, guests, live, networks, problems
from imdsproxy.errors import ImdsproxyError, NotFound

_STATIC: Final = Path(__file__).with_name("static")
_MOST: Final = 64 * 1024 * 1024
"""Maximum size of a form in bytes: 16 MiB of user-data, each byte escaped."""

_View: TypeAlias = Callable[[Console, Request], Response]
_Change: TypeAlias = Callable[[Console, Request, Sent], Response]

_PAGES: Final[dict[str, _View]] = {
    "/networks": networks.show_networks,
    "/networks/{network}": networks.show_network,
    "/networks/{network}/edit": editing.edit_network,
    "/guests": guests.list_guests,
    "/guests/{guest}": guests.show_guest,
    "/guests/{guest}/edit": editing.edit_guest,
    "/guests/{guest}/usage": guests.show_usage,
    "/guests/{guest}/documents": documents.show_documents,
    "/live": live.show_live,
    "/live/stream": live.stream_live,
    "/problems": problems.show_problems,
}
_CHANGES: Final[dict[str, _Change]] = {
    "/networks/{network}/edit": editing.change_network,
    "/guests/{guest}/edit": editing.change_guest,
    "/guests/{guest}/documents": documents.reveal_document,
}
"""Handlers of forms, which need the session's token, by path."""


def console_app(daemon: AdminClient, access: Access) -> Secured:
    console = Console(daemon, access)
    routes = [
        Route("/open", partial(_open, console), methods=["GET"]),
        Route("/", partial(_begin, console), methods=["GET"]),
        *(Route(path, partial(view, console), methods=["GET"]) for path, view in _PAGES.items()),
        *(
            Route(path, partial(_take_form, console, view), methods=["POST"])
            for path, view in _CHANGES.items()
        ),
        Mount("/static", StaticFiles(directory=_STATIC)),
    ]
    app = Starlette(
        routes=[Mount(console.root, routes=routes)],
        exception_handlers={
            ImdsproxyError: partial(_explain, console),
            HTTPException: partial(_explain, console),
        },
    )
    return Secured(app, access)


async def _open(console: Console, request: Request) -> Response:
    """Open the session from the link and set its cookie, once. Async, because threads could open it twice."""
    if not console.access.open(request.query_params.get("key", "")):
        reason = "this link is not valid any more: it works once, for five minutes"
        return PlainTextResponse(f"Refused: {reason}. Run `imdsproxy console` again.\n", 403)
    # A redirect would not work: after a link on another site, such as web mail, the browser sends no strict cookie.
    html = console.templates.get_template("open.html").render(root=console.root)
    answer = HTMLResponse(html)
    answer.set_cookie(
        COOKIE, console.access.cookie, path=f"{console.root}/", httponly=True, samesite="strict"
    )
    return answer


def _begin(console: Console, _request: Request) -> Response:
    return RedirectResponse(f"{console.root}/networks", 303)


async def _take_form(console: Console, view: _Change, request: Request) -> Response:
    """Read a form; refuse forms without this session's token."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _MOST:
            return PlainTextResponse("Refused: the form is too large.\n", 413)
    sent = dict(parse_qsl(raw.decode("utf-8", "replace"), keep_blank_values=True))
    if not console.access.has_token(sent.get(TOKEN, "")):
        return PlainTextResponse("Refused: this form is none of this session's.\n", 403)
    return await run_in_threadpool(view, console, request, sent)


def _explain(console: Console, request: Request, error: Exception) -> Response:
    match error:
        case ImdsproxyError():
            return console.page(request, "error.html", {"error": error}, error.http_status)
        case HTTPException(status_code=status):
            shown = NotFound(f"{HTTPStatus(status).phrase}: {request.url.path}")
            return console.page(request, "error.html", {"error": shown}, status)
        case _:
            raise error
