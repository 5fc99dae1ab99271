"""Pages with the list of networks and with one network's details."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from imdsproxy.api.client import path_to
from imdsproxy.console.pages import Console, Shape

_SHOWN: Final = 200


def show_networks(console: Console, request: Request) -> Response:
    text = request.query_params.get("text", "")
    every, status = console.daemon.get("/v1/networks"), console.daemon.get("/v1/status")
    words = text.lower().split()
    found = [one for one in every if all(word in _words_of(one) for word in words)]
    values = {
        "status": status,
        "text": text,
        "found": len(found),
        "networks": found[:_SHOWN],
        "more": max(0, len(found) - _SHOWN),
    }
    return console.page(request, "networks.html", values)


def _words_of(network: Shape) -> str:
    record = network["record"]
    parts = (record["id"], record.get("name", ""), record.get("project", ""), network["source"])
    return " ".join((*parts, *map(str, record["listener"].values()))).lower()


def show_network(console: Console, request: Request) -> Response:
    network = console.daemon.get(path_to("networks", request.path_params["network"]))
    return console.page(request, "network.html", {"network": network, "record": network["record"]})
