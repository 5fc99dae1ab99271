"""The settings in force, and the effect of changed or lost settings.

The schema notes for each field whether a change takes nothing, is live, or needs a reload of HAProxy or a restart; this
module looks that up. A failed write, a full disk or a crash leaves an empty or shorter file. Such a file is valid YAML,
so only a comparison with the settings in force shows that settings are missing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from imdsproxy.config.describe import Setting, all_settings, join_place
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Change
from imdsproxy.errors import ImdsproxyError, Problem, SettingsDropped
from imdsproxy.reconcile.part import Gauge, Impact, Part


@dataclass(frozen=True, slots=True)
class SettingChange:
    """A setting that a reload found changed; `change` is live, reload, restart or nothing."""

    path: str
    before: object
    after: object
    change: str


@dataclass(frozen=True, slots=True)
class SettingsReload:
    """Result of a reload: the changed settings, and settings that need a restart.

    Attributes:
        pending: Reasons why HAProxy does not use them yet, although it should.
    """

    changes: tuple[SettingChange, ...] = ()
    restart_needed: tuple[str, ...] = ()
    haproxy_reloaded: bool = False
    pending: tuple[str, ...] = ()


def diff_settings(before: Settings, after: Settings) -> tuple[SettingChange, ...]:
    """Return every setting that differs, in the schema's order.

    A name that came or went in a mapping of sections (`nova.endpoint_sets.cell1`) is one change, from or to `None`. In
    a name that stayed, each setting is a change of its own. Lists are compared whole.
    """
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return tuple(_differences(all_settings(), (), old, new))


def _differences(
    setting: Setting,
    place: tuple[str | int, ...],
    old: Any,
    new: Any,
) -> Iterator[SettingChange]:
    if old == new:
        return
    if setting.holds_sections and isinstance(old, Mapping) and isinstance(new, Mapping):
        for step in {**old, **new}:
            yield from _differences(setting[step], (*place, step), old.get(step), new.get(step))
    else:
        yield SettingChange(join_place(place), old, new, setting.change)


_ALLOW = "restore them, or drop them by `imdsproxy reload --allow-dropped`"


def refuse_dropped(before: Loaded | None, after: Loaded, *, allowed: bool = False) -> None:
    """Accept new settings, or raise.

    Args:
        before: The settings in force; `None` at a start.
        allowed: The operator accepts the loss of files and policies. A blank file is refused even so, because the next
            start would refuse it.

    Raises `SettingsDropped`: files or policies are missing; `problems` has each.
    """
    problems = [
        Problem("settings", "is blank", "restore it, write `{}`, or remove it", str(path))
        for path in after.files
        if path in after.blank
    ]
    if before is not None and not allowed:
        problems += _files(before, after)
        problems += _policies(before, after)
    if problems:
        raise SettingsDropped(
            "settings in force before are missing" if before else "a settings file is blank",
            problems=problems,
            hint="" if before is None else _ALLOW,
        )


def _files(before: Loaded, after: Loaded) -> Iterator[Problem]:
    for path in before.files:
        if path in before.empty or path in after.blank:
            continue
        if path not in after.files:
            yield Problem("settings", "is gone", file=str(path))
        elif path in after.empty:
            yield Problem("settings", "has no settings any more", file=str(path))


def _policies(before: Loaded, after: Loaded) -> Iterator[Problem]:
    old, new = (
        _rules(one.settings.policy.model_dump(exclude_none=True)) for one in (before, after)
    )
    if old and not new:
        yield Problem("policy", f"every policy is missing ({', '.join(old)})")
        return
    denied = [place for place, value in old.items() if value == "deny"]
    if denied and "deny" not in new.values() and not any(place in new for place in denied):
        yield Problem("policy", f"every `deny` is missing ({', '.join(denied)})")


def _rules(value: object, place: str = "policy") -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {place: value}
    parts = (_rules(part, f"{place}.{name}") for name, part in value.items())
    return {path: rule for rules in parts for path, rule in rules.items()}


@dataclass(slots=True)
class SettingsHolder(Part):
    """Holder of the settings in force, which may change while the parts that read them run.

    Settings that need a restart are reported and change nothing until then: parts read them once.

    Attributes:
        taken: Called with settings that have come into force.
        refused: Problems for which the last reload was refused; empty after a success.
    """

    impact: ClassVar = Impact.UNNOTICED
    loaded: Loaded
    load: Callable[[], Loaded]
    taken: Callable[[Settings], None] = lambda _: None
    refused: tuple[Problem, ...] = ()

    @property
    def settings(self) -> Settings:
        return self.loaded.settings

    def problems(self) -> tuple[Problem, ...]:
        return self.refused

    def settings_refused(self) -> Gauge:
        """1 while the last reload of the settings files is refused and the settings before it stay in force."""
        return bool(self.refused)

    def reload(
        self, accept: Callable[[Settings], Iterable[str]], *, allow_dropped: bool = False
    ) -> SettingsReload:
        """Read the files again.

        `accept`: reads and applies the files that the new settings name, before the settings come into force. Returns
        the paths of settings whose files have new content. Raises `ImdsproxyError`: the settings, or the files that
        they name, are not acceptable; the settings in force stay.
        """
        try:
            after = self.load()
            refuse_dropped(self.loaded, after, allowed=allow_dropped)
            files = accept(after.settings)
        except ImdsproxyError as error:
            reason = f"the last reload was refused: {error.message}"
            self.refused = (Problem("settings", reason, error.hint), *error.problems)
            raise
        changed = diff_settings(self.settings, after.settings)
        known = {one.path for one in changed}
        content = "its content of before", "its new content", Change.LIVE.value
        changed += tuple(SettingChange(path, *content) for path in files if path not in known)
        self.loaded, self.refused = after, ()
        self.taken(self.settings)
        return SettingsReload(
            changes=changed,
            restart_needed=tuple(one.path for one in changed if one.change is Change.RESTART),
            haproxy_reloaded=any(one.change is Change.RELOAD for one in changed),
        )
