from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import httpcore
import pytest
from structlog.testing import capture_logs

from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.wire import EmbeddedRecord, render_map_value
from imdsproxy.serving.resolver_app import CollectedAnswer, Forward, GuestRequest, found_forwarder

_RECORD = EmbeddedRecord(InstanceId("i"), "0" * 16)


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


def _key(network: str) -> AddressKey:
    return NetworkId(network), ip_address("10.0.0.5")


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
    b"x-imdsproxy-record: " + render_map_value(_RECORD).encode(),
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
async def test_the_target_is_sent_byte_for_byte_and_our_headers_are_ours(
    tmp_path: Path, request_: GuestRequest, more: list[bytes]
) -> None:
    async with _peer(tmp_path) as (peer, forward):
        await forward(_RECORD, request_, CollectedAnswer().take)
    head, _, body = peer.seen.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first == b"%b %b HTTP/1.1" % (request_.method.encode(), request_.target)
    assert sorted(line.lower() for line in lines) == sorted([*_SENT, *more])
    assert body == request_.body


async def test_the_answer_is_passed_on_as_it_is(tmp_path: Path) -> None:
    async with _peer(tmp_path) as (peer, forward):
        peer.answer = (
            b"HTTP/1.1 409 Conflict\r\nContent-Encoding: gzip\r\nX-A: 1\r\nX-A: 2\r\n"
            b"Content-Length: 3\r\nConnection: close\r\n\r\n\x1f\x8b\xff"
        )
        answer = CollectedAnswer()
        await forward(_RECORD, _request(), answer.take)
        assert answer.status == 409
        assert answer.headers == (
            (b"content-encoding", b"gzip"),
            (b"x-a", b"1"),
            (b"x-a", b"2"),
            (b"content-length", b"3"),
        )
        assert answer.body == b"\x1f\x8b\xff"


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", None])
async def test_no_answer_or_none_that_can_be_read_is_503(
    tmp_path: Path, answer: bytes | None
) -> None:
    got = CollectedAnswer()
    async with _peer(tmp_path) as (peer, forward):
        peer.answer = answer or b""
        asked = forward if answer is not None else found_forwarder(str(tmp_path / "none"), 1.0)
        with capture_logs() as logs:
            await asked(_RECORD, _request(), got.take)
    assert got.status == 503
    assert (b"retry-after", b"1") in got.headers
    assert [entry["event"] for entry in logs] == ["request not handed to haproxy"]


async def test_an_answer_that_breaks_off_is_not_made_to_look_whole(tmp_path: Path) -> None:
    async with _peer(tmp_path) as (peer, forward):
        peer.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
        with capture_logs(), pytest.raises(httpcore.RemoteProtocolError):
            await forward(_RECORD, _request(), CollectedAnswer().take)


async def test_a_network_has_its_share_of_the_connections_and_waits_for_it(tmp_path: Path) -> None:
    async with _peer(tmp_path) as (_, forward):
        taking, go_on = asyncio.Semaphore(0), asyncio.Event()

        async def take_slowly(_: object) -> None:
            taking.release()
            await go_on.wait()

        async def ask_slowly() -> None:
            await forward(_RECORD, _request(), take_slowly)

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(ask_slowly())
            for _ in range(2):
                await taking.acquire()
            got = CollectedAnswer()
            await forward(_RECORD, replace(_request(), key=_key("green")), got.take)
            assert got.status == 200
            # Nor does an operator wait for them.
            got = CollectedAnswer()
            await forward(_RECORD, replace(_request(), by_operator=True), got.take)
            assert got.status == 200
            assert taking.locked()
            go_on.set()
        got = CollectedAnswer()
        await forward(_RECORD, _request(), got.take)
        assert got.status == 200
