"""Three processes, three lives: what guests notice when one of them ends, hangs or is replaced."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import yaml

from imdsproxy.cli.doctor import parse_url
from imdsproxy.errors import ImdsproxyError, Starting
from imdsproxy.tools.doctor import Answer, crawl
from support.daemon import Daemon, alive, instance, user_data_of
from support.guest import IPV4, Background, Guest, Load, Lost, Reply, inside
from support.health import METRICS, ask_operator
from support.lab import Lab, until, within
from support.nova_world import open_nova_world
from support.world import World, open_world, own, own_name

pytestmark = pytest.mark.root

_CACHED: Final = "/latest/user-data"
_FRESH: Final = "/openstack/latest/meta_data.json"
"""Never cached, so each answer is the document server's."""

_PASSWORD: Final = "/openstack/latest/password"
_ROUNDS: Final = 5


def _own_name(guest: Guest, reply: Reply) -> str | None:
    """What is wrong with an answer to `_FRESH`."""
    if reply.status == 200 and json.loads(reply.body)["name"] == own_name(guest):
        return None
    return f"{guest.name} got {reply.status} {reply.body[:80]!r}"


def _are_replaced(world: World, gone: set[int]) -> bool:
    """Whether the document server is whole again without these processes."""
    pids = world.daemon.status()["documents"]["pids"]
    return len(pids) == 3 and not gone & set(pids)


def _own_or_later(guest: Guest, reply: Reply) -> str | None:
    return None if reply.is_to_come_again else _own_name(guest, reply)


def _post(guest: Guest, ended: threading.Event, lost: list[str]) -> None:
    """Post a password again and again, over a connection that is kept; the first one is taken."""
    while not ended.is_set():
        with contextlib.closing(guest.connect()) as connection:
            try:
                while not ended.is_set():
                    reply = connection.request(_PASSWORD, method="POST", body=b"secret")
                    if reply.closes:
                        break
            except Lost as error:
                lost.append(f"{guest.name} posted: {error}")


@contextlib.contextmanager
def _reading(world: World) -> Iterator[Callable[[], None]]:
    """Guests read cached and fresh documents, on kept connections and on new ones, and lose none; waits for more."""
    guests = [world.red, world.guests["blue"]]
    loads = [
        Load(guests, _CACHED, own),
        Load(guests, _CACHED, own, keep_alive=False),
        Load(guests, _FRESH, _own_name),
    ]

    def go_on() -> None:
        for load in loads:
            load.wait_answers(20)

    with loads[0], loads[1], loads[2]:
        go_on()
        yield go_on
        go_on()
    assert [one for load in loads for one in load.report.lost] == []


def _every_document(guest: Guest) -> dict[str, Answer]:
    found = inside(guest.namespace, lambda: crawl(parse_url(f"http://{IPV4}"), direct=True))
    return {ask.path: answer for ask, answer in found.asked.items() if answer.ok}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_a_controller_a_known_instance_reads_every_document_for_the_first_time(
    world: World, number: signal.Signals
) -> None:
    guest, other = (world.lab.guest("red", one) for one in (70, 71))
    fields: dict[str, object] = {
        "tags": {"role": "web"},
        "ssh_keys": [f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ{'0' * 44} a@b"],
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
    assert {target.replace(guest.mac, other.mac) for target in after} == set(before)
    assert len(after) > 50
    assert after[_CACHED].body == user_data_of("red-70")
    assert json.loads(after[_FRESH].body)["name"] == "red-70"
    world.all_right()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_controller_that_ends_and_the_next_lose_no_request_and_keep_haproxy(
    world: World, number: signal.Signals
) -> None:
    before = world.settled()
    with _reading(world) as go_on:
        if number == signal.SIGKILL:
            os.killpg(before.controller, number)
        world.daemon.kill_controller(number)
        go_on()
        world.daemon.start()
        go_on()
        # The next one is in charge: what it is told is in force.
        world.daemon.put(instances=[{**instance("green-5", "green"), "user_data": "next"}])
        assert world.guests["green"].ask(_CACHED).text == "next"
    after = world.settled()
    assert after.controller != before.controller
    assert set(after.data_plane) == set(before.data_plane)


def test_a_controller_that_starts_keeps_a_haproxy_whose_master_is_slow(world: World) -> None:
    before, daemon = world.settled(), world.daemon

    def go_on_when_noticed() -> None:
        until(lambda: "haproxy is slow" in daemon.log.read_text(), what="a warning")
        os.kill(before.master, signal.SIGCONT)

    with _reading(world):
        daemon.kill_controller()
        os.kill(before.master, signal.SIGSTOP)
        with Background(go_on_when_noticed):
            daemon.start()
    assert set(world.settled().data_plane) == set(before.data_plane)


class _Changes(Background):
    """Changes red's user-data to ever greater numbers until the controller is gone."""

    def __init__(self, world: World, first: int) -> None:
        super().__init__(self._run)
        self._world = world
        self.first = self.acknowledged = first

    def _run(self) -> None:
        with contextlib.suppress(ImdsproxyError):
            while True:
                text = str(self.acknowledged + 1)
                record = {**instance("red-5", "red"), "user_data": text}
                if self._world.daemon.put(instances=[record])["applied"]:
                    self.acknowledged += 1


def test_what_was_acknowledged_survives_a_kill_at_any_moment(world: World) -> None:
    for first in (1000, 2000, 3000):
        with _Changes(world, first) as changes:
            until(lambda one=changes: one.acknowledged > one.first + 3, what="some changes")  # type: ignore[misc] # mypy cannot see the default's type
            world.daemon.kill_controller()
        known = changes.acknowledged
        assert known <= int(world.red.ask(_CACHED).text) <= known + 1
        world.daemon.start()
        until(lambda: world.daemon.status()["instances"] == len(world.instances))
        assert known <= int(world.red.ask(_CACHED).text) <= known + 1
        assert world.daemon.explain("red", "10.0.0.5")["instance"] == "red-5"


def test_a_second_controller_is_refused_whatever_else_is_its_own(
    world: World, tmp_path: Path
) -> None:
    controller = world.pids().controller
    same = world.daemon.command("run")
    assert (same.status, "another" in same.err) == (71, True)
    settings = yaml.safe_load(world.daemon.config.read_text())
    settings["paths"]["runtime_dir"] = str(tmp_path / "run")
    config = tmp_path / "second.yaml"
    config.write_text(yaml.safe_dump(settings))
    program = (*within(world.lab.host), *world.daemon.program, "--config", str(config), "run")
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 71
    assert f"another controller keeps its state in {world.daemon.state}" in done.stderr
    world.all_right()
    assert world.pids().controller == controller


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "number"),
    [("a worker", signal.SIGSTOP), ("the server", signal.SIGKILL), ("the server", signal.SIGSTOP)],
)
def test_a_process_of_the_document_server_that_ends_or_hangs_is_replaced_and_no_request_lost(
    world: World, which: str, number: signal.Signals
) -> None:
    before = world.settled()
    gone = {before.documents, *before.document_workers}
    if which == "a worker":
        gone = {before.document_workers[0]}

    with _reading(world):
        os.kill(before.document_workers[0] if which == "a worker" else before.documents, number)
        until(partial(_are_replaced, world, gone), what="another process")
        until(lambda: not any(map(alive, gone)), what="the end of the old ones")
    assert world.settled().master == before.master


@pytest.mark.slow
@pytest.mark.parametrize("which", ["all workers", "the server"])
def test_each_request_is_answered_though_all_of_the_document_server_ends_at_once(
    world: World, which: str
) -> None:
    guests, lost = [world.red, world.guests["blue"]], list[str]()
    for _ in range(_ROUNDS):
        before, ended = world.settled(), threading.Event()
        gone = [*before.document_workers, *([before.documents] * (which == "the server"))]
        loads = [
            Load(guests, _FRESH, _own_or_later, connections=8, pause_s=0),
            Load(guests, _FRESH, _own_or_later, keep_alive=False, connections=4, pause_s=0),
        ]
        posts = Background(*(partial(_post, guest, ended, lost) for guest in guests * 4))
        with posts, loads[0], loads[1]:
            for load in loads:
                load.wait_answers(20)
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in gone:
                    os.kill(pid, number)
            for load in loads:
                load.wait_answers(40)
            ended.set()
        lost += [line for load in loads for line in load.report.lost]
        until(partial(_are_replaced, world, {*gone}), what="other processes")
    assert lost == []


@pytest.mark.slow
def test_a_master_of_haproxy_that_hangs_is_replaced(world: World) -> None:
    master = world.settled().master
    with _reading(world):
        os.kill(master, signal.SIGSTOP)
    until(lambda: world.has_other_master(master), what="another master")
    world.settled()
    world.all_right()


@pytest.mark.parametrize("how", ["running", "killed"])
def test_stop_with_the_data_plane_ends_everything(how: str) -> None:
    with open_world() as world:
        pids = world.pids()
        if how == "killed":
            world.daemon.kill_controller()
        done = world.daemon.command("stop", "--data-plane")
        assert done.status == 0, done.err
        until(lambda: not world.daemon.processes(), what="the end of everything")
        # A process that ends has no command line any more before it is gone.
        until(lambda: not any(map(alive, pids.data_plane)), what="the end of the data plane")
        assert not world.lab.made_by_daemon()
        # The kernel removes the links of a namespace a moment after the namespace.
        until(
            lambda: not any(name.startswith(world.lab.prefix) for name in world.lab.host_links()),
            what="the end of the daemon's links",
        )
        assert not world.red.reaches()


@pytest.mark.parametrize("controller", ["killed", "running"])
def test_who_empties_the_runtime_directory_leaves_no_process_of_before_and_a_start_mends_all(
    controller: str,
) -> None:
    with open_world() as world:
        daemon = world.daemon
        before = world.pids()
        if controller == "killed":
            daemon.kill_controller()
        for entry in daemon.runtime.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if controller == "running":
            # HAProxy cannot be reached any more, nor be started again.
            assert daemon.process is not None
            assert daemon.process.wait(30) == 71
            assert "only a start makes them again" in daemon.log.read_text()
        daemon.start()
        world.all_right()
        until(lambda: not any(map(alive, before.data_plane)), what="the end of the old ones")
        now = world.pids()
        expected = {*now.data_plane, now.controller}
        # A check of HAProxy's configuration is one more for a moment.
        others: dict[int, str] = {}

        def are_alone() -> bool:
            others.clear()
            others.update(daemon.processes())
            return others.keys() == expected

        try:
            until(are_alone, what="no other process")
        except AssertionError as error:
            raise AssertionError(f"{others} in place of {expected}") from error
        for entry in daemon.runtime.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        done = daemon.command("stop", "--data-plane")
        assert done.status == 0, done.err
        # It was asked to end before anything else did: it makes nothing again of what is taken away.
        assert daemon.process is not None
        assert daemon.process.wait(0) == 0
        until(lambda: not daemon.processes(), what="the end of everything")


@pytest.mark.slow
def test_a_start_after_a_reboot_serves_the_records_of_the_last_run_and_its_path_rules() -> None:
    denied = {"networks": {"red": {"paths": {_CACHED: "deny"}}}}
    with open_world({"policy": denied}) as world:
        daemon, (red, green) = world.daemon, (world.red, world.guests["green"])
        until(lambda: red.ask(_CACHED).status == 403, what="the path rule")
        daemon.stop()
        # As a reboot does.
        shutil.rmtree(daemon.runtime)
        daemon.process = daemon._started()
        until(red.reaches, what="HAProxy")
        assert red.ask(_CACHED).status == 403
        daemon.wait_ready()
        assert own(green, green.ask(_CACHED)) is None
        messages = [one["message"] for one in daemon.log_entries()]
        assert messages.count("records are those of the last run") == 1


@pytest.mark.slow
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


# A controller that takes long to start, and one whose event loop makes no progress any more


_STUCK: Final = Path(__file__).parents[1] / "support" / "stuck_loop.py"
_SLOW: Final = """#!/bin/sh
if [ "$1" = -vv ]; then
    while [ ! -e {gate} ]; do sleep 0.05; done
fi
exec /usr/sbin/haproxy "$@"
"""


def _health(lab: Lab, path: str) -> tuple[int, str]:
    """Status and text of an answer; 0 where nothing answers."""
    try:
        reply = ask_operator(lab, path, timeout_s=30)
    except Lost:
        return 0, ""
    return reply.status, reply.text


def _get_stuck(daemon: Daemon) -> None:
    daemon.program = (sys.executable, str(_STUCK))
    daemon.environment = {"WATCHDOG_USEC": "3000000", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.slow
def test_a_stuck_controller_says_so_and_where_and_the_next_goes_on() -> None:
    with open_world({"metrics": METRICS}, prepare=_get_stuck) as world:
        assert _health(world.lab, "/livez")[0] == 200
        assert world.daemon.process is not None
        before = world.pids()
        world.daemon.process.send_signal(signal.SIGUSR2)
        until(lambda: _health(world.lab, "/livez")[0] == 503, what="a /livez that fails")
        status, text = _health(world.lab, "/readyz")
        assert status == 503
        assert "the controller's event loop does not answer" in text
        world.all_right()
        # As systemd's watchdog does.
        world.daemon.kill_controller(signal.SIGABRT)
        assert f'File "{_STUCK}"' in world.daemon.log.read_text()
        world.daemon.start()
        assert world.pids().master == before.master
        world.all_right()


@pytest.mark.slow
def test_a_start_answers_livez_from_its_beginning_and_extends_its_time(tmp_path: Path) -> None:
    """It does not get beyond its first question to HAProxy before there is a file `gate`."""
    with contextlib.ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        haproxy = tmp_path / "haproxy"
        haproxy.write_text(_SLOW.format(gate=tmp_path / "gate"))
        haproxy.chmod(0o755)
        daemon = Daemon(lab, {"metrics": METRICS, "haproxy": {"binary": str(haproxy)}})
        stack.callback(daemon.close)
        daemon.environment = {"WATCHDOG_USEC": "2000000", "NOTIFY_SOCKET": str(tmp_path / "notify")}
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        starting = threading.Thread(target=daemon.start)
        starting.start()
        until(lambda: _health(lab, "/livez")[0] == 200, what="a /livez while it starts")
        status, text = _health(lab, "/readyz")
        assert (status, "the controller is starting" in text) == (503, True)
        with pytest.raises(Starting, match="the daemon is starting"):
            replace(daemon.admin, waiting=None).get("/v1/status")
        for _ in range(2):
            assert manager.recv(4096) == b"WATCHDOG=1\nEXTEND_TIMEOUT_USEC=2000000"
        (tmp_path / "gate").touch()
        # Read as they come: the queue holds ten, which a start on a busy machine fills.
        until(lambda: b"READY=1" in manager.recv(4096), what="READY")
        starting.join()
        until(lambda: manager.recv(4096) == b"WATCHDOG=1", what="a beat of one that runs")
        until(lambda: _health(lab, "/readyz")[0] == 200, what="being ready")
