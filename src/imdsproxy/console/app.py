"""The console as an ASGI application: its paths, and what is answered where the daemon refuses."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from imdsproxy.admin_client import AdminClient
from imdsproxy.console.access import COOKIE, Access
from imdsproxy.console.pages import Console
from imdsproxy.console.security import Secured
from imdsproxy.console.views import networks
from imdsproxy.errors import ImdsproxyError

_STATIC: Final = Path(__file__).with_name("static")
_View: TypeAlias = Callable[[Console, Request], Response]

_PAGES: Final[dict[str, _View]] = {
    "/networks": networks.show_networks,
}


def console_app(daemon: AdminClient, access: Access) -> Secured:
    """The application, for one run of the command."""
    console = Console(daemon, access)
    routes = [
        Route("/open", partial(_open, console)),
        Route("/", partial(_begin, console)),
        *(Route(path, partial(view, console)) for path, view in _PAGES.items()),
        Mount("/static", StaticFiles(directory=_STATIC)),
    ]
    app = Starlette(
        routes=[Mount(console.root, routes=routes)],
        exception_handlers={ImdsproxyError: partial(_explain, console)},
    )
    return Secured(app, access)


def _open(console: Console, request: Request) -> Response:
    """The link: the browser gets the session's cookie, once."""
    if not console.access.open(request.query_params.get("key", "")):
        reason = "this link is not valid any more: it works once, for five minutes"
        return PlainTextResponse(f"Refused: {reason}. Run `imdsproxy console` again.\n", 403)
    # No redirect: after a link in a page of another site, such as a web mail, that would carry no strict cookie.
    html = console.templates.get_template("open.html").render(root=console.root)
    answer = HTMLResponse(html)
    answer.set_cookie(
        COOKIE, console.access.cookie, path=f"{console.root}/", httponly=True, samesite="strict"
    )
    return answer


def _begin(console: Console, _request: Request) -> Response:
    return RedirectResponse(f"{console.root}/networks", 303)


def _explain(console: Console, request: Request, error: Exception) -> Response:
    """What the daemon refused, or that it does not answer."""
    assert isinstance(error, ImdsproxyError)  # noqa: S101 - for the type
    return console.page(request, "error.html", {"error": error}, error.http_status)
