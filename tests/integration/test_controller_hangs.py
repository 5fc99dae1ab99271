"""A controller that takes long to start, and one whose event loop makes no progress any more."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon
from support.guest import Guest, Lost
from support.lab import Lab, until
from support.world import open_world

pytestmark = [pytest.mark.root, pytest.mark.slow]

_STUCK: Final = Path(__file__).parents[1] / "support" / "stuck_loop.py"
_PORT: Final = 9475
_METRICS: Final[dict[str, dict[str, object]]] = {"metrics": {"listen": f"127.0.0.1:{_PORT}"}}
_SLOW: Final = """#!/bin/sh
if [ "$1" = -vv ]; then
    while [ ! -e {gate} ]; do sleep 0.05; done
fi
exec /usr/sbin/haproxy "$@"
"""


def _health(lab: Lab, path: str) -> tuple[int, str]:
    """Status and text of an answer, asked where the daemon's host is; 0 where nothing answers."""
    operator = Guest("operator", lab.host, "", "", (), "lo", port=_PORT)
    try:
        reply = operator.ask(path, to="127.0.0.1", timeout_s=30)
    except Lost:
        return 0, ""
    return reply.status, reply.text


def _get_stuck(daemon: Daemon) -> None:
    daemon.program = (sys.executable, str(_STUCK))
    daemon.environment = {"WATCHDOG_USEC": "3000000", "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_stuck_controller_says_so_and_where_and_the_next_goes_on() -> None:
    with open_world(_METRICS, prepare=_get_stuck) as world:
        assert _health(world.lab, "/livez")[0] == 200
        assert _health(world.lab, "/metrics")[0] == 200
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


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Lab, Daemon]]:
    """A daemon that does not get beyond its first question to HAProxy before there is a file `gate`."""
    lab = Lab()
    haproxy = tmp_path / "haproxy"
    haproxy.write_text(_SLOW.format(gate=tmp_path / "gate"))
    haproxy.chmod(0o755)
    daemon = Daemon(lab, {**_METRICS, "haproxy": {"binary": str(haproxy)}})
    daemon.environment = {"WATCHDOG_USEC": "2000000", "NOTIFY_SOCKET": str(tmp_path / "notify")}
    yield lab, daemon
    daemon.close()
    lab.close()


def test_a_start_answers_livez_from_its_beginning_and_extends_its_time(
    slow: tuple[Lab, Daemon], tmp_path: Path
) -> None:
    lab, daemon = slow
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        starting = threading.Thread(target=daemon.start)
        starting.start()
        until(lambda: _health(lab, "/livez")[0] == 200, what="a /livez while it starts")
        status, text = _health(lab, "/readyz")
        assert (status, "the controller is starting" in text) == (503, True)
        for _ in range(2):
            assert manager.recv(4096) == b"WATCHDOG=1\nEXTEND_TIMEOUT_USEC=2000000"
        (tmp_path / "gate").touch()
        starting.join()
        until(lambda: b"READY=1" in manager.recv(4096), what="READY")
        until(lambda: manager.recv(4096) == b"WATCHDOG=1", what="a beat of one that runs")
    until(lambda: _health(lab, "/readyz")[0] == 200, what="being ready")
