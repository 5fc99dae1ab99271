from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client import Gauge
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import CollectorRegistry

from imdsproxy.admin.record_reports import LeftOut
from imdsproxy.admin.reports import Readiness
from imdsproxy.controller.health import HealthServer
from imdsproxy.controller.metrics import Metrics
from imdsproxy.controller.status import list_degraded
from imdsproxy.core.model import NetworkId


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def _metrics(accept: str) -> tuple[str, bytes]:
    registry = CollectorRegistry()
    Gauge("imdsproxy_build_info", "x", ("version",), registry=registry).labels("1.2.3").set(1)
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


@contextlib.contextmanager
def _server(
    *,
    alive: bool = True,
    readiness: Readiness | None = Readiness(ready=True),  # noqa: B008 - frozen
) -> Iterator[int]:
    """A server of which the controller's loop is the test's; without readiness it is starting."""
    listener = socket.create_server(("127.0.0.1", 0))
    with HealthServer(listener, alive=lambda: alive) as server:
        if readiness is not None:
            status = SimpleNamespace(readiness=lambda: readiness)
            server.reports = cast("Metrics", SimpleNamespace(status=status, expose=_metrics))
        yield listener.getsockname()[1]


def _fetch(port: int, method: str, path: str, accept: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers={"Accept": accept} if accept else {})
        reply = connection.getresponse()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        return Answer(reply.status, headers, reply.read())
    finally:
        connection.close()


async def _ask(
    path: str,
    *,
    method: str = "GET",
    accept: str = "",
    alive: bool = True,
    readiness: Readiness | None = Readiness(ready=True),  # noqa: B008 - frozen
) -> Answer:
    with _server(alive=alive, readiness=readiness) as port:
        return await asyncio.to_thread(_fetch, port, method, path, accept)


async def test_a_living_controller_is_200_also_while_it_is_not_ready() -> None:
    answer = await _ask("/livez", readiness=Readiness(ready=False))

    assert (answer.status, json.loads(answer.body)) == (200, {"alive": True})


async def test_a_stuck_controller_is_503() -> None:
    assert (await _ask("/livez", alive=False)).status == 503


async def test_a_controller_that_starts_is_alive_and_not_ready() -> None:
    assert (await _ask("/livez", readiness=None)).status == 200
    answer = await _ask("/readyz", readiness=None)
    assert answer.status == 503
    assert json.loads(answer.body)["reasons"] == ["the controller is starting"]
    assert (await _ask("/metrics", readiness=None)).status == 503


async def test_while_the_controllers_loop_is_stuck_the_answers_are_503() -> None:
    with _server(alive=False) as port:
        # Not awaited: this is the loop.
        assert _fetch(port, "GET", "/livez", "").status == 503
        answer = _fetch(port, "GET", "/readyz", "")
    assert answer.status == 503
    assert json.loads(answer.body)["reasons"] == ["the controller's event loop does not answer"]


async def test_who_sends_no_request_holds_up_nobody() -> None:
    with _server() as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        assert (await asyncio.to_thread(_fetch, port, "GET", "/livez", "")).status == 200
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("request_bytes", [b"\r\n\r\n", b"GET\r\n\r\n", b"x" * 100_000])
async def test_what_is_no_request_is_400(request_bytes: bytes) -> None:
    with _server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes)
        assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
        writer.close()


async def test_ready_is_200() -> None:
    answer = await _ask("/readyz")

    assert answer.status == 200
    assert json.loads(answer.body) == {"ready": True, "reasons": [], "degraded": []}


async def test_not_ready_is_503_with_every_reason() -> None:
    reasons = ("source file is not in sync", "the probe through HAProxy failed")

    answer = await _ask("/readyz", readiness=Readiness(False, reasons))

    assert answer.status == 503
    assert json.loads(answer.body) == {"ready": False, "reasons": list(reasons), "degraded": []}
    assert answer.headers["retry-after"] == "1"


async def test_what_no_guest_notices_is_told_and_ready_all_the_same() -> None:
    answer = await _ask("/readyz", readiness=Readiness(ready=True, degraded=("no audit log",)))

    assert answer.status == 200
    assert json.loads(answer.body)["degraded"] == ["no audit log"]


async def test_metrics_come_in_prometheus_text() -> None:
    answer = await _ask("/metrics")

    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert b'imdsproxy_build_info{version="1.2.3"} 1.0' in answer.body


async def test_metrics_come_as_openmetrics_to_who_asks_for_it() -> None:
    answer = await _ask("/metrics", accept="application/openmetrics-text; version=1.0.0")

    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.body.rstrip().endswith(b"# EOF")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/v1/status", "/latest/meta-data/"])
async def test_there_is_nothing_else(path: str) -> None:
    assert (await _ask(path)).status == 404


@pytest.mark.parametrize("path", ["/livez", "/metrics", "/other"])
async def test_nothing_can_be_written(path: str) -> None:
    answer = await _ask(path, method="POST")

    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


async def test_head_has_the_length_and_no_body() -> None:
    answer = await _ask("/livez", method="HEAD")

    assert answer.body == b""
    assert int(answer.headers["content-length"]) > 0


def test_many_degraded_networks_are_counted_and_the_first_are_named() -> None:
    left_out = [
        LeftOut(NetworkId(f"m{one:04}"), "busy", "no device", "add it") for one in range(1000)
    ]
    lines = list_degraded(left_out)
    assert lines[0] == "network m0000: no device (busy); add it"
    assert (len(lines), lines[-1]) == (21, "and 980 more networks: imdsproxy status")
    assert len(list_degraded(left_out[:20])) == 20
