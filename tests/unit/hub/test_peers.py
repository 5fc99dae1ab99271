"""What a hub makes of other hubs that hang."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.stream import CONNECT_S
from imdsproxy.hub.hosts import in_force as module
from imdsproxy.hub.hosts.in_force import Peers
from imdsproxy.hub.store.state import Change, FleetState
from support.hand_clock import HandClock
from support.patience import patience

_LONG_S = 3600.0

_NOWHERE = "http://127.0.0.1:1"
"""URL of a hub whose machine refuses connections."""


@contextlib.asynccontextmanager
async def _hub(answer: bytes) -> AsyncIterator[tuple[str, list[str]]]:
    """A hub that answers each request so, or not at all; its URL, and what it is asked for."""
    asked: list[str] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                asked.append(head.decode().split(" ")[1])
                if answer:
                    length = f"content-length: {len(answer)}"
                    writer.write(f"HTTP/1.1 200 OK\r\n{length}\r\n\r\n".encode() + answer)

    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def _peers(**urls: str) -> AsyncIterator[Peers]:
    state = FleetState()
    values = {name: codec.encode({"url": url}) for name, url in urls.items()}
    state.apply(1, [Change(f"{layout.HUBS}{name}", value, 1) for name, value in values.items()])
    peers = Peers(state, "this", HandClock())
    async with peers._connections():
        yield peers


async def test_a_hub_that_hangs_is_noticed_before_it_is_asked_what_takes_long_and_is_left_out_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.2)
    async with (
        _hub(b"") as (hung, asked),
        _hub(b'{"a": ""}') as (good, _),
        _peers(hung=hung, good=good) as peers,
    ):
        async with asyncio.timeout(5 * patience()):
            assert await peers.ask_all("/fleet/applied", {}, _LONG_S) == {"good": {"a": ""}}
        for _ in range(3):
            assert await peers.ask_all("/fleet/applied", {}, _LONG_S) == {"good": {"a": ""}}
        assert asked == ["/fleet/alive"]
        assert isinstance(peers.clock, HandClock)
        peers.clock.time += module._REST_S
        async with asyncio.timeout(5 * patience()):
            await peers.ask_all("/fleet/applied", {}, _LONG_S)
        assert asked == ["/fleet/alive"] * 2


async def test_a_hub_that_answers_is_asked_once_a_second_whether_it_runs() -> None:
    async with _hub(b"{}") as (url, asked), _peers(good=url) as peers:
        for _ in range(3):
            assert await peers.ask_all("/fleet/applied", {}, _LONG_S) == {"good": {}}
    assert asked == ["/fleet/alive", *["/fleet/applied"] * 3]


@pytest.mark.parametrize(
    ("ahead_s", "doubt"),
    [(0.0, None), (86400.0, "the clocks of other hubs differ from this hub's: good by +86400 s")],
)
async def test_a_clock_is_compared_with_that_of_each_hub_that_answers(
    ahead_s: float, doubt: str | None
) -> None:
    now = HandClock().now().timestamp() + ahead_s
    async with (
        _hub(json.dumps({"now": now}).encode()) as (good, _),
        _peers(good=good, away=_NOWHERE) as peers,
    ):
        assert await peers.doubt_clock() == doubt


async def test_a_clock_that_no_running_hub_confirms_is_doubted_and_that_of_the_only_hub_is_not() -> (
    None
):
    async with _peers(away=_NOWHERE) as peers:
        assert await peers.doubt_clock() == "no other hub answers with its clock"
    async with _peers() as alone:
        assert await alone.doubt_clock() is None


@pytest.mark.parametrize("answer", [b"[1, 2]", b"7", b"no JSON", b"null"])
async def test_a_hub_that_answers_what_is_no_object_does_not_answer(answer: bytes) -> None:
    async with _hub(answer) as (odd, _), _peers(odd=odd) as peers:
        assert await peers.ask_all("/fleet/applied", {}, CONNECT_S) == {}


async def test_a_hub_whose_own_certificate_cannot_be_used_goes_on_without_the_others(
    tmp_path: Path,
) -> None:
    async with _hub(b"{}") as (other, _):
        state = FleetState()
        value = codec.encode({"url": other})
        state.apply(1, [Change(f"{layout.HUBS}other", value, 1)])
        for name in ("missing", "empty"):
            (tmp_path / "empty").write_bytes(b"")
            files = tmp_path / name, tmp_path / name
            peers = Peers(state, "this", HandClock(), files)
            assert await peers.ask_all("/fleet/applied", {}, CONNECT_S) == {}
