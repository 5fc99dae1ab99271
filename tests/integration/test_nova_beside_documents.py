"""Instances with documents of ours on a host that is in front of Nova too: the cache stands elsewhere there."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from support.daemon import Daemon
from support.guest import IPV6
from support.lab import RecordMapping
from support.nova_world import SECRET
from support.recorder import Recorder, reply
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_PATH = "/latest/user-data"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Recorder]]:
    secret = tmp_path_factory.mktemp("nova") / "secret"
    secret.write_text(f"{SECRET}\n")
    secret.chmod(0o600)
    with contextlib.ExitStack() as stack:
        novas: list[Recorder] = []

        def prepare(daemon: Daemon) -> None:
            nova = stack.enter_context(Recorder(namespace=daemon.lab.host, secret=SECRET))
            novas.append(nova)
            one = {"endpoints": [{"url": nova.url}], "secret_file": str(secret)}
            # Only what guests ask arrives there.
            sets = {"health_check": "off", "endpoint_sets": {"default": one}}
            daemon.configure({**daemon.settings, "nova": sets})

        world = stack.enter_context(open_world({"resolver": {"hold_s": 1.0}}, prepare=prepare))
        yield world, novas[0]


@pytest.fixture(scope="module")
def shared_world(both: tuple[World, Recorder]) -> World:
    return both[0]


@pytest.fixture
def nova(both: tuple[World, Recorder]) -> Recorder:
    both[1].forget()
    return both[1]


def test_a_guest_of_novas_and_guests_with_documents_read_each_their_own(
    world: World, nova: Recorder
) -> None:
    guest, ident = world.lab.guest("red", 70), "aaaaaaaa-0000-4000-8000-000000000070"
    port = {"network": "red", "mac": guest.mac, "addresses": list(guest.addresses)}
    record: RecordMapping = {
        "id": ident,
        "name": "n",
        "upstream": "nova",
        "project": "p",
        "ports": [port],
    }
    world.daemon.put(instances=[record])
    nova.always(reply(b"nova's"))
    for start in ("", "http://169.254.169.254"):
        for _ in range(3):
            assert guest.ask(f"{start}{_PATH}").body == b"nova's"
            for other in world.everybody:
                assert own(other, other.ask(f"{start}{_PATH}")) is None
    # Nova is asked each time, and for nobody else.
    assert [one.values("x-instance-id") for one in nova.requests] == [(ident.encode(),)] * 6


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
