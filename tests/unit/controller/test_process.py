"""The controller's process: its heartbeat, and settings that are read again."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.config.changes import SettingsHolder
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import HaproxySettings, LogSettings, Settings
from imdsproxy.errors import ConfigError, ConfigUnreadable
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
    # There is no service manager either.
    heartbeat = Heartbeat(ServiceNotifier("/nonexistent/notify"), {}, clock.monotonic)
    await _beat(heartbeat)
    clock.time += 119
    assert heartbeat.alive()
    clock.time += 2
    assert not heartbeat.alive()
    await _beat(heartbeat)
    assert heartbeat.alive()


_OTHER = Settings(haproxy=HaproxySettings(maxconn_per_network=77))


def _holder(after: Settings) -> SettingsHolder:
    return SettingsHolder(Loaded(Settings(), ()), lambda: Loaded(after, ()))


def _nothing(_: Settings) -> tuple[str, ...]:
    return ()


def _refuse(_: Settings) -> tuple[str, ...]:
    raise ConfigUnreadable("a secret is missing")


def test_what_changed_is_reported_and_in_force_once_what_it_names_was_read() -> None:
    holder = _holder(_OTHER)

    def look(after: Settings) -> tuple[str, ...]:
        assert (holder.settings, after) == (Settings(), _OTHER)
        return ()

    done = holder.reload(look)
    assert [change.path for change in done.changes] == ["haproxy.maxconn_per_network"]
    assert (done.haproxy_reloaded, done.restart_needed) == (True, ())
    assert holder.settings is _OTHER
    assert holder.reload(_nothing).changes == ()


@pytest.mark.parametrize("after", [_OTHER, Settings(log=LogSettings(level="debug"))])
def test_settings_whose_files_are_refused_change_nothing_and_are_new_the_next_time(
    after: Settings,
) -> None:
    holder = _holder(after)
    before = holder.settings
    with pytest.raises(ConfigError):
        holder.reload(_refuse)
    assert holder.settings is before
    assert len(holder.reload(_nothing).changes) == 1
