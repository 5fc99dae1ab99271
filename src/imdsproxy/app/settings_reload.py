"""The settings in force, and taking over new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from imdsproxy.config.changes import (
    SettingChange,
    SettingsReload,
    diff_settings,
    refuse_dropped,
)
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Change
from imdsproxy.errors import ImdsproxyError, Problem


@dataclass(slots=True)
class SettingsHolder:
    """What every part asks for settings that may change while it runs.

    Settings that need a restart are reported and change nothing until then: parts read them once.

    Attributes:
        taken: Called with settings that have come into force.
        problems: Why the last reload was refused; empty once one succeeds.
    """

    loaded: Loaded
    load: Callable[[], Loaded]
    taken: Callable[[Settings], None] = lambda _: None
    problems: tuple[Problem, ...] = ()

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self.loaded.settings

    def reload(
        self, accept: Callable[[Settings], None], *, allow_dropped: bool = False
    ) -> SettingsReload:
        """Read the files again.

        Args:
            accept: Reads what the settings name, and takes it over, before they are in force themselves.
            allow_dropped: As `allowed` of `refuse_dropped`.

        Raises:
            ImdsproxyError: They, or what they name, are not acceptable; the settings in force stay.
        """
        try:
            after = self.load()
            refuse_dropped(self.loaded, after, allowed=allow_dropped)
            accept(after.settings)
        except ImdsproxyError as error:
            reason = f"the last reload was refused: {error.message}"
            self.problems = (Problem("settings", reason, error.hint), *error.problems)
            raise
        changed = diff_settings(self.settings, after.settings)
        self.loaded, self.problems = after, ()
        self.taken(self.settings)
        return SettingsReload(
            changes=changed,
            restart_needed=tuple(one.path for one in changed if one.change is Change.RESTART),
            haproxy_reloaded=any(one.change is Change.RELOAD for one in changed),
        )


def with_contents(result: SettingsReload, files: Iterable[str]) -> SettingsReload:
    """Tell also of `files`, the paths of settings that are the same while their files have other content."""
    known = {change.path for change in result.changes}
    more = (
        SettingChange(path, "its content of before", "its new content", Change.LIVE.value)
        for path in files
        if path not in known
    )
    return replace(result, changes=(*result.changes, *more))
