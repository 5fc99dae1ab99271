"""Descriptions of the settings: one tree of their JSON Schema, for errors, differences, samples, schemas and YAML."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias, cast

from pydantic_core import ErrorDetails

from imdsproxy.config.schema import Settings
from imdsproxy.config.section import FORMS, Change
from imdsproxy.config.strict_yaml import render_value
from imdsproxy.errors import Problem
from imdsproxy.model.records.json_schema import DIALECT, schema_of_records

Place: TypeAlias = Sequence[str | int]
"""Names and positions from the root on, as pydantic's `loc`."""

Schema: TypeAlias = Mapping[str, Any]
"""A part of the settings' JSON Schema."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One place of the schema: a setting, a section, or the members of a mapping or list.

    Attributes:
        path: `haproxy.maxconn`; inside mappings and lists as `nova.endpoint_sets.NAME.endpoints[N].url`.
        bare: The schema of a value that is not null, without references.
        each: The setting at each name of a mapping or each position of a list.
    """

    path: str
    schema: Schema
    bare: Schema
    change: Change
    fields: Mapping[str | int, Setting]
    each: Setting | None

    def __getitem__(self, step: str | int) -> Setting:
        """Return the setting at a name or a position; raise `KeyError` if there is none."""
        return self.fields[step] if self.each is None else self.each

    @property
    def holds_sections(self) -> bool:
        """Return whether this is a section, or a mapping or list of sections."""
        return bool(self.fields or (self.each and self.each.fields))

    @property
    def takes(self) -> str:
        """Accepted values in words, as `an integer from 0 to 4095, or null`."""
        return _describe(self) + (", or null" if "anyOf" in self.schema else "")

    @property
    def description(self) -> str:
        return str(self.schema.get("description", ""))

    @property
    def variable(self) -> str:
        """The environment variable that overrides the setting; inner settings have none."""
        return "IMDSPROXY_" + self.path.upper().replace(".", "__")

    @property
    def inner(self) -> bool:
        """Return whether the setting is inside the sections of a mapping or a list."""
        return ".NAME." in self.path or "[N]." in self.path


class Node(NamedTuple):
    """One place of the settings in force, with its value for YAML and JSON."""

    place: tuple[str | int, ...]
    value: object
    setting: Setting

    @property
    def path(self) -> str:
        """Path, as `nova.endpoint_sets.default.endpoints[0].url`."""
        return join_place(self.place)

    @property
    def opens(self) -> bool:
        """Return whether the node's parts follow as nodes."""
        return bool(self.value) and self.setting.holds_sections


@cache
def root_schema() -> Schema:
    schema = json.dumps(Settings.model_json_schema())
    return cast("Schema", json.loads(schema, object_hook=_describe_on_one_line))


def _describe_on_one_line(schema: dict[str, Any]) -> dict[str, Any]:
    # A description is a docstring, which may have several lines.
    if isinstance(schema.get("description"), str):
        schema["description"] = " ".join(schema["description"].split())
    return schema


@cache
def all_settings() -> Setting:
    return _read_schema(root_schema())


def _read_schema(schema: Schema, path: str = "", change: Change = Change.RESTART) -> Setting:
    bare = schema
    if "anyOf" in bare:
        (bare,) = (one for one in bare["anyOf"] if one.get("type") != "null")
    if "$ref" in bare:
        bare = root_schema()["$defs"][bare["$ref"].rpartition("/")[2]]
    change = Change(schema.get("change", change))
    within, properties = f"{path}." if path else "", bare.get("properties", {})
    named = bare.get("patternProperties", {"": bare.get("additionalProperties")})
    each = bare.get("items") or next(iter(named.values()))
    step = "[N]" if "items" in bare else ".NAME"
    return Setting(
        path=path,
        schema=schema,
        bare=bare,
        change=change,
        fields={name: _read_schema(one, within + name) for name, one in properties.items()},
        each=_read_schema(each, path + step, change) if each else None,
    )


def join_place(place: Place) -> str:
    """Return the path as YAML documents' problems name it: `nova.endpoint_sets.default.endpoints[0].url`."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def find_setting(place: Place) -> Setting | None:
    """Return the setting at `place`; `None` if there is none."""
    found = all_settings()
    try:
        for step in place:
            found = found[step]
    except KeyError:
        return None
    return found


def iterate_settings(within: Setting | None = None) -> Iterator[Setting]:
    """Yield every setting in the schema's order; in inner ones `NAME` and `N` stand for the key."""
    for setting in (within or all_settings()).fields.values():
        if not setting.fields:
            yield setting
        yield from iterate_settings(setting.each or setting)


def walk_values(
    values: Mapping[str, Any] | Sequence[Any],
    within: Setting | None = None,
    place: tuple[str | int, ...] = (),
) -> Iterator[Node]:
    """Yield every node of settings in force, in their order, each before its parts.

    `values`: the settings, or the settings at `place`, dumped in mode `json`.
    """
    within = within or all_settings()
    for step, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        node = Node((*place, step), value, within[step])
        yield node
        if node.opens:
            yield from walk_values(value, node.setting, node.place)


def _describe(setting: Setting) -> str:
    each = "sections" if setting.holds_sections or setting.each is None else setting.each.takes
    match setting.bare:
        case {"enum": values}:
            words = f"one of {', '.join(values)}"
        case {"properties": fields}:
            words = f"a mapping of {', '.join(fields)}"
        case {"type": "array", "minItems": low, "maxItems": high}:
            words = f"a list of {low} to {high} sections"
        case {"type": "array"}:
            words = f"a list, each {each}"
        case {"type": "object"}:
            words = f"a mapping of names to {each}"
        case {"type": "boolean"}:
            words = "true or false"
        case {"type": "integer" | "number" as kind, "minimum": low, "maximum": high}:
            # pydantic 2.10 writes whole bounds of numbers as 30.0.
            low, high = (int(one) if one == int(one) else one for one in (low, high))
            words = f"{'an integer' if kind == 'integer' else 'a number'} from {low} to {high}"
        case {"pattern": form} | {"format": form}:
            words = FORMS[form]
        case {"minLength": _}:
            words = "a text, not empty"
        case _:
            words = "a text"
    return words


def place_of(error: ErrorDetails) -> Place:
    place = error["loc"][:-1] if error["loc"][-1:] == ("[key]",) else error["loc"]
    return (*place, *error["ctx"]["field"]) if error["type"] == "cross" else place


def explain_finding(error: ErrorDetails) -> Problem:
    """Describe a pydantic error for the operator; `field` is a path of the schema."""
    place = place_of(error)
    field, setting, around = join_place(place), find_setting(place), find_setting(place[:-1])
    if error["type"] == "cross":
        return Problem(field, error["ctx"]["reason"], error["ctx"]["hint"])
    if setting is None:
        known = [] if around is None else list(map(str, around.fields))
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return Problem(field, "there is no such setting", hint)
    if error["loc"][-1:] == ("[key]",):
        patterns = {} if around is None else around.bare.get("patternProperties", {})
        takes = next((FORMS[pattern] for pattern in patterns), "a text")
        name = _clip(render_value(place[-1]))
        return Problem(field, f"{name} is not acceptable as a name", f"takes {takes}")
    if setting.fields:
        return Problem(field, "is a section, not a value", setting.takes)
    reason = "is missing" if error["type"] == "missing" else _reason(error)
    return Problem(field, reason, f"takes {setting.takes}")


def _reason(error: ErrorDetails) -> str:
    written = error["input"]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
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


_WIDTH: Final = 96
_CHANGE: Final[Mapping[Change, str]] = {
    Change.NOTHING: "A change needs no action.",
    Change.LIVE: "A change applies at once.",
    Change.RELOAD: "A change reloads HAProxy.",
    Change.RESTART: "A change needs a restart.",
}
_SAMPLE_HEAD: Final = """\
# yaml-language-server: $schema=/usr/share/imdsproxy/schema/settings.json
# imdsproxy.yaml: every setting with its default. Keep only what you change.
# Files in conf.d/ beside this one are merged over it in the order of their names, and
# IMDSPROXY_SECTION__FIELD in the environment over both."""


def render_schema() -> str:
    """Return the JSON Schema of the configuration file, for editors."""
    about = {"$schema": DIALECT, "title": "imdsproxy settings"}
    schema = {name: value for name, value in root_schema().items() if name != "title"}
    return _render_json({**about, **schema})


def render_records_schema() -> str:
    """Return the JSON Schema of record files, for editors."""
    return _render_json(schema_of_records())


def _render_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def render_sample() -> str:
    """Render every setting with its default and description; the sample loads back as the defaults."""
    lines = [_SAMPLE_HEAD]
    for node, line in render_nodes(walk_values(Settings().model_dump(mode="json"))):
        indent = " " * (len(line) - len(line.lstrip()))
        if node.opens:
            lines += ["", f"{indent}# {node.setting.description}", line]
        else:
            lines += [*_words(node.setting, indent), line, *_example(node, indent)]
    return "\n".join(lines) + "\n"


def render_nodes(nodes: Iterable[Node]) -> Iterator[tuple[Node, str]]:
    """Yield each node that has a line in YAML, with the line."""
    begins = False
    for node in nodes:
        last = node.place[-1]
        if isinstance(last, int):
            begins = True  # an item has no line of its own: its first setting has the dash
            continue
        lead = "  " * (len(node.place) - 1)
        if begins:
            lead = lead.removesuffix("  ") + "- "
        begins = False
        value = "" if node.opens else f" {render_value(node.value)}"
        yield node, f"{lead}{render_value(last)}:{value}"


def _words(setting: Setting, indent: str) -> Iterator[str]:
    comment = f"{indent}# "
    for words in (setting.description, f"Takes {setting.takes}. {_CHANGE[setting.change]}"):
        yield from textwrap.wrap(
            words, _WIDTH, initial_indent=comment, subsequent_indent=comment, break_on_hyphens=False
        )


def _example(node: Node, indent: str) -> Iterator[str]:
    """Render the schema's example of a mapping that is empty by default, as comments."""
    for example in node.setting.schema.get("examples", ())[:1]:
        section, name = map(str, node.place)
        filled = Settings.model_validate({section: {name: example}}, strict=False)
        value = {name: filled.model_dump(mode="json")[section][name]}
        yield f"{indent}# For example, with every setting that it can have:"
        for one, line in render_nodes(walk_values(value, all_settings()[section], (section,))):
            bare = line.removeprefix(indent)
            depth = " " * (len(bare) - len(bare.lstrip()))
            if one.place != node.place and not one.setting.fields:
                yield from _words(one.setting, f"{indent}# {depth}")
            yield f"{indent}# {bare}"
        yield ""  # without the blank line, the example would run into the next setting's description
