"""JSON (RFC 8259) with the line of everything, and duplicate keys reported.

The standard library decodes it, and a second reading of its tokens finds where everything is. The YAML reader is no
substitute: libyaml refuses the surrogate pairs that JSON writes for characters beyond U+FFFF, reads U+2028 in a text as
a line break, accepts what is no JSON, and takes four times as long (3.4 s against 0.7 s for 20,000 instances).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, TypeAlias, TypeVar

from imdsproxy.config.strict_yaml import Decoded, Undecodable
from imdsproxy.core.records import Fault, Path

_T = TypeVar("_T")
_DEEPEST: Final = 100
_TOO_DEEP: Final = f"nested deeper than {_DEEPEST} levels"
_NO_VALUES: Final = {"NaN", "Infinity", "-Infinity"}
"""JavaScript's, which the standard library accepts."""
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^][{}":, \t\r\n]+')
"""Of what is JSON: a text, a bracket, or another value."""

_Tree: TypeAlias = "tuple[int, dict[str, _Tree] | list[_Tree] | None]"
"""Where a value begins (its key, in an object), and the same of its parts."""


def decode_json(text: str) -> Decoded | Undecodable:
    """The one JSON value in `text`; blank text is `None`, as an empty YAML file is."""
    if not text.strip(" \t\r\n"):
        return Decoded(None, lambda _path: None)
    try:
        value = json.loads(text, object_pairs_hook=_first_of_each)
        places = _Places(text)
        tree = places.tree(next(places.tokens), ())
    except json.JSONDecodeError as error:
        return Undecodable(f"is not JSON: {error.msg}", line=error.lineno)
    except ValueError as error:
        return Undecodable(f"is not JSON: {error}")
    except RecursionError:
        return Undecodable(f"is not JSON: {_TOO_DEEP}")
    line_ends = [match.start() for match in re.finditer("\n", text)]

    def line_at(position: int) -> int:
        return bisect_left(line_ends, position) + 1

    faults = tuple(
        Fault(path, "is there twice", "keep one of the two", line_at(position))
        for path, position in places.repeated
    )
    return Decoded(value, lambda path: line_at(_position(tree, path)), faults)


def _position(tree: _Tree, path: Path) -> int:
    position, parts = tree
    for step in path:
        if isinstance(parts, dict) and step in parts:
            position, parts = parts[str(step)]
        elif isinstance(parts, list) and isinstance(step, int) and step < len(parts):
            position, parts = parts[step]
        else:
            break
    return position


def _first_of_each(pairs: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    values: dict[str, _T] = {}
    for key, value in pairs:
        values.setdefault(key, value)
    return values


class _Places:
    """Where the parts of a JSON text are; `repeated` are the keys that are there twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _TOKEN.finditer(text)
        self.repeated: list[tuple[Path, int]] = []

    def tree(self, token: re.Match[str], path: Path) -> _Tree:
        """The value that begins with that token."""
        if len(path) > _DEEPEST:
            raise json.JSONDecodeError(_TOO_DEEP, self.text, token.start())
        if token[0] in _NO_VALUES:
            raise json.JSONDecodeError("expected a value", self.text, token.start())
        if token[0] == "{":
            parts: dict[str, _Tree] = {}
            while (name := next(self.tokens))[0] != "}":
                key = json.loads(name[0])
                _, inner = self.tree(next(self.tokens), (*path, key))
                if key in parts:
                    self.repeated.append(((*path, key), name.start()))
                parts.setdefault(key, (name.start(), inner))
            return token.start(), parts
        if token[0] == "[":
            items: list[_Tree] = []
            while (item := next(self.tokens))[0] != "]":
                items.append(self.tree(item, (*path, len(items))))
            return token.start(), items
        return token.start(), None
