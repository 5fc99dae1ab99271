"""What health, metrics and `status` report of a controller."""

import asyncio
import contextlib
import http.client
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imdsproxy import __version__
from imdsproxy.api.answers import Readiness
from imdsproxy.api.exposition import Exposed
from imdsproxy.api.health import HealthServer
from imdsproxy.api.metrics import Metrics
from imdsproxy.api.status import report_readiness, report_status
from imdsproxy.controller.companion import Companion
from imdsproxy.controller.identity import IdentityHost
from imdsproxy.controller.issuer_documents import IssuerDocuments
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.traffic import count_traffic
from imdsproxy.errors import Problem, RuntimeUnavailable
from imdsproxy.haproxy.master import MasterClient
from imdsproxy.haproxy.rules.runtime import WorkerTotals
from imdsproxy.issuer.rotation import Pace
from imdsproxy.model.entities import Instance, InstanceId, NetworkId, Port
from imdsproxy.model.observation import Observation
from imdsproxy.network.listeners.plan import ListenerPlan
from imdsproxy.network.planned import NotServed
from imdsproxy.nova.upstream import NovaEndpointReport
from imdsproxy.reconcile.part import Gauge
from imdsproxy.reconcile.progress import Durations
from support.controllers import BROKEN, BUSY, busy_controller, expose, idle_controller, row
from support.tasks import until

_RELOAD = ("number", "at", "reason", "ok", "result", "took_s")


async def _report(controller: Any) -> dict[str, Any]:
    return asdict(await report_status(controller))


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Parts]:
    with busy_controller(tmp_path) as controller:
        yield controller


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Parts]:
    with idle_controller(tmp_path) as controller:
        yield controller


async def test_every_part_is_in_the_report(busy: Parts) -> None:
    report = await _report(replace(busy, started=5.0))
    counts = [report[name] for name in ("networks", "serving", "instances", "addresses")]
    assert counts == [2, 1, 3, 4]
    assert report["uptime_s"] == 93_784.0
    assert report["not_served"][0]["reason"] == "nginx has port 80"
    assert report["unmatched_policies"] == ("policy.networks.bleu",)
    assert report["problems"][-1]["reason"] == "/x: disk full"
    assert report["progress"] == ({"what": "storing instances", "done": 1, "of": 2},)
    assert [one["endpoint"] for one in report["nova"]] == ["192.0.2.1:8775", "192.0.2.2:8775"]
    values = {
        name: tuple(report[name].values())
        for name in ("documents", "last_plan", "unix_listener", "macs", "audit", "fleet", "haproxy")
    }
    reload = dict(zip(_RELOAD, (8, 6.0, "networks changed", False, "no file", 0.5), strict=True))
    assert values == {
        "documents": ((os.getpid(),) * 3, "", True),
        "last_plan": (7.0, 3, ("networks changed",), ("red: no device",), 0.002),
        "unix_listener": ("/run/agent", True, "0644", 1, 2, "", 2, "agent (pid 7)"),
        "macs": (
            *(3, 4, 2, 1, {"red": 3}),
            {"red": 7},
            ("169.254.169.254 in network red by 52:54:00:00:00:09",),
        ),
        "audit": ("all", "/x", 40, 4, "/x: disk full"),
        "fleet": (
            "https://hub1:7443",
            pytest.approx(2.5, abs=2),
            812,
            2,
            ("instance/b",),
            {"instance/a": "the disk is full"},
            0.25,
            1_800_000_000.0,
            pytest.approx(3597.5, abs=2),
        ),
        "haproxy": ("3.0.11", 100, 102, (101,), 8, reload, ""),
    }


async def test_a_source_that_does_not_answer_says_for_how_long(busy: Parts) -> None:
    sources = {each["name"]: each for each in (await _report(busy))["sources"]}
    assert sources["neutron"]["stale_s"] == 12.5
    assert sources["fleet"]["stale_s"] == pytest.approx(2.5, abs=2)
    assert (sources["sqlite"]["stale_s"], sources["sqlite"]["instances"]) == (0.0, 3)
    assert [each["reason"] for each in sources["sqlite"]["problems"]] == ["is empty"]
    assert busy.sources.look_up is not None
    busy.sources.look_up.queries.outage = None
    sources = {each["name"]: each for each in (await _report(busy))["sources"]}
    assert sources["neutron"]["stale_s"] == 0.0


async def test_a_port_in_a_network_that_no_source_has_is_a_problem_of_its_source(
    busy: Parts,
) -> None:
    gone = Port(NetworkId("gone"))
    web = Instance(InstanceId("web"), "web", "web", ports=(gone,))
    busy.records.observe(Observation("sqlite", instances={web.id: web}))
    neutron, *_, sqlite = sorted((await _report(busy))["sources"], key=lambda one: one["name"])[1:]
    found = sqlite["problems"][-1]
    assert found["field"] == "instances.web.ports[0].network"
    assert (found["reason"], neutron["problems"]) == ("there is no network gone", ())


async def test_without_haproxy_its_processes_are_not_known(busy: Parts) -> None:
    busy.haproxy.processes = busy.haproxy.last_reload = None
    haproxy = (await _report(busy))["haproxy"]
    assert (haproxy["master"], haproxy["old_workers"], haproxy["last_reload"]) == (None, (), None)


def _set(*places: str) -> Callable[[Parts], None]:
    """Put a problem at these paths."""

    def change(one: Any) -> None:
        for place in places:
            part, name = one, place
            while "." in name:
                step, name = name.split(".", 1)
                part = getattr(part, step)
            setattr(part, name, BROKEN)

    return change


def _end_haproxy(one: Parts) -> None:
    one.haproxy.processes = None


def _hang_haproxy(one: Parts) -> None:
    one.watchdog.answering = False


def _lose_source(one: Parts) -> None:
    one.records.observe(Observation("sqlite", in_sync=False))


def _end_documents(one: Parts) -> None:
    one.records.compiler.serves, one.records.compiler.revisions = False, {InstanceId("a"): "1"}


def _fail_record(one: Parts) -> None:
    one.records.compiler.failures[InstanceId("a")] = BROKEN


def _lose_name(one: Parts) -> None:
    one.nova.unresolved = (BROKEN,)


def _lose_endpoint(one: Parts) -> None:
    one.nova_watch.endpoints = (NovaEndpointReport("default", "192.0.2.2:8775", up=False),)


def _refuse_operation(one: Parts) -> None:
    one.listeners.last_plan = ListenerPlan(problems=(BROKEN,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: None, ""),
        (_end_haproxy, "HAProxy does not run"),
        (_hang_haproxy, "HAProxy does not answer a probe"),
        (_lose_source, "source sqlite is not in sync"),
        (_end_documents, "upstream: nova"),
        (_fail_record, "x: is broken"),
        (_lose_name, "x: is broken"),
        (_lose_endpoint, "no endpoint answers"),
        (_refuse_operation, "x: is broken"),
        *(
            (_set(name), "x: is broken")
            for name in (
                "haproxy.full",
                "policy_store.keys._rounds.failure",
                "records._rounds.failure",
                "listeners.requests.rounds.failure",
                "watchdog._starts.failure",
                "companion._starts.failure",
                "probe.problem",
            )
        ),
    ],
)
def test_a_controller_is_ready_unless_guests_do_not_get_what_sources_have(
    tmp_path: Path, change: Callable[[Parts], None], reason: str
) -> None:
    with idle_controller(tmp_path, audit={"mode": "all", "destination": "/x"}) as one:
        one.audit._failure = Problem("audit.destination", "/x: disk full")
        change(one)
        readiness = report_readiness(one)
    assert readiness.ready is not bool(reason)
    assert reason in "\n".join(readiness.reasons)
    assert readiness.degraded[-1] == "audit.destination: /x: disk full"


@pytest.mark.parametrize("degraded", ["ready", "not-ready"])
def test_a_network_that_is_not_served_counts_by_the_settings(tmp_path: Path, degraded: str) -> None:
    with idle_controller(tmp_path, metrics={"degraded": degraded}) as one:
        one.listeners.last_plan = ListenerPlan(not_served=(BUSY,))
        readiness = report_readiness(one)
    assert "network red: nginx has port 80" in readiness.degraded[0]
    assert readiness.ready is (degraded == "ready")
    assert readiness.reasons == (() if readiness.ready else readiness.degraded)


_NOT_READY: Final = Readiness(False, ("source file is not in sync", "the probe failed"))
_OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0"


@dataclass(eq=False)
class _Reports(Exposed, prefix="imdsproxy_"):
    answer: Readiness

    def readiness(self) -> Readiness:
        return self.answer

    def ready(self) -> Gauge:
        """Whether it is."""
        return self.answer.ready


@contextlib.contextmanager
def _server(readiness: Readiness | None = None, *, alive: bool = True) -> Iterator[int]:
    """A server of which the controller's loop is the test's; without readiness it is starting."""
    listener = socket.create_server(("127.0.0.1", 0))
    with HealthServer(listener, alive=lambda: alive) as server:
        if readiness is not None:
            server.reports = _Reports(readiness)
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
    line: str, readiness: Readiness | None, status: int, body: object, *, alive: bool
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


def test_many_degraded_networks_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    not_served = tuple(
        NotServed(NetworkId(f"m{number:04}"), None, BUSY.code, "no device", "add it")
        for number in range(1000)
    )
    with idle_controller(tmp_path) as one:
        one.listeners.last_plan = ListenerPlan(not_served=not_served)
        lines = report_readiness(one).degraded
        assert lines[0] == "network m0000: no device (port-busy); add it"
        assert (len(lines), lines[-1]) == (21, "and 980 more networks: imdsproxy status")
        one.listeners.last_plan = ListenerPlan(not_served=not_served[:20])
        assert len(report_readiness(one).degraded) == 20


FIGURES = f"""
build_info{{version="{__version__}"}} 1.0
ready 0.0
learned_addresses 1.0
pairs 2.0
networks_serving 1.0
networks_not_served{{code="port-busy"}} 1.0
foreign_listeners{{effect="blocks"}} 2.0
source_in_sync{{source="sqlite"}} 1.0
source_records{{kind="instance",source="sqlite"}} 3.0
mac_filters{{state="refused"}} 4.0
unix_listener_serving 1.0
unix_listener_denied_total 2.0
unix_listener_taken_over_total 2.0
mac_mismatches_total{{network="red"}} 3.0
mac_mismatches_total{{network="blue"}} 0.0
forged_claims_total{{network="red"}} 7.0
nova_endpoint_failures_total{{endpoint="192.0.2.1:8775",endpoint_set="default"}} 4.0
nova_endpoint_up{{endpoint="192.0.2.2:8775",endpoint_set="default"}} 0.0
nova_refused_total{{endpoint_set="default"}} 6.0
haproxy_reloads_total{{result="failed"}} 1.0
haproxy_reload_seconds_count 1.0
haproxy_reload_seconds_sum 0.05
haproxy_reload_seconds_bucket{{le="0.05"}} 1.0
plan_seconds_bucket{{le="0.025"}} 1.0
resolver_seconds_bucket{{le="0.005"}} 1.0
neutron_query_seconds_bucket{{le="0.25"}} 1.0
neutron_query_seconds_sum 0.25
clock_seconds 1.760093784e+09
documents_processes 2.0
limited_guests 2.0
convergence_seconds_sum 0.125
convergence_seconds_count 1.0
convergence_seconds_bucket{{le="0.002"}} 0.0
convergence_seconds_bucket{{le="0.25"}} 1.0
convergence_seconds_bucket{{le="+Inf"}} 1.0
resolver_requests_total{{outcome="unknown"}} 2.0
network_connections_total{{network="blue"}} 100.0
network_denied_total{{network="blue"}} 3.0
audit_lines_total 40.0
audit_lines_lost_total 4.0
audit_failing 1.0
metadata_no_token_total{{network="blue"}} 8.0
metadata_no_token_rejected_total{{network="blue"}} 2.0
metadata_no_token_rejected_total{{network="red"}} 0.0
identity_failing 0.0
identity_tokens_held 3.0
identity_answers_total 3.0
identity_answer_seconds_total 0.5
identity_tokens_total{{origin="new"}} 2.0
identity_refusals_total{{reason="audience"}} 1.0
fleet_connected 1.0
fleet_expired 0.0
fleet_revision 812.0
fleet_failing 1.0
fleet_held 1.0
fleet_certificate_end_seconds 1.8e+09
fleet_clock_difference_seconds 0.25
neutron_queries_total{{result="timeout"}} 1.0
neutron_look_ups_total{{result="negative-cached"}} 3.0
neutron_look_ups_total{{result="known"}} 0.0
neutron_ports 7.0
neutron_stale_seconds 12.5
neutron_backoff_seconds 0.75
"""


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with busy_controller(tmp_path_factory.mktemp("busy")) as controller:
        yield expose(replace(controller, identity=_identity(controller)))


def _identity(controller: Parts) -> IdentityHost:
    """Identity tokens of a host that has given some."""
    beside = Companion(Path("pid"), Path("log"), (), {})
    counts = {"given": {"new": 2}, "refused": {"audience": 1}, "answers": 3, "answered_s": 0.5}
    state = {"held": 3, **counts, "failure": None}
    return IdentityHost(
        controller.layout,
        None,
        IssuerDocuments("https://id.example", Path("public"), lambda: None),
        beside,
        beside,
        Pace(3600, 600),
        controller.clock,
        lambda: asyncio.sleep(0),
        _state=state,
    )


def _names(text: str) -> set[str]:
    families = text_string_to_metric_families(text)
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize("figure", FIGURES.split("\n")[1:-1])
def test_a_figure_has_its_name(exposed: str, figure: str) -> None:
    assert f"\nimdsproxy_{figure}\n" in exposed


def test_an_age_is_exposed(exposed: str) -> None:
    found = re.search(r"^imdsproxy_fleet_age_seconds (.*)$", exposed, re.MULTILINE)
    assert found is not None
    assert float(found[1]) == pytest.approx(2.5, abs=5)


def test_what_is_off_has_no_series(tmp_path: Path) -> None:
    with idle_controller(tmp_path, documents={"enabled": False}) as controller:
        names = _names(expose(controller))
    absent = ("audit_failing", "documents_processes", "unix_listener_serving")
    assert "imdsproxy_ready" in names
    assert not [
        name for name in names if "neutron" in name or "fleet" in name or name.endswith(absent)
    ]


def test_the_room_on_the_disks_of_both_directories_is_exposed(tmp_path: Path, busy: Parts) -> None:
    shutil.rmtree(tmp_path / "state")
    text = expose(busy)
    lines = re.findall(
        r'^imdsproxy_disk_(\w+)_bytes{directory="runtime"} (\S+)$', text, re.MULTILINE
    )
    assert 0 < float(dict(lines)["free"]) < float(dict(lines)["size"])
    assert 'directory="state"' not in text


def test_each_metric_is_exposed_once_with_help_and_type_and_no_other_of_ours(exposed: str) -> None:
    page = (
        (Path(__file__).parents[3] / "docs/reference/metrics.md")
        .read_text()
        .partition("## Of a hub")[0]
    )
    described = set(re.findall(r"imdsproxy_\w+", page))
    assert {name for name in _names(exposed) if name.startswith("imdsproxy_")} == described
    assert "process_resident_memory_bytes" in _names(exposed)
    for word in ("HELP", "TYPE"):
        names = re.findall(rf"^# {word} (\S+)", exposed, re.MULTILINE)
        assert len(names) == len(set(names))


def test_with_more_networks_than_wanted_there_is_one_sum(tmp_path: Path) -> None:
    with idle_controller(tmp_path, metrics={"network_series": 1}) as controller:
        rows = [row(f"net-{number}", 1) for number in range(1000)]
        controller.traffic.totals.add(2, count_traffic(rows))
        lines = [
            one for one in expose(controller).split("\n") if "network_connections_total{" in one
        ]
    assert lines == ['imdsproxy_network_connections_total{network="*"} 1000.0']


async def test_scrapes_that_come_together_read_haproxy_once_and_a_cancelled_one_ends_no_other(
    idle: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answering = asyncio.Event()

    async def send(_client: MasterClient, _worker: int, command: str) -> str:
        asked.append(command)
        await answering.wait()
        return "# pxname,svname,type,stot,\nguests,blue,3,5,\n"

    monkeypatch.setattr(MasterClient, "send", send)
    metrics = Metrics(idle)
    first, *others = [asyncio.create_task(metrics.prepare()) for _ in range(3)]
    await until(lambda: asked)
    first.cancel()
    answering.set()
    await asyncio.gather(*others)
    assert first.cancelled()
    assert asked == ["show stat"]
    assert 'imdsproxy_network_connections_total{network="blue"} 5.0' in expose(idle)
    await metrics.prepare()
    assert asked == ["show stat"] * 2


async def test_haproxys_figures_have_no_value_until_haproxy_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = r"^imdsproxy_(?:network_|unix_listener_)(?:connections|denied|malformed)|^imdsproxy_limited_guests"

    async def send(_client: MasterClient, _worker: int, _command: str) -> str:
        if not answers:
            raise RuntimeUnavailable("HAProxy does not answer")
        return ""

    monkeypatch.setattr(MasterClient, "send", send)
    with idle_controller(tmp_path, limits={"enabled": True}) as controller:
        for answers in (False, True):
            await controller.traffic.refresh()
            found = re.findall(figures, expose(controller), re.MULTILINE)
            assert bool(found) == answers


def test_connections_are_counted_before_a_reload(idle: Parts) -> None:
    assert idle.traffic.count in idle.haproxy.before_reload


def test_a_duration_is_counted_in_the_first_bucket_that_holds_it() -> None:
    durations = Durations()
    for seconds in (0.0, 0.002, 0.0021, 29.0, 31.0):
        durations.add(seconds)
    within = durations.within()
    assert (within[0.002], within[0.005], within[10.0], within[30.0]) == (2, 3, 3, 4)
    assert within[math.inf] == 5
    assert durations.total_s == pytest.approx(60.0041)


def test_both_families_of_a_network_are_one_sum_and_other_proxies_are_not_counted() -> None:
    agents = {**row("agents", 7, 2, 1), "pxname": "agents"}
    others = [{**row("FRONTEND", 9), "type": "0"}, {**row("x", 9), "pxname": "probe"}]
    rows = [row("red", 5, 1), row("red", 2, 0, 3), {**row("blue", 1), "dreq": ""}, row("agents", 5)]
    found = count_traffic([*rows, agents, *others])
    expected = {
        ("guests", "red"): [7, 1, 3],
        ("guests", "blue"): [1, 0, 0],
        # A network of the name of Neutron's proxies is not theirs.
        ("guests", "agents"): [5, 0, 0],
        ("agents", "agents"): [7, 2, 1],
    }
    columns = ("stot", "dreq", "ereq")
    assert {key: [found[*key, one] for one in columns] for key in expected} == expected
    assert {key[:2] for key in found} == expected.keys()


def test_what_a_worker_has_counted_is_counted_once_and_the_sum_never_falls() -> None:
    totals: WorkerTotals[tuple[str, str, str]] = WorkerTotals()
    for worker, rows in ((1, (5, 4)), (1, (6, 4)), (2, (1, 0)), (2, (3, 0))):
        names = zip(("red", "blue"), rows, strict=True)
        totals.add(worker, count_traffic([row(name, count) for name, count in names]))
        totals.add(worker, {})  # an answer in which they are missing
    assert totals.totals["guests", "red", "stot"] == 9
    assert totals.totals["guests", "blue", "stot"] == 4
