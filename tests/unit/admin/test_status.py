"""What `status` and /readyz report of a controller's parts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from imdsproxy.admin.status import report_readiness, report_status
from imdsproxy.core.inventory import Report
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.observation import StrandedPort
from imdsproxy.errors import Problem
from support.fake_controller import fake_controller

_RELOAD = ("number", "at", "reason", "ok", "result", "took_s")


async def _report(controller: Any) -> dict[str, Any]:  # noqa: ANN401 - as `fake_controller` has it
    return asdict(await report_status(controller))


async def test_every_part_is_in_the_report() -> None:
    report = await _report(fake_controller())
    assert [report[name] for name in ("networks", "serving", "instances", "addresses")] == [
        3,
        2,
        3,
        4,
    ]
    assert report["uptime_s"] == 93_784.0
    assert report["left_out"][0]["reason"] == "nginx has port 80"
    assert report["policy_for_nobody"] == ("policy.networks.bleu",)
    assert report["problems"][-1]["reason"] == "/x: disk full"
    assert report["progress"] == ({"what": "storing instances", "done": 1, "of": 2},)
    assert [one["endpoint"] for one in report["nova"]] == ["192.0.2.1:8775", "192.0.2.2:8775"]
    values = {
        name: tuple(report[name].values())
        for name in ("documents", "last_plan", "unix_listener", "macs", "audit", "haproxy")
    }
    reload = dict(zip(_RELOAD, (8, 6.0, "networks changed", False, "no file", 0.5), strict=True))
    assert values == {
        "documents": ((1, 2, 3), "", True),
        "last_plan": (7.0, 3, ("networks changed",), ("red: no device",), 0.002),
        "unix_listener": ("/run/agent", True, "0644", 1, 2, "", 2, "agent (pid 7)"),
        "macs": (3, 4, 2, 1, {"red": 3}),
        "audit": ("all", "/x", 40, 4, "/x: disk full"),
        "haproxy": ("3.0.11", 100, 102, (101,), 8, reload, ""),
    }


async def test_a_source_that_does_not_answer_says_for_how_long() -> None:
    one = fake_controller()
    sources = {each["name"]: each for each in (await _report(one))["sources"]}
    assert sources["neutron"]["stale_s"] == 12.5
    assert (sources["sqlite"]["stale_s"], sources["sqlite"]["instances"]) == (0.0, 3)
    assert [each["reason"] for each in sources["sqlite"]["problems"]] == ["is empty"]
    one.sources.look_up.queries.stale_s = 0.0
    assert [each["stale_s"] for each in (await _report(one))["sources"]] == [0.0, 0.0]


async def test_a_port_in_a_network_that_no_source_has_is_a_problem_of_its_source() -> None:
    one = fake_controller()
    stranded = StrandedPort("sqlite", InstanceId("web"), 0, NetworkId("gone"))
    one.inventory.stranded = lambda: (stranded,)
    one.sources.all[1].explain_stranded = lambda port: port.problem(file="/etc/web.yaml", line=3)
    neutron, sqlite = (await _report(one))["sources"]
    found = sqlite["problems"][-1]
    assert (found["field"], found["file"], found["line"]) == (
        "instances.web.ports[0].network",
        "/etc/web.yaml",
        3,
    )
    assert (found["reason"], neutron["problems"]) == ("there is no network gone", ())


async def test_without_haproxy_its_processes_are_not_known() -> None:
    one = fake_controller()
    one.haproxy.processes = one.haproxy.last_reload = None
    haproxy = (await _report(one))["haproxy"]
    assert (haproxy["master"], haproxy["old_workers"], haproxy["last_reload"]) == (None, (), None)


_BROKEN = Problem("x", "is broken")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"listeners.report.problems": ()}, ""),
        ({"haproxy.processes": None}, "HAProxy does not run"),
        ({"watchdog.answering": False}, "HAProxy does not answer a probe"),
        ({"inventory.reports": {"sqlite": Report()}}, "source sqlite is not in sync"),
        ({"companion.needed": False, "records.compiler.revisions": {"a": "1"}}, "upstream: nova"),
        *(
            ({name: _BROKEN}, "x: is broken")
            for name in (
                "haproxy.full",
                "policy_store.keys.failure",
                "records.failure",
                "listeners.failure",
                "watchdog.failure",
                "companion.failure",
                "probe.problem",
            )
        ),
        ({"records.compiler.failures": {"a": _BROKEN}}, "x: is broken"),
        ({"nova.problems": (_BROKEN,)}, "x: is broken"),
        ({"nova_watch.problems": (_BROKEN,)}, "x: is broken"),
        ({"holder.settings.metrics.degraded": "not-ready"}, "network red: nginx has port 80"),
    ],
)
def test_a_controller_is_ready_unless_guests_do_not_get_what_sources_have(
    changed: dict[str, object], reason: str
) -> None:
    one = fake_controller(**{"listeners.report.problems": (), **changed})
    readiness = report_readiness(one)
    assert readiness.ready is not bool(reason)
    assert reason in "\n".join(readiness.reasons)
    assert readiness.degraded[-1] == "audit.destination: /x: disk full"
