"""What `instance list` says of a record that guests do not get."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imdsproxy.core.model import InstanceId
from imdsproxy.core.observation import Observation
from imdsproxy.errors import NotFound, Problem
from support.admin_server import AdminServer
from support.record_builders import instance, port

WEB = InstanceId("web-1")
_REFUSED = (
    Problem("instances[0].name", "is empty", file="web.yaml", record="web-1"),
    Problem("networks[0].mtu", "is text", file="web.yaml", record="web-1"),
)


def _refuse_record(server: AdminServer) -> None:
    server.records.compiler.failures[WEB] = Problem("instances.web-1", "no space left")


def _fail_round(server: AdminServer) -> None:
    server.records.failure = Problem("records", "HAProxy does not answer")


def _pending(server: AdminServer, name: str = "web-1") -> list[str]:
    (listed,) = (one for one in server.client.get("/v1/instances") if one["record"]["id"] == name)
    shown: list[str] = server.client.get(f"/v1/instances/{name}")["pending"]
    assert shown == listed["pending"]
    return shown


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_refuse_record, "no space left"),
        (_fail_round, "HAProxy does not answer"),
        (lambda server: server.records.compiler.revisions.pop(WEB), "it is not compiled yet"),
        (
            lambda server: setattr(server.controller.companion, "needed", False),
            "documents.enabled is off, and it has documents of ours",
        ),
        (
            lambda server: server.leave_out("blue", "there is no device br0"),
            "network blue is not served: there is no device br0",
        ),
        (
            lambda server: server._observe(Observation("file", full=True, problems=_REFUSED)),
            "a newer version is refused: web.yaml: instances[0].name: is empty",
        ),
    ],
)
def test_a_record_that_is_not_in_force_has_the_reason(
    server: AdminServer, spoil: Callable[[AdminServer], object], reason: str
) -> None:
    assert _pending(server) == []
    spoil(server)
    assert _pending(server) == [reason]


def test_a_record_in_a_network_that_is_not_there_has_the_reason_once(server: AdminServer) -> None:
    ports = [port("gone", address) for address in ("10.0.0.8", "10.0.0.9")]
    server.claim_twice(instance("far", ports=ports))
    assert _pending(server, "far") == ["there is no network gone"]


def test_nova_s_instance_needs_no_documents_of_ours(server: AdminServer) -> None:
    server.client.request("PATCH", "/v1/instances/web-1", body={"upstream": "nova", "project": "p"})
    server.controller.companion.needed = False
    server.records.compiler.revisions.pop(WEB, None)
    assert _pending(server) == []


def test_an_instance_that_sources_describe_differently_is_listed_as_a_conflict(
    server: AdminServer,
) -> None:
    server.claim_twice(instance("web-1", "10.0.0.77"))
    (listed,) = server.client.get("/v1/instances")
    assert (listed["record"]["id"], len(listed["conflicts"])) == ("web-1", 1)
    with pytest.raises(NotFound, match="file and sqlite describe it differently"):
        server.client.get("/v1/instances/web-1")
