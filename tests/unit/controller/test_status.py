"""What `status` and /readyz report of a controller's parts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from imdsproxy.errors import Problem
from imdsproxy.sources.neutron.source import NeutronFigures
from support.fake_controller import fake_controller, fake_status


async def _report(controller: object) -> dict[str, Any]:
    return asdict(await fake_status(controller).report())


async def test_every_part_is_in_the_report() -> None:
    report = await _report(fake_controller())
    expected = {
        "uptime_s": 93_784.0,
        "networks": 3,
        "serving": 2,
        "instances": 3,
        "addresses": 4,
        "documents": {"pids": (1, 2, 3), "problem": "", "needed": True},
        "last_plan": {
            "at": 7.0,
            "operations": 3,
            "reasons": ("networks changed",),
            "failed": ("red: no device",),
            "took_s": 0.002,
        },
        "unix_listener": {
            "path": "/run/agent.sock",
            "serving": True,
            "mode": "0644",
            "user": 1,
            "group": 2,
            "problem": "",
            "taken_over": 2,
            "taken_from": "agent (pid 7)",
        },
        "macs": {"gates": 3, "refused": 4, "pairs": 2, "learned": 1, "mismatches": {"red": 3}},
        "policy_for_nobody": ("policy.networks.bleu",),
        "audit": {
            "mode": "all",
            "destination": "/x",
            "written": 40,
            "left_out": 4,
            "problem": "/x: disk full",
        },
        "progress": ({"what": "storing instances", "done": 1, "of": 2},),
    }
    assert {name: report[name] for name in expected} == expected
    assert [one["endpoint"] for one in report["nova"]] == ["192.0.2.1:8775", "192.0.2.2:8775"]
    assert report["left_out"][0]["reason"] == "nginx has port 80"
    assert report["haproxy"] == {
        "version": "3.0.11",
        "master": 100,
        "worker": 102,
        "old_workers": (101,),
        "reloads": 8,
        "last_reload": {
            "number": 8,
            "at": 6.0,
            "reason": "networks changed",
            "ok": False,
            "result": "no such file",
            "took_s": 0.5,
        },
        "problem": "",
    }


async def test_a_source_that_does_not_answer_says_for_how_long() -> None:
    one = fake_controller()
    sources = {each["name"]: each for each in (await _report(one))["sources"]}
    assert sources["neutron"]["stale_s"] == 12.5
    assert (sources["sqlite"]["stale_s"], sources["sqlite"]["instances"]) == (0.0, 3)
    assert [each["reason"] for each in sources["sqlite"]["problems"]] == ["is empty"]
    one.sources.look_up.figures = NeutronFigures()
    assert [each["stale_s"] for each in (await _report(one))["sources"]] == [0.0, 0.0]


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
        ({"inventory.sources": {"sqlite": False}}, "source sqlite is not in sync"),
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
        ({"holder.settings.metrics.degraded": "not-ready"}, "network red: nginx has port 80"),
    ],
)
def test_a_controller_is_ready_unless_guests_do_not_get_what_sources_have(
    changed: dict[str, object], reason: str
) -> None:
    one = fake_controller()
    one.listeners.report.problems = ()
    for path, value in changed.items():
        part, (*steps, last) = one, path.split(".")
        for step in steps:
            part = getattr(part, step)
        setattr(part, last, value)
    readiness = fake_status(one).readiness()
    assert readiness.ready is not bool(reason)
    assert reason in "\n".join(readiness.reasons)
    assert readiness.degraded[-1] == "audit.destination: /x: disk full"
