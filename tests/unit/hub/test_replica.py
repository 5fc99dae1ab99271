"""What a hub writes for itself."""

from random import Random

import pytest

from imdsproxy.core.fleet import layout
from imdsproxy.host.clock import Clock
from imdsproxy.hub import replica as module
from imdsproxy.hub.replica import Replica
from imdsproxy.hub.state import FleetState
from imdsproxy.hub.streams import Streams
from support.fake_etcd import Answer, Json, answer, client_of, header, text
from support.tasks import background, until


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
