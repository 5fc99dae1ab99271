"""The settings in force, and what changed or lost ones mean.

Whether a change takes nothing, is live, or needs a reload of HAProxy or a restart stands beside each field of the
schema; here it is only looked up. A write that fails, a full disk or a crash leaves an empty or shorter file. It is
valid YAML, so only a comparison with the settings in force shows that something is missing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from imdsproxy.config.describe import Setting, all_settings, join_place
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Change
from imdsproxy.errors import ImdsproxyError, Problem, SettingsDropped


@dataclass(frozen=True, slots=True)
class SettingChange:
    """One setting that a reload found changed; `change` is live, reload, restart or nothing."""

    path: str
    before: object
    after: object
    change: str


@dataclass(frozen=True, slots=True)
class SettingsReload:
    """What `reload` did: which settings it took over, and for which a restart is needed.

    Attributes:
        haproxy_reloaded: HAProxy answers by them.
        pending: Why it does not yet, although it should.
    """

    changes: tuple[SettingChange, ...] = ()
    restart_needed: tuple[str, ...] = ()
    haproxy_reloaded: bool = False
    pending: tuple[str, ...] = ()


def diff_settings(before: Settings, after: Settings) -> tuple[SettingChange, ...]:
    """Every setting that differs, in the schema's order.

    A name that came or went in a mapping of sections (`nova.endpoint_sets.cell1`) is one change,
    from or to `None`; within one that stayed, each of its settings is. Lists are compared whole.
    """
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return tuple(_differences(all_settings(), (), old, new))


def _differences(
    setting: Setting,
    place: tuple[str | int, ...],
    old: Any,  # noqa: ANN401 - a value of any setting
    new: Any,  # noqa: ANN401 - as above
) -> Iterator[SettingChange]:
    if old == new:
        return
    if setting.holds_sections and isinstance(old, Mapping) and isinstance(new, Mapping):
        for step in {**old, **new}:
            yield from _differences(setting[step], (*place, step), old.get(step), new.get(step))
    else:
        yield SettingChange(join_place(place), old, new, setting.change)


_ALLOW = "restore them; if they should go: `imdsproxy reload --allow-dropped`"


def refuse_dropped(before: Loaded | None, after: Loaded, *, allowed: bool = False) -> None:
    """Accept new settings, or raise.

    Args:
        before: In force; `None` at a start.
        after: Read now.
        allowed: The operator wants files and policies to go. A blank file is refused even so: it would be
            refused at the next start.

    Raises:
        SettingsDropped: `problems` has every file and policy that is missing.
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
            "settings are missing that were there before" if before else "a settings file is blank",
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
            yield Problem("settings", "holds no settings any more", file=str(path))


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
    """Each policy rule that is set, by its path."""
    if not isinstance(value, Mapping):
        return {place: value}
    parts = (_rules(part, f"{place}.{name}") for name, part in value.items())
    return {path: rule for rules in parts for path, rule in rules.items()}


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
        self, accept: Callable[[Settings], Iterable[str]], *, allow_dropped: bool = False
    ) -> SettingsReload:
        """Read the files again.

        Args:
            accept: Reads what the settings name, and takes it over, before they are in force themselves. Gives the
                paths of settings whose files have other content than before.
            allow_dropped: As `allowed` of `refuse_dropped`.

        Raises:
            ImdsproxyError: They, or what they name, are not acceptable; the settings in force stay.
        """
        try:
            after = self.load()
            refuse_dropped(self.loaded, after, allowed=allow_dropped)
            files = accept(after.settings)
        except ImdsproxyError as error:
            reason = f"the last reload was refused: {error.message}"
            self.problems = (Problem("settings", reason, error.hint), *error.problems)
            raise
        changed = diff_settings(self.settings, after.settings)
        known = {one.path for one in changed}
        content = "its content of before", "its new content", Change.LIVE.value
        changed += tuple(SettingChange(path, *content) for path in files if path not in known)
        self.loaded, self.problems = after, ()
        self.taken(self.settings)
        return SettingsReload(
            changes=changed,
            restart_needed=tuple(one.path for one in changed if one.change is Change.RESTART),
            haproxy_reloaded=any(one.change is Change.RELOAD for one in changed),
        )
