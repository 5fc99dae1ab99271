"""What `instance list` says of a record that guests do not get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from imdsproxy.admin.record_reports import RecordReports
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.endpoints import Endpoint, LeftOut, LeftOutCode
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import (
    METADATA_IPV4,
    Instance,
    InstanceId,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
    Upstream,
)
from imdsproxy.core.observation import Observation
from imdsproxy.errors import NotFound, Problem
from imdsproxy.listeners.loop import ListenerLoop

RED, GONE = NetworkId("red"), NetworkId("gone")
WEB = InstanceId("web")


def _pending(
    *,
    ports: tuple[NetworkId, ...] = (RED,),
    upstream: Upstream = Upstream.EMBEDDED,
    compiled: bool = True,
    failures: dict[str, Problem] | None = None,
    left_out: tuple[LeftOut, ...] = (),
    problems: tuple[Problem, ...] = (),
    documents: bool = True,
) -> tuple[str, ...]:
    inventory = Inventory(["a"])
    web = Instance(WEB, "web", "web", ports=tuple(Port(one) for one in ports), upstream=upstream)
    inventory.observe(
        Observation(
            "a",
            full=True,
            networks={RED: Network(RED, NamespaceListener("red"))},
            instances={WEB: web},
            problems=problems,
        )
    )
    endpoints = () if left_out else (Endpoint(RED, METADATA_IPV4, 80, None, None),)
    records = SimpleNamespace(revisions={WEB: "1"} if compiled else {}, failures=failures or {})
    listeners = SimpleNamespace(
        report=SimpleNamespace(endpoints=endpoints), degraded=lambda: left_out
    )
    reports = RecordReports(
        inventory, cast("RecordLoop", records), cast("ListenerLoop", listeners), documents
    )
    (listed,) = reports.instances()
    assert reports.instance(WEB) == listed
    assert [one.instance.id for one in reports.instances(RED)] == [WEB] * (RED in ports)
    with pytest.raises(NotFound):
        reports.instance(InstanceId("nobody"))
    return listed.pending


def test_a_record_in_force_has_no_reason() -> None:
    assert _pending() == ()
    assert _pending(upstream=Upstream.NOVA, compiled=False, documents=False) == ()


def test_a_record_that_is_not_written_applied_or_compiled_has_the_reason() -> None:
    full = {"instances.web": Problem("instances.web", "no space left")}
    assert _pending(failures=full) == ("no space left",)
    silent = {"records": Problem("records", "HAProxy does not answer")}
    assert _pending(failures=silent) == ("HAProxy does not answer",)
    assert _pending(compiled=False) == ("it is not compiled yet",)
    assert "documents.enabled is off" in _pending(documents=False)[0]


def test_a_record_whose_network_is_not_there_or_not_served_has_the_reason() -> None:
    assert _pending(ports=(GONE, GONE)) == ("there is no network gone",)
    left = LeftOut(RED, None, LeftOutCode.DEVICE_MISSING, "there is no device br0")
    assert _pending(left_out=(left,)) == ("network red is not served: there is no device br0",)


def test_a_record_whose_newer_version_is_refused_has_the_reason() -> None:
    refused = Problem("instances[0].name", "is empty", file="web.yaml", record="web")
    other = Problem("networks[0].mtu", "is text", file="web.yaml", record="web")
    assert _pending(problems=(refused, other)) == (
        "a newer version is refused: web.yaml: instances[0].name: is empty",
    )


def test_an_instance_that_sources_describe_differently_is_listed_as_a_conflict() -> None:
    inventory = Inventory(["a", "b"])
    for source in ("a", "b"):
        web = Instance(WEB, source, source)
        inventory.observe(Observation(source, full=True, instances={WEB: web}))
    records = SimpleNamespace(revisions={}, failures={})
    listeners = SimpleNamespace(report=SimpleNamespace(endpoints=()), degraded=tuple)
    reports = RecordReports(
        inventory, cast("RecordLoop", records), cast("ListenerLoop", listeners), True
    )
    (listed,) = reports.instances()
    assert (listed.instance.id, len(listed.conflicts)) == (WEB, 1)
    with pytest.raises(NotFound, match="a and b describe it differently"):
        reports.instance(WEB)
