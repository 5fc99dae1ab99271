"""An audit log that cannot be written: told with who must act, mended without a restart, no guest slower for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.audit_log import AuditLog, order_audit
from support.guest import Guest
from support.lab import until
from support.world import World, open_world

pytestmark = [pytest.mark.root, pytest.mark.slow]

_METRICS_PORT: Final = 9465
_LEAF: Final = "/latest/meta-data/instance-id"
_WINDOW_S: Final = 0.25
_LEAST: Final = 0.1
"""A guest that waits for a disk is answered some times a second at most; others slow it by half and more."""

_WINDOWS: Final = 5
_TOGETHER: Final = 50
_MANY: Final = 12_000


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    # What listens is not changed while it runs.
    with open_world({"metrics": {"listen": f"127.0.0.1:{_METRICS_PORT}"}}) as world:
        yield world


@pytest.fixture
def place(world: World, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    _order(world, "off", tmp_path / "audit.log")


def _order(world: World, mode: str, path: Path) -> None:
    metrics = {"listen": f"127.0.0.1:{_METRICS_PORT}"}
    order_audit(world, mode, os.fspath(path), metrics=metrics)


def _told(world: World, path: str) -> str:
    """What the controller tells of itself, read where its host is."""
    host = Guest("operator", world.lab.host, "", "", (), "lo", port=_METRICS_PORT)
    return host.ask(path, to="127.0.0.1").text


def _failing(world: World) -> bool:
    return "\nimdsproxy_audit_failing 1.0\n" in _told(world, "/metrics")


def _answered(guest: Guest) -> int:
    """How many requests a guest is answered in the best of some moments: others use this machine as well."""
    best = 0
    request = f"GET {_LEAF} HTTP/1.1\r\nHost: x\r\nUser-Agent: {'u' * 190}\r\n\r\n".encode()
    with guest.connect() as kept:
        for _ in range(_WINDOWS):
            count, end = 0, time.monotonic() + _WINDOW_S
            while time.monotonic() < end:
                kept.send(request * _TOGETHER)
                assert all(kept.read().status == 200 for _ in range(_TOGETHER))
                count += _TOGETHER
            best = max(best, count)
    return best


def test_a_disk_that_hangs_is_told_and_slows_no_guest(world: World, place: Path) -> None:
    _order(world, "all", place / "good.log")
    before = _answered(world.red)
    # Who opens it for writing waits for a reader, as for a disk.
    os.mkfifo(hangs := place / "hangs")
    _order(world, "all", hangs)
    world.red.ask("/while-it-hangs")
    until(lambda: _failing(world), what="a metric that says so")
    (problem,) = world.daemon.status()["problems"]
    assert "has not come back for" in problem["reason"]
    assert world.daemon.status()["readiness"]["ready"]
    assert f'"degraded": ["audit.destination: {hangs}: a write' in _told(world, "/readyz")
    assert _answered(world.red) > before * _LEAST
    # The end of a controller does not wait for the disk either.
    world.daemon.kill_controller(signal.SIGTERM)
    metrics = {"listen": f"127.0.0.1:{_METRICS_PORT}"}
    audit = {"mode": "all", "destination": os.fspath(place / "later.log")}
    world.daemon.configure({"resolver": {"hold_s": 1.0}, "audit": audit, "metrics": metrics})
    world.daemon.start()
    world.red.ask("/after-the-disk")
    AuditLog(world.daemon, place / "later.log").wait(path="/after-the-disk")


def test_a_controller_that_stands_still_slows_no_guest_and_every_line_is_there_or_counted(
    world: World, place: Path
) -> None:
    _order(world, "all", place / "audit.log")
    log = AuditLog(world.daemon, place / "audit.log")
    before = _answered(world.red)
    with world.looking_away():
        assert _answered(world.red) > before * _LEAST
        # More than HAProxy's ring has room for: what is left out is left out there.
        with world.red.connect() as kept:
            request = f"GET {_LEAF} HTTP/1.1\r\nHost: x\r\nUser-Agent: {'v' * 190}\r\n\r\n"
            for _ in range(_MANY // _TOGETHER):
                kept.send(request.encode() * _TOGETHER)
                assert all(kept.read().status == 200 for _ in range(_TOGETHER))
    # At first the ring has no room for this one either.
    until(
        lambda: world.red.ask("/end").status == 404 and log.has(path="/end"),
        what="room in the ring",
    )
    lines = log.lines()
    left_out = sum(one.get("left_out", 0) for one in lines)
    numbers = [one["number"] for one in lines if "number" in one]
    assert left_out > 0
    assert len(numbers) == len(set(numbers)) > _MANY / 4
    assert sum(one.get("agent") == "v" * 190 for one in lines) + left_out >= _MANY
    told = world.daemon.status()["audit"]
    assert (told["written"], told["left_out"]) >= (len(numbers), left_out)
