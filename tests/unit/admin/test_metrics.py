"""Every metric's name and value, and what is counted of HAProxy's traffic."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imdsproxy import __version__
from imdsproxy.admin.metrics import METRICS, Metric, Metrics, count_traffic
from imdsproxy.core.haproxy.runtime import WorkerTotals
from imdsproxy.core.timing import Durations
from support.fake_controller import fake_controller, fake_metrics, row

FIGURES = f"""
build_info{{version="{__version__}"}} 1.0
ready 0.0
networks_left_out{{code="port-busy"}} 1.0
foreign_listeners{{effect="blocks"}} 2.0
source_in_sync{{source="sqlite"}} 1.0
source_records{{kind="instance",source="sqlite"}} 3.0
source_failures_total{{source="neutron"}} 3.0
gates{{state="refused"}} 4.0
unix_listener_serving 1.0
unix_listener_denied_total 2.0
unix_listener_taken_over_total 2.0
mac_mismatches_total{{network="red"}} 3.0
nova_endpoint_failures_total{{endpoint="192.0.2.1:8775",endpoint_set="default"}} 4.0
nova_endpoint_up{{endpoint="192.0.2.2:8775",endpoint_set="default"}} 0.0
nova_refused_total{{endpoint_set="default"}} 6.0
haproxy_reloads_total{{result="failed"}} 1.0
haproxy_reload_seconds_count 8.0
haproxy_reload_seconds_sum 0.5
convergence_seconds_sum 0.125
convergence_seconds_count 10.0
convergence_seconds_bucket{{le="0.002"}} 0.0
convergence_seconds_bucket{{le="0.01"}} 9.0
convergence_seconds_bucket{{le="+Inf"}} 10.0
resolver_requests_total{{outcome="unknown"}} 2.0
network_connections_total{{network="blue"}} 100.0
network_denied_total{{network="blue"}} 3.0
audit_lines_total 40.0
audit_left_out_total 4.0
audit_failing 1.0
metadata_no_token_total{{network="blue"}} 8.0
metadata_no_token_rejected_total{{network="blue"}} 2.0
neutron_queries_total{{result="timeout"}} 1.0
neutron_look_ups_total{{result="negative-cached"}} 3.0
neutron_look_ups_total{{result="known"}} 0.0
neutron_ports 7.0
neutron_stale_seconds 12.5
neutron_backoff_seconds 0.75
"""


def _full(*, network_series: int = 100, neutron: bool = True, audit: int = 1) -> Metrics:
    one = fake_controller()
    one.holder.settings.metrics.network_series = network_series
    one.audit.settings = lambda: SimpleNamespace(one_in=audit)
    one.sources.look_up = one.sources.look_up if neutron else None
    return fake_metrics(one)


def _exposed(metrics: Metrics) -> str:
    return metrics.expose("")[1].decode()


def _names(text: str) -> set[str]:
    families = text_string_to_metric_families(text)
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize("figure", FIGURES.split("\n")[1:-1])
def test_a_figure_has_its_name(figure: str) -> None:
    assert f"\nimdsproxy_{figure}\n" in _exposed(_full())


def test_what_is_off_has_no_series() -> None:
    names = _names(_exposed(_full(neutron=False, audit=0)))
    assert not [name for name in names if "neutron" in name or name.endswith("audit_failing")]


def test_each_metric_is_exposed_once_with_help_and_type_and_no_other_of_ours() -> None:
    text = _exposed(_full())
    described = {name for metric in METRICS for name in metric.exposed.split(", ")}
    assert {name for name in _names(text) if name.startswith("imdsproxy_")} == described
    assert "process_resident_memory_bytes" in _names(text)
    for word in ("HELP", "TYPE"):
        names = re.findall(rf"^# {word} (\S+)", text, re.MULTILINE)
        assert len(names) == len(set(names))
        assert {name.removesuffix("_total") for name in names} >= {one.name for one in METRICS}


def test_with_more_networks_than_wanted_there_is_one_sum() -> None:
    metrics = _full(network_series=1)
    metrics.traffic.add(2, count_traffic([row(f"net-{number}", 1) for number in range(1000)]))
    lines = [one for one in _exposed(metrics).split("\n") if "network_connections_total{" in one]
    assert lines == ['imdsproxy_network_connections_total{network="*"} 1110.0']


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
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", label) for label in metric.labels)
    assert not {"le", "quantile"} & set(metric.labels)


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
