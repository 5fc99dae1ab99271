"""Page with live requests, as a stream of server-sent events."""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from imdsproxy.console.pages import Console
from imdsproxy.errors import ImdsproxyError

_EVERY_S: Final = 0.5
_FILTERS: Final = ("network", "instance", "path", "status")
_STATUSES: Final = (("", "any status"), ("2", "2xx"), ("4", "4xx"), ("5", "5xx"))


def show_live(console: Console, request: Request) -> Response:
    asked = {name: request.query_params.get(name, "") for name in _FILTERS}
    return console.page(request, "live.html", {**asked, "statuses": _STATUSES})


def stream_live(console: Console, request: Request) -> Response:
    """Stream an event with the answered requests every half second, without storing them."""
    asked = {name: request.query_params.get(name, "") for name in _FILTERS}
    headers = {"x-accel-buffering": "no"}
    return StreamingResponse(
        _events(console, asked), media_type="text/event-stream", headers=headers
    )


def _events(console: Console, asked: Mapping[str, str]) -> Iterator[str]:
    query = {name: asked[name] for name in ("network", "instance") if asked[name]}
    try:
        while True:
            console.access.see()
            answer = console.daemon.get("/v1/watch", query)
            query["cursor"] = str(answer["cursor"])
            requests = [one for one in answer["requests"] if _matches(one, asked)]
            yield _event({"requests": requests, "missed": answer["missed"]})
            time.sleep(_EVERY_S)
    except ImdsproxyError as error:
        yield _event({"problem": error.message, "hint": error.hint})


def _matches(one: Mapping[str, Any], asked: Mapping[str, str]) -> bool:
    return asked["path"] in one["path"] and str(one["status"]).startswith(asked["status"])


def _event(value: Mapping[str, object]) -> str:
    # JSON escapes line breaks, so a guest's text never ends a line of the stream.
    return f"data: {json.dumps(value)}\n\n"
