from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imdsproxy import __version__
from imdsproxy.controller.metrics import METRICS, Metric, Metrics, count_traffic
from imdsproxy.core.haproxy.runtime import WorkerTotals
from imdsproxy.core.timing import Durations
from support.fake_controller import ONE, fake_controller, fake_metrics, row


def _full(*, network_series: int = 100, neutron: bool = True, audit: int = 1) -> Metrics:
    one = fake_controller()
    one.holder.settings.metrics.network_series = network_series
    one.audit.settings = lambda: SimpleNamespace(one_in=audit)
    one.sources.look_up = one.sources.look_up if neutron else None
    return fake_metrics(one)


def _exposed(metrics: Metrics) -> str:
    return metrics.expose("")[1].decode()


def _samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(_exposed(metrics))
        for sample in family.samples
    }


def _value(metrics: Metrics, name: str, **labels: str) -> float:
    return _samples(metrics)[name, frozenset(labels.items())]


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("imdsproxy_build_info", {"version": __version__}, 1),
        ("imdsproxy_ready", {}, 0),
        ("imdsproxy_networks_left_out", {"code": "port-busy"}, 1),
        ("imdsproxy_foreign_listeners", {"effect": "blocks"}, 2),
        ("imdsproxy_source_in_sync", {"source": "sqlite"}, 1),
        ("imdsproxy_source_records", {"source": "sqlite", "kind": "instance"}, 3),
        ("imdsproxy_source_failures_total", {"source": "neutron"}, 3),
        ("imdsproxy_gates", {"state": "refused"}, 4),
        ("imdsproxy_unix_listener_denied_total", {}, 2),
        ("imdsproxy_unix_listener_taken_over_total", {}, 2),
        ("imdsproxy_mac_mismatches_total", {"network": "red"}, 3),
        (
            "imdsproxy_nova_endpoint_failures_total",
            {"endpoint_set": "default", "endpoint": ONE},
            4,
        ),
        ("imdsproxy_haproxy_reloads_total", {"result": "failed"}, 1),
        ("imdsproxy_haproxy_reload_seconds_count", {}, 8),
        ("imdsproxy_haproxy_reload_seconds_sum", {}, 0.5),
        ("imdsproxy_convergence_seconds_sum", {}, 0.125),
        ("imdsproxy_convergence_seconds_count", {}, 10),
        ("imdsproxy_convergence_seconds_bucket", {"le": "0.002"}, 0),
        ("imdsproxy_convergence_seconds_bucket", {"le": "0.01"}, 9),
        ("imdsproxy_convergence_seconds_bucket", {"le": "+Inf"}, 10),
        ("imdsproxy_resolver_requests_total", {"outcome": "unknown"}, 2),
        ("imdsproxy_network_connections_total", {"network": "blue"}, 100),
        ("imdsproxy_network_denied_total", {"network": "blue"}, 3),
        (
            "imdsproxy_nova_endpoint_up",
            {"endpoint_set": "default", "endpoint": "192.0.2.2:8775"},
            0,
        ),
        ("imdsproxy_nova_refused_total", {"endpoint_set": "default"}, 6),
        ("imdsproxy_audit_lines_total", {}, 40),
        ("imdsproxy_audit_left_out_total", {}, 4),
        ("imdsproxy_audit_failing", {}, 1),
        ("imdsproxy_metadata_no_token_total", {"network": "blue"}, 8),
        ("imdsproxy_metadata_no_token_rejected_total", {"network": "blue"}, 2),
        ("imdsproxy_neutron_queries_total", {"result": "timeout"}, 1),
        ("imdsproxy_neutron_look_ups_total", {"result": "negative-cached"}, 3),
        ("imdsproxy_neutron_ports", {}, 7),
        ("imdsproxy_neutron_stale_seconds", {}, 12.5),
        ("imdsproxy_neutron_backoff_seconds", {}, 0.75),
    ],
)
def test_a_figure_has_its_name(name: str, labels: dict[str, str], value: float) -> None:
    assert _value(_full(), name, **labels) == value


def test_what_is_off_has_no_series() -> None:
    names = {name for name, _ in _samples(_full(neutron=False, audit=0))}
    assert not [name for name in names if "neutron" in name or name.endswith("audit_failing")]


def test_each_metric_is_exposed_once_with_help_and_type_and_no_other_of_ours() -> None:
    exposed = {name for name, _ in _samples(_full()) if name.startswith("imdsproxy_")}

    described = {name for metric in METRICS for name in metric.exposed.split(", ")}
    assert exposed == described
    for word in ("HELP", "TYPE"):
        names = re.findall(rf"^# {word} (\S+)", _exposed(_full()), re.MULTILINE)
        assert len(names) == len(set(names))
        assert {name.removesuffix("_total") for name in names} >= {one.name for one in METRICS}


def test_with_more_networks_than_wanted_there_is_one_sum() -> None:
    samples = _samples(_full(network_series=1))

    networks = {
        dict(labels)["network"]: value
        for (name, labels), value in samples.items()
        if name == "imdsproxy_network_connections_total"
    }
    assert networks == {"*": 110}


def test_the_number_of_series_is_bounded_at_a_thousand_networks() -> None:
    metrics = _full()
    metrics.traffic.add(2, count_traffic([row(f"net-{number}", 1) for number in range(1000)]))

    assert len(_samples(metrics)) < 150


def test_the_process_tells_of_itself() -> None:
    assert _value(_full(), "process_resident_memory_bytes") > 0


def test_a_duration_is_counted_in_the_first_bucket_that_holds_it() -> None:
    durations = Durations()
    for seconds in (0.0, 0.002, 0.0021, 29.0, 31.0):
        durations.add(seconds)
    within = durations.within()
    assert (within[0.002], within[0.005], within[10.0], within[30.0]) == (2, 3, 3, 4)
    assert within[math.inf] == 5
    assert durations.total_s == pytest.approx(60.0041)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_named_as_prometheus_wants_it(metric: Metric) -> None:
    """The rules of `promtool check metrics` (promlint): seconds and bytes, without a prefix."""
    assert metric.help.endswith(".")
    assert re.fullmatch(r"imdsproxy(_[a-z]+)+", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
    assert (metric.kind == "summary") <= metric.name.endswith("_seconds")
    for name in metric.exposed.split(", "):
        assert name.endswith("_total") == (metric.kind == "counter")
    units = "ms milliseconds microseconds minutes hours kb kib mb mib percent"
    kinds = "gauge counter summary histogram info"
    words = set(metric.name.removesuffix("_build_info").split("_"))
    assert not words & {*units.split(), *kinds.split()}
    for label in metric.labels:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", label)
        assert label not in ("le", "quantile")


def test_both_families_of_a_network_are_one_sum() -> None:
    found = count_traffic([row("red", 5, 1), row("red", 2, 0, 3), row("blue", 1)])
    red = [found["guests", "red", column] for column in ("stot", "dreq", "ereq")]
    assert (red, found["guests", "blue", "stot"]) == ([7, 1, 3], 1)


def test_what_a_worker_has_counted_is_counted_once_and_the_sum_never_falls() -> None:
    totals: WorkerTotals[tuple[str, str, str]] = WorkerTotals()
    for worker, rows in ((1, (5, 4)), (1, (6, 4)), (2, (1, 0)), (2, (3, 0))):
        names = zip(("red", "blue"), rows, strict=True)
        totals.add(worker, count_traffic([row(name, count) for name, count in names]))
        totals.add(worker, {})  # an answer in which they are missing
    assert totals.totals["guests", "red", "stot"] == 9
    assert totals.totals["guests", "blue", "stot"] == 4


def test_other_proxies_and_lines_are_not_counted() -> None:
    frontend = {**row("FRONTEND", 9), "type": "0"}
    found = count_traffic(
        [frontend, {**row("x", 9), "pxname": "probe"}, {**row("red", 0), "stot": ""}]
    )
    assert set(found) == {("guests", "red", one) for one in ("stot", "dreq", "ereq")}
    assert not found.total()


def test_neutrons_proxies_are_counted_apart_from_a_network_of_that_name() -> None:
    found = count_traffic([row("agents", 5), {**row("agents", 7, 2, 1), "pxname": "agents"}])
    assert found["guests", "agents", "stot"] == 5
    assert [found["agents", "agents", one] for one in ("stot", "dreq", "ereq")] == [7, 2, 1]
