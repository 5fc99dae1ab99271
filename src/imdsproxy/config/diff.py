"""What a changed configuration takes: nothing, live, a reload of HAProxy, or a restart.

The answer stands beside each field of the schema; here it is only looked up, so that what SIGHUP
and `imdsproxy reload` do is data that a test can walk through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imdsproxy.config.change import Change
from imdsproxy.config.schema import Section, Settings
from imdsproxy.config.words import fields_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@dataclass(frozen=True, slots=True)
class Changed:
    """One setting that differs; `before` and `after` are as YAML and JSON write them."""

    path: str
    before: object
    after: object
    change: Change


def diff_settings(before: Settings, after: Settings) -> tuple[Changed, ...]:
    """Every setting that differs, in the schema's order.

    A name that came or went in a mapping of sections (`nova.endpoint_sets.cell1`) is one change,
    from or to `None`; within one that stayed, each of its settings is. Lists are compared whole.
    """
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return tuple(_differences(Settings, old, new, ""))


def _differences(
    section: type[Section], old: Mapping[str, Any], new: Mapping[str, Any], prefix: str
) -> Iterator[Changed]:
    for name, setting, held in fields_of(section, prefix):
        before, after = old[name], new[name]
        if before == after:
            continue
        if held is None or held.by == "position":
            yield Changed(setting.path, before, after, setting.change)
        elif held.by == "itself":
            yield from _differences(held.section, before, after, f"{setting.path}.")
        else:
            for key in {**before, **after}:
                path = f"{setting.path}.{key}"
                if key in before and key in after:
                    yield from _differences(held.section, before[key], after[key], f"{path}.")
                else:
                    yield Changed(path, before.get(key), after.get(key), setting.change)


def needed(changes: Iterable[Changed]) -> Change:
    """The most that any of `changes` takes."""
    return max(
        (changed.change for changed in changes),
        key=lambda change: change.rank,
        default=Change.NOTHING,
    )
