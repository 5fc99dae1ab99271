"""The listener `unix` where HAProxy is a unit with few capabilities, in a directory of another account."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.systemd_daemon import CONTROLLER, HAPROXY, UnitDaemon
from support.systemd_machine import systemd_machine, until

pytestmark = [pytest.mark.root, pytest.mark.slow]

_NEUTRON: Final = "64999"
_DIRECTORY: Final = "/var/lib/neutron"
_SOCKET: Final = f"{_DIRECTORY}/metadata_proxy"
_ASK: Final = f"""
import socket
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(10)
    sock.connect("{_SOCKET}")
    sock.sendall(b"GET /latest/user-data HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n"
                 b"X-Neutron-Network-ID: blue\\r\\nX-Forwarded-For: ::ffff:10.0.0.11\\r\\n\\r\\n")
    while data := sock.recv(65536):
        print(data.decode(), end="")
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[UnitDaemon]:
    work = tmp_path / "machine"
    work.mkdir()
    with systemd_machine(work) as machine:
        daemon = UnitDaemon(machine)
        try:
            daemon.install()
            machine.run("install", "-d", "-m", "755", "-o", _NEUTRON, "-g", _NEUTRON, _DIRECTORY)
            settings = "unix_listener:\n  enabled: true\n"
            machine.write("/etc/imdsproxy/conf.d/unix.yaml", settings)
            daemon.plug_in()
            daemon.start()
            yield daemon
        except BaseException:
            print(machine.journal())  # noqa: T201 - pytest shows it of a test that failed
            raise


def _access(daemon: UnitDaemon) -> str:
    return daemon.machine.run("stat", "--format=%A %u %g", _SOCKET).strip()


def _answered(daemon: UnitDaemon) -> bool:
    """Whether the account that the agents run as gets the guest's documents."""
    command = ("setpriv", f"--reuid={_NEUTRON}", f"--regid={_NEUTRON}", "--clear-groups")
    status, said = daemon.machine.attempt(*command, "python3", "-", text=_ASK)
    return status == 0 and "echo blue" in said


def test_neutrons_account_has_the_socket_whoever_starts_haproxy(daemon: UnitDaemon) -> None:
    expected = f"srw-r--r-- {_NEUTRON} {_NEUTRON}"
    assert _access(daemon) == expected
    assert _answered(daemon)
    before = daemon.machine.main_pid(HAPROXY)
    daemon.machine.run("systemctl", "stop", CONTROLLER)
    daemon.machine.run("systemctl", "kill", "--signal=KILL", HAPROXY)
    until(
        lambda: daemon.machine.main_pid(HAPROXY) not in (0, before),
        within_s=20,
        what="another HAProxy",
    )
    until(lambda: _answered(daemon), within_s=20, what="the guest's documents")
    assert _access(daemon) == expected
    daemon.machine.run("systemctl", "start", CONTROLLER)
    unix = json.loads(daemon.command("status", "--json"))["unix_listener"]
    assert (unix["serving"], unix["problem"]) == (True, "")
    assert _answered(daemon)
    daemon.command("stop", "--data-plane")
    assert daemon.machine.run("ls", _DIRECTORY) == ""
