"""What a changed configuration takes: nothing, live, a reload of HAProxy, or a restart.

The answer stands beside each field of the schema; here it is only looked up, so that what SIGHUP
and `imdsproxy reload` do is data that a test can walk through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from imdsproxy.config.change import Change
from imdsproxy.config.words import iterate_settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imdsproxy.config.schema import Settings

__all__ = ["Changed", "diff_settings", "needed"]


@dataclass(frozen=True, slots=True)
class Changed:
    """One setting that differs; `before` and `after` are as YAML and JSON write them."""

    path: str
    before: object
    after: object
    change: Change


def diff_settings(before: Settings, after: Settings) -> tuple[Changed, ...]:
    """Every setting that differs, in the schema's order."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return tuple(
        Changed(setting.path, _at(old, setting.path), _at(new, setting.path), setting.change)
        for setting in iterate_settings()
        if _at(old, setting.path) != _at(new, setting.path)
    )


def needed(changes: Iterable[Changed]) -> Change:
    """The most that any of `changes` takes."""
    return max(
        (changed.change for changed in changes),
        key=lambda change: change.rank,
        default=Change.NOTHING,
    )


def _at(tree: object, path: str) -> object:
    for name in path.split("."):
        tree = tree[name] if isinstance(tree, dict) else None
    return tree
