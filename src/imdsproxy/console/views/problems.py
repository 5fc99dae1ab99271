"""What is wrong, and what to do."""

from starlette.requests import Request
from starlette.responses import Response

from imdsproxy.console.pages import Console
from imdsproxy.console.troubles import list_troubles


def show_problems(console: Console, request: Request) -> Response:
    """Everything that the status names, what guests notice first."""
    status = console.daemon.get("/v1/status")
    values = {"status": status, "troubles": list_troubles(status)}
    return console.page(request, "problems.html", values)
