"""The schema in words: every setting, and what pydantic's findings mean to an operator."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, get_args

from imdsproxy.config.change import Change
from imdsproxy.config.schema import Section, Settings
from imdsproxy.config.shape import Held, Place, held_sections, join_place, spot_at, type_of
from imdsproxy.config.takes import describe_kind, render_value

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_STEPS: Final = {"itself": "", "name": ".NAME", "position": "[N]"}

_IN_WORDS: Final = frozenset({"path", "endpoint"})
"""The types of our own errors whose message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the schema; a mapping of names to sections is one, and holds inner ones.

    Attributes:
        path: `haproxy.maxconn`; inner ones as `nova.endpoint_sets.NAME.endpoints[N].url`.
        takes: What may be written, as `an integer from 0 to 4095`.
        default: The default as YAML and JSON write it; `None` too where `required`.
        required: There is no default: it has to be written.
        example: What the sample shows beside a default that is empty.
    """

    path: str
    takes: str
    default: object
    description: str
    change: Change
    required: bool = False
    example: object = None

    @property
    def variable(self) -> str:
        """The environment variable that overrides it; inner settings have none."""
        return "IMDSPROXY_" + self.path.upper().replace(".", "__")


@dataclass(frozen=True, slots=True)
class Finding:
    """One of pydantic's errors in the operator's words; `field` is a path of the schema."""

    field: str
    reason: str
    hint: str


def iterate_settings(section: type[Section] = Settings, prefix: str = "") -> Iterator[Setting]:
    """Every setting in the schema's order, without the inner ones."""
    for name, setting, held in fields_of(section, prefix):
        if held is not None and held.by == "itself":
            yield from iterate_settings(held.section, f"{prefix}{name}.")
        else:
            yield setting


def iterate_inner_settings(
    section: type[Section] = Settings, prefix: str = "", *, inner: bool = False
) -> Iterator[Setting]:
    """Every setting inside a mapping's or a list's sections: `NAME` and `N` stand for the key."""
    for name, setting, held in fields_of(section, prefix):
        if inner and (held is None or held.by != "itself"):
            yield setting
        if held is not None:
            step = _STEPS[held.by]
            below = inner or held.by != "itself"
            yield from iterate_inner_settings(held.section, f"{prefix}{name}{step}.", inner=below)


def fields_of(
    section: type[Section], prefix: str = ""
) -> Iterator[tuple[str, Setting, Held | None]]:
    """A section's fields by name: as settings, and with the sections that they hold."""
    # What has no default is left out of what is constructed without any value.
    defaults = section.model_construct().model_dump(mode="json")
    for name, field in section.model_fields.items():
        kind = type_of(field)
        yield name, _setting(prefix + name, field, defaults.get(name)), held_sections(kind)


def explain_finding(error: ErrorDetails) -> Finding:
    """Say one pydantic error as path, reason and what would be right."""
    place = list(error["loc"])
    context = error.get("ctx", {})
    if error["type"] == "cross":
        place = place[:-1] if place[-1:] == ["[key]"] else place
        path = [*place, *filter(None, [str(context["field"])])]
        return Finding(join_place(path), str(context["reason"]), str(context["hint"]))
    if error["type"] == "extra_forbidden":
        return _unknown(place)
    if place and place[-1] == "[key]":
        return _bad_name(place[:-1])
    spot = spot_at(place)
    if spot is None or spot.section is not None:
        names = ", ".join(_names_at(place))
        return Finding(join_place(place), "is a section, not a value", f"a mapping of {names}")
    takes = f"takes {describe_kind(spot.kind)}"
    if error["type"] == "missing":
        return Finding(join_place(place), "is missing", takes)
    return Finding(join_place(place), _reason(error), takes)


def _setting(path: str, field: FieldInfo, default: object) -> Setting:
    extra = field.json_schema_extra
    change = extra["change"] if isinstance(extra, Mapping) else Change.RESTART
    return Setting(
        path=path,
        takes=describe_kind(type_of(field)),
        default=default,
        description=field.description or "",
        change=Change(str(change)),
        required=field.is_required(),
        example=next(iter(field.examples or ()), None),
    )


def _reason(error: ErrorDetails) -> str:
    written = error["input"]
    if error["type"] in _IN_WORDS:
        return str(error["msg"])
    if error["type"] in {"too_short", "too_long"}:
        return f"has {len(written)} items"
    if isinstance(written, Mapping):
        return "a mapping is not acceptable"
    if isinstance(written, list | tuple):
        return "a list is not acceptable"
    shown = render_value(written) if isinstance(written, str | int | float | None) else "this"
    return f"{_clip(shown)} is not acceptable"


def _clip(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _bad_name(place: Place) -> Finding:
    spot = spot_at(place[:-1])
    kinds = () if spot is None else get_args(spot.kind)
    takes = describe_kind(kinds[0]) if kinds else "another name"
    name = _clip(render_value(place[-1]))
    return Finding(join_place(place), f"{name} is not acceptable as a name", f"takes {takes}")


def _unknown(place: Place) -> Finding:
    siblings = _names_at(place[:-1])
    near = difflib.get_close_matches(str(place[-1]), siblings, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings)}"
    return Finding(join_place(place), "there is no such setting", hint)


def _names_at(place: Place) -> list[str]:
    spot = spot_at(place)
    return [] if spot is None or spot.section is None else list(spot.section.model_fields)
