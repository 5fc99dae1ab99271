"""A host in front of Nova alone, without a document server."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from support.daemon import Daemon, alive, instance
from support.lab import until
from support.nova_world import NovaWorld, open_nova_world

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[NovaWorld]:
    with open_nova_world() as world:
        yield world


def _without_documents(world: NovaWorld) -> Daemon:
    settings = world.settings([{"url": world.nova.url}])
    world.daemon.configure({**settings, "documents": {"supervisor": "spawn", "enabled": False}})
    return world.daemon


@pytest.mark.slow
def test_a_document_server_that_is_not_needed_any_more_ends_and_guests_of_nova_notice_nothing(
    world: NovaWorld,
) -> None:
    world.daemon.kill_controller(signal.SIGTERM)
    world.daemon.configure(world.settings([{"url": world.nova.url}]))
    world.daemon.start()
    until(lambda: world.daemon.status()["documents"]["pids"])
    before = world.daemon.pids()
    world.daemon.kill_controller(signal.SIGTERM)
    daemon = _without_documents(world)
    daemon.start()
    until(lambda: not any(map(alive, (before.documents, *before.document_workers))))
    status = daemon.status()
    assert status["documents"] == {"pids": [], "problem": "", "needed": False}
    assert status["haproxy"]["master"] == before.master
    assert world.red.ask("/latest/meta-data/").status == 200
    # Names the setting, and asks for nobody's help.
    assert status["readiness"]["ready"], status["readiness"]
    daemon.kill_controller(signal.SIGTERM)
    daemon.start()
    assert daemon.status()["documents"]["pids"] == []
    assert world.red.ask("/latest/meta-data/").status == 200


def test_an_instance_whose_documents_would_be_ours_is_told_and_gets_503(world: NovaWorld) -> None:
    if world.daemon.status()["documents"]["needed"]:
        world.daemon.kill_controller(signal.SIGTERM)
        _without_documents(world).start()
    ours = instance("ours", "green", 9)
    guest = world.lab.guest("green", 9)
    world.daemon.put((), [ours])
    try:
        assert world.green.ask("/latest/meta-data/").status == 200
        assert guest.ask("/latest/meta-data/").status == 503
        problems = world.daemon.status()["problems"]
        assert [problem["field"] for problem in problems] == ["documents.enabled"]
    finally:
        world.daemon.command("instance", "remove", "ours")
        world.lab.remove_guest(guest)
    assert world.daemon.status()["readiness"]["ready"]
