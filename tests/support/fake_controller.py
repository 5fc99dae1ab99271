"""Parts of a controller as far as its status and metrics read them; a test changes what it is about."""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imdsproxy.api.metrics import Metrics, count_traffic
from imdsproxy.config.policy import AuditSettings
from imdsproxy.config.unix_listener import UnixListenerSettings
from imdsproxy.controller.audit import Audit
from imdsproxy.controller.controller import Controller
from imdsproxy.errors import Problem
from imdsproxy.haproxy.process import ReloadReport
from imdsproxy.haproxy.rules.model import UnixBind
from imdsproxy.haproxy.rules.runtime import Processes
from imdsproxy.haproxy.unix_listener.listener import UnixListener
from imdsproxy.host.state import Effect
from imdsproxy.model.entities import NetworkId
from imdsproxy.model.identity import Denial
from imdsproxy.model.inventory import Report
from imdsproxy.network.endpoints import NotServed, NotServedCode
from imdsproxy.nova.upstream import NovaEndpointReport
from imdsproxy.reconcile.progress import Durations, Step

_BUSY = NotServed(NetworkId("red"), None, NotServedCode.PORT_BUSY, "nginx has port 80", "stop it")


def row(network: str, requests: int, denied: int = 0, errors: int = 0) -> dict[str, str]:
    """A line of `show stat`."""
    counts = {"stot": str(requests), "dreq": str(denied), "ereq": str(errors)}
    return {"pxname": "guests", "svname": network, "type": "3", **counts}


def _tree(values: Mapping[str, object]) -> SimpleNamespace:
    """Objects whose attributes are these, by path."""
    root = SimpleNamespace()
    for path, value in values.items():
        part, (*steps, last) = root, path.split(".")
        for step in steps:
            part = vars(part).setdefault(step, SimpleNamespace())
        setattr(part, last, value)
    return root


def _unix(settings: UnixListenerSettings, **state: Any) -> UnixListener:
    """A listener that only reports."""
    unused: Any = None
    return UnixListener(lambda: settings, unused, unused, unused, **state)


def _usual() -> dict[str, object]:
    neutron = SimpleNamespace(
        name="neutron",
        queries=SimpleNamespace(
            results=Counter(ok=9, failed=2, timeout=1),
            durations=Durations(Counter({0.25: 8, 1.0: 1}), 1.5),
            stale_s=12.5,
            backoff_s=0.75,
        ),
        look_ups=Counter({"found": 5, "negative-cached": 3}),
        known=SimpleNamespace(ports=range(7)),
    )
    foreign = [SimpleNamespace(socket=one, effect=Effect.BLOCKS) for one in (1, 2, 2)]
    refused = (Problem("name", "is empty"),)
    sqlite = SimpleNamespace(networks="ab", instances="abc", problems=refused, in_sync=True)
    return {
        "started_at": 1_760_000_000.0,
        "started": 5.0,
        "clock.monotonic": lambda: 93_789.0,
        "clock.now": lambda: datetime.fromtimestamp(1_760_093_784, UTC),
        "layout.runtime": Path("/"),
        "layout.state": Path("/"),
        "holder.problems": (),
        "holder.settings.metrics.network_series": 100,
        "holder.settings.metrics.degraded": "ready",
        "holder.settings.limits.enabled": False,
        "inventory.reports": {"neutron": Report(in_sync=True), "sqlite": sqlite},
        "inventory.networks": {"blue": None, "red": None},
        "inventory.contradictory": ("green",),
        "inventory.instances": range(3),
        "inventory.address_count": 4,
        "inventory.conflict_count": 1,
        "inventory.conflicts": tuple,
        "inventory.stranded": tuple,
        "listeners.serving": 2,
        "listeners.failure": None,
        "listeners.degraded": lambda: (_BUSY, _BUSY),
        "listeners.report.at": 7.0,
        "listeners.report.operations": 3,
        "listeners.report.reasons": ("networks changed",),
        "listeners.report.problems": (Problem("red", "no device"),),
        "listeners.report.seconds": 0.002,
        "listeners.report.foreign": foreign,
        "listeners.rounds": 9,
        "listeners.durations": Durations(Counter({0.025: 8, 0.1: 1}), 0.25),
        "host.operations": {"ok": 20},
        "listeners.unix": _unix(
            UnixListenerSettings(enabled=True, path=Path("/run/agent")),
            bind=UnixBind("/run/agent", "0644", 1, 2),
            serving=True,
            taken_over=2,
            taken_from="agent (pid 7)",
        ),
        "records.rounds": Durations(Counter({0.005: 9, 0.1: 1}), 0.125),
        "records.compiler.warnings": {},
        "records.compiler.failures": {},
        "records.compiler.revisions": {},
        "records.failure": None,
        "records.learned": {1: _tree({"mac": "52:54:00:00:00:01"}), 2: _tree({"mac": None})},
        "records.progress.steps": (Step("storing instances", 1, 2),),
        "mac_filters.plan.filters": range(3),
        "mac_filters.refused": range(4),
        "mac_filters.pair_count": 2,
        "forged_claims.counts": {"red": 7, "blue": 0},
        "forged_claims.lines": lambda: ("10.0.0.5 in network red by 52:54:00:00:00:09",),
        "forged_claims.refresh": _nothing,
        "resolver.outcomes": Counter({"found": 1, Denial.UNKNOWN: 2}),
        "resolver.mismatched": Counter({NetworkId("red"): 3}),
        "resolver.held": 2,
        "resolver.durations": Durations(Counter({0.005: 3}), 0.01),
        "sources.all": (neutron, SimpleNamespace(name="sqlite")),
        "sources.look_up": neutron,
        "sources.fleet.name": "fleet",
        "sources.fleet.hub": "https://hub1:7443",
        "sources.fleet.age_s": 2.5,
        "sources.fleet.acknowledged": 812,
        "sources.fleet.known.items": {"instance/a": 7, "instance/b": 8},
        "sources.fleet.known.held": {"instance/b": "the store has it no more"},
        "sources.fleet.failing": {"instance/a": "the disk is full"},
        "sources.fleet.skew_s": 0.25,
        "sources.fleet.certificate_end": 1_800_000_000.0,
        "sources.fleet.serves_for_s": 3600.0,
        "policy_store.keys.failure": None,
        "policy_store.find_unmatched": lambda _: ("policy.networks.bleu",),
        "counting.recalled": True,
        "counting.problem": None,
        "counting.ledger.read": {"blue": 8, "red": 1},
        "counting.ledger.refused": {"blue": 2},
        "audit": Audit(
            lambda: AuditSettings(mode="all", destination="/x"),
            written=40,
            lost=4,
            _failure=Problem("audit.destination", "/x: disk full"),
        ),
        "ovn": None,
        "nova.problems": (),
        "nova_watch.endpoints": (
            NovaEndpointReport("default", "192.0.2.1:8775", up=True, failures=4),
            NovaEndpointReport("default", "192.0.2.2:8775", up=False),
        ),
        "nova.names": lambda: ("default",),
        "nova_watch.refused.totals": {"default": 6},
        "nova_watch.problems": (),
        "nova_watch.refresh": _nothing,
        "haproxy.processes": Processes(100, 102, (101,), 8),
        "haproxy.last_reload": ReloadReport(8, 6.0, "networks changed", False, "no file", 0.5),
        "haproxy.reload_counts": Counter(ok=7, failed=1),
        "haproxy.reload_durations": Durations(Counter({0.05: 6, 0.25: 1}), 0.5),
        "haproxy.full": None,
        "haproxy.master.commands": {"ok": 30},
        "haproxy_version": "3.0.11",
        "watchdog.answering": True,
        "watchdog.restarts": 1,
        "watchdog.failure": None,
        "companion.restarts": 0,
        "companion.needed": True,
        "companion.failure": None,
        "companion.read": lambda: _tree({"pids": (1, 2, 3), "workers": (2, 3)}),
        "probe.problem": None,
    }


HEALTHY: Mapping[str, object] = {
    "listeners.report.problems": (),
    "listeners.unix": _unix(UnixListenerSettings()),
    "mac_filters.plan.filters": (),
    "mac_filters.refused": (),
    "audit": Audit(AuditSettings),
    "policy_store.find_unmatched": lambda _: (),
}
"""Without problems, and with no more than every controller has."""


def fake_controller(**changed: object) -> Any:
    """A controller in front of Neutron and Nova, of which everything is in use.

    Args:
        changed: What is otherwise, by path as `haproxy.processes`.
    """
    kept = {path: value for path, value in _usual().items() if path.split(".")[0] not in changed}
    one = _tree({**kept, **changed})
    for method in ("documents_problem", "unapplied", "own_problems", "unnoticed_problems"):
        setattr(one, method, partial(getattr(Controller, method), one))
    return one


async def _nothing() -> None:
    """HAProxy's counters are as they are."""


def fake_metrics(controller: Any) -> Metrics:
    """Its metrics, with what one worker has counted."""
    metrics = Metrics(controller, limited=2)
    agents = {**row("agents", 3, 2, 1), "pxname": "agents"}
    metrics.traffic.add(1, count_traffic([row("blue", 100, 3, 1), row("red", 10), agents]))
    return metrics
