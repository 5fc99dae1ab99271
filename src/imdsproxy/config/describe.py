"""What the settings are, in words: one walk over their JSON Schema for samples, references, errors and differences."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeAlias, cast

from pydantic_core import ErrorDetails

from imdsproxy.config.schema import Settings
from imdsproxy.config.section import FORMS, Change
from imdsproxy.config.strict_yaml import render_value
from imdsproxy.errors import Problem

Place: TypeAlias = Sequence[str | int]
"""Names and positions from the root on, as pydantic's `loc`."""

Schema: TypeAlias = Mapping[str, Any]
"""A part of the settings' JSON Schema."""

_MESSAGES: Final = frozenset({"path", "endpoint"})
"""The types of our own errors whose message is the reason."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the schema; a mapping of names to sections is one, and holds inner ones.

    Attributes:
        path: `haproxy.maxconn`; inner ones as `nova.endpoint_sets.NAME.endpoints[N].url`.
        takes: What may be written, as `an integer from 0 to 4095`.
        default: The default as YAML and JSON write it; `None` too where `required`.
        required: There is no default: it has to be written.
        example: What the sample shows beside a default that is empty.
        holds: `section`, or sections by `names` or as `items`, or `nothing` of that kind.
        section: The schema of what it holds.
    """

    path: str
    takes: str
    default: object
    description: str
    change: Change
    required: bool
    example: object
    holds: str
    section: Schema

    @property
    def name(self) -> str:
        """The field's, in its section."""
        return self.path.rpartition(".")[2]

    @property
    def variable(self) -> str:
        """The environment variable that overrides it; inner settings have none."""
        return "IMDSPROXY_" + self.path.upper().replace(".", "__")

    @property
    def inner(self) -> bool:
        """It is inside a mapping's or a list's sections."""
        return ".NAME." in self.path or "[N]." in self.path


@dataclass(frozen=True, slots=True)
class Node:
    """One place of the settings in force.

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


@cache
def root_schema() -> Schema:
    """The JSON Schema of all settings."""
    schema = json.dumps(Settings.model_json_schema())
    return cast("Schema", json.loads(schema, object_hook=_describe_on_one_line))


def _describe_on_one_line(schema: dict[str, Any]) -> dict[str, Any]:
    # A description is a docstring, which may have several lines.
    if isinstance(schema.get("description"), str):
        schema["description"] = " ".join(schema["description"].split())
    return schema


@cache
def _defaults() -> Mapping[str, Any]:
    return Settings().model_dump(mode="json")


def join_place(place: Place) -> str:
    """`nova.endpoint_sets.default.endpoints[0].url`, as the lines of a YAML document are named."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def schema_at(place: Place) -> Schema | None:
    """What may be written at `place`; `None` where the settings have nothing."""
    found: object = root_schema()
    for step in place:
        inside = _bare(found)
        if isinstance(step, int):
            found = inside.get("items")
        else:
            found = inside["properties"].get(step) if "properties" in inside else _values(inside)
        if not isinstance(found, Mapping):
            return None
    return found if isinstance(found, Mapping) else None


def type_at(place: Place) -> str:
    """JSON Schema's name of the type at `place`, as `integer`; empty where there are several."""
    return str(_bare(schema_at(place)).get("type", ""))


def fields_of(section: Schema, prefix: str = "") -> Iterator[Setting]:
    """A section's fields in the schema's order; `prefix` goes before their paths."""
    for name, schema in section["properties"].items():
        bare, path = _bare(schema), prefix + name
        default: Any = _defaults()
        for step in path.split("."):
            default = default.get(step) if isinstance(default, Mapping) else None
        inside = ("section", bare), ("items", bare.get("items")), ("names", _values(bare))
        held = ((holds, _bare(one)) for holds, one in inside)
        holds, inner = next((one for one in held if "properties" in one[1]), ("nothing", {}))
        yield Setting(
            path=path,
            takes=describe_type(schema),
            default=schema.get("default") if default is None else default,
            description=schema.get("description", ""),
            change=Change(schema.get("change", Change.RESTART)),
            required=name in section.get("required", ()),
            example=next(iter(schema.get("examples", ())), None),
            holds=holds,
            section=inner,
        )


def iterate_settings(section: Schema | None = None, prefix: str = "") -> Iterator[Setting]:
    """Every setting in the schema's order. For inner ones `NAME` and `N` stand for the key."""
    steps = {"section": ".", "names": ".NAME.", "items": "[N]."}
    for setting in fields_of(section or root_schema(), prefix):
        if setting.holds != "section":
            yield setting
        if setting.holds != "nothing":
            yield from iterate_settings(setting.section, setting.path + steps[setting.holds])


def walk_values(
    values: Mapping[str, Any], section: Schema | None = None, place: tuple[str | int, ...] = ()
) -> Iterator[Node]:
    """Every node of the settings in force, an opening one before its parts.

    Args:
        values: What the section dumps in mode `json`.
        section: Its schema; that of all settings for `None`.
        place: Where it is.
    """
    for setting in fields_of(section or root_schema()):
        value, here, text = values[setting.name], (*place, setting.name), setting.description
        if setting.holds == "nothing" or not value:
            yield Node(here, value, opens=False, description=text, setting=setting)
        elif setting.holds == "section":
            yield Node(here, value, opens=True, description=text)
            yield from walk_values(value, setting.section, here)
        else:
            yield Node(here, value, opens=True, description=text, setting=setting)
            for step, part in value.items() if setting.holds == "names" else enumerate(value):
                yield Node((*here, step), part, opens=True)
                yield from walk_values(part, setting.section, (*here, step))


def describe_type(schema: Schema) -> str:
    """What something of this schema takes, as `an integer from 0 to 4095, or null`."""
    if "anyOf" in schema:
        others = [one for one in schema["anyOf"] if one.get("type") != "null"]
        words = " or ".join(map(describe_type, others))
        return f"{words}, or null" if len(others) < len(schema["anyOf"]) else words
    schema = _bare(schema)
    kind = schema.get("type")
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if kind in {"array", "object"}:
        return _describe_collection(schema)
    if kind in {"integer", "number"}:
        words = "an integer" if kind == "integer" else "a number"
        return words + _range(schema, "minimum", "maximum", " from {} to {}")
    return "true or false" if kind == "boolean" else _describe_text(schema)


def _describe_collection(schema: Schema) -> str:
    if "properties" in schema:
        return f"a mapping of {', '.join(schema['properties'])}"
    parts = schema["items"] if schema["type"] == "array" else _values(schema)
    sections = "properties" in _bare(parts)
    if schema["type"] == "object":
        return f"a mapping of names to {'sections' if sections else describe_type(parts)}"
    if sections:
        return f"a list of {_range(schema, 'minItems', 'maxItems', '{} to {} ')}sections"
    return f"a list, each {describe_type(parts)}"


def _range(schema: Schema, low: str, high: str, words: str) -> str:
    if low in schema and high in schema:
        # pydantic 2.10 writes the whole bounds of numbers as 30.0.
        bounds = (schema[low], schema[high])
        return words.format(*(int(one) if one == int(one) else one for one in bounds))
    return ""


def _describe_text(schema: Schema) -> str:
    form = schema.get("pattern", schema.get("format"))
    if form is not None:
        return FORMS.get(form, f"a text of the form {form}")
    return "a text, not empty" if "minLength" in schema else "a text"


def place_of(error: ErrorDetails) -> Place:
    """What a pydantic error is about."""
    place = error["loc"][:-1] if error["loc"][-1:] == ("[key]",) else error["loc"]
    return (*place, *error["ctx"]["field"]) if error["type"] == "cross" else place


def explain_finding(error: ErrorDetails) -> Problem:
    """One pydantic error in the operator's words; `field` is a path of the schema."""
    place, schema = place_of(error), schema_at(place_of(error))
    field = join_place(place)
    if error["type"] == "cross":
        return Problem(field, error["ctx"]["reason"], error["ctx"]["hint"])
    if error["type"] == "extra_forbidden":
        siblings = _names_at(place[:-1])
        near = difflib.get_close_matches(str(place[-1]), siblings, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings)}"
        return Problem(field, "there is no such setting", hint)
    if error["loc"][-1:] == ("[key]",):
        patterns = _bare(schema_at(place[:-1])).get("patternProperties", {})
        takes = _describe_text({"pattern": next(iter(patterns))}) if patterns else "a text"
        name = _clip(render_value(place[-1]))
        return Problem(field, f"{name} is not acceptable as a name", f"takes {takes}")
    if schema is None or "properties" in _bare(schema):
        return Problem(
            field, "is a section, not a value", f"a mapping of {', '.join(_names_at(place))}"
        )
    reason = "is missing" if error["type"] == "missing" else _reason(error)
    return Problem(field, reason, f"takes {describe_type(schema)}")


def _bare(schema: object) -> Schema:
    """The schema behind a reference and without `null`; empty for what is none."""
    while isinstance(schema, Mapping):
        options = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
        if "$ref" in schema:
            schema = root_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
        elif len(options) == 1:
            schema = options[0]
        else:
            return schema
    return {}


def _values(schema: Schema) -> Any:  # noqa: ANN401 - a schema, or what JSON Schema allows beside
    """The schema of a mapping's values."""
    return next(
        iter(schema.get("patternProperties", {}).values()), schema.get("additionalProperties")
    )


def _reason(error: ErrorDetails) -> str:
    written = error["input"]
    if error["type"] in _MESSAGES:
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


def _names_at(place: Place) -> list[str]:
    return list(_bare(schema_at(place)).get("properties", ()))
