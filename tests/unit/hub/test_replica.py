"""What a hub writes for itself."""

import contextlib
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from random import Random

import pytest

from imdsproxy.errors import EtcdUnavailable, SourceCorrupt
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import (
    Claim,
    HostId,
    HostState,
    Meta,
    StoredHost,
    Suspicion,
    host_key,
    parse_suspicion,
    render_host,
)
from imdsproxy.fleet.restores import Evidence
from imdsproxy.host.clock import Clock
from imdsproxy.hub import replica as module
from imdsproxy.hub.hosts.in_force import InForce, Peers
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.replica import Replica
from imdsproxy.hub.store.state import Change, FleetState
from support.fake_etcd import (
    Answer,
    Handler,
    Json,
    answer,
    client_of,
    header,
    lines,
    put,
    text,
    watched,
)
from support.restores import restores_of
from support.tasks import background, until

_HOST = render_host(StoredHost(HostState.ENROLLED, ("1",)))


async def test_a_hub_whose_address_was_not_written_writes_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    places: list[Json] = []

    def handle(path: str, body: Json) -> Answer:
        if path.endswith("txn"):
            puts = [one["request_put"] for one in body["success"]]
            places.extend(one for one in puts if one["key"] == text(layout.HUBS + "hub-1"))
            if len(places) == 1:
                return answer({"code": 14, "message": "etcdserver: request timed out"}, 503)
            return answer({**header(5), "succeeded": True})
        if path.endswith("keepalive"):
            return answer({"result": {**header(5), "ID": body["ID"], "TTL": "15"}})
        return answer({**header(5), "ID": "7"})

    async with client_of(handle) as (etcd, _):
        state, clock = FleetState(), Clock()
        streams = Streams(state, clock, lambda *_: True)
        replica = Replica(
            etcd,
            state,
            streams,
            "hub-1",
            "https://hub",
            clock,
            Random(1),  # noqa: S311
            restores_of(etcd, state, clock),
        )
        replica.complete.set()
        async with background(replica.beat()):
            await until(lambda: len(places) > 1)
        assert places[1]["lease"] == "7"


class _Store:
    """An etcd, as its JSON gateway has it: single keys are read and written, or all are read."""

    def __init__(self, incarnation: int = 1, revision: int = 50) -> None:
        self.revision = revision
        self.values = {layout.META: (layout.render_meta(Meta("f", incarnation)), 1)}

    @property
    def suspicion(self) -> Suspicion | None:
        found = self.values.get(layout.SUSPECT)
        return None if found is None else parse_suspicion(found[0])

    def handle(self, path: str, body: Json) -> Answer:
        if path.endswith("range"):
            wanted = (
                [b64decode(body["key"]).decode()] if not body.get("range_end") else [*self.values]
            )
            kvs = [self._kv(key) for key in wanted if key in self.values]
            return answer({**header(self.revision), "kvs": kvs})
        self.revision += 1
        for one in body["success"]:
            put = one["request_put"]
            key, value = (b64decode(put[part]) for part in ("key", "value"))
            self.values[key.decode()] = value, self.revision
        return answer({**header(self.revision), "succeeded": True})

    def _kv(self, key: str) -> Json:
        value, at = self.values[key]
        numbers = {"mod_revision": str(at), "create_revision": str(at)}
        return {"key": text(key), "value": b64encode(value).decode(), **numbers}


@contextlib.asynccontextmanager
async def _replica_of(
    store: _Store, hosts: str = "abc", handle: Handler | None = None
) -> AsyncIterator[Replica]:
    clock, state = Clock(), FleetState()
    state.apply(1, [Change(f"{layout.HOSTS}{name}", _HOST, 1) for name in hosts])
    streams = Streams(state, clock, lambda *_: True)
    async with client_of(handle or store.handle) as (etcd, _):
        yield Replica(
            etcd,
            state,
            streams,
            "hub-1",
            "https://hub",
            clock,
            Random(1),  # noqa: S311
            restores_of(etcd, state, clock),
        )


@pytest.mark.parametrize(
    ("noticed", "refuses"),
    [
        ([("a", 0)], False),
        ([("a", 0), ("a", 0)], False),
        ([("a", 0), ("b", 0)], True),
        ([("", 0)], True),
        # A host that has a hub's name is a host.
        ([("hub-1", 0)], False),
        ([("a", 99)], False),
        ([("a", 99), ("b", 99)], True),
        ([("a", 7), ("b", 7)], None),
        # Those that are not members have no say.
        ([("revoked", 0)], None),
        ([("a", 0), ("revoked", 0)], False),
        ([("invited", 0), ("revoked", 0), ("stranger", 0)], None),
    ],
)
async def test_writes_are_refused_when_a_hub_or_two_hosts_notice_a_restore(
    *, noticed: list[tuple[str, int]], refuses: bool | None
) -> None:
    store = _Store()
    async with _replica_of(store) as replica:
        others = {
            host_key(HostId("hub-1")): _HOST,
            host_key(HostId("invited")): render_host(StoredHost(HostState.INVITED)),
            host_key(HostId("revoked")): render_host(StoredHost(HostState.REVOKED)),
        }
        replica.state.apply(1, [Change(*one, 1) for one in others.items()])
        for host, revision in noticed:
            evidence = Evidence("why", HostId(host) if host else None, revision)
            assert await replica.restores._note(evidence, 1)
    assert (store.suspicion and store.suspicion.refuses) is refuses


async def test_the_only_host_of_a_fleet_does_not_stop_writes() -> None:
    store = _Store()
    async with _replica_of(store, "a") as replica:
        assert await replica.restores._note(Evidence("why", HostId("a")), 1)
    assert store.suspicion is not None
    assert not store.suspicion.refuses


@pytest.mark.parametrize(("etcd", "counts"), [(1, True), (2, True), (3, False)])
async def test_a_host_that_has_seen_a_later_incarnation_is_evidence_unless_etcd_has_that_by_now(
    etcd: int, *, counts: bool
) -> None:
    store = _Store(incarnation=etcd, revision=50)
    async with _replica_of(store) as replica:
        assert await replica.restores._note(Evidence("why", HostId("a"), incarnation=3), etcd)
    assert (store.suspicion is not None) is counts
    assert store.suspicion is None or store.suspicion.incarnation == 3


async def test_a_suspicion_that_etcd_refuses_is_dropped_and_those_after_it_are_written() -> None:
    store = _Store()

    def handle(path: str, body: Json) -> Answer:
        if path.endswith("txn") and not refused:
            refused.append(body)
            return answer({"code": 3, "message": "etcdserver: request is too large"}, 400)
        return store.handle(path, body)

    refused: list[Json] = []
    async with _replica_of(store, "abc", handle) as replica:
        replica.restores.suspect(Evidence("it has what etcd lacks", HostId("c")))
        async with background(replica.repair()):
            await until(lambda: refused)
            replica.restores.suspect(Evidence("x" * 2_000_000, HostId("a")))
            await until(lambda: store.suspicion)
    assert store.suspicion is not None
    assert store.suspicion.hosts.keys() == {"a"}
    assert len(store.suspicion.why) <= codec.MOST_TEXT


async def test_a_host_that_says_hello_again_and_again_has_one_suspicion_that_waits() -> None:
    async with _replica_of(_Store()) as replica:
        for number in range(5000):
            replica.restores.suspect(Evidence(f"{number}", HostId("a")))
            replica.restores.suspect(Evidence("why", HostId(f"h{number}")))
        assert replica.restores._evidence[HostId("a")][0].why == "4999"
        assert len(replica.restores._evidence) <= 1000


@pytest.mark.parametrize("value", [b"{}", b"\xff", b'{"hosts": [7]}'])
async def test_a_suspicion_that_another_program_wrote_is_written_over(value: bytes) -> None:
    store = _Store()
    store.values[layout.SUSPECT] = value, 3
    async with _replica_of(store) as replica:
        assert await replica.restores._note(Evidence("why", HostId("a")), 1)
    assert store.suspicion == Suspicion("why", {}, {HostId("a"): Claim(0)})


async def test_a_hub_that_ends_takes_back_where_it_is() -> None:
    asked: list[tuple[str, Json]] = []

    def handle(path: str, body: Json) -> Answer:
        asked.append((path.rpartition("/")[2], body))
        return answer({**header(5), "ID": "7", "succeeded": True})

    async with client_of(handle) as (etcd, _):
        state, clock = FleetState(), Clock()
        streams = Streams(state, clock, lambda *_: True)
        replica = Replica(
            etcd,
            state,
            streams,
            "hub-1",
            "https://hub",
            clock,
            Random(1),  # noqa: S311
            restores_of(etcd, state, clock),
        )
        replica.complete.set()
        async with background(replica.beat()):
            await until(lambda: sum(path == "txn" for path, _ in asked) > 1)
    assert asked[-1] == ("revoke", {"ID": "7"})


@pytest.mark.parametrize(("seen", "suspected"), [(1, False), (2, True), (3, True), (0, True)])
async def test_what_an_operator_has_accepted_meanwhile_is_not_suspected_again(
    *, seen: int, suspected: bool
) -> None:
    store = _Store(incarnation=2)
    async with _replica_of(store) as replica:
        assert await replica.restores._note(Evidence("why"), seen)
    assert (store.suspicion is not None) is suspected


async def test_a_hub_that_reads_an_accepted_restore_all_at_once_keeps_nothing_of_before() -> None:
    store, older, gone = _Store(), f"{layout.POLICIES}project/a", f"{layout.POLICIES}project/b"
    store.values |= {older: (_HOST, 40), gone: (_HOST, 41)}
    async with _replica_of(store, "") as replica:
        await replica._read()
        del store.values[gone]
        store.values |= {
            older: (_HOST, 30),
            layout.META: (layout.render_meta(Meta("f", 2)), 51),
        }
        store.revision = 60
        await replica._read()
        assert replica.state.value(older) == (_HOST, 30)
        assert replica.state.value(gone) is None
        assert not replica.state.lost
        assert replica.state.meta.incarnation == 2


async def test_a_backup_from_before_the_last_acceptance_is_no_acceptance() -> None:
    store, key = _Store(incarnation=2), f"{layout.POLICIES}project/a"
    store.values[key] = _HOST, 40
    async with _replica_of(store, "") as replica:
        await replica._read()
        store.values = {layout.META: (layout.render_meta(Meta("f", 1)), 1)}
        await replica._read()
        assert replica.state.lost.keys() == {layout.META, key}
        assert replica.state.value(key) is not None
        assert replica.state.meta.incarnation == 2


async def test_a_hub_founds_no_fleet_in_an_etcd_that_was_emptied_under_it() -> None:
    store, key = _Store(), f"{layout.POLICIES}project/a"
    store.values[key] = _HOST, 40
    async with _replica_of(store, "") as replica:
        await replica._read()
        store.values.clear()
        await replica._read()
        assert not store.values
        assert replica.state.lost.keys() == {layout.META, key}
        assert replica.state.meta.fleet == "f"
        assert replica.restores._evidence


async def test_a_hub_that_knows_no_fleet_founds_one_only_where_etcd_has_nothing_at_all() -> None:
    store = _Store()
    store.values = {f"{layout.HOSTS}a": (_HOST, 40)}
    async with _replica_of(store, "") as replica:
        with pytest.raises(SourceCorrupt, match="own key was deleted"):
            await replica._read()
    assert layout.META not in store.values


async def test_a_hub_takes_over_nothing_of_another_fleet() -> None:
    store, key = _Store(), f"{layout.HOSTS}a"
    store.values[key] = _HOST, 40
    async with _replica_of(store, "") as replica:
        await replica._read()
        store.values = {
            layout.META: (layout.render_meta(Meta("g", 7)), 60),
            f"{layout.HOSTS}other": (_HOST, 61),
        }
        with pytest.raises(
            EtcdUnavailable, match="etcd has fleet g, but this hub belongs to fleet f"
        ):
            await replica._read()
        assert replica.state.meta.fleet == "f"
        assert replica.state.value(key) is not None
        assert replica.state.value(f"{layout.HOSTS}other") is None
        assert replica.state.lost == {layout.META: "of another fleet, g"}


@pytest.mark.parametrize("same", [True, False])
async def test_a_hub_that_was_away_notices_another_history_whose_revisions_have_the_same_numbers(
    *, same: bool
) -> None:
    store, key = _Store(revision=50), f"{layout.POLICIES}project/a"
    other = f"{layout.POLICIES}project/b"
    begun: list[int] = []

    def handle(path: str, body: Json) -> Answer:
        if path.endswith(("range", "txn")):
            return store.handle(path, body)
        if not path.endswith("watch"):
            return answer({"code": 14, "message": "no"}, 503)
        begun.append(int(body["create_request"]["start_revision"]))
        created = watched(52, created=True)
        if len(begun) == 1:
            return lines(created, watched(52, put(key, 52, _HOST.decode())), ends=True)
        store.revision = 53
        written = put(key if same else other, 52, _HOST.decode())
        return lines(created, watched(53, written, put(other, 53, _HOST.decode())))

    async with _replica_of(store, "", handle) as replica, background(replica.run()):
        await until(lambda: replica.state.revision == 53)
        await until(lambda: same or len(replica.restores._evidence) == 1)
        assert begun[:2] == [51, 52]
        assert replica.state.value(key) == (_HOST, 52)
        assert bool(replica.state.lost) is not same


async def test_a_member_whose_watch_does_not_show_what_is_waited_for_is_left_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LATE_S", 0.05)
    store, watches = _Store(), list[str]()

    def hang(path: str, body: Json) -> Answer:
        if not path.endswith("watch"):
            return store.handle(path, body)
        watches.append("hung")
        return lines(watched(store.revision, created=True))

    def go_on(path: str, body: Json) -> Answer:
        if not path.endswith("watch"):
            return store.handle(path, body)
        watches.append("sound")
        beat, at = store.values[layout.BEAT]
        return lines(
            watched(store.revision, created=True), watched(at, put(layout.BEAT, at, beat.decode()))
        )

    clock, state = Clock(), FleetState()
    streams = Streams(state, clock, lambda *_: True)
    async with client_of(hang, go_on, silence_s=3600.0) as (etcd, _):
        random, restores = Random(1), restores_of(etcd, state, clock)  # noqa: S311
        replica = Replica(etcd, state, streams, "hub-1", "https://hub", clock, random, restores)
        in_force = InForce(streams, Peers(state, "hub-1", clock), replica.expect)
        async with background(replica.run()), background(replica.prove_watch()):
            await replica.complete.wait()
            await until(lambda: watches)
            # Nobody waits for what this hub does not have.
            await in_force.here([], state.revision, None, 0)
            assert layout.BEAT not in store.values
            await in_force.here([], state.revision + 1, None, 0)
            await until(lambda: state.value(layout.BEAT) is not None)
    assert watches == ["hung", "sound"]
