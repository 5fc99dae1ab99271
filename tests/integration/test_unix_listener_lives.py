"""The socket of the listener `unix`: whose it is, who else was there, and what it survives."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.agent_socket import AgentWorld, open_agents, squat
from support.daemon import instance
from support.guest import Load, Lost
from support.lab import until
from support.world import own

pytestmark = pytest.mark.root

_WITHIN_S: Final = 3.0
"""A look a second, and a reload."""

_CONNECT: Final = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
_NOBODY: Final = 65534
_OTHER: Final = 64999


@pytest.fixture(scope="module")
def shared() -> Iterator[AgentWorld]:
    with open_agents() as one:
        yield one


@pytest.fixture
def world(shared: AgentWorld) -> Iterator[AgentWorld]:
    yield shared
    shared.heal()


def _access(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def _may_connect(path: Path, *, user: int, group: int) -> bool:
    """Whether a process of that user and group can connect."""
    done = subprocess.run(
        (
            *("/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"),
            *(sys.executable, "-c", _CONNECT, str(path)),
        ),
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def _left_out(world: AgentWorld, what: str) -> None:
    until(lambda: what in world.problem(), within_s=_WITHIN_S, what=f"the problem {what}")
    assert world.report()["serving"] is False
    until(lambda: not world.daemon.status()["readiness"]["ready"], within_s=_WITHIN_S)
    assert any(what in one for one in world.daemon.status()["readiness"]["reasons"])
    assert world.metric("imdsproxy_unix_listener_serving") == 0


@contextlib.contextmanager
def _others_served(world: AgentWorld) -> Iterator[None]:
    """A network's own listener comes and loses no request meanwhile: nothing keeps it back."""
    network = world.lab.namespace_network("beside")
    guest = world.lab.guest("beside")
    world.daemon.put([network], [instance("beside-5", "beside")])
    try:
        with Load([guest], "/latest/user-data", own) as load:
            load.wait_answers(10)
            yield
            load.wait_answers(10)
        assert load.report.lost == []
    finally:
        world.daemon.remove_instance("beside-5")
        world.daemon.remove_network("beside")
        world.lab.remove_guest(guest)
        world.lab.delete_namespace("beside")


# Mode and owner


@pytest.mark.parametrize(
    ("fields", "access", "members", "strangers"),
    [
        ({}, (0o644, 0, 0), [(0, 0)], [(_NOBODY, 0), (_OTHER, _OTHER)]),
        ({"mode": "user", "user": "nobody"}, (0o644, _NOBODY, 0), [(_NOBODY, _OTHER)], [(_OTHER, 0)]),
        ({"mode": "group", "group": "nogroup"}, (0o664, 0, _NOBODY), [(_OTHER, _NOBODY)], [(_OTHER, _OTHER)]),
        ({"mode": "all"}, (0o666, 0, 0), [(_OTHER, _OTHER)], []),
        ({"proxy_user": "65534", "user": "nobody"}, (0o644, _NOBODY, 0), [(_NOBODY, 0)], [(_OTHER, 0)]),
        ({"proxy_user": "nobody"}, (0o664, 0, 0), [(_NOBODY, 0)], [(_NOBODY, _OTHER)]),
        ({"proxy_user": str(_OTHER), "proxy_group": str(_OTHER)}, (0o666, 0, 0), [(_OTHER, _OTHER)], []),
    ],
    ids=str,
)  # fmt: skip
def test_who_may_connect_is_as_the_settings_say(
    world: AgentWorld,
    fields: dict[str, object],
    access: tuple[int, int, int],
    members: list[tuple[int, int]],
    strangers: list[tuple[int, int]],
) -> None:
    # HAProxy hands its socket on with the mode and owner of before.
    world.take_over(**fields)
    assert _access(world.path) == access
    for user, group in members:
        assert _may_connect(world.path, user=user, group=group)
    for user, group in strangers:
        assert not _may_connect(world.path, user=user, group=group)
    mode, user, group = access
    report = world.report()
    assert (report["mode"], report["user"], report["group"]) == (f"{mode:04o}", user, group)
    assert world.socket.serves()


def test_mode_and_owner_survive_reload_restart_and_kill(world: AgentWorld) -> None:
    expected = (0o664, _NOBODY, _NOBODY)
    world.take_over(mode="group", user="nobody", group="nogroup")
    assert _access(world.path) == expected
    world.daemon.put([world.lab.namespace_network("more")])
    world.daemon.remove_network("more")
    assert _access(world.path) == expected
    master = world.daemon.pids().master
    os.kill(master, signal.SIGKILL)
    until(lambda: world.daemon.status()["haproxy"]["master"] not in (None, master))
    world.wait_serving()
    assert _access(world.path) == expected
    world.daemon.kill_controller()
    world.daemon.start()
    assert _access(world.path) == expected
    world.wait_serving()
    world.daemon.stop()
    assert not world.path.exists()
    world.daemon.start(ready=False)
    world.wait_serving()
    assert _access(world.path) == expected


def test_a_mode_that_somebody_changes_is_mended(world: AgentWorld) -> None:
    world.path.chmod(0o600)
    os.chown(world.path, _NOBODY, _NOBODY)
    until(lambda: _access(world.path) == (0o644, 0, 0), within_s=_WITHIN_S)
    assert world.problem() == ""


def test_a_missing_directory_is_made_with_its_mode_and_owner_and_one_that_is_there_left_alone(
    world: AgentWorld,
) -> None:
    path = world.daemon.directory / "deep" / "down" / "metadata_proxy"
    fields = {"user": "nobody", "group": "nogroup", "directory_mode": "0750"}
    world.take_over(path=str(path), **fields)
    assert _access(path.parent) == (0o750, _NOBODY, _NOBODY)
    assert _access(path.parent.parent) == (0o755, 0, 0)
    assert not world.path.exists()
    path.parent.chmod(0o711)
    os.chown(path.parent, _OTHER, _OTHER)
    world.take_over()
    assert not path.exists()
    # Without a setting the owner is the directory's: the account that Neutron's agents run as.
    world.take_over(path=str(path), directory_mode="0700")
    assert _access(path.parent) == (0o711, _OTHER, _OTHER)
    assert _access(path) == (0o644, _OTHER, _OTHER)
    assert _may_connect(path, user=_OTHER, group=0)


# Who is there


def test_the_file_that_a_dead_process_left_is_replaced(world: AgentWorld) -> None:
    world.take_over(enabled=False)
    assert not world.path.exists()
    with squat(world.path):
        pass
    assert world.path.is_socket()
    with pytest.raises(Lost):
        world.socket.connect()
    world.take_over()
    assert world.socket.serves()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["host", "other-namespace"])
def test_a_living_agent_keeps_its_socket_until_it_ends(
    world: AgentWorld, *, elsewhere: bool
) -> None:
    world.take_over(enabled=False)
    # Of sockets in another network namespace the kernel does not tell; a path leads to them all the same.
    namespace = world.lab.namespace("away") if elsewhere else world.lab.host
    with squat(world.path, namespace=namespace) as agent:
        world.take_over()
        _left_out(world, f"pid {agent.pid}")
        assert world.socket.ask().body == b"foreign"
        with _others_served(world):
            assert world.socket.ask().body == b"foreign"
        logged = [one for one in world.daemon.log_entries() if f"pid {agent.pid}" in str(one)]
        assert len(logged) == 1
    until(world.socket.serves, within_s=_WITHIN_S, what="our own service")
    world.daemon.wait_ready()
    assert world.metric("imdsproxy_unix_listener_serving") == 1
    if elsewhere:
        world.lab.delete_namespace("away")


@pytest.mark.slow
def test_a_socket_that_somebody_takes_is_told_of_and_taken_again_when_it_is_free(
    world: AgentWorld,
) -> None:
    for running in (True, False):
        if not running:
            world.daemon.kill_controller()
        with squat(world.path, namespace=world.lab.host) as thief:
            if not running:
                world.daemon.start(ready=False)
            _left_out(world, f"pid {thief.pid}")
            assert world.socket.ask().body == b"foreign"
        until(world.socket.serves, within_s=_WITHIN_S, what="our own service")
        world.daemon.wait_ready()
    assert _access(world.path) == (0o644, 0, 0)


def test_a_socket_that_somebody_removes_is_made_again(world: AgentWorld) -> None:
    with world.socket.connect() as held:
        assert held.request("/").status == 400
        for _ in range(2):
            world.path.unlink()
            until(world.socket.serves, within_s=_WITHIN_S, what="our own service")
            assert _access(world.path) == (0o644, 0, 0)
        assert held.request("/").status == 400
    world.daemon.wait_ready()


def test_a_directory_that_somebody_removes_is_made_again(world: AgentWorld) -> None:
    world.path.unlink()
    world.path.parent.rmdir()
    until(world.socket.serves, within_s=_WITHIN_S, what="our own service")


def test_a_haproxy_that_ends_after_its_directory_does_not_stay_away(world: AgentWorld) -> None:
    pids = world.daemon.pids()
    os.kill(pids.controller, signal.SIGSTOP)
    try:
        world.path.unlink()
        world.path.parent.rmdir()
        for pid in (pids.master, pids.worker):
            os.kill(pid, signal.SIGKILL)
    finally:
        os.kill(pids.controller, signal.SIGCONT)
    until(world.socket.serves, within_s=5, what="our own service")
    with _others_served(world):
        assert world.problem() == ""


def test_what_is_no_socket_is_not_replaced(world: AgentWorld) -> None:
    world.take_over(enabled=False)
    world.path.write_text("precious")
    world.take_over()
    _left_out(world, "is no socket")
    with _others_served(world):
        pass
    assert world.path.read_text() == "precious"
    world.path.unlink()
    until(world.socket.serves, within_s=_WITHIN_S, what="our own service")


# What is wrong with it leaves out nothing else


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"user": "imdst-none"}, "there is no user imdst-none"),
        ({"path": "/proc/sys/imdst"}, "/proc/sys/imdst"),
        ({"path": "/proc/imdst/metadata_proxy"}, "cannot create the directory /proc/imdst"),
    ],
    ids=str,
)
def test_a_setting_that_this_host_cannot_follow_disables_this_listener_only(
    world: AgentWorld, fields: dict[str, object], reason: str
) -> None:
    world.daemon.configure(world.choose(**fields))
    done = world.daemon.command("reload")
    assert done.status == 0, done.err
    _left_out(world, reason)
    assert not world.path.exists()
    with _others_served(world):
        assert reason in world.problem()
    # Nor does it keep a daemon from starting.
    world.daemon.stop()
    world.daemon.start(ready=False)
    _left_out(world, reason)
    world.take_over()
    world.wait_serving()


# Off and on


def test_it_comes_and_goes_with_its_setting_and_costs_others_nothing(world: AgentWorld) -> None:
    with _others_served(world):
        for _ in range(2):
            world.take_over(enabled=False)
            assert not world.path.exists()
            assert world.daemon.status()["unix_listener"] is None
            world.take_over()
            assert world.socket.serves()
        other = world.path.with_name("other")
        world.take_over(path=str(other))
        assert not world.path.exists()
        assert other.is_socket()
    world.take_over()
    assert not other.exists()


def test_a_file_at_the_path_of_before_that_is_somebody_elses_now_is_left_alone(
    world: AgentWorld,
) -> None:
    with squat(world.path, namespace=world.lab.host) as thief:
        world.take_over(enabled=False)
        assert world.socket.ask().body == b"foreign"
        assert thief.process.poll() is None
