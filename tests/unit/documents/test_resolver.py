"""The miss path: who waits for what, and what goes back to HAProxy."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import httpcore
import pytest
from structlog.testing import capture_logs

from imdsproxy.config.schema import ResolverSettings
from imdsproxy.documents.http import Send, while_there
from imdsproxy.documents.resolver import FOUND, Outcome, Resolver
from imdsproxy.documents.resolver_app import (
    CollectedAnswer,
    Forward,
    GuestRequest,
    found_forwarder,
    resolver_app,
)
from imdsproxy.model.entities import InstanceId, NetworkId, Scope
from imdsproxy.model.identity import Denial
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.wire import (
    MISMATCH_TEXT,
    UNKNOWN_TEXT,
    EmbeddedRecord,
    MapRecord,
    render_map_value,
)
from support.tasks import until

_WEB = EmbeddedRecord(InstanceId("web"), "0123456789abcdef")


def _key(network: str = "red", last: int = 5) -> AddressKey:
    return NetworkId(network), IPv4Address(f"10.0.0.{last}")


_KEY = _key()


class World:
    """A resolver, and what its look-up finds, which may change while requests wait."""

    def __init__(self, hold_s: float = 5) -> None:
        self.found: dict[AddressKey, Outcome] = {}
        self.otherwise: Outcome = Denial.UNKNOWN
        self.asked: list[tuple[AddressKey, Scope | None, int | None]] = []
        self.clock = 1000.0
        self.limits = ResolverSettings(hold_s=hold_s)
        self.resolver = Resolver(self._look, lambda: self.limits, lambda: self.clock)
        self.resolve = self.resolver.resolve

    async def _look(self, key: AddressKey, scope: Scope | None, port: int | None, /) -> Outcome:
        self.asked.append((key, scope, port))
        return self.found.get(key, self.otherwise)

    async def hold(self, key: AddressKey = _KEY) -> asyncio.Task[Outcome]:
        """A request that waits."""
        count = self.resolver.held
        request = asyncio.create_task(self.resolve(key))
        await until(lambda: self.resolver.held > count)
        return request

    async def leave(self, *requests: asyncio.Task[Outcome]) -> None:
        """Their guests have gone away."""
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)


@pytest.mark.parametrize("hold_s", [0, 0.01])
@pytest.mark.parametrize("denial", [Denial.UNKNOWN, Denial.UNAVAILABLE, Denial.CONFLICT])
async def test_only_what_may_still_come_is_held_and_looked_up_again(
    denial: Denial, hold_s: float
) -> None:
    world = World(hold_s)
    world.otherwise = denial
    held = bool(hold_s) and denial is not Denial.CONFLICT
    assert await world.resolve(_KEY, Scope.NETWORK, 4711) == denial
    assert world.asked == [(_KEY, Scope.NETWORK, 4711)] * (1 + held)
    world.clock += 1
    await world.resolve(_KEY)
    # Of a source that is not in sync each request waits; else an address waits once a minute.
    again = held and denial is Denial.UNAVAILABLE
    assert len(world.asked) == 2 + held + again
    world.clock += 61
    await world.resolve(_KEY)
    assert len(world.asked) == 3 + held + again + held
    # A known one does not.
    world.found[_KEY] = _WEB
    assert await world.resolve(_KEY) == _WEB
    assert len(world.asked) == 4 + held + again + held
    assert world.resolver.outcomes == {denial: 3, FOUND: 1}


@pytest.mark.parametrize("outcome", [_WEB, Denial.CONFLICT])
async def test_a_request_waits_for_what_is_found_and_gets_it(outcome: Outcome) -> None:
    world = World()
    request = await world.hold()
    for others, looks in ((_key(last=9), 1), (_KEY, 2)):
        # Another address, and nothing new of its own.
        world.resolver.waiting.wake([others])
        async with asyncio.timeout(30):
            while len(world.asked) < looks:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not request.done()
    world.found[_KEY] = outcome
    world.resolver.waiting.wake([_KEY])
    assert await request == outcome
    assert world.resolver.held == 0


async def test_one_network_s_share_is_bounded_and_leaves_the_others_theirs() -> None:
    world = World()
    world.limits = ResolverSettings(max_held_per_network=3)
    waiting = [await world.hold(_key(last=number)) for number in range(1, 4)]
    assert await world.resolve(_key(last=100)) == Denial.OVER_LIMIT
    assert world.resolver.outcomes == {Denial.OVER_LIMIT: 1}
    waiting.append(await world.hold(_key("blue")))
    # All networks together are bounded too.
    world.limits = ResolverSettings(max_held_per_network=4, max_held=4)
    assert await world.resolve(_key("green")) == Denial.OVER_LIMIT
    # A guest that leaves frees its place; one that found none has not waited.
    await world.leave(waiting.pop())
    request = await world.hold(_key("green"))
    await world.leave(request, *waiting)
    assert world.resolver.held == 0


async def test_an_address_that_is_asked_for_again_and_again_waits_once() -> None:
    world = World(hold_s=0.01)
    await world.resolve(_KEY)
    for looks in range(2, 52):
        assert len(world.asked) == looks
        world.clock += 50
        assert await world.resolve(_KEY) == Denial.UNKNOWN


async def test_who_gives_up_early_uses_up_the_wait_of_the_address_too() -> None:
    world = World()
    await world.leave(await world.hold())
    world.clock += 4.99
    assert await world.resolve(_KEY) == Denial.UNKNOWN
    assert len(world.asked) == 3
    world.clock += 0.02
    assert await world.resolve(_KEY) == Denial.UNKNOWN
    assert len(world.asked) == 4


@pytest.mark.parametrize(
    "reported",
    [
        lambda resolver: resolver.waiting.wake([_KEY]),
        lambda resolver: resolver.waiting.wake(None),
        lambda resolver: resolver.waiting.wake_networks({_KEY[0]}),
    ],
)
async def test_an_address_that_a_source_has_reported_waits_again_when_it_is_gone(
    reported: Callable[[Resolver], None],
) -> None:
    world = World(hold_s=0.01)
    await world.resolve(_KEY)
    await world.resolve(_key("blue"))
    world.clock += 1
    reported(world.resolver)
    request = await world.hold()
    world.found[_KEY] = _WEB
    reported(world.resolver)
    assert await request == _WEB


async def test_invented_addresses_fill_no_memory() -> None:
    world = World(hold_s=0)
    for number in range(10_500):
        await world.resolve((NetworkId("red"), IPv4Address(number)))
    assert len(world.resolver.waiting.ends) == 10_000
    world.clock += 100
    for number in range(6000):
        await world.resolve((NetworkId("blue"), IPv4Address(number)))
    assert len(world.resolver.waiting.ends) == 6000


_SCOPE_HEADERS = [(b"x-imdsproxy-network", b"red"), (b"x-imdsproxy-address", b"10.0.0.5")]
_UNVERIFIED = (b"x-imdsproxy-unverified", b"4711")


class Rig(World):
    """A guest that asks the application, and what becomes of its request.

    Attributes:
        gone: When the guest goes away.
        forwarded: Requests that were handed to HAProxy.
    """

    def __init__(self, outcome: Outcome = _WEB, hold_s: float = 0) -> None:
        super().__init__(hold_s)
        self.otherwise = outcome
        self.gone = asyncio.Event()
        self.forwarded: list[GuestRequest] = []
        self._sent = False
        self._app = resolver_app(self.resolver, self._forward)

    async def _forward(self, _: MapRecord, request: GuestRequest, send: Send) -> None:
        self.forwarded.append(request)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive(self) -> MutableMapping[str, object]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": b"pass", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def ask(
        self, *more: tuple[bytes, bytes], method: str = "POST", base: bool = True
    ) -> CollectedAnswer:
        answer = CollectedAnswer()
        headers = [*(_SCOPE_HEADERS if base else ()), *more]
        scope = {"type": "http", "method": method, "raw_path": b"/password", "headers": headers}
        async with asyncio.timeout(30):
            await self._app(scope, self.receive, answer.take)
        return answer


async def test_what_a_guest_asked_that_went_away_meanwhile_is_not_sent_on() -> None:
    """HAProxy has told it to come again: a password would arrive twice."""
    rig = Rig(Denial.UNKNOWN, hold_s=5)
    asking = asyncio.create_task(rig.ask())
    await until(lambda: rig.resolver.held)
    rig.otherwise = _WEB
    rig.gone.set()
    assert not (await asking).status
    assert not rig.forwarded


@pytest.mark.parametrize(
    ("denial", "method", "status", "body"),
    [
        (Denial.UNKNOWN, "GET", 404, UNKNOWN_TEXT),
        (Denial.UNKNOWN, "HEAD", 404, ""),
        # Some clients take any body for a token.
        (Denial.UNKNOWN, "PUT", 404, ""),
        (Denial.MISMATCH, "GET", 403, MISMATCH_TEXT),
        (Denial.MISMATCH, "PUT", 403, ""),
        *(
            (one, "GET", 503, "")
            for one in (Denial.CONFLICT, Denial.UNAVAILABLE, Denial.OVER_LIMIT)
        ),
    ],
)
@pytest.mark.parametrize("verified", [True, False])
async def test_a_denial_is_answered_in_one_line_or_none(
    denial: Denial, method: str, status: int, body: str, *, verified: bool
) -> None:
    rig = Rig(denial)
    answer = await rig.ask(*([] if verified else [_UNVERIFIED]), method=method)
    found = dict(answer.headers)
    assert (answer.status, answer.body.decode()) == (status, body)
    assert found[b"content-length"] == (b"44" if method == "HEAD" else b"%d" % len(body))
    assert found.get(b"content-type") == (b"text/plain" if body or method == "HEAD" else None)
    assert (b"retry-after" in found) == (status == 503)
    # Only what holds nothing of an instance may be read by any MAC.
    assert (b"x-imdsproxy-refused" in found) == (not verified)
    assert not rig.forwarded


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", (), 200),
        *((one, (_UNVERIFIED,), 200) for one in ("GET", "PUT")),
        ("POST", (_UNVERIFIED,), 503),
    ],
)
async def test_what_a_guest_asked_is_sent_in_its_networks_name_unless_it_is_not_verified_and_changes_something(
    method: str, headers: tuple[tuple[bytes, bytes], ...], status: int
) -> None:
    rig = Rig()
    assert (await rig.ask(*headers, method=method)).status == status
    sent = [(one.key, one.method, one.body) for one in rig.forwarded]
    assert sent == ([(_key("red"), method, b"pass")] if status == 200 else [])


async def test_what_goes_wrong_is_not_kept_quiet() -> None:
    async def fail() -> None:
        raise ValueError("a fault")

    rig = Rig()
    await rig.receive()
    with pytest.raises(ValueError, match="a fault"):
        await while_there(rig.receive, fail())


@pytest.mark.parametrize(
    "headers",
    [
        # Twice, one of the two is not HAProxy's.
        *([(name, b"1")] * 2 for name in ("network", "address", "target", "scope", "unverified")),
        [("address", b"\xff")],
        [("scope", b"nonsense")],
        [("unverified", b"x")],
    ],
)
async def test_what_haproxy_would_never_say_of_who_asks_is_400(
    headers: list[tuple[str, bytes]],
) -> None:
    rig = Rig()
    sent = [(f"x-imdsproxy-{name}".encode(), value) for name, value in headers]
    names = {name for name, _ in sent}
    first = [one for one in _SCOPE_HEADERS if one[0] not in names]
    assert (await rig.ask(*first, *sent, base=False)).status == 400
    assert not rig.forwarded


class Peer:
    """What stands behind the socket: takes one request a connection and says what it is told to say."""

    def __init__(self) -> None:
        self.seen = b""
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        self.seen = head + await reader.readexactly(length)
        writer.write(self.answer)
        writer.close()
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def _peer(directory: Path) -> AsyncIterator[tuple[Peer, Forward]]:
    peer = Peer()
    path = directory / "found.sock"
    server = await asyncio.start_unix_server(peer.serve, str(path))
    async with server:
        yield peer, found_forwarder(str(path), 5.0, per_network=2)


def _request(method: str = "GET", target: bytes = b"/a", body: bytes = b"") -> GuestRequest:
    headers = (
        (b"host", b"169.254.169.254"),
        (b"accept", b"*/*"),
        (b"content-length", b"999"),
        (b"transfer-encoding", b"chunked"),
        (b"x-imdsproxy-record", b"forged"),
        (b"x-imdsproxy-network", b"n"),
        (b"x-imdsproxy-forwarded", b"by"),
    )
    return GuestRequest(_key("red"), method, target, headers, body)


_SENT = [
    b"host: 169.254.169.254",
    b"accept: */*",
    b"x-imdsproxy-record: " + render_map_value(_WEB).encode(),
    b"x-imdsproxy-network: red",
    b"x-imdsproxy-address: 10.0.0.5",
    b"x-imdsproxy-forwarded: by",
]


@pytest.mark.parametrize(
    ("request_", "more"),
    [(_request(target=target), []) for target in (b"/a?", b"/a%2fb/../c//d?x=%3F", b"/?a#", b"*")]
    + [
        (_request("POST", body=b"pass"), [b"content-length: 4"]),
        (_request("POST"), [b"content-length: 0"]),
        (replace(_request(), by_operator=True), [b"x-imdsproxy-operator: yes"]),
    ],
)
async def test_target_and_answer_pass_byte_for_byte_and_our_headers_are_ours(
    tmp_path: Path, request_: GuestRequest, more: list[bytes]
) -> None:
    answer = CollectedAnswer()
    async with _peer(tmp_path) as (peer, forward):
        peer.answer = (
            b"HTTP/1.1 409 Conflict\r\nContent-Encoding: gzip\r\nX-A: 1\r\nX-A: 2\r\n"
            b"Content-Length: 3\r\nConnection: close\r\n\r\n\x1f\x8b\xff"
        )
        await forward(_WEB, request_, answer.take)
    passed = [
        (b"content-encoding", b"gzip"),
        (b"x-a", b"1"),
        (b"x-a", b"2"),
        (b"content-length", b"3"),
    ]
    assert (answer.status, answer.headers, bytes(answer.body)) == (
        409,
        tuple(passed),
        b"\x1f\x8b\xff",
    )
    head, _, body = peer.seen.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first == b"%b %b HTTP/1.1" % (request_.method.encode(), request_.target)
    assert sorted(line.lower() for line in lines) == sorted([*_SENT, *more])
    assert body == request_.body


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", None])
async def test_no_answer_or_none_that_can_be_read_is_503(
    tmp_path: Path, answer: bytes | None
) -> None:
    got = CollectedAnswer()
    async with _peer(tmp_path) as (peer, forward):
        peer.answer = answer or b""
        asked = forward if answer is not None else found_forwarder(str(tmp_path / "none"), 1.0)
        with capture_logs() as logs:
            await asked(_WEB, _request(), got.take)
    assert got.status == 503
    assert (b"retry-after", b"1") in got.headers
    assert [entry["event"] for entry in logs] == ["haproxy did not answer a forwarded request"]


async def test_an_answer_that_breaks_off_is_not_made_to_look_whole(tmp_path: Path) -> None:
    async with _peer(tmp_path) as (peer, forward):
        peer.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
        with capture_logs(), pytest.raises(httpcore.RemoteProtocolError):
            await forward(_WEB, _request(), CollectedAnswer().take)


async def test_a_network_has_its_share_of_the_connections_and_waits_for_it(tmp_path: Path) -> None:
    async with _peer(tmp_path) as (_, forward):
        taking, go_on = asyncio.Semaphore(0), asyncio.Event()

        async def take_slowly(_: object) -> None:
            taking.release()
            await go_on.wait()

        async def ask_slowly() -> None:
            await forward(_WEB, _request(), take_slowly)

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(ask_slowly())
            for _ in range(2):
                await taking.acquire()
            got = CollectedAnswer()
            await forward(_WEB, replace(_request(), key=_key("green")), got.take)
            assert got.status == 200
            # Nor does an operator wait for them.
            got = CollectedAnswer()
            await forward(_WEB, replace(_request(), by_operator=True), got.take)
            assert got.status == 200
            assert taking.locked()
            go_on.set()
        got = CollectedAnswer()
        await forward(_WEB, _request(), got.take)
        assert got.status == 200
