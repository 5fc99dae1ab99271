from __future__ import annotations

import json
from collections.abc import MutableMapping
from dataclasses import dataclass, field

import pytest
from prometheus_client.registry import CollectorRegistry

from imdsproxy.admin.collector import metrics_registry
from imdsproxy.admin.health import health_app
from imdsproxy.admin.reports import Readiness
from imdsproxy.admin.snapshot import MetricsSnapshot


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def _registry() -> CollectorRegistry:
    snapshot = MetricsSnapshot("1.2.3", ready=True, started_at=0.0)
    return metrics_registry(lambda: snapshot, network_series=lambda: 100)


async def _ask(
    path: str,
    *,
    method: str = "GET",
    accept: str = "",
    alive: bool = True,
    readiness: Readiness = Readiness(ready=True),  # noqa: B008 - frozen
) -> Answer:
    answer = Answer()

    async def receive() -> MutableMapping[str, object]:
        raise AssertionError("no body is read")

    async def send(message: MutableMapping[str, object]) -> None:
        if message["type"] == "http.response.start":
            answer.status = int(str(message["status"]))
            headers = message["headers"]
            assert isinstance(headers, list)
            answer.headers = {name.decode(): value.decode() for name, value in headers}
        else:
            body = message["body"]
            assert isinstance(body, bytes)
            answer.body += body

    app = health_app(alive=lambda: alive, readiness=lambda: readiness, registry=_registry())
    headers = [(b"accept", accept.encode())] if accept else []
    scope: MutableMapping[str, object] = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": headers,
    }
    await app(scope, receive, send)
    return answer


async def test_a_living_controller_is_200_also_while_it_is_not_ready() -> None:
    answer = await _ask("/livez", readiness=Readiness(ready=False))

    assert (answer.status, json.loads(answer.body)) == (200, {"alive": True})


async def test_a_stuck_controller_is_503() -> None:
    assert (await _ask("/livez", alive=False)).status == 503


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
