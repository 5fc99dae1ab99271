from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.host.notify import Heartbeat, ServiceNotifier
from support.hand_clock import HandClock


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(tmp_path / "notify"))
        one.setblocking(False)
        yield one


async def _beat(heartbeat: Heartbeat) -> None:
    task = asyncio.create_task(heartbeat.run())
    await asyncio.sleep(0)
    task.cancel()


async def test_a_start_is_extended_by_each_beat_until_it_is_over(
    tmp_path: Path, manager: socket.socket
) -> None:
    notifier = ServiceNotifier(str(tmp_path / "notify"))
    heartbeat = Heartbeat(notifier, {"WATCHDOG_USEC": "8000000"}, HandClock().monotonic)
    await _beat(heartbeat)
    assert manager.recv(1024) == b"WATCHDOG=1\nEXTEND_TIMEOUT_USEC=8000000"
    heartbeat.starting = False
    await _beat(heartbeat)
    assert manager.recv(1024) == b"WATCHDOG=1"


async def test_a_loop_that_does_not_come_round_for_two_minutes_is_not_alive() -> None:
    clock = HandClock()
    heartbeat = Heartbeat(ServiceNotifier(), {}, clock.monotonic)
    await _beat(heartbeat)
    clock.time += 119
    assert heartbeat.alive()
    clock.time += 2
    assert not heartbeat.alive()
    await _beat(heartbeat)
    assert heartbeat.alive()


async def test_a_service_manager_that_is_away_ends_no_controller(tmp_path: Path) -> None:
    clock = HandClock()
    heartbeat = Heartbeat(ServiceNotifier(str(tmp_path / "nobody")), {}, clock.monotonic)
    clock.time += 100
    await _beat(heartbeat)
    assert heartbeat.alive()
