"""Page with all problems and their fixes."""

from starlette.requests import Request
from starlette.responses import Response

from imdsproxy.console.pages import Console
from imdsproxy.console.troubles import list_troubles


def show_problems(console: Console, request: Request) -> Response:
    """Show all problems in the daemon's status; those that guests notice come first."""
    status = console.daemon.get("/v1/status")
    values = {"status": status, "troubles": list_troubles(status)}
    return console.page(request, "problems.html", values)
