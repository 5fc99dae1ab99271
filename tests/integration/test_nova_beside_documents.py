"""Instances with documents of ours on a host that is in front of Nova too: the cache stands elsewhere there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from support.guest import IPV6
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_PATH = "/latest/user-data"


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    secret = tmp_path_factory.mktemp("nova") / "secret"
    secret.write_text("a secret\n")
    secret.chmod(0o600)
    nova = {"endpoints": [{"url": "http://127.0.0.1:9"}], "secret_file": str(secret)}
    # Nobody is there, and nothing is to be said of that.
    sets = {"health_check": "off", "endpoint_sets": {"default": nova}}
    with open_world({"resolver": {"hold_s": 1.0}, "nova": sets}) as world:
        yield world


def test_no_request_reads_what_another_instance_left_in_the_cache(world: World) -> None:
    records = {
        guest.network: f"{guest.network}-5|"
        + str(world.daemon.explain(guest.network, "10.0.0.5")["revision"])
        for guest in world.everybody
    }
    for _ in range(2):
        for start in ("", "http://169.254.169.254"):
            for query in ("", "?", "?x=1"):
                for guest in world.everybody:
                    assert own(guest, guest.ask(f"{start}{_PATH}{query}")) is None, (start, query)
    for record in records.values():
        for target in (f"/{record}{_PATH}", f"http://{record}/{record}{_PATH}"):
            for guest in world.everybody:
                reply = guest.ask(target)
                assert reply.status in (400, 404) or own(guest, reply) is None, target


def test_repeated_reads_never_reach_python_and_tell_nothing_of_the_cache(world: World) -> None:
    world.settled()
    first = {guest: guest.ask(_PATH).body for guest in world.everybody}
    pids = world.pids()
    for pid in (pids.controller, pids.documents, *pids.document_workers):
        os.kill(pid, signal.SIGSTOP)
    for guest, body in first.items():
        for to in ("169.254.169.254", IPV6):
            reply = guest.ask(_PATH, to=to)
            assert (reply.status, reply.body) == (200, body)
            assert not {"cache-control", "age"} & set(reply.headers)


def test_an_unknown_guest_is_told_the_same_however_it_spells_its_target(world: World) -> None:
    stranger = world.lab.guest("red", 68)
    for target in (_PATH, f"http://169.254.169.254{_PATH}?x=1"):
        assert stranger.ask(target).status == 404


def test_other_methods_are_refused(world: World) -> None:
    assert world.red.ask(_PATH, method="BREW").status == 405
