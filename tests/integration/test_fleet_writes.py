"""What operators do in a fleet: a hub's API over a real etcd, with hosts that acknowledge."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

import pytest

from imdsproxy.errors import (
    AccessDenied,
    AlreadyExists,
    EtcdUnavailable,
    ImdsproxyError,
    NotFound,
    RequestRefused,
    RestoreSuspected,
    RevisionOutdated,
    SourceRefused,
    SourceUnavailable,
    WriteUnknown,
)
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import Claim, HostId, Suspicion, render_suspicion
from imdsproxy.hub.api import callers, fleet_records, operations
from imdsproxy.hub.api.callers import Caller
from imdsproxy.hub.api.operations import Operations
from imdsproxy.hub.hosts import in_force
from imdsproxy.hub.store.etcd_messages import prefix_end
from imdsproxy.hub.store.upkeep import REMOVED_S, UNUSED_S, Sweep
from imdsproxy.model.entities import InstanceId
from support.etcd_lab import EtcdLab, etcd_lab
from support.hand_clock import HandClock
from support.hub_api import Hub, open_hub
from support.lab import until
from support.versions import ADDED, LATER, NEWER

pytestmark = pytest.mark.root

NETWORK = {"id": "blue", "listener": {"bridge": "br-blue"}}


@pytest.fixture(scope="module")
def lab() -> Iterator[EtcdLab]:
    with etcd_lab(1, tls=False) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_force, "_ABSENT_S", 0.3)
        yield made


@pytest.fixture(scope="module")
def hub(lab: EtcdLab) -> Iterator[Hub]:
    with open_hub(lab) as made:
        made.enrol("a", "b", "c")
        made.connect("a")
        made.client.request("POST", "/v1/networks", body=NETWORK)
        yield made


def instance(name: str, address: str, *hosts: str, **more: object) -> dict[str, object]:
    ports = [{"network": "blue", "addresses": [address]}]
    return {"id": name, "name": name, "ports": ports, "hosts": list(hosts), **more}


def test_an_added_instance_is_answered_once_its_host_has_it(hub: Hub) -> None:
    written = hub.client.request("POST", "/v1/instances", body=instance("web", "10.0.0.5", "a"))
    assert written["applied"]
    assert written["hosts"] == ["a"]


def test_an_address_that_another_instance_has_is_refused_with_its_hosts(hub: Hub) -> None:
    hub.client.request("POST", "/v1/instances", body=instance("first", "10.0.0.6", "a"))
    with pytest.raises(SourceRefused) as refused:
        hub.client.request("POST", "/v1/instances", body=instance("second", "10.0.0.6", "b"))
    (problem,) = refused.value.problems
    assert problem.reason == "10.0.0.6 in network blue belongs to instance first (on a)"


def test_a_host_gets_no_second_network_with_the_listener_of_another_one(hub: Hub) -> None:
    hub.enrol("own-1", "own-2")
    ask = hub.client.request
    ask("POST", "/v1/networks", body={**NETWORK, "id": "same"})
    there = {**instance("same-1", "10.0.77.7", "own-1"), "ports": [{"network": "same"}]}
    ask("POST", "/v1/instances", body=there)
    ask("POST", "/v1/instances", body=instance("blue-1", "10.0.77.8", "own-2"))
    for path, body in (
        ("/v1/instances", {**there, "id": "same-2", "hosts": ["own-2"]}),
        ("/v1/instances/same-1/move", {"to": "own-2"}),
        ("/v1/records", {"instances": [{**there, "id": "same-2", "hosts": ["own-2"]}]}),
    ):
        with pytest.raises(SourceRefused) as refused:
            ask("POST", path, body=body)
        (problem,) = refused.value.problems
        assert problem.reason == (
            "network same has the same listener on host own-2 as network blue, which has instance blue-1"
        )
    for name in ("same-1", "blue-1"):
        ask("DELETE", f"/v1/instances/{name}")
    ask("DELETE", "/v1/networks/same")


def test_the_status_of_a_fleet_has_each_member_of_etcd(hub: Hub) -> None:
    (member,) = hub.client.get("/fleet/status")["etcd"]
    assert member["leads"]
    assert 0 < member["bytes"] < member["quota_bytes"]
    assert member["problems"] == []


def test_a_host_that_is_away_is_named_and_gets_the_change_when_it_is_back(hub: Hub) -> None:
    written = hub.client.request("POST", "/v1/instances", body=instance("away", "10.0.0.7", "c"))
    assert not written["applied"]
    assert written["pending"] == ["host c: not connected"]
    host = hub.connect("c")
    waited = hub.client.request(
        "POST", "/fleet/wait", body={"revision": written["revision"], "hosts": ["c"]}
    )
    assert waited["applied"]
    assert host.has["instance/away"]["record"]["name"] == "away"
    hub.disconnect("c")


_DEEP: Final[dict[str, object]] = {}
_inner = _DEEP
for _ in range(1500):
    _inner["name"] = _inner = {}

_HUGE = "?if_revision=" + "9" * 5000


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        *(
            (method, f"{path}{query}", body)
            for query in ("?if_revision=0", "?if_revision=soon", _HUGE)
            for method, path, body in (
                ("PUT", "/v1/instances/odd", instance("odd", "10.0.5.1", "a")),
                ("PATCH", "/v1/instances/odd", {}),
                ("DELETE", "/v1/instances/odd", None),
                ("POST", "/v1/instances/odd/move", {"to": "a"}),
                ("POST", "/v1/instances/odd/revoke-tokens", None),
                ("POST", "/v1/instances/odd/reopen", None),
                ("PATCH", "/v1/policies/fleet", {}),
                ("PUT", "/v1/grants/shop", {}),
            )
        ),
        *(
            (method, path, body)
            for project in ("a/b", "two words", "x" * 65)
            for method, path, body in (
                ("POST", "/v1/instances", instance("odd", "10.0.5.1", "a", project=project)),
                ("PUT", "/v1/networks/odd", {"listener": {"bridge": "b"}, "project": project}),
                ("PATCH", "/v1/networks/blue", {"project": project}),
            )
        ),
        ("PATCH", "/v1/networks/blue", _DEEP),
        ("PATCH", "/v1/policies/fleet", _DEEP),
        ("POST", "/v1/instances/odd/move", {"to": "\ud800"}),
        ("POST", "/fleet/wait", {"revision": 1, "hosts": ["\ud800"]}),
    ],
)
def test_a_write_with_a_value_that_nothing_can_use_is_refused_and_is_no_fault(
    hub: Hub, method: str, path: str, body: object
) -> None:
    with pytest.raises(RequestRefused):
        hub.client.request(method, path, body=body)


def test_a_number_that_is_too_long_to_be_read_is_refused_as_no_json(hub: Hub) -> None:
    raw = b'{"revision": ' + b"9" * 5000 + b"}"
    with pytest.raises(RequestRefused, match="not JSON"):
        hub.client._ask("POST", "/fleet/wait", raw, {"content-type": "application/json"})


def test_a_caller_is_admitted_once_and_refused_before_the_body_is_read(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit, admitted = callers.admit, list[str]()

    async def count(operations: Operations, headers: Mapping[str, str]) -> Caller:
        admitted.append(headers["x-imdsproxy-name"])
        return await admit(operations, headers)

    monkeypatch.setattr(callers, "admit", count)
    reader = replace(hub.client, role="reader")
    for method, path in (
        ("PATCH", "/v1/policies/fleet"),
        ("PUT", "/v1/grants/shop"),
        ("PUT", "/v1/networks/blue"),
        ("PATCH", "/v1/instances/web"),
        ("POST", "/v1/records"),
    ):
        admitted.clear()
        with pytest.raises(AccessDenied):
            reader._ask(method, path, b"this is no JSON", {})
        with pytest.raises(RequestRefused):
            hub.client._ask(method, path, b"this is no JSON", {})
        assert admitted == ["reader-1", "operator-1"], path


def test_a_host_on_which_a_record_fails_is_named_with_the_reason(hub: Hub) -> None:
    host = hub.connect("c")
    host.failed = {"instance/bad": "no bridge br-blue"}
    written = hub.client.request("POST", "/v1/instances", body=instance("bad", "10.0.0.8", "c"))
    assert written["pending"] == ["host c: instance/bad: no bridge br-blue"]
    other = hub.client.request("POST", "/v1/instances", body=instance("good", "10.0.0.9", "c"))
    assert other["applied"], "another record's failure does not count"
    hub.disconnect("c")


def test_a_move_serves_on_both_hosts_until_it_is_finished(hub: Hub) -> None:
    ask, b = hub.client.request, hub.connect("b")
    ask("POST", "/v1/instances", body=instance("moving", "10.0.1.1", "a", user_data="secret"))
    begun = ask("POST", "/v1/instances/moving/move", body={"to": "b"})
    assert (begun["applied"], begun["serving"]) == (True, ["a", "b"])
    assert b.has["instance/moving"]["user_data"]["size"] == 6
    finished = ask("POST", "/v1/instances/moving/move", body={"finish": True})
    assert (finished["applied"], finished["serving"]) == (True, ["b"])
    back = ask("POST", "/v1/instances/moving/move", body={"to": "a", "now": True})
    assert (back["applied"], back["serving"]) == (True, ["a"])
    assert "instance/moving" not in b.has
    hub.disconnect("b")


def test_a_move_at_once_keeps_the_old_host_while_the_new_one_has_not_confirmed(hub: Hub) -> None:
    ask = hub.client.request
    ask("POST", "/v1/instances", body=instance("stays", "10.0.1.2", "a"))
    moved = ask("POST", "/v1/instances/stays/move", body={"to": "b", "now": True})
    assert (moved["applied"], moved["serving"]) == (False, ["a", "b"])
    cancelled = ask("POST", "/v1/instances/stays/move", body={"cancel": True})
    assert cancelled["serving"] == ["a"]


def test_a_write_that_is_sent_again_is_done_once(hub: Hub) -> None:
    client = replace(hub.client, key="a-request")
    body = instance("once", "10.0.1.3", "a")
    first = client.request("POST", "/v1/instances", body=body)
    assert client.request("POST", "/v1/instances", body=body)["revision"] == first["revision"]
    with pytest.raises(AlreadyExists):
        hub.client.request("POST", "/v1/instances", body=body)


def test_a_write_whose_answer_is_lost_is_found_by_its_request(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.etcd.commit
    lost: list[Any] = []

    async def lose(*args: Any, **more: Any) -> Any:
        done = await commit(*args, **more)
        if not lost:
            lost.append(done)
            raise WriteUnknown("no answer came")
        return done

    monkeypatch.setattr(hub.etcd, "commit", lose)
    written = hub.client.request("POST", "/v1/instances", body=instance("lost", "10.0.1.4", "a"))
    assert written["revision"] == lost[0].revision


def test_a_change_of_an_older_revision_is_refused(hub: Hub) -> None:
    added = hub.client.request("POST", "/v1/instances", body=instance("locked", "10.0.1.5", "a"))
    old = {"if_revision": str(added["revision"])}
    ask = hub.client.request
    ask("PATCH", "/v1/instances/locked", query=old, body={"name": "new"})
    with pytest.raises(RevisionOutdated):
        ask("PATCH", "/v1/instances/locked", query=old, body={"name": "newer"})
    assert ask("GET", "/v1/instances/locked")["record"]["name"] == "new"


def test_a_network_with_ports_is_not_removed_and_a_removed_instance_frees_its_address(
    hub: Hub,
) -> None:
    ask = hub.client.request
    ask("POST", "/v1/networks", body={"id": "red", "listener": {"bridge": "br-red"}})
    port = [{"network": "red", "mac": "52:54:00:00:00:01"}]
    ask("POST", "/v1/instances", body=instance("there", "10.0.1.6", "a", ports=port))
    with pytest.raises(SourceRefused, match="there"):
        ask("DELETE", "/v1/networks/red")
    ask("DELETE", "/v1/instances/there")
    ask("POST", "/v1/instances", body=instance("next", "10.0.1.6", "a", ports=port))
    ask("DELETE", "/v1/instances/next")
    assert ask("DELETE", "/v1/networks/red")["applied"]
    with pytest.raises(NotFound):
        ask("GET", "/v1/networks/red")


def test_user_data_is_sealed_in_etcd_and_comes_back_whole_to_those_who_may_read_it(
    hub: Hub,
) -> None:
    data = "#!/bin/sh\n" + "x" * 300_000
    body = instance("data", "10.0.1.7", "a", user_data=data)
    hub.client.request("POST", "/v1/instances", body=body)
    assert hub.client.get("/v1/instances/data")["record"]["user_data"] == data
    reader = replace(hub.client, role="reader")
    assert "user_data" not in reader.get("/v1/instances/data")["record"]
    chunks = hub.run(hub.etcd.read("/imds/blob/", "/imds/blob0")).kvs
    assert not any(b"xxxxxxxx" in one.value for one in chunks)
    with pytest.raises(RequestRefused, match="too large"):
        hub.client.request(
            "PATCH", "/v1/instances/data", body={"user_data": "y" * (1024 * 1024 + 1)}
        )
    hub.client.request("PATCH", "/v1/instances/data", body={"name": "kept"})
    assert hub.client.get("/v1/instances/data")["record"]["user_data"] == data


def test_roles_and_projects_limit_what_an_operator_may_do(hub: Hub) -> None:
    hub.client.request(
        "POST", "/v1/instances", body=instance("theirs", "10.0.1.8", "a", project="other")
    )
    reader, mover = (replace(hub.client, role=one) for one in ("reader", "mover"))
    with pytest.raises(AccessDenied):
        reader.request("DELETE", "/v1/instances/theirs")
    with pytest.raises(AccessDenied):
        mover.request("PATCH", "/v1/instances/theirs", body={"name": "x"})
    assert mover.request("POST", "/v1/instances/theirs/move", body={"to": "a"})["applied"]
    shop = replace(hub.client, scope="shop")
    for method in ("GET", "DELETE"):
        with pytest.raises(NotFound):
            shop.request(method, "/v1/instances/theirs")
    refusals: tuple[Callable[[], object], ...] = (
        lambda: shop.request("POST", "/v1/instances", body=instance("nobodys", "10.0.1.9", "a")),
        lambda: shop.get("/fleet/status"),
        lambda: replace(hub.client, role="host").get("/v1/instances"),
        lambda: hub.client.get("/fleet/applied"),
    )
    for refused in refusals:
        with pytest.raises(AccessDenied):
            refused()
    mine = instance("mine", "10.0.1.9", "a", project="shop")
    given = {"hosts": ["a"], "addresses": [{"network": "blue", "cidr": "10.0.1.8/30"}]}
    hub.client.request("PUT", "/v1/grants/shop", body=given)
    assert shop.request("POST", "/v1/instances", body=mine)["applied"]
    assert [one["record"]["id"] for one in shop.get("/v1/instances")] == ["mine"]
    chosen = hub.client.get("/v1/instances", {"host": "a", "project": "shop", "text": "MINE"})
    assert [one["record"]["id"] for one in chosen] == ["mine"]
    # What a host says of a failure may name records of others.
    host = hub.connect("b")
    hub.client.request("PATCH", "/v1/instances/mine", body={"hosts": ["b"]})
    host.failed = {"override/mine": "as instance theirs has it"}
    for step in ("revoke-tokens", "reopen"):
        seen, withheld = (
            one.request("POST", f"/v1/instances/mine/{step}")["pending"]
            for one in (hub.client, shop)
        )
        assert seen == ["host b: override/mine: as instance theirs has it"]
        assert withheld == [f"host b: {operations.WITHHELD}"]
    hub.disconnect("b")


def test_policies_and_revocations_reach_the_hosts_that_they_are_for(hub: Hub) -> None:
    ask, b = hub.client.request, hub.connect("b")
    ask("POST", "/v1/instances", body=instance("guarded", "10.0.2.1", "b", project="p"))
    assert ask("PATCH", "/v1/policies/project/p", body={"tokens": "required"})["hosts"] == ["b"]
    assert b.has["policy/project/p"] == {"tokens": "required"}
    first = ask("POST", "/v1/instances/guarded/revoke-tokens")["epoch"]
    again = ask("POST", "/v1/instances/guarded/revoke-tokens")
    assert (again["epoch"], again["applied"]) == (first + 1, True)
    assert b.has["override/guarded"]["epoch"] == first + 1
    hub.disconnect("b")
    away = ask("POST", "/v1/instances/guarded/revoke-tokens")
    assert away["pending"] == ["host b: not connected"]
    with pytest.raises(RequestRefused):
        ask("PATCH", "/v1/policies/project/p", body={"tokens": "sometimes"})


def test_what_a_guest_gets_is_asked_of_its_host(hub: Hub) -> None:
    host = hub.connect("b")
    hub.client.request("POST", "/v1/instances", body=instance("asked", "10.0.2.2", "b"))
    host.answers["/v1/explain"] = {"verdict": "found"}
    found = hub.client.get("/v1/explain", {"network": "blue", "address": "10.0.2.2"})
    assert found == {"verdict": "found", "host": "b"}
    with pytest.raises(NotFound):
        hub.client.get("/v1/explain", {"network": "blue", "address": "10.9.9.9"})
    # A captured host may answer anything.
    odd: object
    for odd in ([1, 2], "text", 7, {"a": "\ud800"}, {"a": float("inf")}, [[[]]]):
        host.answers |= dict.fromkeys(
            ("/v1/explain", "/v1/watch", "/v1/instances/asked/explain"), odd
        )
        for route, query in (
            ("/v1/explain", {"network": "blue", "address": "10.0.2.2"}),
            ("/v1/watch", {"instance": "asked"}),
            ("/v1/instances/asked/explain", {}),
        ):
            with pytest.raises(
                SourceUnavailable, match="the answer of host b is not one of this version"
            ):
                hub.client.get(route, query)
    assert hub.client.get("/v1/instances/asked")["record"]["id"] == "asked"
    hub.disconnect("b")
    with pytest.raises(SourceUnavailable):
        hub.client.get("/v1/explain", {"network": "blue", "address": "10.0.2.2"})


def test_nothing_is_written_while_a_restore_is_suspected_until_an_operator_accepts_it(
    hub: Hub,
) -> None:
    before = hub.client.get("/fleet/status")["incarnation"]
    alone = Suspicion("it has revision 999", {}, {HostId("a"): Claim(0)})
    hub.run(hub.etcd.commit((), {layout.SUSPECT: render_suspicion(alone)}))
    assert hub.client.request("POST", "/v1/instances", body=instance("soon", "10.0.2.4", "a"))
    value = render_suspicion(alone.add_hub("hub-1", 1).regain({"host x": "stays revoked"}))
    hub.run(hub.etcd.commit((), {layout.SUSPECT: value}))
    with pytest.raises(RestoreSuspected, match="999"):
        hub.client.request("POST", "/v1/instances", body=instance("late", "10.0.2.3", "a"))
    until(lambda: hub.client.get("/fleet/status")["regained"] == {"host x": "stays revoked"})
    accepted = hub.client.request("POST", "/fleet/accept-restore")
    assert accepted["warnings"] == ["host x stays revoked"]
    until(lambda: hub.client.get("/fleet/status")["incarnation"] == before + 1)
    assert hub.client.request("POST", "/v1/instances", body=instance("late", "10.0.2.3", "a"))


def test_an_import_is_checked_as_a_whole_and_goes_on_where_it_broke_off(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [instance(f"m{one}", f"10.1.0.{one}", "a") for one in range(1, 121)]
    bad = [*many, instance("clash", "10.0.3.1", "a")]
    hub.client.request("POST", "/v1/instances", body=instance("holder", "10.0.3.1", "a"))
    with pytest.raises(SourceRefused, match="holder"):
        send(hub, bad)
    assert not any(one["record"]["id"] == "m1" for one in hub.client.get("/v1/instances"))
    commit, left = hub.etcd.commit, [3]

    async def fail(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise EtcdUnavailable("no member answers")
        return await commit(*args, **more)

    monkeypatch.setattr(hub.etcd, "commit", fail)
    with pytest.raises(EtcdUnavailable):
        send(hub, many)
    monkeypatch.undo()
    (journal,) = hub.client.get("/fleet/status")["imports"]
    assert 0 < journal["done"] < journal["of"] == 120
    written = send(hub, many)
    assert (written["instances"], written["applied"]) == (120, True)
    assert hub.client.get("/fleet/status")["imports"] == []
    assert send(hub, many)["applied"], "the answer may have been lost"
    hub.client.request("PATCH", "/v1/instances/m7", body={"name": "changed"})
    with pytest.raises(AlreadyExists, match="m7"):
        send(hub, many)


def send(hub: Hub, instances: list[dict[str, object]], *, create: bool = True) -> dict[str, Any]:
    query, body = {"create": str(create).lower()}, {"instances": instances}
    answer = hub.client.request("POST", "/v1/records", query=query, body=body)
    while "importing" in answer:
        answer = hub.client.get(f"/v1/imports/{answer['importing']}")
    return dict(answer)


def test_two_clients_that_send_the_same_import_both_get_its_answer_and_it_is_forgotten(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [instance(f"two{one}", f"10.1.1.{one}", "a") for one in range(1, 121)]
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda _: send(hub, many, create=False), range(2)))
    assert [(one["instances"], one["applied"]) for one in answers] == [(120, True)] * 2
    assert hub.operations.imports == {}
    # A client that has gone asks for no answer.
    monkeypatch.setattr(fleet_records, "_IMPORT_S", 0.0)
    monkeypatch.setattr(operations, "_ANSWER_S", 0.0)
    hub.client.request("POST", "/v1/records", body={"instances": many})
    until(lambda: hub.operations.imports == {})


def test_user_data_that_no_instance_has_is_removed_after_an_hour(hub: Hub) -> None:
    ask, clock = hub.client.request, HandClock()
    sweep = Sweep(hub.etcd, hub.state, clock)
    for name, address in (("keeps", "10.0.4.1"), ("drops", "10.0.4.2")):
        ask("POST", "/v1/instances", body=instance(name, address, "a", user_data=name * 100))
    ask("DELETE", "/v1/instances/drops")

    def chunks(data: str) -> int:
        prefix = f"/imds/blob/{hashlib.sha256(data.encode()).hexdigest()}/"
        return len(hub.run(hub.etcd.read(prefix, prefix_end(prefix))).kvs)

    hub.run(sweep.look())
    clock.time += UNUSED_S - 1
    hub.run(sweep.look())
    assert (chunks("keeps" * 100), chunks("drops" * 100)) == (1, 1)
    clock.time += 2
    hub.run(sweep.look())
    assert (chunks("keeps" * 100), chunks("drops" * 100)) == (1, 0)
    ask("POST", "/v1/instances", body=instance("drops", "10.0.4.2", "a", user_data="drops" * 100))
    assert hub.client.get("/v1/instances/drops")["record"]["user_data"] == "drops" * 100


def test_a_removal_is_forgotten_after_thirty_days_and_no_restore_is_suspected(hub: Hub) -> None:
    ask, clock = hub.client.request, HandClock(pace=1)
    sweep, key = Sweep(hub.etcd, hub.state, clock), layout.instance_key(InstanceId("goes"))
    ask("POST", "/v1/instances", body=instance("goes", "10.0.5.1", "a"))
    ask("DELETE", "/v1/instances/goes")
    clock.time += time.time() - clock.now().timestamp() + REMOVED_S - 60
    hub.run(sweep.forget_removals())
    assert hub.state.value(key) is not None
    clock.time += 120
    hub.run(sweep.forget_removals())
    until(lambda: hub.state.value(key) is None, what="a removal that is forgotten")
    assert not hub.state.lost


def test_a_limit_is_not_written_where_a_host_is_too_old_to_observe_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.operations.writes, "schema", NEWER)
    ask = hub.client.request
    hub.enrol("older", "newer", "away")
    hub.connect("older")
    hub.connect("newer", level=2)
    for host in ("newer", "away"):
        ask("PATCH", f"/v1/policies/host/{host}", body={LATER: 1})
    with pytest.raises(SourceRefused) as refused:
        ask("PATCH", "/v1/policies/host/older", body={LATER: 1})
    (problem,) = refused.value.problems
    assert problem.reason == "host older is too old for policy/host/older"
    # What nothing is open without is written, and the older host gets the rest.
    ask("PATCH", "/v1/policies/host/older", body={ADDED: 7})
    ask("PATCH", "/v1/policies/project/later", body={LATER: 1})
    ask("POST", "/v1/instances", body=instance("later", "10.0.78.1", "newer", project="later"))
    with pytest.raises(SourceRefused) as refused:
        ask("POST", "/v1/instances/later/move", body={"to": "older"})
    (problem,) = refused.value.problems
    assert problem.reason == "host older is too old for policy/project/later"
    ask("DELETE", "/v1/instances/later")


def _posted(hub: Hub, host: str, instance: str, password: bytes) -> None:
    body = {"instance": instance, "password": base64.b64encode(password).decode()}
    replace(hub.client, role="host", name=host).request("POST", "/fleet/password", body=body)


def test_a_posted_password_is_sealed_in_etcd_on_each_host_of_its_instance_and_gone_with_it(
    hub: Hub,
) -> None:
    ask = hub.client.request
    hub.enrol("from", "to", "captured")
    first, then, captured = (hub.connect(one) for one in ("from", "to", "captured"))
    ask("POST", "/v1/instances", body=instance("posts", "10.0.79.1", "from"))
    key, item = layout.password_key(InstanceId("posts")), "password/posts"
    with pytest.raises(NotFound):
        _posted(hub, "captured", "posts", b"forged")
    _posted(hub, "from", "posts", b"secret-of-a-guest")
    # Sent again, as after a lost answer.
    _posted(hub, "from", "posts", b"secret-of-a-guest")
    with pytest.raises(AlreadyExists):
        _posted(hub, "from", "posts", b"another")
    shown = hub.client.get("/v1/instances/posts/password")
    assert shown == {"instance": "posts", "password": {"text": "secret-of-a-guest"}}

    def stored() -> bytes:
        return hub.run(hub.etcd.read(key)).kvs[0].value

    assert b"secret" not in stored()
    assert base64.b64encode(b"secret-of-a-guest") not in stored()
    ask("POST", "/v1/instances/posts/move", body={"to": "to"})
    wanted = {"password": base64.b64encode(b"secret-of-a-guest").decode()}
    until(lambda: first.has.get(item) == then.has.get(item) == wanted)
    ask("POST", "/v1/instances/posts/move", body={"to": "to", "finish": True})
    until(lambda: item not in first.has)
    with pytest.raises(NotFound):
        _posted(hub, "from", "posts", b"forged")
    ask("DELETE", "/v1/instances/posts/password")
    until(lambda: then.has.get(item) == {"password": None})
    _posted(hub, "to", "posts", b"second")
    assert hub.client.get("/v1/instances/posts/password")["password"] == {"text": "second"}
    ask("DELETE", "/v1/instances/posts")
    assert json.loads(stored())["sealed"] is None
    until(lambda: item not in then.has)
    assert not any(name.startswith("password/") for name in captured.has)
    # Under the same id there is another guest.
    ask("POST", "/v1/instances", body=instance("posts", "10.0.79.1", "to"))
    with pytest.raises(NotFound):
        hub.client.get("/v1/instances/posts/password")
    ask("DELETE", "/v1/instances/posts")


def test_user_data_that_another_program_damaged_is_whole_when_it_is_written_again(hub: Hub) -> None:
    data = "payload" * 70_000
    body = instance("payload", "10.0.2.77", "a", user_data=data)
    hub.client.request("PUT", "/v1/instances/payload", body=body)
    sha256 = hashlib.sha256(data.encode()).hexdigest()
    keys = [layout.blob_key(sha256, number) for number in (0, 1, 7)]
    for damage in ({keys[0]: b"garbage"}, {keys[1]: b""}, {keys[2]: b"one more"}):
        hub.run(hub.etcd.commit((), damage))
        with pytest.raises(ImdsproxyError):
            hub.client.get("/v1/instances/payload")
        hub.client.request("PUT", "/v1/instances/payload", body=body)
        shown = hub.client.get("/v1/instances/payload")["record"]["user_data"]
        assert shown == data
