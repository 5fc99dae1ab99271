"""A HAProxy that has all the connections it may have is not taken for one that hangs."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from support.daemon import alive
from support.guest import Connection
from support.lab import until
from support.world import World, open_world

pytestmark = [pytest.mark.root, pytest.mark.slow]

_MAXCONN = 24
_NOTICED_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def opened() -> Iterator[World]:
    with open_world({"haproxy": {"maxconn": _MAXCONN}}) as world:
        yield world


@pytest.fixture
def world(opened: World) -> World:
    opened.heal()
    return opened


def _reasons(world: World) -> str:
    return " ".join(world.daemon.status()["readiness"]["reasons"])


def _fill(world: World, stack: contextlib.ExitStack) -> list[Connection]:
    """Connections of all guests, twice as many as HAProxy may have, until the daemon reports it."""
    guests = world.everybody
    found = [
        stack.enter_context(guests[number % len(guests)].connect())
        for number in range(2 * _MAXCONN)
    ]
    until(lambda: "HAProxy is full" in _reasons(world), within_s=5, what="the report of a full one")
    return found


def test_a_full_haproxy_is_reported_and_goes_on(world: World) -> None:
    before = world.settled()
    with contextlib.ExitStack() as stack:
        first, *_ = _fill(world, stack)
        reasons = _reasons(world)
        assert "LimitNOFILE" in reasons
        assert "does not answer" not in reasons
        # HAProxy gives a guest ten seconds to ask something; a hung one is ended after four.
        assert first.read().status == 408
        assert world.pids().master == before.master
        assert alive(before.worker)
    world.daemon.wait_ready()
    world.all_right()
    assert world.settled().worker == before.worker
    messages = [one["message"] for one in world.daemon.log_entries()]
    assert messages.count("haproxy is full") == 1
    assert not [one for one in messages if one.startswith(("haproxy does not", "no documents"))]


def test_a_full_haproxy_that_hangs_is_ended_as_soon_as_any_other(world: World) -> None:
    before = world.settled()
    with contextlib.ExitStack() as stack:
        _fill(world, stack)
        os.kill(before.worker, signal.SIGSTOP)
        until(
            lambda: not alive(before.worker), within_s=_NOTICED_WITHIN_S, what="the hung one's end"
        )
    until(lambda: world.has_other_master(before.master), within_s=5, what="another HAProxy")
    world.wait_all_right()
