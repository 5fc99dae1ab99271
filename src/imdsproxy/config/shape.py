"""What the schema has where: sections inside sections, mappings of names to sections, lists of them."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    TypeAlias,
    Union,
    get_args,
    get_origin,
)

from imdsproxy.config.schema import Section, Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Place: TypeAlias = Sequence[str | int]
"""Names and positions from the root on, as pydantic's `loc`."""

_UNIONS: Final = (Union, types.UnionType)


@dataclass(frozen=True, slots=True)
class Held:
    """The section class that a field holds: itself, or several by name or by position."""

    section: type[Section]
    by: Literal["itself", "name", "position"]


@dataclass(frozen=True, slots=True)
class Spot:
    """What may be written at a place.

    Attributes:
        kind: The annotation, `Annotated` included.
        section: The section class whose fields are written there, if it is a section.
    """

    kind: object
    section: type[Section] | None = None


def type_of(field: FieldInfo) -> object:
    """The field's annotation with what pydantic has taken off it."""
    if not field.metadata:
        return field.annotation
    return Annotated[(field.annotation, *field.metadata)]


def held_sections(kind: object) -> Held | None:
    """Which sections something of this type holds, if any."""
    kind = _bare(kind)
    if isinstance(kind, type) and issubclass(kind, Section):
        return Held(kind, "itself")
    origin, inner = get_origin(kind), get_args(kind)
    if origin is dict and (held := held_sections(inner[1])) is not None:
        return Held(held.section, "name")
    if origin is tuple and (held := held_sections(inner[0])) is not None:
        return Held(held.section, "position")
    return None


def spot_at(place: Place, root: type[Section] = Settings) -> Spot | None:
    """What may be written at `place`; `None` where the schema has nothing."""
    spot: Spot | None = Spot(root, root)
    for step in place:
        if spot is None:
            return None
        spot = _inside(spot, step)
    return spot


def join_place(place: Place) -> str:
    """`nova.endpoint_sets.default.endpoints[0].url`, as the lines of a YAML document are named."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text


def _inside(spot: Spot, step: str | int) -> Spot | None:
    if spot.section is not None:
        fields: Mapping[Any, FieldInfo] = spot.section.model_fields
        return None if step not in fields else _spot(type_of(fields[step]))
    kind = _bare(spot.kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is dict and isinstance(step, str):
        return _spot(inner[1])
    if origin is tuple and isinstance(step, int):
        return _spot(inner[0])
    return None


def _spot(kind: object) -> Spot:
    held = held_sections(kind)
    return Spot(kind, held.section if held is not None and held.by == "itself" else None)


def _bare(kind: object) -> object:
    """Without `Annotated` and without `| None`."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in _UNIONS:
        others = [one for one in get_args(kind) if one is not type(None)]
        return _bare(others[0]) if len(others) == 1 else kind
    return kind
