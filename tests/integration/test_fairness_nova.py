"""Limits in front of Nova, and behind the unix listener, where many guests share a socket and connections."""

from __future__ import annotations

import select
from collections.abc import Iterator, Mapping
from typing import Final

import pytest

from support.agent_socket import NETWORK, AgentWorld, open_agents
from support.guest import Connection, Reply
from support.nova_world import INSTANCES, open_nova_world

pytestmark = pytest.mark.root

_PATH: Final = "/openstack/latest/meta_data.json"
_FEW: Final = {"policy": {"instances": {INSTANCES["red"]: {"burst": 20}}}}
_DEFAULTS: Final = {"limits": {"requests_per_s": 1, "burst": 30, "connections": 160, "body_kib": 2}}


@pytest.fixture(scope="module")
def shared_agents() -> Iterator[AgentWorld]:
    with open_agents(maxconn=100) as one:
        yield one


@pytest.fixture
def agents(shared_agents: AgentWorld) -> Iterator[AgentWorld]:
    yield shared_agents
    shared_agents.heal()
    shared_agents.daemon.forget_floods()


def _choose(world: AgentWorld, settings: Mapping[str, Mapping[str, object]]) -> None:
    world.daemon.reconfigure({**world.settings, **settings})


def _through(connection: Connection, network: str) -> Reply:
    return connection.request(_PATH, headers=(f"{NETWORK}: {network}", "X-Forwarded-For: 10.0.0.5"))


def _is_refusal(reply: Reply) -> bool:
    return reply.status == 503 and reply.headers.get("retry-after") == "1"


def test_beyond_its_burst_a_guest_of_nova_gets_503_and_nova_nothing_of_it() -> None:
    with open_nova_world() as world:
        base = world.settings([{"url": world.nova.url}])
        world.take_over({**base, **_FEW})
        with world.red.connect() as connection:
            statuses = [connection.request(_PATH).status for _ in range(20)]
            assert statuses == [200] * 20
            assert _is_refusal(connection.request(_PATH))
        assert world.green.ask(_PATH).status == 200
        assert len(world.requests()) == 21


def test_what_is_in_a_policy_counts_behind_the_unix_listener_for_each_guest_of_a_connection(
    agents: AgentWorld,
) -> None:
    _choose(agents, _FEW)
    with agents.socket.connect() as connection:
        assert [_through(connection, "red").status for _ in range(20)] == [200] * 20
        assert [_through(connection, "green").status for _ in range(25)] == [200] * 25
    assert _is_refusal(agents.socket.ask(_PATH))


def test_the_settings_limit_counts_behind_the_unix_listener_for_each_guest_of_a_connection(
    agents: AgentWorld,
) -> None:
    _choose(agents, _DEFAULTS)
    with agents.socket.connect() as connection:
        for _ in range(30):
            assert _through(connection, "red").status == 200
            assert _through(connection, "green").status == 200
    assert _is_refusal(agents.socket.ask(_PATH))
    assert agents.daemon.status()["busiest"][0]["limited"]


def test_a_body_that_is_too_long_for_nova_is_413(agents: AgentWorld) -> None:
    _choose(agents, _DEFAULTS)
    agents.nova.forget()
    assert agents.socket.ask(_PATH, method="POST", body=b"a" * 2049).status == 413
    assert agents.nova.requests == []
    assert agents.socket.ask(_PATH, method="POST", body=b"a" * 2048).status == 200


def test_networks_that_drag_out_their_requests_together_leave_room_for_another(
    agents: AgentWorld,
) -> None:
    # None may have more than 40, and three could have all 100: beyond three quarters each may have 5.
    _choose(agents, {"haproxy": {"maxconn_per_network": 40}})
    held: list[Connection] = []
    try:
        for network in ("one", "two", "three"):
            for _ in range(40):
                held.append(agents.socket.connect())
                held[-1].send(
                    f"POST {_PATH} HTTP/1.1\r\nHost: x\r\n{NETWORK}: {network}\r\n"
                    "X-Forwarded-For: 10.0.0.5\r\nContent-Length: 1000\r\n\r\n".encode()
                )
            held = _without_answered(held)
        assert agents.socket.ask(_PATH).status == 200
        assert 70 < len(held) < 90
    finally:
        for one in held:
            one.close()


def _without_answered(connections: list[Connection]) -> list[Connection]:
    """Close those that were answered, as a proxy does that has no further request."""
    left = {one.socket: one for one in connections}
    while readable := select.select(list(left), (), (), 0.3)[0]:
        for one in readable:
            left.pop(one).close()
    return list(left.values())
