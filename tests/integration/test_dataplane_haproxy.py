"""HAProxy's own life: unprivileged, supervised, reloaded, and never run with what it refuses."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon, Pids, alive, instance
from support.guest import IPV4, IPV6, Load
from support.lab import NETNS, SERVER, batch, until
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
    assert int(status["CapEff"], 16) == 0
    assert int(status["CapPrm"], 16) == 0
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
    assert kept.report.lost == []
    assert new.report.lost == []
    assert min(kept.report.answered, new.report.answered) > 200
    assert world.pids().master == master
    assert world.daemon.status()["haproxy"]["reloads"] == before + 20


def _have_ended(pids: Pids) -> bool:
    return not alive(pids.worker) and not alive(pids.master)


def _back_within(world: World, seconds: float) -> float:
    return until(
        lambda: all(map(reads_own, world.everybody)), within_s=seconds, what="service again"
    )


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
        until(lambda: not world.daemon.left_out(), within_s=1)
    logged = world.daemon.log_entries()[before:]
    assert not [one for one in logged if one["message"] == "foreign listener"]


@pytest.mark.slow
def test_a_worker_that_hangs_is_noticed_and_replaced(world: World) -> None:
    before = world.settled()
    started = time.monotonic()
    os.kill(before.worker, signal.SIGSTOP)
    until(
        lambda: (
            any("does not answer" in one for one in _reasons(world))
            or world.daemon.status()["haproxy"]["master"] != before.master
        ),
        within_s=_NOTICED_WITHIN_S,
        what="the notice",
    )
    _back_within(world, 2 + _NOTICED_WITHIN_S)
    assert time.monotonic() - started < (2 + _NOTICED_WITHIN_S) * patience()
    assert not alive(before.worker)


def _reasons(world: World) -> list[str]:
    return list(world.daemon.status()["readiness"]["reasons"])


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
    until(lambda: "green" in world.daemon.left_out(), within_s=1)
    assert world.daemon.left_out()["green"]["code"] == "namespace-missing"


@pytest.fixture
def settings_restored(world: World) -> Iterator[World]:
    yield world
    world.daemon.reconfigure(_HOLD)


@pytest.mark.slow
def test_a_configuration_that_haproxy_refuses_never_replaces_a_good_one(
    settings_restored: World,
) -> None:
    world = settings_restored
    before = world.settled()
    config = world.daemon.runtime / "haproxy.cfg"
    good = config.read_text()
    with Load(world.everybody, _TARGET, own) as load:
        load.wait_answers(20)
        world.daemon.configure({**_HOLD, "haproxy": {"user": "nobody-of-that-name"}})
        world.daemon.command("reload")
        until(lambda: any("cannot find user" in one for one in _reasons(world)), within_s=3)
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
    nsenter --net={namespace} -- {python} -c '{program}' {address} "" 0 0 taken \\
      >"{here}/taken" 2>/dev/null </dev/null &
    echo $! >"{here}/taker"
    until grep -q ready "{here}/taken"; do sleep 0.01; done
  fi;;
esac
exec /usr/sbin/haproxy "$@"
"""


def _race(daemon: Daemon) -> None:
    program = daemon.directory / "haproxy"
    program.write_text(
        _RACING.format(
            here=daemon.directory,
            namespace=NETNS / daemon.lab.name("raced"),
            python=sys.executable,
            program=SERVER,
            address=IPV4,
        )
    )
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
            until(lambda: "raced" in world.daemon.left_out(), within_s=1)
            taker = int((world.daemon.directory / "taker").read_text())
            assert f"pid {taker}" in world.daemon.left_out()["raced"]["reason"]
            assert own(guest, guest.ask(_TARGET, to=IPV6)) is None
            load.wait_answers(20)
            os.kill(taker, signal.SIGKILL)
            until(lambda: reads_own(guest), within_s=1)
        assert load.report.lost == []
        assert world.settled().master == before.master
        rejected = (world.daemon.runtime / "haproxy.cfg.rejected").read_text()
        assert "raced" in rejected


def test_an_exporter_whose_port_is_taken_keeps_no_network_from_being_served(
    settings_restored: World,
) -> None:
    world = settings_restored
    batch(world.lab.host, ["address add 127.0.0.9/32 dev lo"])
    intruder = world.lab.intrude(world.lab.host, "127.0.0.9", reuse_port=False)
    with Load(world.everybody, _TARGET, own) as load:
        load.wait_answers(20)
        world.daemon.configure({**_HOLD, "metrics": {"haproxy_listen": "127.0.0.9:80"}})
        world.daemon.command("reload")
        until(lambda: "127.0.0.9" in str(world.daemon.status()["last_plan"]["failed"]), within_s=3)
        world.reload()
        assert world.daemon.status()["serving"] == len(world.networks) + 1
        load.wait_answers(20)
        intruder.stop()
        config = world.daemon.runtime / "haproxy.cfg"
        until(lambda: "127.0.0.9:80" in config.read_text(), within_s=8)
        load.wait_answers(20)
    assert load.report.lost == []


def test_nothing_of_an_old_worker_is_left_after_its_connections_are_done(world: World) -> None:
    with world.red.connect() as held:
        assert own(world.red, held.request(_TARGET)) is None
        world.reload()
        world.reload()
    until(lambda: not world.daemon.status()["haproxy"]["old_workers"], within_s=7)
    workers = [
        one for one in world.daemon.processes().values() if one.split()[0].endswith("/haproxy")
    ]
    assert len(workers) == 2
