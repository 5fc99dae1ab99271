import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeAlias, cast
from unittest.mock import MagicMock, call

import pytest

from imdsproxy.documents.http import (
    AsgiApp,
    Receive,
    Scope,
    Send,
    _WholeAnswers,
    read_body,
    serving,
)
from imdsproxy.errors import HostRefused
from imdsproxy.host.servers import open_unix_socket

ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def answering(begun: asyncio.Event | None = None, gate: asyncio.Event | None = None) -> AsgiApp:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        if begun is not None:
            begun.set()
        if gate is not None:
            await gate.wait()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
        )
        await send({"type": "http.response.body", "body": b"ok"})

    return app


def test_a_socket_has_its_mode_and_group_and_takes_the_old_ones_place(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with (
        open_unix_socket(path, mode=0o600) as old,
        open_unix_socket(path, mode=0o620, owner=(-1, os.getegid())) as new,
        socket.socket(socket.AF_UNIX) as client,
    ):
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o620, os.getegid())
        assert list(tmp_path.iterdir()) == [path]
        client.connect(str(path))
        new.accept()[0].close()
        with pytest.raises(BlockingIOError):
            old.accept()


def test_a_path_that_is_too_long_or_missing_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(HostRefused, match="cannot listen on") as refused:
        open_unix_socket(tmp_path / ("x" * 120), mode=0o600)
    assert "shorter" in refused.value.hint
    with pytest.raises(HostRefused, match="ENOENT"):
        open_unix_socket(tmp_path / "nothing" / "x.sock", mode=0o600)
    assert list(tmp_path.iterdir()) == []


End: TypeAlias = Callable[[], Coroutine[object, object, None]]
Connect: TypeAlias = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@contextlib.asynccontextmanager
async def listening(
    directory: Path, app: AsgiApp, grace_s: float = 20
) -> AsyncIterator[tuple[End, Connect]]:
    """What ends the serving of a socket, and what connects to it."""
    path, writers, served = directory / "x.sock", list[asyncio.StreamWriter](), AsyncExitStack()
    listener = open_unix_socket(path, mode=0o600)
    await served.enter_async_context(serving(app, listener, grace_s=grace_s))

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(path)
        writers.append(writer)
        return reader, writer

    async with asyncio.timeout(60):
        yield served.aclose, connect
        for writer in writers:
            writer.close()
        await served.aclose()


@pytest.mark.parametrize("late", [True, False])
async def test_a_request_that_has_begun_or_is_on_its_way_at_the_end_is_answered(
    tmp_path: Path, *, late: bool
) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    async with listening(tmp_path, answering(begun, gate)) as (end, connect):
        reader, writer = await connect()
        if not late:
            writer.write(ASK)
            await begun.wait()
        closing = asyncio.create_task(end())
        await asyncio.sleep(0)
        if late:
            writer.write(ASK)
        gate.set()
        answer = await reader.read()
        assert answer.endswith(b"\r\n\r\nok")
        assert not late or b"connection: close" in answer
        await closing


@pytest.mark.parametrize("accepted", [True, False])
async def test_a_connection_that_comes_in_the_turn_of_the_end_is_answered(
    tmp_path: Path, *, accepted: bool
) -> None:
    async with listening(tmp_path, answering()) as (end, _):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(tmp_path / "x.sock"))
            client.sendall(ASK)
            if accepted:
                # In this turn of the loop; its task comes after the one that ends all.
                await asyncio.sleep(0)
            await asyncio.create_task(end())
            assert client.recv(4096).endswith(b"ok")


async def test_idle_connections_and_endless_requests_do_not_hold_up_the_end(tmp_path: Path) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with listening(tmp_path, app, grace_s=0.5) as (end, connect):
        idle, _ = await connect()
        _, endless = await connect()
        endless.write(ASK)
        await begun.wait()
        await end()
        assert await idle.read() == b""
        await cancelled.wait()


def test_an_answers_parts_are_sent_in_one_piece() -> None:
    sink = MagicMock(spec=asyncio.Transport)
    whole = _WholeAnswers(sink)
    whole.write(b"HTTP/1.1 200 OK\r\n\r\n")
    whole.write(b"body")
    assert sink.mock_calls == []
    whole.flush()
    whole.flush()
    assert sink.mock_calls == [call.write(b"HTTP/1.1 200 OK\r\n\r\nbody")]
    # Long parts and interim answers do not wait.
    whole.write(b"head")
    whole.write(b"x" * 70_000)
    whole.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    interim = call.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert sink.mock_calls[1:] == [call.write(b"head" + b"x" * 70_000), interim]
    whole.write(b"end")
    whole.close()
    assert sink.mock_calls[3:] == [call.write(b"end"), call.close()]


async def test_a_client_that_waits_for_100_continue_gets_it(tmp_path: Path) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await answering()(scope, receive, send)

    async with listening(tmp_path, app) as (_, connect):
        reader, writer = await connect()
        writer.write(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"abc")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 OK")


async def test_what_a_guest_sends_behind_a_body_writes_no_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with listening(tmp_path, answering()) as (_, connect):
        reader, writer = await connect()
        writer.write(head + b"1\r\na\r\n0\r\nContent-Length: 1\r\n\r\n")
        await reader.read(10_000)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


async def test_what_comes_behind_a_body_is_no_header(tmp_path: Path) -> None:
    """HAProxy says in headers who asks, and sends the guest's trailers on as they are."""
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        before = list(cast("list[object]", scope["headers"]))
        await read_body(receive)
        seen.append((before, list(cast("list[object]", scope["headers"]))))
        await answering()(scope, receive, send)

    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nX: 1\r\n\r\n"
    body = b"1\r\na\r\n0\r\nX: 2\r\n\r\n"
    async with listening(tmp_path, app) as (_, connect):
        reader, writer = await connect()
        writer.write(head + body)
        await reader.readuntil(b"ok")
        writer.write(head)
        await asyncio.sleep(0)
        writer.write(body)
        await reader.readuntil(b"ok")
    headers = [(b"transfer-encoding", b"chunked"), (b"x", b"1")]
    assert seen == [(headers, headers)] * 2
