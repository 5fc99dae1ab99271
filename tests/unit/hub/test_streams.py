"""A host's stream: who is let in, what is sent to a host that reads, and to one that does not."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pytest

from imdsproxy.errors import SourceUnavailable
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, HostState, Meta, StoredHost, StoredInstance, render_host
from imdsproxy.fleet.restores import Evidence
from imdsproxy.fleet.stream import (
    MAX_LINE,
    PING_S,
    SILENCE_S,
    Ack,
    Answer,
    Ask,
    Batch,
    Bye,
    ByeCode,
    FromHost,
    FromHub,
    Hello,
    Ping,
    digest_items,
    parse_from_hub,
    render_line,
)
from imdsproxy.host.servers import open_unix_socket
from imdsproxy.hub.hosts import streams as module
from imdsproxy.hub.hosts.streams import AT_A_TIME_S, SHARE, WAITING, HostStream, Streams
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.model.entities import InstanceId
from support.hand_clock import HandClock
from support.patience import patience
from support.tasks import until

A, B = HostId("a"), HostId("b")

_M = TypeVar("_M", Batch, Ping, Ask, Bye)


def instance(name: str, revision: int, *hosts: HostId, size: int = 0) -> Change:
    stored = StoredInstance(hosts, {"id": name, "name": f"{name}-{revision}", "tags": "x" * size})
    return Change(layout.instance_key(InstanceId(name)), layout.render_instance(stored), revision)


@dataclass
class Host:
    """The other end of a stream."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, *messages: FromHost) -> None:
        self.writer.write(b"".join(map(render_line, messages)))

    async def line(self) -> FromHub | None:
        async with asyncio.timeout(10 * patience()):
            line = await self.reader.readline()
        return parse_from_hub(line) if line else None

    async def next(self, kind: type[_M]) -> _M:
        found = await self.line()
        # On a busy machine the first ping comes at any time.
        while isinstance(found, Ping) and kind is not Ping:
            found = await self.line()
        assert isinstance(found, kind), found
        return found


@dataclass
class World:
    """Streams on a socket, as HAProxy has it before it."""

    socket: Path
    state: FleetState = field(default_factory=FleetState)
    clock: HandClock = field(default_factory=lambda: HandClock(pace=1))
    revoked: set[str] = field(default_factory=set)
    evidence: list[Evidence] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    streams: Streams = field(init=False)

    def __post_init__(self) -> None:
        self.streams = Streams(
            self.state,
            self.clock,
            lambda _, serial: serial not in self.revoked,
            self.evidence.append,
        )
        self.state.apply(1, [Change(layout.META, layout.render_meta(Meta("f")), 1)])

    def commit(self, *changes: Change) -> int:
        revision = changes[-1].mod_revision
        self.streams.deliver(self.state.apply(revision, changes))
        return revision

    async def head(
        self, *lines: str, first: str = "GET /fleet/stream HTTP/1.1"
    ) -> tuple[bytes, Host]:
        reader, writer = await asyncio.open_unix_connection(str(self.socket), limit=2**18)
        self.writers.append(writer)
        writer.write("\r\n".join((first, *lines, "", "")).encode())
        async with asyncio.timeout(10 * patience()):
            answer = await reader.readuntil(b"\r\n\r\n")
        return answer.split(b"\r\n")[0], Host(reader, writer)

    async def join(self, name: str, serial: str = "1", hello: Hello | None = None) -> Host:
        answer, host = await self.head(
            "Upgrade: imdsproxy-fleet",
            "X-Imdsproxy-Role: host",
            f"X-Imdsproxy-Name: {name}",
            f"X-Imdsproxy-Serial: {serial}",
        )
        assert answer == b"HTTP/1.1 101 Switching Protocols"
        host.send(hello or Hello())
        return host

    async def until(self, host: HostId, why: str | None, revision: int) -> None:
        async with asyncio.timeout(10 * patience()):
            while self.streams.lacks(host, revision) != why:
                await asyncio.sleep(0.001)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    one = World(tmp_path / "s")
    task = asyncio.create_task(one.streams.run(open_unix_socket(one.socket, mode=0o600)))
    yield one
    task.cancel()
    await asyncio.wait([task])
    for writer in one.writers:
        writer.close()
    for writer in one.writers:
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_what_a_hub_holds_back_since_a_restore_is_suspected_is_in_force_nowhere(
    world: World,
) -> None:
    first, other = await world.join("a"), await world.join("b")
    for host in (first, other):
        await host.next(Batch)
    made = replace(instance("web", 5, A), create_revision=5, version=3)
    world.commit(made)
    await first.next(Batch)
    first.send(Ack(5))
    other.send(Ack(1))
    await world.until(A, None, 5)
    await world.until(B, None, 5)
    # Etcd was restored, and the record was written anew, to be on the other host.
    anew = replace(instance("web", 1_000_009, B), create_revision=5, version=3)
    revision = world.commit(anew)
    why = "instance/web is of version 3, after version 3"
    waited = await world.streams.wait([A, B], revision, 0.01, {"instance/web"})
    assert waited == {A: why, B: why}
    assert await world.streams.wait([A, B], revision, 0.01) == {A: why}


async def test_a_host_gets_what_it_lacks_and_then_each_change(world: World) -> None:
    world.commit(instance("web", 2, A), instance("db", 3, B))
    host = await world.join("a", hello=Hello("f", 1, 1, {}))
    first = await host.next(Batch)
    assert (first.revision, set(first.put), first.fleet) == (3, {"instance/web"}, "f")
    world.commit(instance("web", 4, A))
    assert (await host.next(Batch)).put["instance/web"][0] == 4
    world.commit(instance("web", 5, B))
    assert "instance/web" in (await host.next(Batch)).remove


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("X-Imdsproxy-Role: operator", "X-Imdsproxy-Name: a", "X-Imdsproxy-Serial: 1"),
        ("X-Imdsproxy-Role: host", "X-Imdsproxy-Name: a", "X-Imdsproxy-Serial: BAD"),
    ],
)
async def test_only_an_admitted_hosts_certificate_opens_a_stream(
    world: World, headers: tuple[str, ...]
) -> None:
    world.revoked.add("BAD")
    answer, host = await world.head("Upgrade: imdsproxy-fleet", *headers)
    assert answer == b"HTTP/1.1 403 Forbidden"
    assert await host.line() is None
    assert not world.streams.hosts


async def test_what_is_no_upgrade_is_refused(world: World) -> None:
    answer, _ = await world.head("X-Imdsproxy-Role: host")
    assert answer == b"HTTP/1.1 426 Upgrade Required"


async def test_a_revoked_hosts_stream_ends_at_once_and_the_others_go_on(world: World) -> None:
    first, second = await world.join("a", "AA"), await world.join("b", "BB")
    await first.next(Batch)
    await second.next(Batch)
    world.revoked.add("AA")
    world.streams.review([A, B])
    assert (await first.next(Bye)).code is ByeCode.REVOKED
    assert await first.line() is None
    world.commit(instance("web", 7, A, B))
    assert (await second.next(Batch)).revision == 7


async def _spare(world: World, name: str = "a", serial: str = "AA") -> Host:
    """A stream whose host has not said hello."""
    answer, host = await world.head(
        "Upgrade: imdsproxy-fleet",
        "X-Imdsproxy-Role: host",
        f"X-Imdsproxy-Name: {name}",
        f"X-Imdsproxy-Serial: {serial}",
    )
    assert answer == b"HTTP/1.1 101 Switching Protocols"
    return host


async def test_a_host_that_was_revoked_since_its_stream_was_opened_gets_nothing_for_its_hello(
    world: World,
) -> None:
    world.commit(instance("web", 2, A))
    spare = await _spare(world)
    world.revoked.add("AA")
    spare.send(Hello())
    assert isinstance(bye := await spare.line(), Bye)
    assert bye.code is ByeCode.REVOKED
    assert await spare.line() is None
    assert not world.streams.hosts


async def test_every_stream_of_a_certificate_that_is_revoked_ends_and_those_of_the_next_one_stay(
    world: World,
) -> None:
    spares = [await _spare(world) for _ in range(WAITING)]
    joined = await world.join("a", "AA")
    await joined.next(Batch)
    renewed = await _spare(world, serial="AB")
    world.revoked.add("AA")
    world.streams.review([A])
    # At once: a ping would end them as well.
    assert [stream.serial for stream in world.streams._opened[A]] == ["AB"]
    for host in (*spares[1:], joined):
        assert (await host.next(Bye)).code is ByeCode.REVOKED
        assert await host.line() is None
    renewed.send(Hello())
    assert (await renewed.next(Batch)).revision == 1


async def test_a_ping_ends_the_stream_of_a_certificate_that_is_no_longer_good(
    world: World,
) -> None:
    joined, spare = await world.join("a", "AA"), await _spare(world, "b", "BB")
    await joined.next(Batch)
    world.revoked |= {"AA", "BB"}
    for turn in range(module._TURNS):
        world.streams._ping(turn)
    for host in (joined, spare):
        assert isinstance(bye := await host.line(), Bye)
        assert bye.code is ByeCode.REVOKED


async def test_a_host_has_few_streams_without_a_hello_and_the_oldest_makes_room(
    world: World,
) -> None:
    spares = [await _spare(world) for _ in range(WAITING + 1)]
    assert (await spares[0].next(Bye)).code is ByeCode.REPLACED
    other = await _spare(world, "b")
    for host in (spares[-1], other):
        host.send(Hello())
        await host.next(Batch)
    assert world.streams.hosts.keys() == {A, B}


async def test_a_revision_is_in_force_when_every_host_of_it_has_acknowledged(world: World) -> None:
    first, second = await world.join("a"), await world.join("b")
    await first.next(Batch)
    await second.next(Batch)
    revision = world.commit(instance("web", 8, A, B))
    waiting = asyncio.create_task(world.streams.wait([A, B], revision, 60))
    assert (await first.next(Batch)).revision == revision
    first.send(Ack(revision))
    await world.until(A, None, revision)
    assert not waiting.done()
    assert await world.streams.wait([A, B], revision, 0.01) == {B: "not acknowledged yet"}
    second.send(Ack(revision))
    assert await waiting == {}


async def test_a_newer_change_that_is_on_its_way_holds_no_older_one_back(world: World) -> None:
    host = await world.join("a")
    await host.next(Batch)
    revision = world.commit(instance("web", 8, A))
    assert (await host.next(Batch)).revision == revision
    host.send(Ack(revision))
    await world.until(A, None, revision)
    newer = world.commit(instance("web", 9, A))
    assert world.streams.lacks(A, revision) is None
    assert world.streams.lacks(A, newer) == "not sent yet"


async def test_what_concerns_no_item_of_a_host_is_in_force_there_once_the_hub_has_it(
    world: World,
) -> None:
    host = await world.join("a")
    host.send(Ack((await host.next(Batch)).revision))
    await world.until(A, None, 1)
    waiting = asyncio.create_task(world.streams.wait([A], 8, 60))
    assert await world.streams.wait([A], 8, 0.01) == {A: "not received"}
    world.commit(instance("db", 8, B))
    assert await waiting == {}


async def test_what_a_host_could_not_apply_is_named(world: World) -> None:
    host = await world.join("a")
    await host.next(Batch)
    revision = world.commit(instance("web", 8, A))
    await host.next(Batch)
    host.send(Ack(revision, {"instance/web": "its MAC is not one"}))
    await world.until(A, "instance/web: its MAC is not one", revision)


async def test_an_acknowledgement_of_what_the_hub_has_not_sent_counts_for_nothing(
    world: World,
) -> None:
    host = await world.join("a")
    sent = (await host.next(Batch)).revision
    host.send(Ack(sent + 1000, {"instance/web": "of before a restore"}))
    await until(lambda: world.streams.hosts[A].failed)
    assert world.streams.lacks(A, sent) == "not acknowledged yet"


async def test_a_host_that_is_away_has_nothing_in_force(world: World) -> None:
    host = await world.join("a")
    await host.next(Batch)
    host.writer.close()
    await world.until(A, "not connected", 1)


async def test_a_host_that_does_not_read_costs_no_queue_and_then_gets_the_latest(
    world: World,
) -> None:
    host = await world.join("a")
    await host.next(Batch)
    revision = 10
    while not world.streams.hosts[A]._paused_at:
        revision += 1
        world.commit(instance("web", revision, A, size=100_000))
        await asyncio.sleep(0)
    for _ in range(200):
        revision += 1
        world.commit(instance("web", revision, A, size=100_000))
        await asyncio.sleep(0)
    buffered = world.streams.hosts[A]._transport
    assert buffered is not None
    assert buffered.get_write_buffer_size() < 1_000_000
    batches = 0
    while (await host.next(Batch)).revision < revision:
        batches += 1
    assert batches < 100


async def test_a_host_that_answers_no_ping_for_fifteen_seconds_is_cut(world: World) -> None:
    host = await world.join("a")
    await host.next(Batch)
    for _ in range(3):
        assert A in world.streams.hosts
        world.clock.time += PING_S
        for turn in range(module._TURNS):
            world.streams._ping(turn)
    assert world.streams.lacks(A, 1) == "not connected"
    last = None
    while (line := await host.line()) is not None:
        last = line
    assert isinstance(last, Bye)
    assert last.code is ByeCode.SLOW


async def test_a_hub_that_hung_itself_takes_no_host_for_silent(world: World) -> None:
    host = await world.join("a")
    await host.next(Batch)
    world.clock.time += 60
    for turn in range(module._TURNS):
        world.streams._ping(turn)
    host.send(Ack(1))
    await world.until(A, None, 1)
    world.clock.time += 60
    for turn in range(module._TURNS):
        world.streams._ping(turn)
    assert A in world.streams.hosts


async def test_a_host_that_reads_nothing_for_fifteen_seconds_is_cut(world: World) -> None:
    host = await world.join("a")
    await host.next(Batch)
    while not world.streams.hosts[A]._paused_at:
        world.commit(instance("web", world.state.revision + 1, A, size=100_000))
        await asyncio.sleep(0)
    world.clock.time += SILENCE_S
    world.streams.hosts[A].keep_alive(world.clock.monotonic(), b"")
    assert A not in world.streams.hosts


async def test_a_host_that_comes_again_takes_the_place_of_its_old_stream(world: World) -> None:
    old = await world.join("a")
    await old.next(Batch)
    new = await world.join("a")
    await new.next(Batch)
    assert (await old.next(Bye)).code is ByeCode.REPLACED
    assert await old.line() is None
    world.commit(instance("web", 5, A))
    assert (await new.next(Batch)).revision == 5


async def test_a_host_that_is_ahead_is_sent_away_and_the_store_is_doubted(world: World) -> None:
    host = await world.join("a", hello=Hello("f", 1, 99, {}))
    assert (await host.next(Bye)).code is ByeCode.BEHIND
    assert [(one.host, one.revision) for one in world.evidence] == [(A, 99)]


async def test_a_host_that_has_seen_a_later_incarnation_is_told_so_and_one_that_no_fleet_had_is_no_evidence(
    world: World,
) -> None:
    host = await world.join("a", hello=Hello("f", 3, 1, {}))
    bye = await host.next(Bye)
    assert (bye.code, bye.reason) == (
        ByeCode.AHEAD,
        "the fleet has incarnation 1, and the host has seen 3",
    )
    assert [(one.host, one.incarnation) for one in world.evidence] == [(A, 3)]
    liar = await world.join("b", hello=Hello("f", 10**9, 1, {}))
    assert (await liar.next(Bye)).code is ByeCode.FORMAT
    assert len(world.evidence) == 1


async def test_a_member_whose_certificate_is_not_good_any_more_is_named_until_it_is_admitted(
    world: World,
) -> None:
    member = render_host(StoredHost(HostState.ENROLLED, ("2",)))
    world.commit(Change(f"{layout.HOSTS}a", member, 2))
    world.revoked.add("1")
    for name in ("a", "stranger"):
        answer, _ = await world.head(
            "Upgrade: imdsproxy-fleet",
            "X-Imdsproxy-Role: host",
            f"X-Imdsproxy-Name: {name}",
            "X-Imdsproxy-Serial: 1",
        )
        assert b"403" in answer
    assert world.streams.refused().keys() == {A}
    assert "certificate 1 is not valid" in world.streams.refused()[A]
    await world.join("a", serial="2")
    assert not world.streams.refused()


async def test_a_host_that_has_what_etcd_lacks_keeps_it_and_the_store_is_doubted(
    world: World,
) -> None:
    host = await world.join("a", hello=Hello("f", 1, 1, {"instance/web": 1}))
    batch = await host.next(Batch)
    assert (batch.remove, set(batch.held)) == ((), {"instance/web"})
    assert [(one.host, one.revision) for one in world.evidence] == [(A, 0)]


@pytest.mark.parametrize("sent", [b"no json\n", b'{"ack":1}\n', render_line(Hello()) * 2])
async def test_a_line_that_no_host_sends_ends_the_stream(world: World, sent: bytes) -> None:
    _, host = await world.head(
        "Upgrade: imdsproxy-fleet",
        "X-Imdsproxy-Role: host",
        "X-Imdsproxy-Name: a",
        "X-Imdsproxy-Serial: 1",
    )
    host.writer.write(sent)
    last = None
    while (found := await host.line()) is not None:
        last = found
    assert isinstance(last, Bye)
    assert last.code is ByeCode.FORMAT
    assert not world.streams.hosts


async def test_a_line_without_end_ends_the_stream(world: World) -> None:
    host = await world.join("a")
    await host.next(Batch)
    host.writer.write(b"x" * (MAX_LINE + 1))
    async with asyncio.timeout(10 * patience()):
        while world.streams.hosts:
            await asyncio.sleep(0.001)


def test_a_byte_of_a_line_without_end_costs_as_much_as_the_first_one(tmp_path: Path) -> None:
    stream = HostStream(World(tmp_path / "s").streams)
    stream.host = A

    def feed() -> float:
        begin = time.perf_counter()
        for _ in range(100):
            stream.data_received(b"x")
        return time.perf_counter() - begin

    first = min(feed() for _ in range(10))
    stream.data_received(b"x" * (MAX_LINE - 10_000))
    assert min(feed() for _ in range(10)) < 20 * first


class _SlowClock(HandClock):
    """Each line that is taken takes a part of a second."""

    def monotonic(self) -> float:
        self.time += AT_A_TIME_S / 10
        return self.time


async def test_a_host_that_sends_many_lines_takes_a_part_of_the_hubs_time_only(
    tmp_path: Path,
) -> None:
    world = World(tmp_path / "s", clock=_SlowClock(pace=1))
    stream = HostStream(world.streams)
    reads: list[bool] = []

    class Wire(asyncio.Transport):
        def write(self, data: object) -> None:
            """Nobody reads it."""

        def pause_reading(self) -> None:
            reads.append(False)

        def resume_reading(self) -> None:
            reads.append(True)

        def is_closing(self) -> bool:
            return False

    stream.connection_made(Wire())
    stream.host, stream.serial = A, "AA"
    lines: list[FromHost] = [
        Hello(),
        *(Ack(1, {f"instance/{number}": "why"}) for number in range(100)),
    ]
    begin = asyncio.get_running_loop().time()
    stream.data_received(b"".join(render_line(line) for line in lines))
    assert reads == [False]
    assert len(stream.failed) < 2
    await until(lambda: "instance/99" in stream.failed)
    took = asyncio.get_running_loop().time() - begin
    # A hundred lines take ten times as long as is taken at a time; between two of these the host waits.
    assert (reads.count(False), took > 9 * AT_A_TIME_S * SHARE) == (reads.count(True), True)
    stream.connection_lost(None)


async def test_a_question_is_answered_by_the_host_that_is_asked(world: World) -> None:
    host = await world.join("a")
    await host.next(Batch)
    asking = asyncio.create_task(world.streams.ask(A, "/v1/status", 60))
    asked = await host.next(Ask)
    assert asked.path == "/v1/status"
    host.send(Answer(asked.number, 200, {"networks": 3}))
    assert (await asking).body == {"networks": 3}


@pytest.mark.parametrize("name", ["a", "c"])
async def test_a_host_that_does_not_answer_is_named(world: World, name: str) -> None:
    host = await world.join("a")
    await host.next(Batch)
    with pytest.raises(SourceUnavailable, match=f"host {name} "):
        await world.streams.ask(HostId(name), "/v1/status", 0.05)


async def test_a_change_of_very_many_hosts_is_sent_to_some_of_them_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 3)
    streams, sent, turns = (
        Streams(FleetState(), HandClock(), lambda *_: True),
        list[str](),
        list[int](),
    )
    monkeypatch.setattr(HostStream, "flush", lambda self: sent.append(self.host))
    for number in range(10):
        stream = streams.hosts[HostId(str(number))] = HostStream(streams)
        stream.host, stream.greeted = HostId(str(number)), True
    streams.deliver({HostId("*"): {"policy/fleet"}})
    while len(sent) < 10:
        turns.append(len(sent))
        await asyncio.sleep(0)
    assert sent == [str(number) for number in range(10)]
    assert max(after - before for before, after in itertools.pairwise([*turns, len(sent)])) == 3


async def test_a_host_that_differs_says_hello_again_and_is_reported_until_it_does_not(
    world: World,
) -> None:
    world.commit(instance("web", 2, A), instance("db", 3, A))
    have = {"instance/web": 2, "instance/db": 3}
    right, wrong = digest_items(have), digest_items({"instance/web": 2})
    host = await world.join("a", hello=Hello("f", 1, 3, have))
    await host.next(Batch)
    host.send(Ack(3, digest=right))
    host.send(Ack(3, {"instance/db": "refused"}, wrong))
    world.commit(instance("db", 4, A))
    await host.next(Batch)
    host.send(Ack(3, digest=wrong), Ack(4))
    await world.until(A, None, 4)
    assert not world.streams.differing()
    # The second was on its way when the first was taken.
    host.send(Ack(4, digest=right), Ack(4, digest=right))
    bye = await host.next(Bye)
    assert bye.code is ByeCode.DIFFERS
    assert world.streams.differing() == {A: bye.reason}
    host = await world.join("a", hello=Hello("f", 1, 4, have))
    assert (await host.next(Batch)).put.keys() == {"instance/db"}
    assert A in world.streams.differing()
    host.send(Ack(4, digest=digest_items(have | {"instance/db": 4})), Ack(4))
    async with asyncio.timeout(10 * patience()):
        while world.streams.differing():
            await asyncio.sleep(0.001)
    assert world.streams.differed == 1


@pytest.mark.parametrize(
    "line",
    [
        {"hello": {"format": 1, "incarnation": 1, "items": {"instance/" + "x" * 2_000_000: 1}}},
        {"hello": {"format": 1, "incarnation": 1, "items": {"instance/../meta": 1}}},
        {"hello": {"format": 1, "incarnation": 2**64}},
        {"ack": -1},
        {"answer": 1, "status": "200", "body": []},
    ],
)
async def test_a_host_that_sends_what_is_no_line_loses_its_stream_and_no_other_does(
    world: World, line: dict[str, object]
) -> None:
    other = await world.join("b")
    await other.next(Batch)
    host = await world.join("a", hello=Hello())
    await host.next(Batch)
    host.writer.write(json.dumps(line).encode() + b"\n")
    assert (await host.next(Bye)).code is ByeCode.FORMAT
    assert await host.line() is None
    assert not world.evidence
    assert B in world.streams.hosts
