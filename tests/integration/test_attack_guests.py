"""Guests do what they can to keep others from being answered, or to be answered what nobody should be."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import pytest

from support.agent_socket import AgentWorld, open_agents
from support.guest import Connection, Lost
from support.lab import until
from support.nova_world import NovaWorld, open_nova_world
from support.recorder import Answer, Received, reply

pytestmark = pytest.mark.root

_SHARE = 20
_SLOTS = 16
_ENDLESS = b"Host: x\r\nContent-Length: 100\r\n\r\nab"
_CHUNKED = b"Host: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def agents() -> Iterator[AgentWorld]:
    with open_agents(maxconn=2 * _SHARE) as world:
        haproxy: dict[str, object] = {"maxconn_per_network": _SHARE}
        world.settings = {**world.settings, "haproxy": haproxy}
        world.heal()
        world.daemon.reconfigure(world.settings)
        world.wait_serving()
        yield world


def _send_slowly(world: AgentWorld, network: str) -> Connection | None:
    """A body that never ends, as the network's proxy forwards it; `None` where it is refused."""
    connection = world.socket.connect()
    who = f"X-Neutron-Network-ID: {network}\r\nX-Forwarded-For: 10.0.0.5\r\n"
    connection.send(b"POST /password HTTP/1.1\r\n" + who.encode() + _ENDLESS)
    connection.socket.settimeout(0.05)
    try:
        refusal = connection.read()
    except Lost:
        return connection
    # As Neutron's proxies do.
    connection.close()
    assert (refusal.status, refusal.headers["retry-after"]) == (503, "1")
    return None


def test_no_network_takes_the_whole_socket_by_sending_slowly(agents: AgentWorld) -> None:
    with ExitStack() as stack:
        taken = 0
        for _ in range(3 * _SHARE):
            connection = _send_slowly(agents, "red")
            if connection is not None:
                stack.enter_context(connection)
                taken += 1
        assert taken == _SHARE
        assert agents.socket.ask(network="red").status == 503
        assert agents.socket.ask(network="green").status == 200
    until(
        lambda: agents.socket.ask(network="red").status == 200,
        what="the end of those who went away",
    )


@pytest.fixture(scope="module")
def world() -> Iterator[NovaWorld]:
    with open_nova_world() as one:
        yield one


def _read_slowly(world: NovaWorld, target: str) -> Connection:
    connection = world.red.connect()
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.send(b"GET " + target.encode() + b" HTTP/1.1\r\n" + _CHUNKED)
    return connection


def test_no_network_takes_the_whole_way_through_the_resolver_by_reading_slowly(
    world: NovaWorld,
) -> None:
    world.nova.default = _large_for_red
    with ExitStack() as stack:
        for number in range(5 * _SLOTS):
            stack.enter_context(_read_slowly(world, f"/{number}"))
        assert world.green.raw(b"POST /p HTTP/1.1\r\n" + _CHUNKED, timeout_s=5).status == 200
        assert len([one for one in world.requests() if one.target[1:].isdigit()]) <= _SLOTS
    until(
        lambda: world.red.raw(b"POST /p HTTP/1.1\r\n" + _CHUNKED).status == 200,
        what="the end of those who went away",
    )


def _large_for_red(request: Received) -> Answer:
    return reply(b"x" * 2_000_000 if request.target[1:].isdigit() else b"small")


@pytest.mark.parametrize("framing", ["", "Transfer-Encoding: chunked\r\n"])
def test_a_large_head_is_taken_or_refused_and_never_a_fault_of_ours(
    world: NovaWorld, framing: str
) -> None:
    body = "0\r\n\r\n" if framing else ""
    lines: Mapping[str, Callable[[int], str]] = {
        "target": lambda size: f"GET /{'a' * size} HTTP/1.1\r\n",
        "both": lambda size: (
            f"GET /{'a' * (size // 2)} HTTP/1.1\r\nAccept: {'b' * (size // 2)}\r\n"
        ),
        "header": lambda size: f"GET / HTTP/1.1\r\nAccept: {'b' * size}\r\n",
        "headers": lambda size: (
            "GET / HTTP/1.1\r\n"
            + "".join(
                f"If-{'x' * (number % 9 + 1)}: {'c' * (size // 90)}\r\n" for number in range(90)
            )
        ),
    }
    found = {}
    for name, line in lines.items():
        for size in (
            3_000,
            7_000,
            7_400,
            7_800,
            8_200,
            10_000,
            12_000,
            14_000,
            15_000,
            15_300,
            17_000,
        ):
            data = f"{line(size)}Host: x\r\n{framing}\r\n{body}"
            status = world.red.raw(data.encode()).status
            if status not in {200, 400, 414, 431} or (size <= 7_000 and status != 200):
                found[name, size] = status
    assert not found
