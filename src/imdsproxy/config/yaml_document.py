"""Settings as YAML text, into plain values with the line of each; the dialect is that of records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import yaml

from imdsproxy.config.strict_yaml import Undecodable, decode_yaml
from imdsproxy.core.records import render_path
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

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
