from __future__ import annotations

import pytest

from imdsproxy.config.changes import SettingsHolder
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import HaproxySettings, LogSettings, Settings
from imdsproxy.errors import ConfigError, ConfigUnreadable

_OTHER = Settings(haproxy=HaproxySettings(maxconn_per_network=77))


def _holder(after: Settings) -> SettingsHolder:
    return SettingsHolder(Loaded(Settings(), ()), lambda: Loaded(after, ()))


def _nothing(_: Settings) -> tuple[str, ...]:
    return ()


def _refuse(_: Settings) -> tuple[str, ...]:
    raise ConfigUnreadable("a secret is missing")


def test_what_changed_is_told_and_in_force() -> None:
    holder = _holder(_OTHER)
    done = holder.reload(_nothing)
    assert [change.path for change in done.changes] == ["haproxy.maxconn_per_network"]
    assert (done.haproxy_reloaded, done.restart_needed) == (True, ())
    assert holder.settings is _OTHER
    assert holder.reload(_nothing).changes == ()


def test_what_the_settings_name_is_read_before_they_are_in_force() -> None:
    holder, seen = _holder(_OTHER), list[tuple[int, int]]()

    def look(after: Settings) -> tuple[str, ...]:
        seen.append(
            (holder.settings.haproxy.maxconn_per_network, after.haproxy.maxconn_per_network)
        )
        return ()

    holder.reload(look)
    assert seen == [(200, 77)]


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
