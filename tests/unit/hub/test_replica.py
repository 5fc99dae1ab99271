"""What a hub writes for itself."""

from base64 import b64decode, b64encode
from random import Random

import pytest

from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.layout import HostId
from imdsproxy.core.fleet.members import HostState, StoredHost, host_key, render_host
from imdsproxy.host.clock import Clock
from imdsproxy.hub import replica as module
from imdsproxy.hub.replica import Replica
from imdsproxy.hub.state import Change, FleetState
from imdsproxy.hub.streams import Streams
from support.fake_etcd import Answer, Json, answer, client_of, header, text
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
        replica = Replica(etcd, state, streams, "hub-1", "https://hub", clock, Random(1))  # noqa: S311
        replica.complete.set()
        async with background(replica.beat()):
            await until(lambda: len(places) > 1)
        assert places[1]["lease"] == "7"


class _Store:
    """The one key of an etcd, as its JSON gateway has it."""

    def __init__(self, revision: int = 50) -> None:
        self.revision, self.value, self.at = revision, b"", 0

    def handle(self, path: str, body: Json) -> Answer:
        if path.endswith("range"):
            kvs = [] if not self.at else [{"key": text(layout.SUSPECT), **self._kv()}]
            return answer({**header(self.revision), "kvs": kvs})
        self.revision += 1
        self.value, self.at = b64decode(body["success"][0]["request_put"]["value"]), self.revision
        return answer({**header(self.revision), "succeeded": True})

    def _kv(self) -> Json:
        at = str(self.at)
        return {"value": b64encode(self.value).decode(), "mod_revision": at, "create_revision": at}


@pytest.mark.parametrize(
    ("noticed", "refuses"),
    [
        ([("a", 0)], False),
        ([("a", 0), ("a", 0)], False),
        ([("a", 0), ("b", 0)], True),
        ([("hub-1", 0)], True),
        ([("a", 99)], False),
        ([("a", 99), ("b", 99)], True),
        ([("a", 7), ("b", 7)], None),
    ],
)
async def test_writes_are_refused_when_a_hub_or_two_hosts_notice_a_restore(
    *, noticed: list[tuple[str, int]], refuses: bool | None
) -> None:
    store, clock = _Store(), Clock()
    async with client_of(store.handle) as (etcd, _):
        state = FleetState()
        state.apply(1, [Change(f"{layout.HOSTS}{name}", _HOST, 1) for name in "abc"])
        streams = Streams(state, clock, lambda *_: True)
        replica = Replica(etcd, state, streams, "hub-1", "https://hub", clock, Random(1))  # noqa: S311
        for host, revision in noticed:
            assert await replica._note(HostId(host), "why", revision)
    found = layout.parse_suspicion(store.value).refuses if store.at else None
    assert found is refuses


@pytest.mark.parametrize(
    ("invited", "revoked", "noticed", "refuses"),
    [
        ("", "", "a", True),
        # Those that cannot connect could never agree with it,
        ("b", "c", "a", True),
        # and their word is no reason to stop.
        ("b", "c", "c", False),
        ("", "cd", "cd", False),
    ],
)
async def test_the_only_enrolled_host_of_a_fleet_is_believed_and_those_that_are_not_enrolled_are_not(
    invited: str, revoked: str, noticed: str, *, refuses: bool
) -> None:
    store, clock = _Store(), Clock()
    hosts = dict.fromkeys(invited, StoredHost(HostState.INVITED))
    hosts |= dict.fromkeys(revoked, StoredHost(HostState.REVOKED))
    async with client_of(store.handle) as (etcd, _):
        state = FleetState()
        state.apply(1, [Change(f"{layout.HOSTS}a", _HOST, 1)])
        state.apply(1, [Change(host_key(HostId(k)), render_host(v), 1) for k, v in hosts.items()])
        streams = Streams(state, clock, lambda *_: True)
        replica = Replica(etcd, state, streams, "hub-1", "https://hub", clock, Random(1))  # noqa: S311
        for host in noticed:
            assert await replica._note(HostId(host), "why", 0)
    assert layout.parse_suspicion(store.value).refuses is refuses


async def test_a_hub_that_ends_takes_back_where_it_is() -> None:
    asked: list[tuple[str, Json]] = []

    def handle(path: str, body: Json) -> Answer:
        asked.append((path.rpartition("/")[2], body))
        return answer({**header(5), "ID": "7", "succeeded": True})

    async with client_of(handle) as (etcd, _):
        state, clock = FleetState(), Clock()
        streams = Streams(state, clock, lambda *_: True)
        replica = Replica(etcd, state, streams, "hub-1", "https://hub", clock, Random(1))  # noqa: S311
        replica.complete.set()
        async with background(replica.beat()):
            await until(lambda: sum(path == "txn" for path, _ in asked) > 1)
    assert asked[-1] == ("revoke", {"ID": "7"})
