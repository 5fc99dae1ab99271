from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from imdsproxy.admin.collector import metrics_registry
from imdsproxy.admin.metrics import METRICS, MetricDescription
from imdsproxy.admin.snapshot import (
    MetricsSnapshot,
    NetworkTraffic,
    NeutronCounts,
    SourceFigures,
    Timing,
    bound_networks,
)
from imdsproxy.core.progress import Durations

FULL = MetricsSnapshot(
    version="1.2.3",
    ready=True,
    started_at=1_760_000_000.0,
    networks_serving=2,
    instances=3,
    addresses=4,
    conflicts=1,
    left_out={"port-busy": 1},
    foreign={"blocks": 2},
    sources={"sqlite": SourceFigures(True, 2, 3, 1, 5)},
    haproxy_up=True,
    haproxy_old_workers=1,
    reloads={"ok": 7, "failed": 1},
    reload=Timing(8, 0.5),
    restarts={"haproxy": 1},
    documents_up=3,
    plans=Timing(9, 0.25),
    operations={"ok": 20},
    convergence=Durations(Counter({0.005: 9, 0.1: 1}), 0.125),
    resolver={"found": 1, "unknown": 2},
    mismatches={"red": 3},
    resolver_held=2,
    commands={"ok": 30},
    traffic={"blue": NetworkTraffic(100, 3, 1), "red": NetworkTraffic(10, 0, 0)},
    neutron=NeutronCounts(
        queries={"ok": 9, "failed": 2, "timeout": 1},
        look_ups={"found": 5, "negative-cached": 3},
        ports=7,
        stale_s=12.5,
        backoff_s=0.75,
    ),
    unix_serving=True,
    unix_traffic=NetworkTraffic(3, 2, 1),
    nova_failures={("default", "192.0.2.1:8775"): 4},
    nova_up={("default", "192.0.2.1:8775"): True, ("default", "192.0.2.2:8775"): False},
    nova_refused={"default": 6},
    audit_lines=40,
    audit_left_out=4,
    audit_failing=True,
    no_token={"blue": 8, "red": 1},
    no_token_rejected={"blue": 2},
)


def _exposed(snapshot: MetricsSnapshot, *, network_series: int = 100) -> str:
    registry = metrics_registry(lambda: snapshot, network_series=lambda: network_series)
    return generate_latest(registry).decode()


def _samples(
    snapshot: MetricsSnapshot, *, network_series: int = 100
) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(_exposed(snapshot, network_series=network_series))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def _value(snapshot: MetricsSnapshot, name: str, **labels: str) -> float:
    return _samples(snapshot)[name, frozenset(labels.items())]


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("imdsproxy_build_info", {"version": "1.2.3"}, 1),
        ("imdsproxy_ready", {}, 1),
        ("imdsproxy_networks_left_out", {"code": "port-busy"}, 1),
        ("imdsproxy_foreign_listeners", {"effect": "blocks"}, 2),
        ("imdsproxy_source_in_sync", {"source": "sqlite"}, 1),
        ("imdsproxy_source_records", {"source": "sqlite", "kind": "instance"}, 3),
        ("imdsproxy_source_failures_total", {"source": "sqlite"}, 5),
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
def test_a_figure_is_told_under_its_name(name: str, labels: dict[str, str], value: float) -> None:
    assert _value(FULL, name, **labels) == value


def test_without_the_source_neutron_nothing_is_told_of_it() -> None:
    snapshot = replace(FULL, neutron=None)
    assert not any("neutron" in name for name, _ in _samples(snapshot))


def test_nothing_fails_where_there_is_no_audit_log() -> None:
    assert ("imdsproxy_audit_failing", frozenset()) not in _samples(
        replace(FULL, audit_failing=None)
    )


def test_every_described_metric_is_exposed_and_no_other_of_ours() -> None:
    exposed = {name for name, _ in _samples(FULL) if name.startswith("imdsproxy_")}

    described = {name for metric in METRICS for name in metric.exposed.split(", ")}
    assert exposed == described


def test_with_more_networks_than_wanted_there_is_one_sum() -> None:
    samples = _samples(FULL, network_series=1)

    networks = {
        dict(labels)["network"]: value
        for (name, labels), value in samples.items()
        if name == "imdsproxy_network_connections_total"
    }
    assert networks == {"*": 110}


def test_the_number_of_series_is_bounded_at_a_thousand_networks() -> None:
    traffic = {f"net-{number}": NetworkTraffic(1, 1, 1) for number in range(1000)}
    snapshot = MetricsSnapshot("1", ready=True, started_at=0.0, traffic=traffic)

    assert len(_samples(snapshot)) < 100


def test_the_sum_is_the_sum_of_each_part() -> None:
    bounded = bound_networks({"a": NetworkTraffic(1, 2, 3), "b": NetworkTraffic(10, 20, 30)}, 1)

    assert bounded == {"*": NetworkTraffic(11, 22, 33)}
    assert bound_networks({"a": NetworkTraffic(1, 2, 3)}, 1) == {"a": NetworkTraffic(1, 2, 3)}
    assert bound_networks({}, 0) == {}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: MetricDescription) -> None:
    assert re.fullmatch(r"imdsproxy(_[a-z]+)+", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum"))
    assert (metric.kind == "summary") <= metric.name.endswith("_seconds")
    assert metric.help.endswith(".")


def test_the_process_tells_of_itself() -> None:
    assert _value(FULL, "process_resident_memory_bytes") > 0


def test_registering_takes_no_snapshot() -> None:
    def take() -> MetricsSnapshot:
        raise AssertionError("asked too early")

    registry = metrics_registry(take, network_series=lambda: 100)
    with pytest.raises(AssertionError, match="too early"):
        generate_latest(registry)


def test_a_duration_is_counted_in_the_first_bucket_that_holds_it() -> None:
    durations = Durations()
    for seconds in (0.0, 0.002, 0.0021, 29.0, 31.0):
        durations.add(seconds)
    within = durations.within()
    assert (within[0.002], within[0.005], within[10.0], within[30.0]) == (2, 3, 3, 4)
    assert within[math.inf] == 5
    assert durations.total_s == pytest.approx(60.0041)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_named_as_prometheus_wants_it(metric: MetricDescription) -> None:
    """The rules of `promtool check metrics` (promlint)."""
    assert metric.help
    assert re.fullmatch(r"imdsproxy(_[a-z0-9]+)+", metric.name)
    for name in metric.exposed.split(", "):
        assert name.endswith("_total") == (metric.kind == "counter")
        if metric.kind in ("gauge", "counter"):
            assert not name.endswith(("_count", "_sum", "_bucket"))
    words = set(metric.name.split("_"))
    assert not words & {"gauge", "counter", "summary", "histogram", "info"} or metric.name.endswith(
        "_build_info"
    )
    # Seconds and bytes, without a prefix.
    assert not words & {
        "ms",
        "milliseconds",
        "microseconds",
        "minutes",
        "hours",
        "kb",
        "kib",
        "mb",
        "mib",
        "percent",
    }
    for label in metric.labels:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", label)
        assert label not in ("le", "quantile")


def test_each_metric_is_exposed_once_with_its_help_and_type() -> None:
    text = _exposed(FULL)
    for word in ("HELP", "TYPE"):
        names = re.findall(rf"^# {word} (\S+)", text, re.MULTILINE)
        assert len(names) == len(set(names))
        assert {name.removesuffix("_total") for name in names} >= {one.name for one in METRICS}
