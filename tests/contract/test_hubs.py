"""What a host gets of a hub: of the genuine one, over a genuine etcd, and of the one in memory that other tests use."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Final, TypeAlias

import pytest

from imdsproxy.errors import SourceRefused, SourceUnavailable
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, StoredInstance
from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.envelope import make_envelope, parse_envelope
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed, prefix_end
from imdsproxy.model.entities import Instance, Network
from imdsproxy.model.records import render_record
from imdsproxy.sources.fleet import source as source_module
from imdsproxy.sources.fleet.client import HubClient
from support.etcd_lab import etcd_lab
from support.fleet_backing import source_of
from support.fleet_hub import HOST, FleetHub, network_item
from support.host_front import host_front
from support.hub_api import SERIAL, Hub, open_hub
from support.patience import patience
from support.record_builders import instance, network
from support.source_runs import DEADLINE_S, Heard, running

N1: Final = network("n1")
A: Final = instance("a", "10.0.0.5", text="user data of a")
B: Final = instance("b", "10.0.0.6", text="user data of b")
_OTHER_KEYS: Final = parse_envelope(make_envelope("other"), "test")


@dataclass
class InMemory:
    """The hub of other tests."""

    hub: FleetHub

    @contextlib.asynccontextmanager
    async def reached(self) -> AsyncIterator[str]:
        yield self.hub.url

    def put(self, records: list[Network | Instance], host: str = HOST) -> None:
        networks = [one for one in records if isinstance(one, Network)]
        self.hub.put(networks, [one for one in records if isinstance(one, Instance)], host)

    def write_chunk(self, key: str, value: bytes | None) -> bytes:
        """Replace a chunk of user data, or delete it; what was there."""
        before = self.hub.store.blobs.pop(key, b"")
        if value is not None:
            self.hub.store.blobs[key] = value
        return before

    @contextlib.contextmanager
    def without_etcd(self) -> Iterator[None]:
        self.hub.store.away = True
        yield
        self.hub.store.away = False


@dataclass
class Genuine:
    """A hub's API and streams, over an etcd."""

    hub: Hub

    @contextlib.asynccontextmanager
    async def reached(self) -> AsyncIterator[str]:
        directory = self.hub.directory
        stream, api = str(directory / "stream.sock"), str(directory / "api.sock")
        async with host_front(stream, api, HOST, SERIAL) as url:
            yield url

    def put(self, records: list[Network | Instance], host: str = HOST) -> None:
        hub = self.hub

        async def put() -> None:
            values: dict[str, bytes] = {}
            for one in records:
                if isinstance(one, Network):
                    values |= dict([network_item(one)])
                    continue
                data = None
                if isinstance(one.user_data, bytes):
                    data, _ = await hub.operations.writes.store_blob(one.user_data)
                record = dict(render_record(replace(one, user_data=None)))
                stored = StoredInstance((HostId(host),), record, data)
                values[layout.instance_key(one.id)] = layout.render_instance(stored)
            await self._write(values)

        hub.run(put())

    def remove_all(self) -> None:
        """Remove every instance, and all user data."""

        async def remove() -> None:
            gone = layout.render_instance(StoredInstance((), {}, removed_at=1))
            keys = tuple(self.hub.state.keys(layout.INSTANCES))
            blobs = await self.hub.etcd.read(layout.BLOBS, prefix_end(layout.BLOBS), keys_only=True)
            await self._write(dict.fromkeys(keys, gone), [one.key for one in blobs.kvs])

        self.hub.run(remove())

    async def _write(self, values: Mapping[str, bytes], gone: Sequence[str] = ()) -> None:
        done = await self.hub.etcd.commit((), values, gone)
        assert isinstance(done, Committed)
        async with asyncio.timeout(DEADLINE_S * patience()):
            while self.hub.state.revision < done.revision:
                await asyncio.sleep(0.005)

    def write_chunk(self, key: str, value: bytes | None) -> bytes:
        async def write() -> bytes:
            (before,) = (await self.hub.etcd.read(key)).kvs
            gone = [key] if value is None else []
            done = await self.hub.etcd.commit((), {} if value is None else {key: value}, gone)
            assert isinstance(done, Committed)
            return before.value

        return self.hub.run(write())

    @contextlib.contextmanager
    def without_etcd(self) -> Iterator[None]:
        writes = self.hub.operations.writes
        nobody = Etcd(
            ["http://127.0.0.1:1"],
            random=Random(7),  # noqa: S311
            clock=Clock(),
            timeout_s=0.2,
        )
        before, writes.etcd = writes.etcd, nobody
        yield
        writes.etcd = before
        self.hub.run(nobody.close())


Fleet: TypeAlias = InMemory | Genuine


@pytest.fixture(scope="module")
def genuine() -> Iterator[Hub]:
    with etcd_lab(1, tls=False) as lab, open_hub(lab) as hub:
        hub.enrol(HOST)
        yield hub


@pytest.fixture(params=["in memory", pytest.param("genuine", marks=pytest.mark.root)])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """A hub with network `n1`."""
    if request.param == "genuine":
        made = Genuine(request.getfixturevalue("genuine"))
        made.put([N1])
        yield made
        made.remove_all()
        return
    hub = FleetHub()
    hub.put([N1])
    yield InMemory(hub)
    hub.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_LOOK_EVERY_S", 0.05)


def _data(one: Instance) -> bytes:
    assert isinstance(one.user_data, bytes)
    return one.user_data


def _chunk(one: Instance, number: int = 0) -> str:
    return layout.blob_key(sha256(_data(one)).hexdigest(), number)


async def _fetch(fleet: Fleet, one: Instance) -> bytes:
    async with fleet.reached() as url, HubClient(None, 10.0).stream(url) as stream:
        return await stream.user_data(sha256(_data(one)).hexdigest(), len(_data(one)))


async def test_a_host_gets_the_user_data_of_its_own_instances_and_of_no_others(
    fleet: Fleet,
) -> None:
    fleet.put([A])
    fleet.put([B], "another")
    assert await _fetch(fleet, A) == _data(A)
    with pytest.raises(SourceRefused, match="no instance on this host has user data"):
        await _fetch(fleet, B)


def _changed(_: str, value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


def _sealed_elsewhere(key: str, _: bytes) -> bytes:
    return _OTHER_KEYS.seal(key, b"x")


@pytest.mark.parametrize("spoil", [_changed, _sealed_elsewhere])
async def test_user_data_that_a_hub_cannot_read_is_refused_by_its_own_code(
    fleet: Fleet, spoil: Callable[[str, bytes], bytes]
) -> None:
    fleet.put([A])
    before = fleet.write_chunk(_chunk(A), b"")
    fleet.write_chunk(_chunk(A), spoil(_chunk(A), before))
    with pytest.raises(SourceRefused, match="user-data-unreadable"):
        await _fetch(fleet, A)


async def test_user_data_that_was_swept_is_not_there(fleet: Fleet) -> None:
    fleet.put([A])
    fleet.write_chunk(_chunk(A), None)
    with pytest.raises(SourceRefused, match="not-found"):
        await _fetch(fleet, A)


async def test_a_hub_without_etcd_is_asked_again(fleet: Fleet) -> None:
    fleet.put([A])
    with fleet.without_etcd(), pytest.raises(SourceUnavailable):
        await _fetch(fleet, A)
    assert await _fetch(fleet, A) == _data(A)


def _names(heard: Heard) -> set[str]:
    return set(heard.inventory.instances)


async def test_user_data_that_cannot_be_read_delays_its_own_instance_alone(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.put([A, B])
    before = fleet.write_chunk(_chunk(A), b"changed")
    async with fleet.reached() as url:
        source = source_of(tmp_path / "fleet.sqlite", url)
        async with running(source) as heard:
            # On a busy machine what is asked for first takes longer than a change waits for it.
            await heard.until(lambda each: "user-data-unreadable" in str(each.last.problems))
            await heard.until(lambda each: _names(each) == {"b"})
            (problem,) = heard.last.problems
            assert problem.record == "a"
            # A change of another instance comes at once, on the same stream.
            fleet.put([replace(B, hostname="second")])
            await heard.until(lambda each: each.inventory.instances[B.id].hostname == "second")
            assert source.age_s < DEADLINE_S
            fleet.write_chunk(_chunk(A), before)
            await heard.until(lambda each: _names(each) == {"a", "b"})
            assert heard.last.problems == ()


async def test_a_host_gets_what_needs_no_user_data_while_etcd_is_away(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.put([A, replace(B, user_data=None)])
    with contextlib.ExitStack() as away:
        away.enter_context(fleet.without_etcd())
        async with fleet.reached() as url:
            source = source_of(tmp_path / "fleet.sqlite", url)
            async with running(source) as heard:
                await heard.until(lambda each: _names(each) == {"b"})
                # Who else there is, is not known yet.
                assert not heard.last.in_sync
                away.close()
                await heard.until(lambda each: each.last.in_sync)
                assert _names(heard) == {"a", "b"}
