"""Tokens that HAProxy keeps, after its clock was set."""

import json
from collections.abc import Iterator
from typing import Final

import pytest

from support.daemon import Daemon
from support.guest import take_token
from support.identity.requests import identity_settings, request_token, wait_token
from support.lab import run, until
from support.wall_clock import WallClock
from support.world import World, open_world

pytestmark = pytest.mark.root

_DAY_S: Final = 86_400


def _clock(daemon: Daemon) -> WallClock:
    # In its jail the worker of HAProxy finds it too.
    return WallClock(daemon.runtime / "jail/clock")


def _prepare(daemon: Daemon) -> None:
    clock = _clock(daemon)
    clock.step(0)
    daemon.configure(
        {**daemon.settings, "haproxy": {"binary": str(clock.haproxy(daemon.directory))}}
    )


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    section, _ = identity_settings(tmp_path_factory.mktemp("issuer"))
    settings = {"identity": section, "policy": {"host": {"audiences": ["vault"]}}}
    with open_world(settings, prepare=_prepare) as world:
        yield world


def _given_by_process(world: World) -> int:
    """Return the number of tokens that the process behind HAProxy has given."""
    socket = world.daemon.runtime / "jail/identity.sock"
    state = run("curl", "-sf", "--unix-socket", str(socket), "http://identity/state")
    given: dict[str, int] = json.loads(state)["given"]
    return sum(given.values())


def test_after_a_clock_was_set_back_haproxy_gives_no_token_of_the_time_ahead(world: World) -> None:
    token = wait_token(world.red)
    clock = _clock(world.daemon)

    def given_after_a_request() -> int:
        session = take_token(world.red)
        assert request_token(world.red, session=session).text == token
        return _given_by_process(world)

    before = given_after_a_request()
    assert given_after_a_request() == before
    clock.step(-_DAY_S)
    until(lambda: given_after_a_request() > before, within_s=20, what="the process's answer")
    clock.step(0)
