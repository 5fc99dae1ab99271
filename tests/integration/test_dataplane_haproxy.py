"""HAProxy's own life: unprivileged, supervised, reloaded, never run with what it refuses, and always up to date."""

import contextlib
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon, Pids, alive, instance, user_data_of
from support.guest import IPV4, IPV6, Connection, Guest, Load, Lost, Reply
from support.lab import NETNS, SERVER, until, within
from support.patience import patience
from support.world import World, open_world, own, reads_own

pytestmark = pytest.mark.root

_TARGET: Final = "/latest/user-data"
_HOLD: Final[Mapping[str, Mapping[str, object]]] = {"resolver": {"hold_s": 1.0}}
_NOTICED_WITHIN_S: Final = 5.0


def _status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.partition(":")[0]: line.partition(":")[2].strip() for line in lines}


def test_no_process_that_answers_guests_has_privileges_and_haproxys_is_locked_in(
    world: World,
) -> None:
    world.reload()
    worker = world.settled().worker
    documents = world.pids().document_workers
    for pid in documents:
        assert "0" not in _status_of(pid)["Uid"].split()
        assert int(_status_of(pid)["CapEff"], 16) == 0
    status = _status_of(worker)
    account = pwd.getpwnam("haproxy")
    assert set(status["Uid"].split()) == {str(account.pw_uid)}
    assert set(status["Gid"].split()) == {str(account.pw_gid)}
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert Path(f"/proc/{worker}/root").readlink() == world.daemon.runtime / "jail"
    # Nothing in there but the sockets that it connects to, and its own path, which leads back to it.
    jail = world.daemon.runtime / "jail"
    for entry in jail.rglob("*"):
        if entry.is_symlink():
            assert (str(entry.readlink()), entry) == ("/", jail.joinpath(*jail.parts[1:]))
        else:
            assert entry.is_socket() or entry.is_dir(), entry
            assert entry.is_socket() or entry.stat().st_mode & 0o022 == 0, entry


@pytest.mark.slow
def test_twenty_reloads_lose_no_request(world: World) -> None:
    guests = [world.red, world.guests["blue"]]
    kept = Load(guests, _TARGET, own, connections=2)
    new = Load(guests, _TARGET, own, keep_alive=False)
    master = world.pids().master
    before = world.daemon.status()["haproxy"]["reloads"]
    with kept, new:
        kept.wait_answers(20)
        for _ in range(20):
            world.reload()
        kept.wait_answers(20)
    assert kept.report.lost == new.report.lost == []
    assert min(kept.report.answered, new.report.answered) > 200
    assert world.pids().master == master
    assert world.daemon.status()["haproxy"]["reloads"] == before + 20


def test_nothing_of_an_old_worker_is_left_after_its_connections_are_done(world: World) -> None:
    with world.red.connect() as held:
        assert own(world.red, held.request(_TARGET)) is None
        for _ in range(2):
            world.reload()
            # What it still has bound is nobody else's.
            assert world.daemon.not_served() == {}
    until(lambda: not world.daemon.status()["haproxy"]["old_workers"], within_s=7)
    workers = [
        one for one in world.daemon.processes().values() if one.split()[0].endswith("/haproxy")
    ]
    assert len(workers) == 2


# Ended, hung and full


def _have_ended(pids: Pids) -> bool:
    return not alive(pids.worker) and not alive(pids.master)


def _back_within(world: World, seconds: float) -> None:
    until(lambda: all(map(reads_own, world.everybody)), within_s=seconds, what="service again")


@pytest.mark.slow
def test_a_haproxy_killed_again_and_again_comes_back_each_time(world: World) -> None:
    before = len(world.daemon.log_entries())
    for number in range(6):
        pids = world.settled()
        master = pids.master
        for pid in ((master,), (pids.worker,), (pids.worker, master))[number % 3]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(partial(_have_ended, pids), what="its end")
        _back_within(world, 3)
        until(partial(world.has_other_master, master), within_s=2)
        # And it knows what is reported from now on.
        text = f"after {number}"
        world.daemon.put(instances=[{**instance("red-5", "red"), "user_data": text}])
        assert world.red.ask(_TARGET).text == text
        world.heal()
        # Its new sockets are nobody else's, whenever somebody looked.
        world.lab.furnish(f"look{master}")
        until(lambda: not world.daemon.not_served(), within_s=1)
    logged = world.daemon.log_entries()[before:]
    assert not [one for one in logged if one["message"] == "foreign listener"]


def _reasons(world: World) -> str:
    return " ".join(world.daemon.status()["readiness"]["reasons"])


@pytest.mark.slow
def test_a_worker_that_hangs_is_noticed_and_replaced(world: World) -> None:
    before = world.settled()
    started = time.monotonic()
    os.kill(before.worker, signal.SIGSTOP)
    until(
        lambda: (
            "does not answer" in _reasons(world)
            or world.daemon.status()["haproxy"]["master"] != before.master
        ),
        within_s=_NOTICED_WITHIN_S,
        what="the notice",
    )
    _back_within(world, 2 + _NOTICED_WITHIN_S)
    assert time.monotonic() - started < (2 + _NOTICED_WITHIN_S) * patience()
    assert not alive(before.worker)


def _fill(world: World, stack: contextlib.ExitStack, count: int) -> list[Connection]:
    """Connections of all guests, more than HAProxy may have, until the daemon reports it."""
    guests = world.everybody
    found = [stack.enter_context(guests[one % len(guests)].connect()) for one in range(count)]
    until(lambda: "HAProxy is full" in _reasons(world), within_s=5, what="the report of a full one")
    return found


@pytest.mark.slow
def test_a_haproxy_with_all_its_connections_is_not_taken_for_one_that_hangs_unless_it_does() -> (
    None
):
    with open_world({"haproxy": {"maxconn": 24}}) as world:
        before = world.settled()
        with contextlib.ExitStack() as stack:
            first, *_ = _fill(world, stack, 48)
            reasons = _reasons(world)
            assert ("LimitNOFILE" in reasons, "does not answer" in reasons) == (True, False)
            # HAProxy gives a guest ten seconds to ask something; a hung one is ended after four.
            assert first.read().status == 408
        world.daemon.wait_ready()
        world.all_right()
        assert world.settled() == before
        messages = [one["message"] for one in world.daemon.log_entries()]
        assert messages.count("haproxy is full") == 1
        assert not [one for one in messages if one.startswith(("haproxy does not", "no documents"))]
        with contextlib.ExitStack() as stack:
            _fill(world, stack, 48)
            os.kill(before.worker, signal.SIGSTOP)
            until(lambda: not alive(before.worker), within_s=_NOTICED_WITHIN_S, what="its end")
        until(lambda: world.has_other_master(before.master), within_s=5, what="another HAProxy")
        world.wait_all_right()


# Configurations that it refuses


@pytest.mark.slow
def test_haproxy_comes_back_with_what_is_on_disk_when_the_host_has_changed_meanwhile(
    world: World,
) -> None:
    before = world.settled()
    os.kill(before.controller, signal.SIGSTOP)
    os.kill(before.master, signal.SIGKILL)
    # One missing namespace makes HAProxy refuse the whole file that is on disk.
    world.lab.delete_namespace("green")
    os.kill(before.controller, signal.SIGCONT)
    until(lambda: reads_own(world.red) and reads_own(world.guests["blue"]), within_s=3)
    until(lambda: "green" in world.daemon.not_served(), within_s=1)
    assert world.daemon.not_served()["green"]["code"] == "namespace-missing"


@pytest.mark.slow
def test_a_configuration_that_haproxy_refuses_never_replaces_a_good_one(world: World) -> None:
    before = world.settled()
    config = world.daemon.runtime / "haproxy.cfg"
    good = config.read_text()
    with Load(world.everybody, _TARGET, own) as load:
        load.wait_answers(20)
        world.daemon.configure({**_HOLD, "haproxy": {"user": "nobody-of-that-name"}})
        world.daemon.command("reload")
        until(lambda: "cannot find user" in _reasons(world), within_s=3)
        assert config.read_text() == good
        load.wait_answers(20)
        # HAProxy by itself, from what is on disk, comes up as well.
        os.kill(before.master, signal.SIGUSR2)
        load.wait_answers(50)
    assert load.report.lost == []
    assert world.pids().master == before.master
    rejected = (world.daemon.runtime / "haproxy.cfg.rejected").read_text()
    assert "nobody-of-that-name" in rejected
    # Records go on, and a mended file is taken over.
    world.daemon.put(instances=[{**instance("red-5", "red"), "user_data": "meanwhile"}])
    assert world.red.ask(_TARGET).text == "meanwhile"
    world.daemon.reconfigure(_HOLD)
    until(lambda: world.daemon.status()["readiness"]["ready"], within_s=8)


_RACING: Final = """#!/bin/sh
# HAProxy, but a port is taken right after the check that it is free: `haproxy -c` binds nothing.
case " $* " in *" -c "*)
  if [ -e "{here}/armed" ]; then
    rm "{here}/armed"
    nsenter --net={namespace} -- {python} -c '{program}' {address} "" 0 0 80 taken \\
      >"{here}/taken" 2>/dev/null </dev/null &
    echo $! >"{here}/taker"
    until grep -q ready "{here}/taken"; do sleep 0.01; done
  fi;;
esac
exec /usr/sbin/haproxy "$@"
"""


def _race(daemon: Daemon) -> None:
    program = daemon.directory / "haproxy"
    namespace = NETNS / daemon.lab.name("raced")
    words = {"python": sys.executable, "program": SERVER, "address": IPV4}
    program.write_text(_RACING.format(here=daemon.directory, namespace=namespace, **words))
    program.chmod(0o755)


@pytest.mark.slow
def test_a_port_that_is_taken_between_check_and_load_leaves_only_its_own_network_out() -> None:
    """No worker comes up with that file: the old one goes on, and the host is looked at again."""
    settings = {**_HOLD, "haproxy": {"binary": "{directory}/haproxy"}}
    with open_world(settings, prepare=_race) as world:
        network = world.lab.namespace_network("raced")
        guest = world.lab.guest("raced", 5)
        before = world.settled()
        with Load(world.everybody, _TARGET, own) as load:
            load.wait_answers(20)
            (world.daemon.directory / "armed").touch()
            world.daemon.put([network], [instance("raced-5", "raced")])
            until(lambda: "raced" in world.daemon.not_served(), within_s=1)
            taker = int((world.daemon.directory / "taker").read_text())
            assert f"pid {taker}" in world.daemon.not_served()["raced"]["reason"]
            assert own(guest, guest.ask(_TARGET, to=IPV6)) is None
            load.wait_answers(20)
            os.kill(taker, signal.SIGKILL)
            until(lambda: reads_own(guest), within_s=1)
        assert load.report.lost == []
        assert world.settled().master == before.master
        assert "raced" in (world.daemon.runtime / "haproxy.cfg.rejected").read_text()


# Records: acknowledged means in force, on disk and in every worker, whatever happens next


def _move(world: World, number: int) -> str:
    """Give red's address to the other of two instances; whose it is now."""
    owner, other = ("red-5", "move-b") if number % 2 else ("move-b", "red-5")
    world.daemon.put(instances=[{**instance(other, "red"), "ports": []}, instance(owner, "red")])
    return owner


def _start_again_from_disk(world: World) -> subprocess.Popen[bytes]:
    """End HAProxy and start it as a service manager would: the same words, nothing else."""
    pids = world.settled()
    words = Path(f"/proc/{pids.master}/cmdline").read_bytes().decode().split("\0")[:-1]
    os.kill(pids.controller, signal.SIGSTOP)
    for pid in (pids.worker, pids.master):
        # Each takes the other with it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: _have_ended(pids), what="HAProxy's end")
    return subprocess.Popen(
        (*within(world.lab.host), *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_a_haproxy_that_starts_or_reloads_by_itself_knows_what_was_acknowledged(
    world: World,
) -> None:
    for number in range(4):
        os.kill(world.pids().master, signal.SIGUSR2)
        owner = _move(world, number)
        assert world.red.ask(_TARGET).body == user_data_of(owner)
    controller = world.pids().controller
    other = _start_again_from_disk(world)
    try:
        assert _first_answer(world.red).body == user_data_of(owner)
        assert own(world.guests["green"], _first_answer(world.guests["green"])) is None
    finally:
        other.terminate()
        other.wait()
        os.kill(controller, signal.SIGCONT)
    world.daemon.wait_ready()


def _first_answer(guest: Guest) -> Reply:
    """Of a HAProxy that starts: it may cut off a connection that it got before it was ready."""
    answers: list[Reply] = []

    def ask() -> bool:
        with contextlib.suppress(Lost):
            answers.append(guest.ask(_TARGET))
        return bool(answers)

    until(ask, what="HAProxy's return")
    return answers[0]


def test_a_removed_instance_is_unknown_right_after_it_was_acknowledged(world: World) -> None:
    with world.red.connect() as connection:
        for _ in range(2):
            world.daemon.put(instances=[instance("red-5", "red")])
            assert own(world.red, connection.request(_TARGET)) is None
            world.daemon.remove_instance("red-5")
            assert connection.request(_TARGET).status == 404
