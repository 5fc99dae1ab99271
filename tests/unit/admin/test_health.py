"""`/livez`, `/readyz` and `/metrics` over a socket, from a thread of their own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Final, cast

import pytest

from imdsproxy.admin.health import HealthServer
from imdsproxy.admin.metrics import Metrics
from imdsproxy.admin.status import Readiness, report_readiness
from imdsproxy.core.endpoints import LeftOut, LeftOutCode
from imdsproxy.core.model import NetworkId
from support.fake_controller import HEALTHY, fake_controller, fake_metrics

_NOT_READY: Final = Readiness(False, ("source file is not in sync", "the probe failed"))
_OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0"


@contextlib.contextmanager
def _server(readiness: Readiness | None = None, *, alive: bool = True) -> Iterator[int]:
    """A server of which the controller's loop is the test's; without readiness it is starting."""
    listener = socket.create_server(("127.0.0.1", 0))
    with HealthServer(listener, alive=lambda: alive) as server:
        if readiness is not None:
            metrics = fake_metrics(fake_controller())
            reports = SimpleNamespace(readiness=lambda: readiness, expose=metrics.expose)
            server.reports = cast("Metrics", reports)
        yield listener.getsockname()[1]


def _fetch(
    port: int, method: str, path: str, sent: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers=sent or {})
        reply = connection.getresponse()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, headers, reply.read()
    finally:
        connection.close()


def _body(*reasons: str, ready: bool = False, degraded: Sequence[str] = ()) -> dict[str, object]:
    return {"ready": ready, "reasons": list(reasons), "degraded": list(degraded)}


@pytest.mark.parametrize(
    ("line", "readiness", "alive", "status", "body"),
    [
        ("GET /livez", _NOT_READY, True, 200, {"alive": True}),
        ("GET /livez", _NOT_READY, False, 503, {"alive": False}),
        ("GET /livez", None, True, 200, {"alive": True}),
        ("GET /readyz", None, True, 503, _body("the controller is starting")),
        ("GET /metrics", None, True, 503, _body("the controller is starting")),
        ("GET /readyz", Readiness(ready=True), True, 200, _body(ready=True)),
        ("GET /readyz?verbose", _NOT_READY, True, 503, _body(*_NOT_READY.reasons)),
        (
            "GET /readyz",
            Readiness(ready=True, degraded=("no audit log",)),
            True,
            200,
            _body(ready=True, degraded=["no audit log"]),
        ),
        *((f"GET {path}", None, True, 404, None) for path in ("/", "/metrics/", "/v1/status")),
        *((f"POST {path}", None, True, 405, None) for path in ("/livez", "/metrics", "/other")),
        ("HEAD /livez", None, True, 200, None),
    ],
)
async def test_each_question_has_its_answer(
    line: str,
    readiness: Readiness | None,
    status: int,
    body: object,
    *,
    alive: bool,
) -> None:
    method, path = line.split()
    with _server(readiness, alive=alive) as port:
        found, headers, text = await asyncio.to_thread(_fetch, port, method, path)
    assert found == status
    assert body is None or json.loads(text) == body
    assert headers.get("allow") == ("GET, HEAD" if status == 405 else None)
    assert (headers.get("retry-after") == "1") == (status == 503 and path != "/livez")
    assert int(headers["content-length"]) > 0
    assert (text == b"") == (method == "HEAD")


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({}, "text/plain"),
        ({"Accept": _OPENMETRICS}, _OPENMETRICS[:29]),
        # An empty one does not take the next line, and a long one no time.
        ({"Accept": "", "application/openmetrics-text;version=1.0.0;a": "b"}, "text/plain"),
        ({"Accept": f"a{' ' * 16_000}b"}, "text/plain"),
    ],
)
async def test_metrics_come_as_the_client_wants_them(headers: dict[str, str], kind: str) -> None:
    with _server(_NOT_READY) as port:
        begun = time.process_time()
        _, found, text = await asyncio.to_thread(_fetch, port, "GET", "/metrics", headers)
    # Of the processor, whatever else the machine does: looked through for each space it is 0.8 s.
    assert time.process_time() - begun < 0.4
    assert found["content-type"].startswith(kind)
    assert b"imdsproxy_ready 0.0" in text
    assert text.rstrip().endswith(b"# EOF") == (kind != "text/plain")


async def test_while_the_controllers_loop_is_stuck_the_answers_are_503() -> None:
    with _server(_NOT_READY, alive=False) as port:
        # Not awaited: this is the loop.
        assert _fetch(port, "GET", "/livez")[0] == 503
        status, _, text = _fetch(port, "GET", "/readyz")
    assert (status, json.loads(text)) == (503, _body("the controller's event loop does not answer"))


async def test_a_client_that_sends_no_request_delays_no_other() -> None:
    with _server() as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        assert (await asyncio.to_thread(_fetch, port, "GET", "/livez"))[0] == 200
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("request_bytes", [b"\r\n\r\n", b"GET\r\n\r\n", b"x" * 100_000])
async def test_what_is_no_request_is_400(request_bytes: bytes) -> None:
    with _server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes)
        assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
        writer.close()


def test_many_degraded_networks_are_counted_and_the_first_are_named() -> None:
    busy, one = LeftOutCode.PORT_BUSY, fake_controller(**HEALTHY)
    left_out = [
        LeftOut(NetworkId(f"m{number:04}"), None, busy, "no device", "add it")
        for number in range(1000)
    ]
    one.listeners.degraded = lambda: left_out
    lines = report_readiness(one).degraded
    assert lines[0] == "network m0000: no device (port-busy); add it"
    assert (len(lines), lines[-1]) == (21, "and 980 more networks: imdsproxy status")
    one.listeners.degraded = lambda: left_out[:20]
    assert len(report_readiness(one).degraded) == 20
