"""Networks: how each is reached, and whether it is served."""

from starlette.requests import Request
from starlette.responses import Response

from imdsproxy.console.pages import Console


def show_networks(console: Console, request: Request) -> Response:
    """All networks."""
    networks = console.daemon.get("/v1/networks")
    return console.page(request, "networks.html", {"networks": networks})
