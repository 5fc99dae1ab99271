"""The audit log under a real systemd, which keeps HAProxy's connections while there is no controller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support.guest import Load
from support.systemd_daemon import CONTROLLER, UnitDaemon, own_user_data
from support.systemd_machine import systemd_machine, until

pytestmark = [pytest.mark.root, pytest.mark.slow]

_USER_DATA: Final = "/latest/user-data"
_LOG: Final = "/var/log/imdsproxy/audit.log"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[UnitDaemon]:
    """Started, with an audit log."""
    work = tmp_path / "machine"
    work.mkdir()
    with systemd_machine(work) as machine:
        daemon = UnitDaemon(machine)
        daemon.install()
        settings = json.dumps({"audit": {"mode": "all", "destination": _LOG}})
        machine.write("/etc/imdsproxy/conf.d/audit.yaml", settings)
        daemon.plug_in()
        daemon.start()
        yield daemon


def _lines(daemon: UnitDaemon) -> list[dict[str, Any]]:
    text = (daemon.machine.root / _LOG.lstrip("/")).read_text()
    return [one for one in map(json.loads, text.splitlines()) if one.get("path") == _USER_DATA]


def _pid(daemon: UnitDaemon) -> int:
    return daemon.machine.main_pid(CONTROLLER)


@pytest.mark.parametrize("end", ["kill --signal=KILL", "restart"])
def test_every_request_has_its_line_when_a_controller_is_killed_or_restarted(
    daemon: UnitDaemon, end: str
) -> None:
    before = _pid(daemon)
    with Load(daemon.guests, _USER_DATA, own_user_data, connections=2) as running:
        running.wait_answers(300)
        daemon.machine.run("systemctl", *end.split(), CONTROLLER)
        running.wait_answers(300)
        until(lambda: _pid(daemon) not in (0, before), within_s=20, what="another controller")
        running.wait_answers(300)
    assert not running.report.lost
    asked = running.report.answered

    def numbers() -> list[int]:
        return [one["number"] for one in _lines(daemon)]

    until(lambda: len(set(numbers())) >= asked, within_s=20, what=f"{asked} lines")
    assert len(set(numbers())) == asked
    if end != "kill --signal=KILL":
        # Who is killed between writing and taking out leaves both to the next.
        assert len(numbers()) == asked
