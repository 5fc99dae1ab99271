"""What a changed configuration takes: nothing, live, a reload of HAProxy, or a restart.

The answer stands beside each field of the schema; here it is only looked up, so that what SIGHUP
and `imdsproxy reload` do is data that a test can walk through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imdsproxy.config.change import Change
from imdsproxy.config.describe import Schema, fields_of, root_schema
from imdsproxy.config.schema import Settings

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
    return tuple(_differences(root_schema(), old, new, ""))


def _differences(
    section: Schema, old: Mapping[str, Any], new: Mapping[str, Any], prefix: str
) -> Iterator[Changed]:
    for field in fields_of(section, prefix):
        setting, before, after = field.setting, old[field.name], new[field.name]
        if before == after:
            continue
        if field.holds in {"nothing", "items"}:
            yield Changed(setting.path, before, after, setting.change)
        elif field.holds == "section":
            yield from _differences(field.section, before, after, f"{setting.path}.")
        else:
            for key in {**before, **after}:
                path = f"{setting.path}.{key}"
                if key in before and key in after:
                    yield from _differences(field.section, before[key], after[key], f"{path}.")
                else:
                    yield Changed(path, before.get(key), after.get(key), setting.change)


def needed(changes: Iterable[Changed]) -> Change:
    """The most that any of `changes` takes."""
    return max(
        (changed.change for changed in changes),
        key=lambda change: change.rank,
        default=Change.NOTHING,
    )
