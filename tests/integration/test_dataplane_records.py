"""Records: acknowledged means in force, on disk and in every worker, whatever happens next."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.core.haproxy.maps import COMPACT_ABOVE
from support.daemon import alive, instance, user_data_of
from support.guest import Load
from support.lab import ip, until, within
from support.patience import patience
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_KEY: Final = "red/10.0.0.5"


def _without_ports(name: str) -> dict[str, object]:
    return {**instance(name, "red"), "ports": []}


def _move(world: World, number: int) -> str:
    """Give red's address to the other of two instances; whose it is now."""
    owner, other = ("move-a", "move-b") if number % 2 else ("move-b", "move-a")
    world.daemon.put(instances=[_without_ports(other), instance(owner, "red")])
    return owner


@pytest.fixture
def movable(world: World) -> World:
    """Red's address belongs to nobody but what `_move` says."""
    world.daemon.remove_instance("red-5")
    return world


def test_a_removed_instance_is_unknown_right_after_it_was_acknowledged(world: World) -> None:
    with world.red.connect() as connection:
        for _ in range(2):
            world.daemon.put(instances=[instance("red-5", "red")])
            assert own(world.red, connection.request("/latest/user-data")) is None
            world.daemon.remove_instance("red-5")
            assert connection.request("/latest/user-data").status == 404


def _start_again_from_disk(world: World, master: int) -> subprocess.Popen[bytes]:
    """End HAProxy and start it as a service manager would: the same words, nothing else."""
    words = Path(f"/proc/{master}/cmdline").read_bytes().decode().split("\0")[:-1]
    worker = world.pids().worker
    os.kill(world.pids().controller, signal.SIGSTOP)
    for pid in (worker, master):
        # Each takes the other with it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(master) and not alive(worker), what="HAProxy's end")
    return subprocess.Popen(
        (*within(world.lab.host), *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_a_haproxy_that_starts_by_itself_knows_what_was_acknowledged(movable: World) -> None:
    for number in (0, 1):
        owner = _move(movable, number)
        kept = movable.settled()
        other = _start_again_from_disk(movable, kept.master)
        until(movable.red.reaches, what="HAProxy's return")
        reply = movable.red.ask("/latest/user-data")
        assert reply.body == user_data_of(owner)
        assert (
            own(movable.guests["green"], movable.guests["green"].ask("/latest/user-data")) is None
        )
        other.terminate()
        other.wait()
        os.kill(kept.controller, signal.SIGCONT)
        movable.daemon.wait_ready()


@pytest.mark.slow
def test_a_worker_that_somebody_else_reloaded_is_kept_up_to_date(movable: World) -> None:
    for number in range(6):
        os.kill(movable.pids().master, signal.SIGUSR2)
        owner = _move(movable, number)
        assert movable.red.ask("/latest/user-data").body == user_data_of(owner)


def _many(first: int, number: int) -> list[dict[str, object]]:
    return [
        {
            "id": f"many-{index}",
            "name": f"many-{index}",
            "ports": [{"network": "red", "addresses": [_address(index)]}],
            "user_data": user_data_of(f"many-{index}").decode(),
        }
        for index in range(first, first + number)
    ]


def _address(index: int) -> str:
    return f"10.0.{16 + index // 250}.{1 + index % 250}"


@pytest.mark.slow
def test_every_answer_stays_right_while_the_overlay_is_folded_into_the_base() -> None:
    # A world of its own: it would take long to take so many instances away one by one.
    with open_world() as world:
        _fold(world)


def _fold(world: World) -> None:
    total = COMPACT_ABOVE + 300
    sample = [0, 1, 250, COMPACT_ABOVE - 1, COMPACT_ABOVE, total - 1]
    for index in sample:
        ip("-n", world.red.namespace, "address", "add", f"{_address(index)}/32", "dev", "eth0")
    ip("-n", world.lab.name("red"), "route", "add", "10.0.16.0/20", "dev", "br0")
    generation = int(world.daemon.map_on_disk().generation)
    with Load(world.everybody, "/latest/user-data", own) as load:
        for first in range(0, total, 100):
            world.daemon.put(instances=_many(first, min(100, total - first)))
            for index in sample:
                reply = (
                    world.red.ask("/latest/user-data", source=_address(index))
                    if index < first + 100
                    else None
                )
                assert reply is None or reply.body == user_data_of(f"many-{index}")
        assert int(world.daemon.map_on_disk().generation) > generation
        # What went is gone from the base too, and others may take its place.
        world.daemon.remove_instance("many-0")
        taken = {**_many(1, 1)[0], "ports": [{"network": "red", "addresses": [_address(0)]}]}
        world.daemon.put(instances=[taken])
        reply = world.red.ask("/latest/user-data", source=_address(0))
        assert reply.body == user_data_of("many-1")
        assert world.red.ask("/latest/user-data", source=_address(1)).status == 404
    assert load.report.lost == []


def test_an_acknowledged_change_takes_milliseconds(world: World) -> None:
    took = []
    for number in range(20):
        text = f"{number}"
        started = time.monotonic()
        world.daemon.put(instances=[{**instance("red-5", "red"), "user_data": text}])
        took.append(time.monotonic() - started)
        assert world.red.ask("/latest/user-data").text == text
    assert sorted(took)[10] < 0.2 * patience()
