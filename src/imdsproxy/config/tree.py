"""Settings in force as a tree: every section, set and value, in the schema's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from imdsproxy.config.schema import Section, Settings
from imdsproxy.config.shape import join_place
from imdsproxy.config.words import Setting, fields_of


@dataclass(frozen=True, slots=True)
class Node:
    """One place of the tree.

    Attributes:
        place: Names and positions from the root on.
        value: As YAML and JSON write it.
        opens: Its parts follow as nodes of their own.
        description: Of a section or a setting; empty for a name or position.
        setting: What it sets; `None` for sections, names and positions.
    """

    place: tuple[str | int, ...]
    value: object
    opens: bool
    description: str = ""
    setting: Setting | None = None

    @property
    def path(self) -> str:
        """`nova.endpoint_sets.default.endpoints[0].url`."""
        return join_place(self.place)


def walk_values(
    values: Mapping[str, object],
    section: type[Section] = Settings,
    place: tuple[str | int, ...] = (),
) -> Iterator[Node]:
    """Every node, an opening one before its parts.

    Args:
        values: What `section` dumps in mode `json`.
        section: Its class.
        place: Where it is.
    """
    for name, setting, held in fields_of(section):
        value, here = values[name], (*place, name)
        if held is None or not value:
            yield Node(here, value, opens=False, description=setting.description, setting=setting)
        elif held.by == "itself":
            yield Node(here, value, opens=True, description=setting.description)
            yield from walk_values(cast("Mapping[str, object]", value), held.section, here)
        else:
            yield Node(here, value, opens=True, description=setting.description, setting=setting)
            for step, part in _parts(value):
                yield Node((*here, step), part, opens=True)
                yield from walk_values(part, held.section, (*here, step))


def _parts(value: object) -> Iterator[tuple[str | int, Mapping[str, object]]]:
    if isinstance(value, Mapping):
        yield from value.items()
    else:
        yield from enumerate(cast("Sequence[Mapping[str, object]]", value))
