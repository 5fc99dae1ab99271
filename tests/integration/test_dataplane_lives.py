"""Three processes, three lives: what guests notice when one of them ends, hangs or is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Final, Self

import pytest

from imdsproxy.errors import ImdsproxyError
from support.daemon import alive, instance, user_data_of
from support.guest import Guest, Load, Reply
from support.lab import until
from support.world import World, open_world, own, own_name

pytestmark = pytest.mark.root

_CACHED: Final = "/latest/user-data"
_FRESH: Final = "/openstack/latest/meta_data.json"
"""Never cached, so each answer is the document server's."""


def _own_name(guest: Guest, reply: Reply) -> str | None:
    """What is wrong with an answer to `_FRESH`."""
    if reply.status == 200 and json.loads(reply.body)["name"] == own_name(guest):
        return None
    return f"{guest.name} got {reply.status} {reply.body[:80]!r}"


class _Loads:
    """Guests that read cached and fresh documents, on kept connections and on new ones."""

    def __init__(self, world: World) -> None:
        guests = [world.red, world.guests["blue"]]
        self.loads = [
            Load(guests, _CACHED, own),
            Load(guests, _CACHED, own, keep_alive=False, pause_s=0.005),
            Load(guests, _FRESH, _own_name, pause_s=0.005),
        ]

    def __enter__(self) -> Self:
        for load in self.loads:
            load.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for load in self.loads:
            load.__exit__()

    def go_on(self) -> None:
        """Wait until each of them has had some more answers."""
        for load in self.loads:
            load.wait_answers(20)

    @property
    def lost(self) -> list[str]:
        return [one for load in self.loads for one in load.report.lost]


def _documents_below(guest: Guest, directory: str) -> Iterator[tuple[str, Reply]]:
    """Every document that a listing leads to."""
    listing = guest.ask(directory)
    assert listing.status == 200, directory
    for line in listing.text.splitlines():
        name = line.partition("=")[0] + "/" if "=" in line else line
        path = directory + name
        if name.endswith("/"):
            yield from _documents_below(guest, path)
        else:
            yield path, guest.ask(path)


_OPENSTACK: Final = (
    "meta_data.json",
    "network_data.json",
    "user_data",
    "vendor_data.json",
    "vendor_data2.json",
)


def _every_document(guest: Guest) -> dict[str, Reply]:
    found = dict(_documents_below(guest, "/latest/meta-data/"))
    targets = [_CACHED, "/latest/dynamic/", "/"]
    targets += [f"/openstack/latest/{name}" for name in _OPENSTACK]
    targets += [f"/openstack/2018-08-27/{name}" for name in _OPENSTACK]
    targets += [
        f"/nocloud/{name}" for name in ("meta-data", "user-data", "vendor-data", "network-config")
    ]
    return found | {target: guest.ask(target) for target in targets}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_a_controller_a_known_instance_reads_every_document_for_the_first_time(
    world: World, number: signal.Signals
) -> None:
    guest = world.lab.guest("red", 70)
    other = world.lab.guest("red", 71)
    fields: dict[str, object] = {
        "tags": {"role": "web"},
        "ssh_keys": [
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0000000000000000000000000000000000000000000 a@b"
        ],
        "availability_zone": "z",
        "instance_type": "m1",
        "vendor_data": {"a": "b"},
    }
    records = [instance(f"red-{one}", "red", one, fields=fields) for one in (70, 71)]
    world.daemon.put(instances=records)
    before = _every_document(other)
    if number == signal.SIGSTOP:
        os.kill(world.pids().controller, number)
    else:
        world.daemon.kill_controller(number)
    after = _every_document(guest)
    macs = (guest.mac, other.mac)
    assert {target.replace(*macs) for target in after} == set(before)
    assert len(after) > 30
    assert {reply.status for reply in after.values()} == {200}
    assert after[_CACHED].body == user_data_of("red-70")
    assert json.loads(after[_FRESH].body)["name"] == "red-70"
    world.all_right()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_controller_that_ends_and_the_next_lose_no_request_and_keep_haproxy(
    world: World, number: signal.Signals
) -> None:
    before = world.settled()
    with _Loads(world) as loads:
        loads.go_on()
        if number == signal.SIGKILL:
            os.killpg(before.controller, number)
        world.daemon.kill_controller(number)
        loads.go_on()
        world.daemon.start()
        loads.go_on()
        # The next one is in charge: what it is told is in force.
        world.daemon.put(instances=[{**instance("green-5", "green"), "user_data": "next"}])
        assert world.guests["green"].ask(_CACHED).text == "next"
        loads.go_on()
    assert loads.lost == []
    after = world.settled()
    assert after.controller != before.controller
    assert after.master == before.master
    assert (after.documents, set(after.document_workers)) == (
        before.documents,
        set(before.document_workers),
    )


class _Changes:
    """Changes red's user-data to ever greater numbers until the controller is gone."""

    def __init__(self, world: World, first: int) -> None:
        self._world = world
        self.acknowledged = first
        self._thread = threading.Thread(target=self._run, name="changes")
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(ImdsproxyError):
            while True:
                text = str(self.acknowledged + 1)
                record = {**instance("red-5", "red"), "user_data": text}
                if self._world.daemon.put(instances=[record])["applied"]:
                    self.acknowledged += 1

    def join(self) -> None:
        self._thread.join()


def test_what_was_acknowledged_survives_a_kill_at_any_moment(world: World) -> None:
    for first in (1000, 2000, 3000):
        changes = _Changes(world, first)
        until(partial(_has_more_than, changes, first + 3), what="some changes")
        world.daemon.kill_controller()
        changes.join()
        known = changes.acknowledged
        assert known <= int(world.red.ask(_CACHED).text) <= known + 1
        world.daemon.start()
        until(lambda: world.daemon.status()["instances"] == len(world.instances))
        assert known <= int(world.red.ask(_CACHED).text) <= known + 1
        assert world.daemon.explain("red", "10.0.0.5")["instance"] == "red-5"


def _has_more_than(changes: _Changes, number: int) -> bool:
    return changes.acknowledged > number


def test_a_second_controller_refuses_to_start(world: World) -> None:
    done = world.daemon.command("run")
    assert done.status != 0
    assert "another" in done.err
    world.all_right()
    assert world.pids().controller == world.daemon.pids().controller


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "number"),
    [
        ("document_workers", signal.SIGKILL),
        ("document_workers", signal.SIGSTOP),
        ("documents", signal.SIGSTOP),
    ],
)
def test_a_process_of_the_document_server_that_ends_or_hangs_is_replaced_and_no_request_lost(
    world: World, which: str, number: signal.Signals
) -> None:
    before = world.settled()
    gone = {before.documents, *before.document_workers}
    if which == "document_workers":
        gone = {before.document_workers[0]}

    def is_replaced() -> bool:
        now = world.pids()
        return len(now.document_workers) == 2 and not gone & {now.documents, *now.document_workers}

    with _Loads(world) as loads:
        loads.go_on()
        os.kill(before.documents if which == "documents" else before.document_workers[0], number)
        until(is_replaced, what="another process")
        until(lambda: not any(map(alive, gone)), what="the end of the old ones")
        loads.go_on()
    assert loads.lost == []


@pytest.mark.slow
def test_a_master_of_haproxy_that_hangs_is_replaced(world: World) -> None:
    master = world.settled().master
    with _Loads(world) as loads:
        os.kill(master, signal.SIGSTOP)
        loads.go_on()
    assert loads.lost == []
    until(lambda: world.has_other_master(master), what="another master")
    world.settled()
    world.all_right()


def test_a_killed_document_server_is_started_again(world: World) -> None:
    before = world.settled()
    os.kill(before.documents, signal.SIGKILL)

    def other_is_there() -> bool:
        pids = world.daemon.status()["documents"]["pids"]
        return len(pids) == 3 and before.documents not in pids

    until(other_is_there, within_s=5, what="another document server")
    until(lambda: world.red.ask(_FRESH).status == 200, within_s=5)
    assert world.settled().master == before.master


@pytest.mark.parametrize("how", ["running", "killed"])
def test_stop_with_the_data_plane_ends_everything(how: str) -> None:
    with open_world() as world:
        pids = world.pids()
        if how == "killed":
            world.daemon.kill_controller()
        done = world.daemon.command("stop", "--data-plane")
        assert done.status == 0, done.err
        until(lambda: not world.daemon.processes(), what="the end of everything")
        assert not any(alive(pid) for pid in pids.data_plane)
        assert not world.lab.made_by_daemon()
        assert not [name for name in world.lab.host_links() if name.startswith(world.lab.prefix)]
        assert not world.red.reaches()


@pytest.mark.parametrize("then", ["start", "stop"])
def test_who_empties_the_runtime_directory_leaves_no_process_of_before(then: str) -> None:
    with open_world() as world:
        daemon = world.daemon
        before = world.pids()
        daemon.kill_controller()
        for entry in daemon.runtime.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if then == "start":
            daemon.start()
            world.all_right()
            until(lambda: not any(map(alive, before.data_plane)), what="the end of the old ones")
            assert len(daemon.processes()) == len(
                {*world.pids().data_plane, world.pids().controller}
            )
        done = daemon.command("stop", "--data-plane")
        assert done.status == 0, done.err
        until(lambda: not daemon.processes(), what="the end of everything")


def test_a_controller_whose_files_were_removed_ends_when_haproxy_needs_them_and_the_next_makes_them() -> (
    None
):
    with open_world() as world:
        daemon, process = world.daemon, world.daemon.process
        assert process is not None
        master = world.pids().master
        for entry in daemon.runtime.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        os.kill(master, signal.SIGKILL)
        assert process.wait(30) == 71
        assert "only a start makes them again" in daemon.log.read_text()
        daemon.start()
        world.all_right()


@pytest.mark.slow
def test_a_start_with_the_records_of_the_last_run_serves_them_and_not_what_has_changed_since() -> (
    None
):
    denied = {"networks": {"red": {"paths": {"/latest/user-data": "deny"}}}}
    with open_world({"policy": denied}) as world:
        daemon, (red, green) = world.daemon, (world.red, world.guests["green"])

        def starts_with_them() -> int:
            return sum(
                one["message"] == "records are those of the last run"
                for one in daemon.log_entries()
            )

        until(lambda: red.ask("/latest/user-data").status == 403, what="the path rule")
        daemon.stop()
        # As a reboot does.
        shutil.rmtree(daemon.runtime)
        daemon.process = daemon._started()
        until(red.reaches, what="HAProxy")
        assert red.ask("/latest/user-data").status == 403
        daemon.wait_ready()
        assert all(
            own(one, one.ask("/latest/user-data")) is None for one in world.everybody if one != red
        )
        assert starts_with_them() == 1
        denied["networks"]["green"] = {"paths": {"/latest/meta-data": "deny"}}
        daemon.reconfigure({"policy": denied})
        until(lambda: green.ask("/latest/meta-data/").status == 403, what="another path rule")
        assert red.ask("/latest/user-data").status == 403
        daemon.stop()
        daemon.configure({"policy": {"instances": {"red-5": {"endpoint": False}}}})
        daemon.start()
        assert red.ask("/latest/user-data").status == 403
        assert own(green, green.ask("/latest/user-data")) is None
        assert starts_with_them() == 1
