"""The path of OVN's agent, which lives on: taken over from it, taken back when it is started again, and given back."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from support.agent_socket import AgentWorld, open_agents, say_whose, squat
from support.daemon import alive
from support.guest import Guest, Load, Reply
from support.lab import RecordMapping, Server, record, until
from support.openstack.front import open_fronts

pytestmark = [pytest.mark.root, pytest.mark.slow]

_WITHIN_S: Final = 3.0
"""A look a second, and two reloads."""

_INSTANCE: Final = "00000009-0000-4000-8000-000000000000"
_TAKEN: Final = "imdsproxy_unix_listener_taken_over_total"


@pytest.fixture(scope="module")
def shared() -> Iterator[AgentWorld]:
    with open_agents(take_over=True) as one:
        yield one


@pytest.fixture
def world(shared: AgentWorld) -> Iterator[AgentWorld]:
    """A daemon that was just started."""
    _restart(shared)
    yield shared
    shared.heal()


def _restart(world: AgentWorld) -> None:
    world.heal()
    world.daemon.kill_controller()
    world.daemon.start()
    world.wait_serving()


def _agent(world: AgentWorld) -> contextlib.AbstractContextManager[Server]:
    """The agent is started: it removes what is at the path and listens there."""
    return squat(world.path, namespace=world.lab.host)


def _taken(world: AgentWorld, times: int) -> None:
    """HAProxy has the path, and had to take it so often."""
    until(world.socket.serves, within_s=_WITHIN_S, what="our own service")
    world.daemon.wait_ready()
    until(lambda: world.report()["taken_over"] == times, within_s=_WITHIN_S)
    assert world.metric(_TAKEN) == times
    assert world.metric("imdsproxy_unix_listener_serving") == 1


def _told_of(world: AgentWorld, agent: Server) -> list[str]:
    """The names of log entries with the agent's pid."""
    entries = world.daemon.log_entries()
    return [str(one["message"]) for one in entries if f"(pid {agent.pid})" in str(one)]


# Whom it is taken from


@pytest.mark.parametrize("elsewhere", [False, True], ids=["host", "other-namespace"])
def test_a_living_agent_loses_its_place_once_it_is_to_be_taken_over(
    world: AgentWorld, *, elsewhere: bool
) -> None:
    world.take_over(enabled=False)
    namespace = world.lab.namespace("away") if elsewhere else world.lab.host
    with squat(world.path, namespace=namespace) as agent:
        world.take_over(take_over=False)
        assert f"(pid {agent.pid}) listens on" in world.problem()
        with world.socket.connect() as held:
            world.take_over()
            _taken(world, 1)
            # Whoever it had taken up is the agent's still.
            assert held.request("/").body == b"foreign"
        assert alive(agent.pid)
        assert str(world.report()["taken_from"]).endswith(f"(pid {agent.pid})")
        assert _told_of(world, agent) == ["host refused", "unix listener taken over"]
        assert f"(pid {agent.pid})" in world.daemon.command("status").out
    assert world.socket.serves()
    if elsewhere:
        world.lab.delete_namespace("away")


def test_a_daemon_that_starts_takes_it_over(world: AgentWorld) -> None:
    world.daemon.stop()
    with _agent(world) as agent:
        world.daemon.start()
        _taken(world, 1)
        assert _told_of(world, agent) == ["unix listener taken over"]
        assert alive(agent.pid)


# HAProxy and the agent are started again


def test_a_haproxy_that_ends_while_the_agent_lives_has_the_path_again(world: AgentWorld) -> None:
    with _agent(world):
        _taken(world, 1)
        master = world.daemon.pids().master
        os.kill(master, signal.SIGKILL)
        until(lambda: world.daemon.status()["haproxy"]["master"] not in (None, master))
        world.wait_serving()
        assert world.report()["taken_over"] == 1


# Guests behind the agent's own proxy


@pytest.fixture(scope="module")
def front(shared: AgentWorld) -> Iterator[Guest]:
    """A guest behind the HAProxy that OVN's agent starts."""
    with open_fronts(shared.lab, shared.daemon.directory, shared.path) as fronts:
        fronts.start("ovn", "ovn")
        guest = shared.lab.guest("ovn")
        network = record("ovn", {"namespace": shared.lab.name("nowhere-ovn")})
        port = {"network": "ovn", "mac": guest.mac, "addresses": list(guest.addresses)}
        machine: RecordMapping = {
            "id": _INSTANCE,
            "name": "ovn-5",
            "project": "blue",
            "upstream": "nova",
            "ports": [port],
        }
        shared.daemon.put([network], [machine])
        yield guest


def _by(answers: Counter[str]) -> Callable[[Guest, Reply], str | None]:
    """Counts who has answered; anybody else's answer is none."""

    def judge(guest: Guest, answer: Reply) -> str | None:
        said = answer.text if answer.status == 200 else ""
        if said not in {"foreign", _INSTANCE}:
            return f"{guest.name} got {answer.status} {answer.body[:80]!r}"
        answers[said] += 1
        return None

    return judge


# An agent has a gap of its own between removing the socket and listening, which is long on a busy machine.
@pytest.mark.alone
def test_no_guest_loses_a_request_while_the_agent_is_started_again_and_again(
    world: AgentWorld, front: Guest
) -> None:
    world.nova.default = say_whose
    answers: Counter[str] = Counter()
    with Load([front], "/openstack", _by(answers), connections=3, pause_s=0.01) as load:
        load.wait_answers(20)
        for times in (1, 2):
            before = answers["foreign"]
            with _agent(world):
                until(lambda before=before: answers["foreign"] > before)  # type: ignore[misc]  # a default
                _taken(world, times)
                ours = answers[_INSTANCE]
                until(lambda ours=ours: answers[_INSTANCE] > ours + 20)  # type: ignore[misc]  # as above
            load.wait_answers(20)
    assert load.report.lost == []


# Going back


@pytest.mark.parametrize("way", ["enabled: false", "stop --data-plane"])
def test_what_is_left_to_an_agent_that_is_started_again_is_its_own(
    world: AgentWorld, way: str
) -> None:
    with _agent(world) as agent:
        _taken(world, 1)
        if way == "enabled: false":
            world.take_over(enabled=False)
        else:
            world.daemon.stop()
        # Nobody listens there: the agent does not make its file again by itself.
        assert not world.path.exists()
        assert alive(agent.pid)
    with _agent(world):
        assert world.socket.ask().body == b"foreign"
        if way == "stop --data-plane":
            world.daemon.start()
            _taken(world, 1)


def test_leaving_does_not_take_the_file_of_an_agent_that_has_bound_meanwhile(
    world: AgentWorld,
) -> None:
    world.daemon.kill_controller()
    with _agent(world) as agent:
        world.daemon.stop()
        assert world.socket.ask().body == b"foreign"
        assert alive(agent.pid)
    world.daemon.start()
