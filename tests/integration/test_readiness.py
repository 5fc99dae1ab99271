"""Readiness asks for a document as a guest does: through HAProxy and the document server, off the disk."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.core.compiled import compiled_path
from imdsproxy.core.wire import PROBE_INSTANCE, PROBE_PATH
from support.daemon import Daemon, instance
from support.guest import Load
from support.health import METRICS, ask_operator
from support.lab import Lab, until
from support.world import World, own

pytestmark = pytest.mark.root

_NOTICED_WITHIN_S: Final = 8.0


@pytest.fixture
def closed() -> Iterator[tuple[Lab, Daemon, Path]]:
    """A daemon that is not started yet, its state below a directory that only root can enter."""
    settings: Mapping[str, Mapping[str, object]] = {
        "metrics": METRICS,
        "paths": {"state_dir": "{directory}/closed/state"},
    }
    with closing(Lab()) as lab, closing(Daemon(lab, settings)) as daemon:
        directory = daemon.directory / "closed"
        directory.mkdir(mode=0o700)
        yield lab, daemon, directory


def test_a_state_directory_that_the_document_server_cannot_enter_is_not_ready_and_says_so(
    closed: tuple[Lab, Daemon, Path],
) -> None:
    lab, daemon, directory = closed
    checked = daemon.command("check")
    assert checked.status == 71
    assert f"cannot enter {directory}" in " ".join(checked.out.split())
    network = lab.namespace_network("red")
    guest = lab.guest("red", 5)
    daemon.start(ready=False)
    answer = daemon.put([network], [instance("red-5", "red")])
    assert any(f"cannot enter {directory}" in one for one in answer["pending"])
    assert guest.ask("/latest/user-data").status == 503
    ready = ask_operator(lab, "/readyz")
    assert ready.status == 503
    assert any(f"cannot enter {directory}" in one for one in json.loads(ready.text)["reasons"])
    shown = daemon.command("status", "--check")
    assert shown.status == 1
    assert str(directory) in "".join(shown.out.split())
    explained = daemon.explain("red", "10.0.0.5")
    assert explained["answer"] == 503
    assert any(f"cannot enter {directory}" in one for one in explained["why"])
    directory.chmod(0o711)
    daemon.wait_ready(within_s=_NOTICED_WITHIN_S)
    assert own(guest, guest.ask("/latest/user-data")) is None
    assert daemon.explain("red", "10.0.0.5")["answer"] == 200
    assert "cannot enter" not in daemon.command("check").out


@pytest.mark.slow
def test_records_that_cannot_be_read_any_more_are_noticed_and_read_again_when_they_can(
    world: World,
) -> None:
    records = world.daemon.state / "documents"
    mode = stat.S_IMODE(records.stat().st_mode)
    with Load([world.red], "/latest/user-data", own) as cached:
        cached.wait_answers(20)
        records.chmod(0o700)
        os.chown(records, 0, 0)
        until(
            lambda: not world.daemon.status()["readiness"]["ready"],
            within_s=_NOTICED_WITHIN_S,
            what="not being ready",
        )
        assert f"cannot enter {records}" in world.daemon.command("status").out.replace("\n", " ")
        cached.wait_answers(20)
    world.daemon.kill_controller()
    world.daemon.start()
    world.all_right()
    assert stat.S_IMODE(records.stat().st_mode) == mode


def test_the_probes_record_is_no_guests_and_no_instance(world: World) -> None:
    probe = world.daemon.state / "documents" / compiled_path(PROBE_INSTANCE)
    assert probe.exists()
    sockets = world.daemon.runtime / "probe.sock"
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o600
    own_id = world.daemon.admin.get("/v1/instances/red-5")
    assert world.red.ask(PROBE_PATH).text == own_id["ec2_id"]
    listed = world.daemon.command("instance", "list", "--json").out
    assert PROBE_INSTANCE not in listed
    refused = world.daemon.command("instance", "add", PROBE_INSTANCE, "--name", "probe")
    assert refused.status == 64
    world.daemon.kill_controller()
    world.daemon.start()
    assert probe.exists()
