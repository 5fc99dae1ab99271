"""How large a request may be and how long it may take, and what a guest that drags it out takes from others."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from support.guest import Connection, Guest, Reply
from support.lab import until
from support.patience import patience
from support.world import World

pytestmark = pytest.mark.root

_USER_DATA: Final = "/latest/user-data"
_HEAD: Final = b"GET /latest/user-data HTTP/1.1\r\nHost: x\r\n"
_PASSWORD: Final = "POST /openstack/latest/password HTTP/1.1\r\nHost: x\r\n"
_TOO_SLOW_S: Final = 14.0
"""More than the ten seconds that a head may take, and than those that a body may take after it."""


@pytest.mark.parametrize("length", [65_537, 1_000_000, 100_000_000_000])
def test_a_body_that_is_too_long_is_413(world: World, length: int) -> None:
    body = b"a" * min(length, 1_000_000)
    assert (
        world.red.raw(f"{_PASSWORD}Content-Length: {length}\r\n\r\n".encode() + body).status == 413
    )


def test_what_takes_too_long_to_send_is_408_head_or_body(world: World) -> None:
    started = {
        "nothing": b"",
        "head": _HEAD,
        "body": f"{_PASSWORD}Content-Length: 100\r\n\r\nabc".encode(),
        "chunks": f"{_PASSWORD}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n".encode(),
    }

    def send(data: bytes) -> tuple[Reply, float]:
        began = time.monotonic()
        return world.red.raw(data, timeout_s=20 * patience()), time.monotonic() - began

    with ThreadPoolExecutor(len(started)) as pool:
        answers = dict(zip(started, pool.map(send, started.values()), strict=True))
    assert {name: reply.status for name, (reply, _) in answers.items()} == dict.fromkeys(
        started, 408
    )
    assert max(took for _, took in answers.values()) < _TOO_SLOW_S * patience()


def test_a_guest_that_sends_a_byte_now_and_then_on_64_connections_starves_nobody(
    world: World,
) -> None:
    green = world.guests["green"]
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(world.red.connect()) for _ in range(64)]
        longest = 0.0
        for byte in _HEAD[:20]:
            for one in slow:
                one.send(bytes([byte]))
            longest = max(longest, _took(green))
        assert longest < 1 * patience()
        # Itself neither, on one that it has left.
        assert world.red.ask(_USER_DATA).status == 200


def test_a_guest_that_does_not_read_its_answers_starves_nobody(world: World) -> None:
    green = world.guests["green"]
    with contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(world.red.connect()) for _ in range(64)]
        _ask_without_reading(deaf)
        assert max(_took(green) for _ in range(20)) < 1 * patience()
    until(lambda: world.red.ask(_USER_DATA).status == 200, what="its own service")


def _took(guest: Guest) -> float:
    began = time.monotonic()
    assert guest.ask(_USER_DATA).status == 200
    return time.monotonic() - began


def _ask_without_reading(connections: list[Connection]) -> None:
    for one in connections:
        one.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                one.socket.send((_HEAD + b"\r\n") * 200)
