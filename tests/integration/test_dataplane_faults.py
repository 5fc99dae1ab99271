"""Full disks, read-only directories, damaged stores, jumping clocks: guests read on, operators are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.errors import ImdsproxyError
from support.daemon import Daemon, instance, user_data_of
from support.guest import IPV6, Load
from support.lab import until
from support.patience import patience
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_CLOCK: Final = Path(__file__).parents[1] / "support" / "jumping_clock.py"
_TARGET: Final = "/latest/user-data"
_FRESH: Final = "/openstack/latest/meta_data.json"
_SETTINGS: Final[dict[str, dict[str, object]]] = {"resolver": {"hold_s": 1.0}}


def _mount(path: Path, *options: str) -> None:
    path.mkdir(mode=0o755, exist_ok=True)
    words = ("/usr/bin/mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path))
    subprocess.run(words, check=True)


def _remount(path: Path, how: str) -> None:
    subprocess.run(("/usr/bin/mount", "-o", f"remount,{how}", str(path)), check=True)


def _small_disks(daemon: Daemon) -> None:
    _mount(daemon.state, "size=4m", "mode=0755")
    _mount(daemon.runtime, "size=4m", "mode=0755")


@pytest.fixture(scope="module")
def world_on_small_disks() -> Iterator[World]:
    with open_world(_SETTINGS, prepare=_small_disks) as world:
        yield world


@pytest.fixture
def small_world(world_on_small_disks: World) -> Iterator[World]:
    yield world_on_small_disks
    daemon = world_on_small_disks.daemon
    for place in (daemon.state, daemon.runtime):
        _remount(place, "rw")
        (place / "ballast").unlink(missing_ok=True)
    until(lambda: daemon.status()["readiness"]["ready"], within_s=12, what="being ready again")
    world_on_small_disks.heal()


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


def _refused_words(world: World, text: str) -> str:
    """Try a change; what the daemon says against it, at once or in its status."""
    try:
        answer = world.daemon.put(instances=[{**instance("red-5", "red"), "user_data": text}])
    except ImdsproxyError as error:
        return str(error)
    assert not answer["applied"], "the change was acknowledged"
    reasons = world.daemon.status()["readiness"]["reasons"]
    return " ".join([*answer["pending"], *reasons])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["state", "runtime"])
def test_a_full_disk_stops_changes_and_no_guest(small_world: World, place: str) -> None:
    world = small_world
    directory = world.daemon.state if place == "state" else world.daemon.runtime
    with Load(world.everybody, _TARGET, own) as load:
        load.wait_answers(20)
        ballast = _fill(directory)
        words = _refused_words(world, "x" * 100_000)
        assert "space" in words.lower() or "full" in words.lower(), words
        assert world.guests["green"].ask(_FRESH).status == 200
        load.wait_answers(20)
        ballast.unlink()
    assert [one for one in load.report.lost if "red" not in one] == []
    # Whatever became of the refused change: the next one is in force, and all is well again.
    until(lambda: _put(world, "room again"), within_s=12, what="a change after there is room")
    assert world.red.ask(_TARGET).text == "room again"
    until(lambda: world.daemon.status()["readiness"]["ready"], within_s=12)


def _told(world: World) -> str:
    """What status says that is wrong, hints included."""
    status = world.daemon.status()
    problems = [
        *status["problems"],
        *(one for source in status["sources"] for one in source["problems"]),
    ]
    reasons = [f"{one['reason']} {one['hint']} {one['file']}" for one in problems]
    return " ".join([*status["readiness"]["reasons"], *reasons])


def _put(world: World, text: str) -> bool:
    try:
        return bool(
            world.daemon.put(instances=[{**instance("red-5", "red"), "user_data": text}])["applied"]
        )
    except ImdsproxyError:
        return False


def test_a_full_disk_at_start_leaves_what_runs_alone(small_world: World) -> None:
    world = small_world
    ballast = _fill(world.daemon.state)
    world.daemon.kill_controller()
    world.daemon.start(ready=False)
    world.all_right()
    ballast.unlink()
    world.daemon.wait_ready()


@pytest.mark.slow
def test_a_read_only_state_directory_stops_changes_and_no_guest(small_world: World) -> None:
    world = small_world
    with Load(world.everybody, _TARGET, own) as load:
        load.wait_answers(20)
        # What is open for writing keeps a file system from being made read-only.
        world.daemon.kill_controller()
        _remount(world.daemon.state, "ro")
        world.daemon.start(ready=False)
        told = _told(world)
        assert "read-only" in told.lower(), told
        assert "writable" in told, told
        _refused_words(world, "read-only")
        assert world.guests["green"].ask(_FRESH).status == 200
        load.wait_answers(20)
        _remount(world.daemon.state, "rw")
    assert load.report.lost == []
    until(lambda: _put(world, "writable again"), within_s=12)


def _damage(store: Path) -> None:
    for path in store.parent.glob(f"{store.name}-*"):
        path.unlink()
    store.write_bytes(b"SQLite format 3\0" + b"\xa5" * 20_000)


@pytest.mark.slow
def test_a_damaged_store_at_start_leaves_what_runs_alone_and_says_who_must_act() -> None:
    with open_world(_SETTINGS) as world:
        before = world.pids()
        store = world.daemon.state / "store.sqlite"
        world.daemon.kill_controller()
        kept = {path: path.read_bytes() for path in store.parent.glob("store.sqlite*")}
        _damage(store)
        world.daemon.start(ready=False)
        for _ in range(3):
            world.all_right()
            assert world.red.ask(_FRESH).status == 200
        assert world.pids().master == before.master
        told = _told(world)
        assert "store.sqlite" in told, told
        assert "sqlite is not in sync" in told
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


@pytest.mark.slow
def test_a_damaged_record_is_503_for_its_own_instance_only() -> None:
    with open_world(_SETTINGS) as world:
        world.daemon.kill_controller()
        (file,) = (
            one
            for one in (world.daemon.state / "documents").rglob("*")
            if one.is_file() and user_data_of("red-5") in one.read_bytes()
        )
        kept = file.read_bytes()
        file.write_bytes(kept[: len(kept) // 2])
        reply = world.red.ask(_FRESH)
        assert reply.status == 503
        assert reply.headers["retry-after"]
        for name in ("green", "blue", "grey"):
            assert world.guests[name].ask(_FRESH).status == 200
        # The next controller makes it whole.
        world.daemon.start()
        until(lambda: world.red.ask(_FRESH).status == 200, within_s=3)


def _jumping(daemon: Daemon) -> None:
    file = daemon.directory / "clock"
    file.write_text("0")
    daemon.program = (sys.executable, str(_CLOCK))
    daemon.environment = {
        "IMDST_CLOCK": str(file),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


@pytest.mark.slow
def test_a_clock_that_jumps_changes_no_answer_and_no_wait() -> None:
    with open_world({"resolver": {"hold_s": 1.0, "learned_ttl_s": 1}}, prepare=_jumping) as world:
        stranger = world.lab.guest("red", 81)
        private = world.lab.guest("red", 82, privacy="fe80::5eed:3")
        world.daemon.put(instances=[instance("red-82", "red", 82)])
        for number, offset in enumerate((1e9, -1e9, 0.0, 3600.0)):
            (world.daemon.directory / "clock").write_text(str(offset))
            status = world.daemon.status()
            assert abs(status["started_at"] - time.time()) < 1e10
            world.all_right()
            text = f"{number}"
            started = time.monotonic()
            world.daemon.put(instances=[{**instance("red-82", "red", 82), "user_data": text}])
            assert time.monotonic() - started < 1 * patience()
            assert private.ask(_TARGET).text == text
            started = time.monotonic()
            assert stranger.ask(_TARGET).status == 404
            assert 1 <= time.monotonic() - started < 1 + 1 * patience()
            reply = private.ask(_TARGET, to=IPV6, source="fe80::5eed:3")
            assert reply.text == text
            world.reload()
            master = world.settled().master
            os.kill(master, signal.SIGKILL)
            until(partial(world.has_other_master, master), within_s=3)
            assert own(world.red, world.red.ask(_TARGET)) is None
        (world.daemon.directory / "clock").write_text("0")
