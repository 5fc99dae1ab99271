"""Settings as text: what is in force, the JSON Schema, and a commented sample of all defaults."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Final

from imdsproxy.config.change import Change
from imdsproxy.config.schema import Section, Settings
from imdsproxy.config.words import Setting, iterate_settings, render_value, subsection

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imdsproxy.config.load import Loaded


__all__ = ["render_sample", "render_schema", "render_settings", "settings_by_origin"]

_WIDTH: Final = 96
_ORIGIN_COLUMN: Final = 48
_CHANGE: Final[Mapping[Change, str]] = {
    Change.NOTHING: "A change takes nothing.",
    Change.LIVE: "A change is taken over live.",
    Change.RELOAD: "A change reloads HAProxy.",
    Change.RESTART: "A change takes a restart.",
}


def render_settings(loaded: Loaded, *, with_origin: bool = False) -> str:
    """The settings in force as YAML that loads back equal; with the origin of each as a comment."""
    values = loaded.settings.model_dump(mode="json")

    def comment(setting: Setting) -> str:
        origin = loaded.origins.get(setting.path)
        return "default" if origin is None else str(origin)

    lines = []
    for line, setting in _tree(values):
        if with_origin and setting is not None:
            lines.append(f"{line.ljust(_ORIGIN_COLUMN)} # {comment(setting)}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def settings_by_origin(loaded: Loaded) -> dict[str, dict[str, object]]:
    """`{path: {"value": …, "origin": …}}`, for programs."""
    values = loaded.settings.model_dump(mode="json")
    return {
        setting.path: {
            "value": _at(values, setting.path),
            "origin": str(loaded.origins.get(setting.path, "default")),
        }
        for setting in iterate_settings()
    }


def render_schema() -> str:
    """The JSON Schema of the configuration file, for editors."""
    return json.dumps(Settings.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def render_sample() -> str:
    """Every setting with its default and what it is for; loads back as the defaults."""
    head = (
        "# imdsproxy.yaml: every setting with its default. Keep only what you change.",
        "# Files in conf.d/ beside this one are merged over it in the order of their names, and",
        "# IMDSPROXY_SECTION__FIELD in the environment over both.",
    )
    lines = [*head]
    for line, setting in _tree(Settings().model_dump(mode="json")):
        indent = " " * (len(line) - len(line.lstrip()))
        if setting is None:
            lines.extend(["", f"{indent}# {_section_words(line.strip(' :'))}", line])
            continue
        for words in (setting.description, f"Takes {setting.takes}. {_CHANGE[setting.change]}"):
            lines.extend(
                textwrap.wrap(
                    words, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
                )
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


def _tree(values: Mapping[str, object]) -> Iterator[tuple[str, Setting | None]]:
    """The settings as YAML lines, each with what it sets; `None` with a section's line."""
    opened: list[str] = []
    for setting in iterate_settings():
        *sections, name = setting.path.split(".")
        common = 0
        while common < min(len(opened), len(sections)) and opened[common] == sections[common]:
            common += 1
        for depth in range(common, len(sections)):
            yield f"{'  ' * depth}{sections[depth]}:", None
        opened = sections
        value = render_value(_at(values, setting.path))
        yield f"{'  ' * len(sections)}{name}: {value}", setting


def _section_words(name: str) -> str:
    waiting: list[type[Section]] = [Settings]
    while waiting:
        section = waiting.pop()
        for field_name, field in section.model_fields.items():
            inner = subsection(field)
            if inner is not None and field_name == name:
                return field.description or ""
            if inner is not None:
                waiting.append(inner)
    return ""


def _at(tree: object, path: str) -> object:
    for name in path.split("."):
        tree = tree[name] if isinstance(tree, dict) else None
    return tree
