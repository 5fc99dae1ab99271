"""Changes through the admin API, refused with the fields or in force when they return; why a record is not."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.api import tokens
from imdsproxy.errors import HostRefused, NotFound, Problem, SourceRefused
from imdsproxy.fleet.guests import FleetPolicies
from imdsproxy.host.state import NamespaceRef, ObservedHost, ObservedNamespace
from imdsproxy.model.entities import InstanceId, NamespaceListener, Network, NetworkId
from imdsproxy.model.identity import Learned
from imdsproxy.model.observation import Observation
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.tokens import TokenKey, instance_key
from imdsproxy.network.planned import NotServedCode
from imdsproxy.sources.sqlite.source import SqliteSource
from support.admin_server import AdminServer
from support.record_builders import instance, key, port


def _has(server: AdminServer, *networks: Network) -> None:
    """The source `file` has these, and an instance `far` in the first of them."""
    far = instance("far", ports=[port(networks[0].id, "10.0.0.9")])
    known = {one.id: one for one in networks}
    server._observe(Observation("file", full=True, networks=known, instances={far.id: far}))


def _green(name: str = "green", namespace: str = "green") -> Network:
    return Network(NetworkId(name), NamespaceListener(namespace))


def _put(server: AdminServer, network: str, namespace: str, **more: object) -> dict[str, Any]:
    body = {"listener": {"namespace": namespace, **more}}
    written: dict[str, Any] = server.client.request("PUT", f"/v1/networks/{network}", body=body)
    return written


def _web(name: str, network: str) -> dict[str, object]:
    return {"id": name, "name": name, "ports": [{"network": network}]}


_RED = {"id": "red", "listener": {"namespace": "red"}}
_TAKEN = {"namespace": "green", "device": "br0"}


@pytest.mark.parametrize(
    ("request_line", "body", "reason", "fields"),
    [
        ("PUT /v1/instances/a", _web("a", "gone"), "does not exist", ["ports[0].network"]),
        (
            "POST /v1/records",
            {"networks": [_RED], "instances": [_web("a", "red"), _web("b", "gone")]},
            "does not exist",
            ["instances[1].ports[0].network"],
        ),
        ("PUT /v1/networks/green", {"listener": {"bridge": "b"}}, "to source file", []),
        ("DELETE /v1/networks/green", None, "to source file", []),
        ("DELETE /v1/instances/far", None, "to source file", []),
        ("PUT /v1/networks/aqua", {"listener": _TAKEN}, "in use", ["listener"]),
        ("PUT /v1/networks/blue", {"listener": _TAKEN}, "in use", ["listener"]),
        (
            "POST /v1/records",
            {"networks": [_RED, {"id": "aqua", "listener": _TAKEN}]},
            "in use",
            ["networks[1].listener"],
        ),
        (
            "POST /v1/records",
            {"networks": [_RED, {**_RED, "id": "rose"}]},
            "in use",
            ["networks[1].listener"],
        ),
    ],
)
def test_what_another_record_or_source_has_is_refused_with_its_fields(
    server: AdminServer, request_line: str, body: object, reason: str, fields: list[str]
) -> None:
    _has(server, _green())
    before = dict(server.networks), dict(server.instances)
    with pytest.raises(SourceRefused, match=reason) as refused:
        server.client.request(*request_line.split(), body=body)
    assert [one.field for one in refused.value.problems] == fields
    assert (dict(server.networks), dict(server.instances)) == before


def test_without_a_writable_source_nothing_can_be_written(server: AdminServer) -> None:
    server.use(sources=replace(server.parts.sources, writable=None))
    with pytest.raises(SourceRefused, match="no source can be written to"):
        _put(server, "blue", "other")


def test_another_source_s_network_is_a_network(server: AdminServer) -> None:
    _has(server, _green())
    server.client.request("PUT", "/v1/instances/a", body=_web("a", "green"))
    assert set(server.instances) == {"a", "far", "web-1"}


def test_a_network_that_shares_its_listener_already_can_be_changed_otherwise(
    server: AdminServer,
) -> None:
    _has(server, _green(namespace="blue"))
    server.client.request("PATCH", "/v1/networks/blue", body={"name": "Blue"})
    assert server.networks[NetworkId("blue")].name == "Blue"


def _seen(**inodes: int) -> ObservedHost:
    """A host with these namespaces."""
    return ObservedHost(
        namespaces={
            name: ObservedNamespace(NamespaceRef(name, inode)) for name, inode in inodes.items()
        }
    )


def test_an_inode_that_a_namespace_had_before_another_one_refuses_nothing(
    server: AdminServer,
) -> None:
    server.listeners.seen = server.listeners.now = _seen(blue=1, red=1)
    with pytest.raises(SourceRefused):
        _put(server, "red", "red")
    server.listeners.now = _seen(blue=1, red=2)
    assert _put(server, "red", "red")["applied"]


@pytest.fixture
def written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write begins together with another one, if that comes."""
    write, writing = SqliteSource.put, asyncio.Barrier(2)

    async def write_beside_the_other(store: SqliteSource, *records: Any, bulk: bool) -> None:
        with contextlib.suppress(TimeoutError, asyncio.BrokenBarrierError):
            await asyncio.wait_for(writing.wait(), 0.5)
        await write(store, *records, bulk=bulk)

    monkeypatch.setattr(SqliteSource, "put", write_beside_the_other)


@pytest.mark.usefixtures("written_at_once")
@pytest.mark.parametrize(
    ("path", "patches"),
    [
        ("/v1/instances/web-1", ({"hostname": "new"}, {"project": "p"})),
        ("/v1/networks/blue", ({"name": "new"}, {"mtu": 1400})),
    ],
)
def test_of_two_patches_at_once_none_undoes_the_other(
    server: AdminServer, path: str, patches: tuple[dict[str, object], ...]
) -> None:
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda patch: server.client.request("PATCH", path, body=patch), patches))
    record = server.client.get(path)["record"]
    assert record == record | patches[0] | patches[1]


@pytest.mark.usefixtures("written_at_once")
def test_of_two_networks_added_at_once_on_one_listener_one_is_refused(server: AdminServer) -> None:
    def put(name: str) -> bool:
        try:
            return bool(_put(server, name, "red"))
        except SourceRefused:
            return False

    with ThreadPoolExecutor(2) as both:
        assert sorted(both.map(put, ("red", "rose"))) == [False, True]
    assert len(server.networks) == 2


def test_a_change_reports_only_of_its_own_networks_why_they_are_not_served(
    server: AdminServer,
) -> None:
    _put(server, "red", "red")
    for name in ("red", "blue"):
        server.leave_out(name, f"no namespace {name}", code=NotServedCode.NAMESPACE_MISSING)
    written = _put(server, "red", "other")
    assert not written["applied"]
    assert written["pending"] == ["network red is not served: no namespace red"]


def test_a_listener_that_is_coming_is_waited_for(server: AdminServer) -> None:
    server.leave_out("blue", "being made", code=NotServedCode.PENDING)
    threading.Timer(0.2, server.listeners.not_served.clear).start()
    assert _put(server, "blue", "other")["applied"]


WEB = InstanceId("web-1")
_REFUSED = (
    Problem("instances[0].name", "is empty", file="web.yaml", record="web-1"),
    Problem("networks[0].mtu", "is text", file="web.yaml", record="web-1"),
)


def _leave_out_both_families(server: AdminServer) -> None:
    server.leave_out("blue", "there is no device br0")
    other = replace(server.listeners.not_served["blue"], reason="port 80 is taken")
    server.listeners.not_served["blue again"] = other


def _pending(server: AdminServer, name: str = "web-1") -> list[str]:
    (listed,) = (one for one in server.client.get("/v1/instances") if one["record"]["id"] == name)
    shown: list[str] = server.client.get(f"/v1/instances/{name}")["pending"]
    assert shown == listed["pending"]
    return shown


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda server: server.records.compiler.failures.update({WEB: Problem("x", "no space")}),
            "no space",
        ),
        (
            lambda server: server.records._rounds.fail(HostRefused("HAProxy is silent")),
            "HAProxy is silent",
        ),
        (
            lambda server: server.records.compiler.revisions.pop(WEB),
            "the documents are not compiled yet",
        ),
        (
            lambda server: setattr(server.parts.companion, "needed", False),
            "documents.enabled is off, so imdsproxy serves no documents of this instance",
        ),
        (_leave_out_both_families, "network blue is not served: there is no device br0"),
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
    shown = server.client.get("/v1/networks/blue")
    assert shown["serving"] is not ("br0" in reason)
    assert shown["serving"] or shown["not_served"]["reason"] == "there is no device br0"


def test_a_family_that_is_left_out_keeps_no_record_from_guests_of_the_other(
    server: AdminServer,
) -> None:
    server.leave_out("blue", "port 80 is taken")
    server.listeners.not_served["IPv6 of blue"] = server.listeners.not_served.pop("blue")
    assert _pending(server) == []


@pytest.mark.parametrize(
    ("addresses", "explained"), [(["10.0.0.5"], "10.0.0.5"), ([], "fe80::5054:ff:fe12:3456")]
)
def test_an_instance_is_explained_by_what_its_mac_makes_only_without_other_addresses(
    server: AdminServer, addresses: list[str], explained: str
) -> None:
    ports = [{"network": "blue", "mac": "52:54:00:12:34:56", "addresses": addresses}]
    server.client.request("PATCH", "/v1/instances/web-1", body={"ports": ports})
    (explanation,) = server.client.get("/v1/instances/web-1/explain")
    assert explanation["address"] == explained


def test_a_record_in_a_network_that_is_not_there_has_the_reason_once(server: AdminServer) -> None:
    ports = [port("gone", address) for address in ("10.0.0.8", "10.0.0.9")]
    server.claim_twice(instance("far", ports=ports))
    assert _pending(server, "far") == ["there is no network gone"]


def test_nova_s_instance_needs_no_documents_of_ours(server: AdminServer) -> None:
    server.client.request("PATCH", "/v1/instances/web-1", body={"upstream": "nova", "project": "p"})
    server.parts.companion.needed = False
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


def _act(server: AdminServer, what: str = "revoke-tokens", name: str = "web-1") -> dict[str, Any]:
    done: dict[str, Any] = server.client.request("POST", f"/v1/instances/{name}/{what}")
    return done


def _epoch(server: AdminServer, address: str) -> str:
    """In the policy that HAProxy's worker has for the address."""
    applier = server.records.applier
    (worker,) = server.haproxy.workers
    found = (
        worker.lookup(applier.layout.overlay_map, applier.layout.base_map, f"blue/{address}") or ""
    )
    return found.partition("|")[0].split(":")[1] if found.startswith("+") else "0"


def test_a_revocation_returns_when_every_address_is_in_force_and_not_before(
    server: AdminServer,
) -> None:
    learned = key("blue", "fe80::5")
    server.records.learned[learned] = Learned(WEB, time.monotonic() + 600)
    server.haproxy.stop_answering_after = 0
    with ThreadPoolExecutor() as threads:
        revoking = threads.submit(_act, server)
        while WEB not in server.policy_store.overrides:
            time.sleep(0.01)
        assert not revoking.done(), "on disk first"
        assert _epoch(server, "10.0.0.5") == "0"
        server.haproxy.stop_answering_after = None
        assert revoking.result(20)["applied"]
    assert (_epoch(server, "10.0.0.5"), _epoch(server, "fe80::5")) == ("1", "1")


def test_two_at_once_are_two_epochs(server: AdminServer) -> None:
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(lambda _: _act(server)["epoch"], range(2)))
    assert sorted(done) == [1, 2]
    assert dict(server.policy_store.overrides) == {WEB: OperatorOverride(2)}


@pytest.mark.parametrize("what", ["revoke-tokens", "reopen"])
def test_an_unknown_instance_is_refused_with_a_hint(server: AdminServer, what: str) -> None:
    with pytest.raises(NotFound, match="there is no instance nobody") as refused:
        _act(server, what, "nobody")
    assert refused.value.hint == "imdsproxy instance list"
    server._observe(Observation("file", in_sync=False))
    with pytest.raises(NotFound) as refused:
        _act(server, what, "nobody")
    assert (
        refused.value.hint
        == "source file is not in sync yet and may report the instance: try again"
    )
    assert not server.policy_store.overrides


_KEY = TokenKey(b"f" * 32)


def _of_fleet(epoch: int = 0, *names: str) -> FleetPolicies:
    """A fleet that has revoked web-1's tokens so often, and has keys for these beside it."""
    keys = {InstanceId(name): (instance_key(_KEY, name),) for name in ("web-1", *names)}
    return FleetPolicies(overrides={"web-1": OperatorOverride(epoch)}, keys=keys)


@pytest.mark.parametrize("what", ["revoke-tokens", "reopen"])
def test_of_an_instance_of_a_fleet_this_host_alone_revokes_nothing(
    server: AdminServer, what: str
) -> None:
    server.policy_store.take_fleet(_of_fleet())
    with pytest.raises(SourceRefused, match="instance web-1 is a fleet's") as refused:
        _act(server, what)
    assert "--fleet URL" in refused.value.hint
    assert not server.policy_store.overrides
    server.policy_store.take_fleet(FleetPolicies())
    assert _act(server, what)["applied"]


def test_what_a_fleet_revokes_is_in_force_with_its_ticket(server: AdminServer) -> None:
    for epoch in (1, 2):
        server.take_fleet(_of_fleet(epoch))
        assert _epoch(server, "10.0.0.5") == str(epoch)


def test_what_haproxy_has_of_a_source_that_is_silent_is_reported(server: AdminServer) -> None:
    _act(server)
    server.client.request("DELETE", "/v1/instances/web-1")
    server._observe(Observation("file", in_sync=False))
    overlay = server.records.applier.state.overlay
    overlay["blue/10.0.0.5"] = "+1tooo--:1:0:64|web-1|0f3a9c"
    changed = _act(server)
    assert (changed["epoch"], changed["applied"]) == (2, False)
    assert "no source in sync reports the instance" in changed["pending"][0]
    overlay["blue/10.0.0.5"] = "mail|0f3a9c"
    assert _act(server)["applied"]


def test_what_is_not_confirmed_in_time_says_why(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_APPLY_DEADLINE_S", 0.05)
    server.unapplied.append(Problem("records", "HAProxy does not answer"))
    server.haproxy.stop_answering_after = 0
    for done in (_act(server), server.client.request("POST", "/v1/token-keys/rotate")):
        assert not done["applied"]
        unconfirmed = "the data plane has not confirmed it yet"
        assert done["pending"][0] == unconfirmed
        assert "HAProxy does not answer" in done["pending"]


def test_a_rotation_returns_when_workers_know_the_key(server: AdminServer) -> None:
    keys = server.policy_store.keys
    rotated = server.client.request("POST", "/v1/token-keys/rotate")
    assert (rotated["kid"], rotated["applied"]) == (keys.keys[0].kid, True)
    assert rotated["of_fleet"] == 0
    server.policy_store.take_fleet(_of_fleet(0, "web-2"))
    rotated = server.client.request("POST", "/v1/token-keys/rotate")
    assert rotated["of_fleet"] == 2
    (worker,) = server.haproxy.workers
    (known,) = (entries for path, entries in worker.maps.items() if "token" in Path(path).name)
    assert rotated["kid"] in {name for name, _ in known}
