"""YAML text into plain values, with the line of each, and nothing of YAML's that surprises people.

Scalars follow YAML 1.2's core schema: `yes` is a word, `52:54:00:12:34:56` a MAC address,
`2024-01-01` a date as written, `0660` the number it looks like. Keys that stand twice are refused,
all at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import yaml

from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["YamlDocument", "parse_yaml"]

_MAX_PROBLEMS: Final = 100
_DEEPEST: Final = 100
_MERGE: Final = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """A parsed file.

    Attributes:
        data: Mappings, lists, `str`, `bytes`, `int`, `float`, `bool` or `None`.
        lines: 1-based line of each key and list item, by path (`a.b[0].c`).
    """

    data: object
    lines: Mapping[str, int] = field(default_factory=dict)


class _Loader(yaml.CSafeLoader):
    """The safe loader with YAML 1.2's core schema; `!!binary` gives bytes."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own declaration, filled below


_CORE_SCHEMA: Final = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
    ("merge", r"^<<$", "<"),
)

for _kind, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}",
        re.compile(_pattern),
        ["" if letter == "\0" else letter for letter in _first],
    )


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, file: str) -> YamlDocument:
    """Parse one YAML (or JSON) document; `file` is only named in what is raised.

    Raises:
        ConfigUnreadable: It is not YAML; the message has the line.
        ConfigInvalid: Keys stand twice, or are no plain text.
    """
    try:
        _refuse_depth(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return YamlDocument(None)
            lines, problems = _survey(node, file)
            if problems:
                raise ConfigInvalid(f"{file} is ambiguous", problems=problems[:_MAX_PROBLEMS])
            return YamlDocument(loader.construct_document(node), lines)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigUnreadable(
            f"{file}{_place(error)} is not YAML: {_reason(error)}",
            hint="indent with blanks, and quote texts that hold a colon, #, * or &",
        ) from error


def _refuse_depth(text: str) -> None:
    """Not every libyaml has a limit of its own, and PyYAML recurses in C: it ends the process.

    What holds an alias of itself has no end either.
    """
    around: list[str | None] = []
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            around.append(event.anchor)
            if len(around) > _DEEPEST:
                raise RecursionError
        elif isinstance(event, yaml.CollectionEndEvent):
            around.pop()
        elif isinstance(event, yaml.AliasEvent) and event.anchor in around:
            raise RecursionError


def _survey(root: yaml.Node, file: str) -> tuple[dict[str, int], list[Problem]]:
    """Each path's line, and each key that stands twice or is no scalar."""
    lines: dict[str, int] = {}
    problems: list[Problem] = []
    waiting: list[tuple[str, yaml.Node]] = [("", root)]
    surveyed: set[int] = set()
    while waiting:
        path, node = waiting.pop()
        if id(node) in surveyed:  # an alias: seen under its anchor
            continue
        surveyed.add(id(node))
        first: dict[str, int] = {}
        for name, child, line in _children(node):
            here = f"{path}{name}" if name.startswith("[") or not path else f"{path}.{name}"
            if name in first:
                problems.append(
                    Problem(
                        here,
                        "stands twice in the same mapping",
                        hint=f"keep one; the other is on line {first[name]}",
                        file=file,
                        line=line,
                    )
                )
            first.setdefault(name, line)
            lines.setdefault(here, line)
            waiting.append((here, child))
    return lines, sorted(problems, key=lambda problem: problem.line or 0)


def _children(node: yaml.Node) -> Iterator[tuple[str, yaml.Node, int]]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"[{index}]", item, item.start_mark.line + 1
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != _MERGE and isinstance(key, yaml.ScalarNode):
                yield str(key.value), value, key.start_mark.line + 1


def _place(error: Exception) -> str:
    line = getattr(getattr(error, "problem_mark", None), "line", None)
    return "" if line is None else f":{line + 1}"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    words = getattr(error, "problem", None)
    if words:
        return str(words)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
