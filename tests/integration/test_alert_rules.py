"""Each alert waits as long as it says, by `promtool test rules`, and says who must do what."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.prometheus import RULES, Alert, alerts, promtool

_BEGINS_M: Final = 10
"""The minute in which each fault begins."""

_SETTLES_M: Final = 3
"""A rate over minutes rises slowly."""

_MINUTES: Final = {"s": 1 / 60, "m": 1, "h": 60}


def _becomes(before: str, after: str) -> str:
    return f"{before}x{_BEGINS_M - 1} {after}x120"


def _grows(each_minute: int = 1) -> str:
    return f"0x{_BEGINS_M - 1} {each_minute}+{each_minute}x120"


def _slow(metric: str, bound: str) -> Mapping[str, str]:
    """A histogram of which each observation takes longer than `bound`."""
    return {f'{metric}_bucket{{le="{bound}"}}': "0x130", f'{metric}_bucket{{le="30.0"}}': _grows(),
            f'{metric}_bucket{{le="+Inf"}}': _grows()}  # fmt: skip


def _ends(metric: str, certificate: str, *, days: int) -> Mapping[str, str]:
    """A certificate that is good for longer than so many days, and then for less: a new one is worse."""
    label = f'{{certificate="{certificate}"}}' if certificate else ""
    # Times of these tests begin at 0.
    return {f"{metric}{label}": _becomes(f"{days * 86_400 + 7200}", f"{days * 86_400}")}


_ON, _OFF = _becomes("0", "1"), _becomes("1", "0")
_SERIES: Final[Mapping[str, Mapping[str, str]]] = {
    "Down": {'up{job="imdsproxy"}': _OFF},
    "HaproxyExporterDown": {'up{job="imdsproxy-haproxy"}': _OFF},
    "HaproxyDown": {"imdsproxy_haproxy_up": _OFF},
    "NotReady": {"imdsproxy_ready": _OFF},
    "ProcessRestarted": {'imdsproxy_process_restarts_total{process="haproxy"}': _grows()},
    "ControllerRestarting": {"imdsproxy_start_time_seconds": f"5x{_BEGINS_M - 1} 6+60x120"},
    "DocumentServerDown": {"imdsproxy_documents_processes": _becomes("2", "0")},
    "IdentityFailing": {"imdsproxy_identity_failing": _ON},
    "SettingsRefused": {"imdsproxy_settings_refused": _ON},
    "FewFileDescriptors": {
        'process_open_fds{job="imdsproxy"}': _becomes("80", "81"),
        'process_max_fds{job="imdsproxy"}': "100x130",
    },
    "HaproxyFull": {
        "haproxy_process_current_connections": _becomes("90", "91"),
        "haproxy_process_max_connections": "100x130",
    },
    "DiskFull": {
        'imdsproxy_disk_free_bytes{directory="state"}': _becomes("5", "4"),
        'imdsproxy_disk_size_bytes{directory="state"}': "100x130",
    },
    # Times of these tests begin at 0.
    "ClockWrong": {"imdsproxy_clock_seconds": f"0+60x{_BEGINS_M - 1} 640+60x120"},
    "NetworkNotServed": {'imdsproxy_networks_not_served{code="port-busy"}': _ON},
    "ForeignListener": {'imdsproxy_foreign_listeners{effect="shares"}': _ON},
    "MacFilterMissing": {'imdsproxy_mac_filters{state="refused"}': _ON},
    "MacMismatch": {'imdsproxy_mac_mismatches_total{network="red"}': _grows()},
    "ForgedClaims": {'imdsproxy_forged_claims_total{network="red"}': _grows(10)},
    "UnixListenerDown": {"imdsproxy_unix_listener_serving": _OFF},
    "UnixListenerContested": {"imdsproxy_unix_listener_taken_over_total": _grows()},
    "SourceNotInSync": {'imdsproxy_source_in_sync{source="file"}': _OFF},
    "RecordsRefused": {'imdsproxy_source_refused_records{source="file"}': _ON},
    "Conflicts": {"imdsproxy_conflicts": _ON},
    "NeutronUnreachable": {"imdsproxy_neutron_stale_seconds": _ON},
    "SlowLookUps": _slow("imdsproxy_resolver_seconds", "2.5"),
    "SlowChanges": _slow("imdsproxy_convergence_seconds", "5.0"),
    "MissesUnavailable": {'imdsproxy_resolver_requests_total{outcome="unavailable"}': _grows()},
    "MissesOverLimit": {'imdsproxy_resolver_requests_total{outcome="over-limit"}': _grows()},
    "UnknownGuests": {'imdsproxy_resolver_requests_total{outcome="unknown"}': _grows(6)},
    "ReloadFailed": {'imdsproxy_haproxy_reloads_total{result="failed"}': _grows()},
    "OldWorkers": {"imdsproxy_haproxy_old_workers": _becomes("3", "4")},
    "CommandsFailing": {'imdsproxy_haproxy_commands_total{result="failed"}': _grows(3)},
    "PlanFailing": {'imdsproxy_plan_operations_total{result="failed"}': _grows()},
    "GuestsLimited": {"imdsproxy_limited_guests": _ON},
    "RequestsDenied": {'imdsproxy_network_denied_total{network="red"}': _grows(6000)},
    "MalformedRequests": {'imdsproxy_network_malformed_total{network="red"}': _grows(6000)},
    "TokensMissing": {'imdsproxy_metadata_no_token_rejected_total{network="red"}': _grows()},
    "ReadsWithoutToken": {'imdsproxy_metadata_no_token_total{network="red"}': _grows()},
    "AuditFailing": {"imdsproxy_audit_failing": _ON},
    "AuditLinesLost": {"imdsproxy_audit_lines_lost_total": _grows()},
    "NovaDown": {
        'imdsproxy_nova_endpoint_up{endpoint_set="default",endpoint="a"}': "0x130",
        'imdsproxy_nova_endpoint_up{endpoint_set="default",endpoint="b"}': _OFF,
    },
    "NovaEndpointDown": {'imdsproxy_nova_endpoint_up{endpoint_set="d",endpoint="a"}': _OFF},
    "NovaRefusesSecret": {'imdsproxy_nova_refused_total{endpoint_set="default"}': _grows()},
    "NovaFailing": {
        'imdsproxy_nova_endpoint_failures_total{endpoint="a"}': _grows(3),
        'imdsproxy_nova_endpoint_up{endpoint="a"}': "1x130",
    },
    "NoHub": {
        'imdsproxy_hub_ready{job="imdsproxy-hub",instance="a"}': _OFF,
        'up{job="imdsproxy-hub",instance="a"}': "1x130",
        # A hub that has ended has no series of its own.
        'up{job="imdsproxy-hub",instance="b"}': "0x130",
    },
    "HubDown": {'up{job="imdsproxy-hub"}': _OFF},
    "HubAbsent": {"imdsproxy_hub_absent_hubs": _ON},
    "HubNotFollowing": {"imdsproxy_hub_ready": _OFF},
    "HubCannotSign": {
        'imdsproxy_hub_identity_failing{instance="a"}': "0x130",
        'imdsproxy_hub_identity_failing{instance="b"}': _ON,
    },
    "FleetCannotSign": {
        'imdsproxy_hub_identity_failing{instance="a"}': "1x130",
        'imdsproxy_hub_identity_failing{instance="b"}': _ON,
    },
    "HubsApart": {"imdsproxy_hub_silent_hubs": _ON},
    "EtcdMemberDown": {
        'imdsproxy_hub_etcd_member_up{member="m1",instance="a"}': "1x130",
        'imdsproxy_hub_etcd_member_up{member="m1",instance="b"}': _OFF,
    },
    "EtcdProblem": {'imdsproxy_hub_etcd_member_problems{member="m1"}': _ON},
    "EtcdNearlyFull": {
        'imdsproxy_hub_etcd_database_bytes{member="m1"}': _becomes("70", "71"),
        'imdsproxy_hub_etcd_quota_bytes{member="m1"}': "100x130",
    },
    "FleetWritesStopped": {
        "imdsproxy_hub_writes_stopped": _ON,
        "imdsproxy_hub_restore_suspected": _ON,
    },
    "FleetRestoreSuspected": {
        "imdsproxy_hub_writes_stopped": "0x130",
        "imdsproxy_hub_restore_suspected": _ON,
    },
    "FleetValuesRefused": {"imdsproxy_hub_refused_values": _ON},
    "FleetTokenKeysUnreadable": {"imdsproxy_hub_token_keys_unreadable": _ON},
    "FleetHostsAbsent": {
        'imdsproxy_hub_hosts{state="enrolled",instance="a"}': "3x130",
        'imdsproxy_hub_hosts{state="enrolled",instance="b"}': "3x130",
        'imdsproxy_hub_connected_hosts{instance="a"}': "1x130",
        'imdsproxy_hub_connected_hosts{instance="b"}': _becomes("2", "1"),
    },
    "FleetHostsBehind": {"imdsproxy_hub_behind_hosts": _ON},
    "FleetAuthorityEnds": _ends("imdsproxy_hub_certificate_end_seconds", "authority", days=180),
    "HubCertificateEnds": _ends("imdsproxy_hub_certificate_end_seconds", "hub", days=20),
    "OperatorCertificateEnds": _ends("imdsproxy_hub_certificate_end_seconds", "operator", days=30),
    "FleetNotReached": {"imdsproxy_fleet_connected": _OFF},
    "FleetStale": {
        "imdsproxy_fleet_connected": "1x130",
        "imdsproxy_fleet_age_seconds": _becomes("300", "301"),
    },
    "FleetExpired": {"imdsproxy_fleet_expired": _ON},
    "FleetHeld": {"imdsproxy_fleet_held": _ON},
    "FleetFailing": {"imdsproxy_fleet_failing": _ON},
    "HostCertificateEnds": _ends("imdsproxy_fleet_certificate_end_seconds", "", days=7),
}


def _minutes(words: str) -> float:
    """What `5m` is."""
    return float(words[:-1]) * _MINUTES[words[-1]] if words else 0.0


def _tests(alert: Alert) -> Mapping[str, object]:
    """Not a moment before its time, and then one, and before its fault nothing."""
    waits = _minutes(alert.waits)
    firing = f'count(ALERTS{{alertname="{alert.name}",alertstate="firing"}}) or vector(0)'
    moments = {_BEGINS_M - 1: 0, _BEGINS_M + waits + _SETTLES_M: 1}
    if waits > 1:
        moments[_BEGINS_M + waits - 1] = 0
    series = _SERIES[alert.name.removeprefix("Imdsproxy")]
    return {
        "name": alert.name,
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": f"{round(minute * 60)}s",
                "exp_samples": [{"labels": "{}", "value": value}],
            }
            for minute, value in moments.items()
        ],
    }


def test_each_alert_fires_after_as_long_as_it_says_and_not_before(tmp_path: Path) -> None:
    named = {f"Imdsproxy{name}" for name in _SERIES}
    assert named == {one.name for one in alerts()}
    file = tmp_path / "test.json"
    files = [str(one) for one in RULES.glob("*.rules.yml")]
    tests = [_tests(one) for one in alerts()]
    file.write_text(json.dumps({"rule_files": files, "evaluation_interval": "30s", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", str(file))


def test_the_files_of_rules_are_well_formed() -> None:
    files = sorted(map(str, RULES.glob("*.rules.yml")))
    assert promtool("check", "rules", *files).count("SUCCESS") == len(files) == 3


def _anchors(page: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        yield heading.lower()


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_each_alert_says_how_bad_it_is_what_it_means_and_what_to_do(alert: Alert) -> None:
    assert alert.severity in {"critical", "warning", "info"}
    texts = {name: alert.texts[name] for name in ("summary", "description", "action")}
    assert all(texts.values())
    assert not texts["summary"].endswith(".")
    assert texts["description"].endswith(".")
    assert texts["action"].endswith(".")
    place, _, anchor = alert.runbook.removeprefix("file:///usr/share/doc/imdsproxy/").partition("#")
    assert anchor in set(_anchors(REPOSITORY / place))


def test_an_alert_fills_in_its_texts(tmp_path: Path) -> None:
    (rule,) = (one for one in alerts() if one.name == "ImdsproxyDiskFull")
    filled = {name: text for name, text in rule.texts.items() if name != "summary"}
    filled["summary"] = "4% of the state directory's file system is free"
    series = [{"series": name, "values": values} for name, values in _SERIES["DiskFull"].items()]
    expected = {"exp_labels": {"severity": "critical", "directory": "state"}}
    test = {
        "interval": "1m",
        "input_series": series,
        "alert_rule_test": [
            {
                "eval_time": "20m",
                "alertname": rule.name,
                "exp_alerts": [{**expected, "exp_annotations": filled}],
            }
        ],
    }
    file = tmp_path / "test.json"
    files = [str(one) for one in RULES.glob("*.rules.yml")]
    file.write_text(json.dumps({"rule_files": files, "tests": [test]}))
    assert "SUCCESS" in promtool("test", "rules", str(file))
