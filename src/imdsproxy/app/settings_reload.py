"""The settings in force, and taking over new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from imdsproxy.config.change import Change
from imdsproxy.config.diff import diff_settings
from imdsproxy.config.schema import Settings

if TYPE_CHECKING:
    from imdsproxy.admin.operations import SettingsReload

__all__ = ["SettingsHolder", "with_contents"]


@dataclass(slots=True)
class SettingsHolder:
    """What every part asks for settings that may change while it runs.

    Settings that need a restart are reported and change nothing until then: parts read them once.
    """

    settings: Settings
    load: Callable[[], Settings]

    def reload(self, accept: Callable[[Settings], None]) -> SettingsReload:
        """Read the files again.

        Args:
            accept: Reads what the settings name, and takes it over, before they are in force themselves.

        Raises:
            ConfigError: They, or what they name, are not acceptable; the settings in force stay.
        """
        from imdsproxy.admin.operations import (  # noqa: PLC0415 - known guests do not wait for it
            SettingChange,
            SettingsReload,
        )

        after = self.load()
        accept(after)
        changed = diff_settings(self.settings, after)
        self.settings = after
        return SettingsReload(
            changes=tuple(
                SettingChange(one.path, one.before, one.after, one.change.value) for one in changed
            ),
            restart_needed=tuple(one.path for one in changed if one.change is Change.RESTART),
            haproxy_reloaded=any(one.change is Change.RELOAD for one in changed),
        )


def with_contents(result: SettingsReload, files: Iterable[str]) -> SettingsReload:
    """Tell also of `files`, the paths of settings that are the same while their files have other content."""
    from imdsproxy.admin.operations import SettingChange  # noqa: PLC0415 - as above

    told = {change.path for change in result.changes}
    more = (
        SettingChange(path, "its content of before", "its new content", Change.LIVE.value)
        for path in files
        if path not in told
    )
    return replace(result, changes=(*result.changes, *more))
