"""Full disks, read-only directories, damaged stores: guests read on, operators are told."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.errors import ImdsproxyError
from support.daemon import Daemon, instance
from support.guest import Load
from support.lab import until
from support.world import World, open_world, own

pytestmark = [pytest.mark.root, pytest.mark.slow]

_TARGET: Final = "/latest/user-data"
_FRESH: Final = "/openstack/latest/meta_data.json"
_SETTINGS: Final[dict[str, dict[str, object]]] = {"resolver": {"hold_s": 1.0}}


def _mount(path: Path, options: str) -> None:
    words = ("/usr/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path))
    subprocess.run(words, check=True)


def _small_disks(daemon: Daemon) -> None:
    for place in (daemon.state, daemon.runtime):
        place.mkdir()
        _mount(place, "size=4m,mode=0755")


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with open_world(_SETTINGS, prepare=_small_disks) as world:
        yield world


@pytest.fixture
def small_world(shared_world: World) -> Iterator[World]:
    yield shared_world
    daemon = shared_world.daemon
    _mount(daemon.state, "remount,rw")
    for place in (daemon.state, daemon.runtime):
        (place / "ballast").unlink(missing_ok=True)
    until(lambda: daemon.status()["readiness"]["ready"], within_s=12, what="being ready again")
    shared_world.heal()


def _fill(directory: Path) -> Path:
    """Leave no byte free."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = 65_536
        while size:
            try:
                if file.write(bytes(size)) < size:
                    size //= 2
            except OSError:
                size //= 2
    return ballast


def _put(world: World, text: str) -> str:
    """Try a change; what the daemon says against it, at once or in its status."""
    try:
        answer = world.daemon.put(instances=[{**instance("red-5", "red"), "user_data": text}])
    except ImdsproxyError as error:
        return str(error)
    if answer["applied"]:
        return ""
    return " ".join([*answer["pending"], *world.daemon.status()["readiness"]["reasons"], "pending"])


def _told(world: World) -> str:
    """What status says that is wrong, hints included."""
    status = world.daemon.status()
    problems = [
        *status["problems"],
        *(one for source in status["sources"] for one in source["problems"]),
    ]
    reasons = [f"{one['reason']} {one['hint']} {one['file']}" for one in problems]
    return " ".join([*status["readiness"]["reasons"], *reasons])


@pytest.mark.parametrize("place", ["state", "runtime"])
def test_a_full_disk_stops_changes_and_no_guest(small_world: World, place: str) -> None:
    world = small_world
    with Load(world.everybody, _TARGET, own) as load:
        load.wait_answers(20)
        ballast = _fill(world.daemon.state if place == "state" else world.daemon.runtime)
        words = _put(world, "x" * 100_000)
        assert "space" in words.lower() or "full" in words.lower(), words
        assert world.guests["green"].ask(_FRESH).status == 200
        if place == "state":
            # Nor does a start change what runs.
            world.daemon.kill_controller()
            world.daemon.start(ready=False)
        load.wait_answers(20)
        ballast.unlink()
    assert [one for one in load.report.lost if "red" not in one] == []
    # Whatever became of the refused change: the next one is in force, and all is well again.
    until(lambda: not _put(world, "room again"), within_s=12, what="a change after there is room")
    assert world.red.ask(_TARGET).text == "room again"
    until(lambda: world.daemon.status()["readiness"]["ready"], within_s=12)


def test_a_read_only_state_directory_stops_changes_and_no_guest(small_world: World) -> None:
    world = small_world
    with Load(world.everybody, _TARGET, own) as load:
        load.wait_answers(20)
        # What is open for writing keeps a file system from being made read-only.
        world.daemon.kill_controller()
        _mount(world.daemon.state, "remount,ro")
        world.daemon.start(ready=False)
        told = _told(world)
        assert ("read-only" in told.lower(), "writable" in told) == (True, True), told
        assert _put(world, "read-only")
        assert world.guests["green"].ask(_FRESH).status == 200
        load.wait_answers(20)
        _mount(world.daemon.state, "remount,rw")
    assert load.report.lost == []
    until(lambda: not _put(world, "writable again"), within_s=12)


def test_a_damaged_store_at_start_leaves_what_runs_alone_and_says_who_must_act() -> None:
    with open_world(_SETTINGS) as world:
        before = world.pids()
        store = world.daemon.state / "store.sqlite"
        world.daemon.kill_controller()
        kept = {path: path.read_bytes() for path in store.parent.glob("store.sqlite*")}
        for path in kept:
            path.unlink()
        store.write_bytes(b"SQLite format 3\0" + b"\xa5" * 20_000)
        world.daemon.start(ready=False)
        for _ in range(3):
            world.all_right()
            assert world.red.ask(_FRESH).status == 200
        assert world.pids().master == before.master
        told = _told(world)
        assert ("store.sqlite" in told, "sqlite is not in sync" in told) == (True, True), told
        # Unknown may mean unread: nobody is told that he does not exist.
        stranger = world.lab.guest("red", 80)
        assert stranger.ask(_TARGET).status == 503
        # HAProxy may even be started anew meanwhile.
        os.kill(before.master, signal.SIGKILL)
        until(lambda: world.has_other_master(before.master), within_s=3)
        world.all_right()
        # The operator puts the store back.
        world.daemon.kill_controller()
        for path in store.parent.glob("store.sqlite*"):
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)
        world.daemon.start()
        world.all_right()
