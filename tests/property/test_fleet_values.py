"""Whatever another program writes to etcd: a hub reads it or reports it, and keeps what was good before."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imdsproxy.errors import ImdsproxyError
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import (
    Beat,
    Claim,
    HostId,
    HostState,
    HubPlace,
    Journal,
    KnownHub,
    Meta,
    SealedKeys,
    Sealing,
    StoredHost,
    StoredInstance,
    StoredNetwork,
    StoredOperator,
    StoredPassword,
    Suspicion,
    UserData,
    host_key,
    operator_key,
    parse_journal,
    parse_value,
    render_beat,
    render_host,
    render_hub,
    render_journal,
    render_known_hub,
    render_operator,
    render_password,
    render_sealed_keys,
    render_sealing,
    render_suspicion,
)
from imdsproxy.fleet.members import admits_host
from imdsproxy.fleet.restores import read_suspicion
from imdsproxy.fleet.stream import Batch, Bye, Hello, parse_from_hub, render_line
from imdsproxy.host.clock import Clock
from imdsproxy.hub.api.metrics import HubMetrics
from imdsproxy.hub.api.operations import Operations
from imdsproxy.hub.api.views import Views, Wanted
from imdsproxy.hub.hosts.in_force import InForce, Peers
from imdsproxy.hub.hosts.sealed import TokenKeyRing
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.store import plan_changes, plan_records, transactions
from imdsproxy.hub.store.envelope import make_envelope, parse_envelope
from imdsproxy.hub.store.scopes import read_scope
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.hub.store.upkeep import Sweep
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records.grant import NO_GRANT
from imdsproxy.sources.fleet.known import FleetKnown
from support.restores import restores_of

A = HostId("a")
WEB, BLUE = InstanceId("web"), NetworkId("blue")
_ENVELOPE = parse_envelope(make_envelope(), "test")
_RECORD = {"id": "web", "name": "web", "project": "p", "ports": [{"network": "blue"}]}
_GOOD: dict[str, bytes] = {
    layout.META: layout.render_meta(Meta("f", 2)),
    layout.BEAT: render_beat(Beat(7, "hub-1")),
    layout.SUSPECT: render_suspicion(Suspicion("why", {"hub-1": 2}, {A: Claim(2)})),
    layout.grant_key("p"): codec.encode({"hosts": ["a"]}),
    layout.ENVELOPE: render_sealing(Sealing("1", "0f" * 32)),
    layout.TOKEN_KEYS: render_sealed_keys(SealedKeys(b"1\0sealed")),
    layout.instance_key(WEB): layout.render_instance(
        StoredInstance((A,), _RECORD, UserData("0f" * 32, 7), "r", None, (HostId("b"),))
    ),
    layout.network_key(BLUE): layout.render_network(
        StoredNetwork({"id": "blue", "listener": {"bridge": "blue"}}, "r")
    ),
    layout.password_key(WEB): render_password(StoredPassword(b"1\0sealed", "r")),
    layout.override_key(WEB): layout.render_override(OperatorOverride(3, 9)),
    f"{layout.POLICIES}fleet": codec.encode({"tokens": "required"}),
    f"{layout.POLICIES}project/p": codec.encode({}),
    host_key(A): render_host(StoredHost(HostState.ENROLLED, ("1",), None, 0, "0f")),
    operator_key("anna"): render_operator(StoredOperator(9)),
    f"{layout.HUBS}hub-2": render_hub(HubPlace("https://10.0.0.1:8469")),
    f"{layout.KNOWN_HUBS}hub-2": render_known_hub(KnownHub("https://10.0.0.1:8469", 9)),
}
_ODD_KEYS = (
    f"{layout.PREFIX}key/other", f"{layout.PREFIX}new/kind", layout.PREFIX, layout.INSTANCES,
    f"{layout.INSTANCES}a/b", f"{layout.HOSTS}\udcff", f"{layout.HUBS}\x1b[2J", f"{layout.NETWORKS}*",
    f"{layout.POLICIES}host/", f"{layout.POLICIES}else/x", f"{layout.CERTIFICATES}{'x' * 200}",
)  # fmt: skip
_FIELDS = st.sampled_from(
    ["fleet", "incarnation", "format", "count", "hub", "why", "hosts", "refuses", "key", "sha256",
     "sealed", "record", "ports", "network", "project", "user_data", "size", "request", "removed_at",
     "left", "epoch", "reopened_at", "state", "serials", "token_sha256", "expires_at", "trusts",
     "revoked_at", "url", "absent_since", "done", "of", "at", "id", "name", "listener"]
)  # fmt: skip
_SCALARS = (
    st.none() | st.booleans() | st.floats() | st.integers()
    | st.sampled_from(["", "web", "enrolled", "unreadable", "\ud800", 2**63, "https://a:1", [[]]])
)  # fmt: skip
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_FIELDS, inner, max_size=4),
    max_leaves=8,
)
_OBJECTS = st.dictionaries(_FIELDS, _JSON, max_size=8).map(lambda one: json.dumps(one).encode())


def _one_field_odd(good: bytes) -> st.SearchStrategy[bytes]:
    """A good value with another value of one field: nearly good."""
    found = json.loads(good)

    def change(field: str, value: object) -> bytes:
        return json.dumps({**found, field: value}).encode()

    return st.builds(change, st.sampled_from(sorted(found)) if found else _FIELDS, _JSON)


def _instance(record: dict[str, object]) -> bytes:
    return codec.encode({"hosts": ["a"], "record": record, "user_data": None, "left": []})


_VALUES = st.binary(max_size=30) | _OBJECTS | st.sampled_from(sorted(_GOOD.values()))
_GARBAGE = st.lists(
    st.tuples(st.sampled_from(_ODD_KEYS), _VALUES)
    | st.sampled_from(sorted(_GOOD)).flatmap(
        lambda key: st.tuples(st.just(key), _VALUES | _one_field_odd(_GOOD[key]))
    ),
    min_size=1,
    max_size=6,
)


class _Writes:
    """An etcd that takes every write."""

    async def commit(self, *_: object) -> None:
        await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class _Looks:
    """Everything that a hub does with its copy, and operators and hosts with what the hub says."""

    state: FleetState

    def all(self) -> None:
        state = self.state
        for look in (
            self._of_hubs,
            self._of_monitoring,
            self._of_operators,
            self._of_hosts,
            self._of_writers,
        ):
            look()
        shown = {codec.plain(key): why for key, why in state.problems.items()}
        json.dumps(shown, ensure_ascii=False).encode()

    def _of_hubs(self) -> None:
        state = self.state
        ring = TokenKeyRing(_ENVELOPE)
        state.keys_of, state.keys_problem = ring.item_of, ring.problem
        assert state.item(f"keys/{WEB}") is None
        Peers(state, "hub-1", Clock()).urls()
        state.count_placed()
        state.blobs()
        with contextlib.suppress(Unreadable):
            state.sealing()

    def _of_monitoring(self) -> None:
        state, clock = self.state, Clock()
        streams, peers = Streams(state, clock, lambda *_: True), Peers(state, "hub-1", clock)
        unused = cast("Any", None)
        operations = Operations(
            unused,
            state,
            streams,
            unused,
            InForce(streams, peers),
            restores_of(unused, state, clock),
            clock,
        )
        assert all(one.host for one in operations._hosts({}))
        assert operations._renewing() == []
        parts = {"state": state, "streams": streams, "background": None}
        metrics = HubMetrics(cast("Any", SimpleNamespace(**parts)), peers, 0.0)
        for read in (
            metrics.hosts, metrics.placed_instances, metrics.restore_suspected, metrics.writes_stopped,
            metrics.refused_values, metrics.token_keys_unreadable, metrics.connected_hosts,
        ):  # fmt: skip
            read()
        asyncio.run(Sweep(cast("Any", _Writes()), state, clock).forget_removals())

    def _of_operators(self) -> None:
        state = self.state
        for host in (key.removeprefix(layout.HOSTS) for key in state.keys(layout.HOSTS)):
            state.host(HostId(host))
        state.enrolled()
        for scope in (None, "p"):
            views = Views(state, scope)
            assert {one["record"]["id"] for one in views.networks({})} <= {BLUE}
            views.find_network("blue")
            views.find_instance("web")
            asyncio.run(_listed(views))
            with contextlib.suppress(ImdsproxyError):
                views.network(BLUE, {})
            with contextlib.suppress(ImdsproxyError):
                views.instance(WEB, {})
            read_scope(state.value, scope)
        read_suspicion(state.value)
        for prefix in (layout.INSTANCES, layout.NETWORKS):
            state.count_records(prefix)

    def _of_hosts(self) -> None:
        have = {f"{kind}/web": 2 for kind in ("instance", "override", "keys")} | {"network/blue": 2}
        for hello in (Hello(), Hello(self.state.meta.fleet, 0, 0, have), Hello("f", 2, 1, have)):
            found = self.state.compare(A, hello)
            if isinstance(found, Bye):
                continue
            known = FleetKnown(lambda _instance, _sha256: None)
            batch = parse_from_hub(render_line(found.batch))
            assert isinstance(batch, Batch)
            known.missing_user_data(batch)
            known.apply(batch, whole=True)
            known.problems()
        self.state.changes_for(A, have)
        self.state.digest(A, ())
        self.state.held_back(A, None)
        admits_host(self.state.host(A), "1")

    def _of_writers(self) -> None:
        terms = transactions.Terms("r2", 9)
        view = self.state.stored
        plans: tuple[Callable[[], object], ...] = (
            lambda: plan_records.plan_removal(view, WEB, terms),
            lambda: plan_records.plan_network_removal(view, BLUE, terms, ()),
            lambda: plan_changes.plan_override(view, WEB, lambda old: old, terms),
            lambda: plan_changes.plan_policy(view, "fleet", lambda _: {}, terms),
            lambda: plan_changes.plan_hosts(view, WEB, lambda _: (A,), terms),
            lambda: plan_changes.plan_grant(view, "p", lambda _: NO_GRANT, terms),
            lambda: plan_changes.plan_acceptance(view, Meta("f")),
            lambda: transactions.refuse_suspect(view),
        )
        for plan in plans:
            with contextlib.suppress(ImdsproxyError):
                plan()


async def _listed(views: Views) -> list[Any]:
    return [one async for one in views.summaries(Wanted("e"), {})]


def _apply(state: FleetState, revision: int, written: list[tuple[str, bytes]]) -> None:
    streams = Streams(state, Clock(), lambda *_: True)
    for number, (key, value) in enumerate(written, revision):
        streams.deliver(state.apply(number, [Change(key, value, number)]))


@given(written=_GARBAGE, afresh=st.booleans())
@example(written=[(f"{layout.HUBS}hubx", b"{}")], afresh=True)
@example(written=[(layout.BEAT, b'{"count": "x"}')], afresh=False)
@example(written=[(layout.SUSPECT, b"{}")], afresh=True)
@example(written=[(layout.ENVELOPE, b"[]")], afresh=True)
@example(written=[(layout.instance_key(WEB), _instance({"ports": [{"network": {}}]}))], afresh=True)
@example(written=[(layout.instance_key(WEB), _instance({"project": []}))], afresh=True)
@example(written=[(layout.instance_key(WEB), _instance({"ports": [7]}))], afresh=False)
@example(written=[(f"{layout.POLICIES}fleet", b'{"removed_at": []}')], afresh=False)
@example(written=[(host_key(A), b'{"state": "unreadable"}')], afresh=True)
@example(written=[(f"{layout.HOSTS}\udcff", b"{}")], afresh=True)
@example(written=[(f"{layout.PREFIX}key/other", b"{}")], afresh=False)
@example(written=[(f"{layout.POLICIES}fleet", b'{"removed_at": []}')], afresh=False)
def test_a_hub_goes_on_with_whatever_another_program_writes(
    written: list[tuple[str, bytes]], *, afresh: bool
) -> None:
    state = FleetState()
    if not afresh:
        _apply(state, 1, sorted(_GOOD.items()))
    before = {key: state.value(key) for key in _GOOD}
    _apply(state, 100, written)
    _Looks(state).all()
    for key, value in dict(written).items():
        try:
            parse_value(key, value)
        except Unreadable:
            # It is reported, and what was good stays.
            assert key in state.problems
            assert state.stored(key) is not None
            if [one for one, _ in written].count(key) == 1:
                assert state.value(key) == before.get(key)
    for key in tuple(state.unreadable):
        state.apply(999, [Change(key, None, 999)])
        assert key not in state.unreadable
    _Looks(state).all()


@pytest.mark.parametrize("key", sorted(_GOOD))
def test_what_hubs_write_is_readable(key: str) -> None:
    parse_value(key, _GOOD[key])


@given(st.binary(max_size=30) | _OBJECTS)
@example(b'{"done": true, "of": 1, "at": 1}')
def test_a_journal_is_read_or_unreadable(value: bytes) -> None:
    with contextlib.suppress(Unreadable):
        journal = parse_journal(value)
        assert parse_journal(render_journal(journal)) == journal
    assert parse_journal(render_journal(Journal(1, 2, 3))) == Journal(1, 2, 3)
