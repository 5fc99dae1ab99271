"""Parts of a controller as far as its status and metrics read them; a test changes what it is about."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imdsproxy.controller.metrics import Metrics, count_traffic
from imdsproxy.controller.status import Status
from imdsproxy.core.endpoints import LeftOut, LeftOutCode
from imdsproxy.core.haproxy.runtime import Processes
from imdsproxy.core.hoststate import Effect
from imdsproxy.core.identity import Denial
from imdsproxy.core.model import NetworkId
from imdsproxy.core.timing import Durations, Step
from imdsproxy.dataplane.haproxy import LastReload
from imdsproxy.errors import Problem
from imdsproxy.nova.upstream import NovaEndpointReport
from imdsproxy.serving.resolver import ResolverCounts
from imdsproxy.sources.neutron.source import NeutronFigures

ONE, TWO = "192.0.2.1:8775", "192.0.2.2:8775"
BUSY = LeftOut(NetworkId("red"), None, LeftOutCode.PORT_BUSY, "nginx has port 80", "stop it")


def row(network: str, requests: int, denied: int = 0, errors: int = 0) -> dict[str, str]:
    """A line of `show stat`."""
    counts = {"stot": str(requests), "dreq": str(denied), "ereq": str(errors)}
    return {"pxname": "guests", "svname": network, "type": "3", **counts}


def _inventory() -> SimpleNamespace:
    return SimpleNamespace(
        sources={"neutron": True, "sqlite": True},
        networks={"blue": None, "red": None},
        contradictory=("green",),
        instances=range(3),
        address_count=4,
        conflict_count=1,
        conflicts=tuple,
        stranded=tuple,
        record_counts={"neutron": (0, 0), "sqlite": (2, 3)}.__getitem__,
        problems_of={"neutron": (), "sqlite": (Problem("name", "is empty"),)}.__getitem__,
    )


def _listeners() -> SimpleNamespace:
    foreign = [SimpleNamespace(socket=one, effect=Effect.BLOCKS) for one in (1, 2, 2)]
    path = Path("/run/agent.sock")
    return SimpleNamespace(
        serving=2,
        failure=None,
        degraded=lambda: (BUSY, BUSY),
        report=SimpleNamespace(
            at=7.0,
            operations=3,
            reasons=("networks changed",),
            problems=(Problem("red", "no device"),),
            seconds=0.002,
            foreign=foreign,
        ),
        rounds=9,
        seconds=0.25,
        unix=SimpleNamespace(
            settings=lambda: SimpleNamespace(enabled=True, path=path),
            bind=SimpleNamespace(mode="0644", user=1, group=2),
            problem=None,
            serving=True,
            taken_over=2,
            taken_from="agent (pid 7)",
        ),
    )


def _dataplane() -> dict[str, object]:
    return {
        "haproxy": SimpleNamespace(
            processes=Processes(100, 102, (101,), 8),
            last_reload=LastReload(8, 6.0, "networks changed", "rejected", "no such file", 0.5),
            reload_counts=Counter(ok=7, failed=1),
            seconds_spent=0.5,
            full=None,
            master=SimpleNamespace(commands={"ok": 30}),
        ),
        "haproxy_version": "3.0.11",
        "watchdog": SimpleNamespace(answering=True, restarts=1, failure=None),
        "companion": SimpleNamespace(
            restarts=0, needed=True, failure=None, read=lambda: SimpleNamespace(pids=(1, 2, 3))
        ),
        "probe": SimpleNamespace(problem=None),
    }


def fake_controller(**changed: object) -> Any:  # noqa: ANN401 - as much of a controller as is read
    """A controller in front of Neutron and Nova, of which everything is in use."""
    counts = ResolverCounts(
        found=1, denied=Counter({Denial.UNKNOWN: 2}), mismatched=Counter({NetworkId("red"): 3})
    )
    figures = NeutronFigures(
        queries={"ok": 9, "failed": 2, "timeout": 1},
        look_ups={"found": 5, "negative-cached": 3},
        ports=7,
        stale_s=12.5,
        backoff_s=0.75,
    )
    neutron, sqlite = (
        SimpleNamespace(name="neutron", figures=figures),
        SimpleNamespace(name="sqlite"),
    )
    settings = SimpleNamespace(
        metrics=SimpleNamespace(network_series=100, degraded="ready"),
        limits=SimpleNamespace(enabled=False),
    )
    parts = {
        "started_at": 1_760_000_000.0,
        "started": 5.0,
        "clock": SimpleNamespace(monotonic=lambda: 93_789.0),
        "holder": SimpleNamespace(settings=settings, problems=()),
        "inventory": _inventory(),
        "listeners": _listeners(),
        "host": SimpleNamespace(operations={"ok": 20}),
        "records": SimpleNamespace(
            rounds=Durations(Counter({0.005: 9, 0.1: 1}), 0.125),
            compiler=SimpleNamespace(warnings={}, failures={}, revisions={}),
            failure=None,
            learned={1: SimpleNamespace(mac="52:54:00:00:00:01"), 2: SimpleNamespace(mac=None)},
            progress=SimpleNamespace(steps=(Step("storing instances", 1, 2),)),
        ),
        "mac_filters": SimpleNamespace(
            plan=SimpleNamespace(filters=range(3)), refused=range(4), pair_count=2
        ),
        "resolver": SimpleNamespace(counts=counts, held=2),
        "sources": SimpleNamespace(all=(neutron, sqlite), look_up=neutron),
        "policy_store": SimpleNamespace(
            keys=SimpleNamespace(failure=None), for_nobody=lambda _: ("policy.networks.bleu",)
        ),
        "counting": SimpleNamespace(
            ledger=SimpleNamespace(read={"blue": 8, "red": 1}, refused={"blue": 2})
        ),
        "audit": SimpleNamespace(
            written=40,
            left_out=4,
            problem=Problem("audit.destination", "/x: disk full"),
            settings=lambda: SimpleNamespace(one_in=1, mode="all", destination="/x"),
        ),
        "nova": SimpleNamespace(problems=()),
        **_dataplane(),
    }
    return SimpleNamespace(**{**parts, **changed})


def fake_status(controller: Any) -> Status:  # noqa: ANN401 - as `fake_controller` has it
    """Its status, with two of Nova's endpoints."""

    async def refresh() -> None:
        pass

    nova: Any = SimpleNamespace(
        endpoints=(
            NovaEndpointReport("default", ONE, up=True, failures=4),
            NovaEndpointReport("default", TWO, up=False),
        ),
        refused=SimpleNamespace(totals={"default": 6}),
        problems=(),
        refresh=refresh,
    )
    return Status(controller, nova)


def fake_metrics(controller: Any) -> Metrics:  # noqa: ANN401 - as `fake_controller` has it
    """Its metrics, with what one worker has counted."""
    metrics = Metrics(controller, fake_status(controller))
    agents = {**row("agents", 3, 2, 1), "pxname": "agents"}
    metrics.traffic.add(1, count_traffic([row("blue", 100, 3, 1), row("red", 10), agents]))
    return metrics
