"""Settings as YAML: text into plain values with the line of each, in the dialect of records; and a value as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import yaml

from imdsproxy.config.strict_yaml import Undecodable, decode_yaml
from imdsproxy.core.records import render_path
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

_MAX_PROBLEMS: Final = 100
_DEEPEST: Final = 1000


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """A parsed file.

    Attributes:
        data: Mappings, lists, `str`, `bytes`, `int`, `float`, `bool` or `None`.
        lines: 1-based line of each key and list item, by path (`a.b[0].c`).
    """

    data: object
    lines: Mapping[str, int] = field(default_factory=dict)


def parse_yaml(text: str, file: str) -> YamlDocument:
    """Parse one YAML (or JSON) document; `file` is only named in what is raised.

    Raises:
        ConfigUnreadable: It is not YAML; the message has the line.
        ConfigInvalid: Keys stand twice or are no plain text, or a tag is unknown.
    """
    decoded = _too_deep(text) or decode_yaml(text)
    if isinstance(decoded, Undecodable):
        place = "" if decoded.line is None else f":{decoded.line}"
        raise ConfigUnreadable(
            f"{file}{place} {decoded.reason}",
            hint=decoded.hint or "indent with blanks, and quote texts that hold a colon, #, * or &",
        )
    if decoded.faults:
        problems = [
            Problem(
                render_path(fault.path) or "configuration",
                fault.reason,
                fault.hint,
                file,
                fault.line or decoded.line_of(fault.path),
            )
            for fault in decoded.faults[:_MAX_PROBLEMS]
        ]
        raise ConfigInvalid(
            f"{file} is ambiguous", problems=sorted(problems, key=lambda one: one.line or 0)
        )
    return YamlDocument(decoded.value, decoded.lines())


def _too_deep(text: str) -> Undecodable | None:
    """Before libyaml 0.2.6 it has no limit of its own, and PyYAML recurses in C: it ends the process."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _DEEPEST:
                    return Undecodable("is not YAML: it is nested too deeply")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except (yaml.YAMLError, ValueError):
        # Decoding it reports where.
        return None
    return None


_PLAIN: Final = re.compile(r"(?!(?:null|true|false)$)[a-zA-Z/][a-zA-Z0-9/_.@-]*", re.IGNORECASE)


def render_value(value: object) -> str:
    """A default or a value as one would write it in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        pairs = (f"{render_value(key)}: {_flow(one)}" for key, one in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(one) for one in value) + "]"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return _quote(value)
    return str(value)


def _flow(value: object) -> str:
    # Beside brackets and commas a text is safe in quotes only.
    return _quote(value) if isinstance(value, str) else render_value(value)


def _quote(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in quoted)


def _escape(letter: str) -> str:
    return f"\\U{ord(letter):08x}"
