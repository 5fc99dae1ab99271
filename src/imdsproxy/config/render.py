"""Settings as text: the settings in force, the JSON Schema, and a commented sample of all defaults."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from imdsproxy.config.describe import Node, Setting, all_settings, root_schema, walk_values
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Change
from imdsproxy.config.strict_yaml import render_value
from imdsproxy.model.records.json_schema import DIALECT, schema_of_records

_WIDTH: Final = 96
_ORIGIN_COLUMN: Final = 48
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


def render_settings(loaded: Loaded, *, with_origin: bool = False) -> str:
    """Render the settings in force as YAML that loads back equal, optionally with each origin as a comment."""
    lines = []
    for node, line in render_nodes(walk_values(loaded.settings.model_dump(mode="json"))):
        if with_origin and not node.opens:
            lines.append(f"{line.ljust(_ORIGIN_COLUMN)} # {loaded.origin(node.place) or 'default'}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def settings_by_origin(loaded: Loaded) -> dict[str, dict[str, object]]:
    """Return `{path: {"value": …, "origin": …}}` for programs; also for each part of mappings and lists."""
    return {
        node.path: {"value": node.value, "origin": loaded.origin(node.place) or "default"}
        for node in walk_values(loaded.settings.model_dump(mode="json"))
        if not node.setting.fields
    }


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
    """Describe a setting in comment lines."""
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
