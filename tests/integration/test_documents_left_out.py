"""A host in front of Nova alone, without a document server."""

from __future__ import annotations

import signal

import pytest

from support.daemon import alive, instance
from support.lab import until
from support.nova_world import open_nova_world

pytestmark = [pytest.mark.root, pytest.mark.slow]


def test_a_document_server_that_is_not_needed_ends_and_an_instance_that_would_need_it_is_told_so() -> (
    None
):
    with open_nova_world() as world:
        daemon, before = world.daemon, world.daemon.pids()
        daemon.kill_controller(signal.SIGTERM)
        documents = {"supervisor": "spawn", "enabled": False}
        daemon.configure({**world.settings([{"url": world.nova.url}]), "documents": documents})
        daemon.start()
        until(lambda: not any(map(alive, (before.documents, *before.document_workers))))
        status = daemon.status()
        assert status["documents"] == {"pids": [], "problem": "", "needed": False}
        assert status["haproxy"]["master"] == before.master
        # Asks for nobody's help.
        assert status["readiness"]["ready"], status["readiness"]
        daemon.kill_controller(signal.SIGTERM)
        daemon.start()
        assert daemon.status()["documents"]["pids"] == []
        guest = world.lab.guest("green", 9)
        daemon.put((), [instance("ours", "green", 9)])
        assert world.red.ask("/latest/meta-data/").status == 200
        assert guest.ask("/latest/meta-data/").status == 503
        assert [one["field"] for one in daemon.status()["problems"]] == ["documents.enabled"]
