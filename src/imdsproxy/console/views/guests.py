"""Pages with the list of guests and with one guest's details."""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from imdsproxy.api.client import path_to
from imdsproxy.console.explained import plan_path
from imdsproxy.console.pages import Console
from imdsproxy.console.rates import HEIGHT, WIDTH, draw_line

_PAGE: Final = 50
_ADDRESSES: Final = 8
"""Maximum number of addresses explained on a guest's page; few guests have more."""


def list_guests(console: Console, request: Request) -> Response:
    asked = {name: request.query_params.get(name, "") for name in ("text", "network", "after")}
    query = {name: value for name, value in asked.items() if value} | {"limit": str(_PAGE)}
    page = console.daemon.get("/v1/search/instances", query)
    return console.page(request, "guests.html", {**asked, "page": page})


def show_guest(console: Console, request: Request) -> Response:
    name = request.path_params["guest"]
    guest = console.daemon.get(path_to("instances", name))
    record = guest["record"]
    explanations = console.daemon.get(path_to("instances", name, "explain"), {"probe": "true"})
    shown = explanations[:_ADDRESSES]
    values = {
        "guest": guest,
        "record": {key: record[key] for key in record.keys() - {"user_data", "vendor_data"}},
        "sizes": {key: _size(record.get(key)) for key in ("user_data", "vendor_data")},
        "paths": [(one, plan_path(one)) for one in shown],
        "more": len(explanations) - len(shown),
        "rules": next((one["rules"] for one in explanations if one["rules"]), None),
        "tokens": console.daemon.get(path_to("instances", name, "tokens")),
        "identity": console.daemon.get(path_to("instances", name, "identity")),
        **_usage_of(console, record["id"]),
    }
    return console.page(request, "guest.html", values)


def show_usage(console: Console, request: Request) -> Response:
    return console.page(request, "usage.html", _usage_of(console, request.path_params["guest"]))


def _usage_of(console: Console, guest: str) -> dict[str, object]:
    usage = console.daemon.get(path_to("instances", guest, "usage"))
    values: dict[str, object] = {"usage": usage, "of": guest, "width": WIDTH, "height": HEIGHT}
    if usage is not None:
        numbers = console.rates.add(guest, usage["requests"])
        values |= {"line": draw_line(numbers, 10), "highest": max(numbers)}
    return values


def _size(payload: Any) -> int:
    if isinstance(payload, str):
        return len(payload.encode())
    return 0 if payload is None else len(payload.get("base64", "")) * 3 // 4
